"""Tests import the scripts at the top level of the repository, run on one thread, and render without a display."""

import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:  # before anything imports mujoco; programs inherit it
    backends = [name for name, library in (("osmesa", "OSMesa"), ("egl", "EGL")) if find_library(library)]
    os.environ.update({"MUJOCO_GL": backends[0]} if backends else {})

import torch


@pytest.fixture(autouse=True)
def single_torch_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def opengl():
    """For tests that render: OpenGL without a display, or a skip."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).close()"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        pytest.skip("needs OpenGL without a display: libosmesa6 or libegl1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI, which installs what tests need, a skipped test fails. Only network namespaces may be forbidden there."""
    report = yield
    if report.skipped and os.environ.get("CI") and "network namespaces" not in str(report.longrepr):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr[-1]}"
    return report
