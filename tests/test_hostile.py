"""A small sample of the attempts of hostile.py."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("hostile.py")
KINDS = ("command_lines_and_config_files", "checkpoints_and_encoders", "full_disks_kills_and_disturbances",
         "environment", "programs")  # fmt: skip


@pytest.fixture(scope="module")
def output():
    return subprocess.run([sys.executable, SCRIPT, "--small"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_no_attempt_fails(kind, output):
    (row,) = (line for line in output.splitlines() if line.startswith(f"| {kind} |"))
    *_, attempts, _, _, _, failed = row.strip("| ").split(" | ")
    assert int(attempts) == 12 and failed == "0", output
