"""Imports point down: the library imports no script and no program, and a script imports no program."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*ROOT.glob("*.py"), *(ROOT / "ballbot_utils").rglob("*.py"))
}
SCRIPTS = {"ppo_ballbot", "ppo_ballbot_gpu", "ppo_ballbot_schedules"}


def is_program(path):
    """Whether a file of ballbot_utils runs by `python -m`, is part of a package that does, or is shared by programs."""
    main = path.with_name("__main__.py").exists() or '__name__ == "__main__"' in path.read_text()
    return main or path.name == "common.py"


PROGRAMS = {name for name, path in FILES.items() if is_program(path)} - SCRIPTS
LIBRARY = set(FILES) - SCRIPTS - PROGRAMS


def imported_modules(source):
    """The modules of this repository that a source imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "ballbot_utils" * bool(node.level) + "." * bool(node.level and node.module) + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names & set(FILES)


def test_every_layer_is_found():
    assert {"ballbot_env", "ballbot_utils", "ballbot_utils.runs", "ballbot_utils.terrain"} <= LIBRARY
    assert {"ballbot_utils.common", "ballbot_utils.evaluate", "ballbot_utils.tune"} <= PROGRAMS


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_the_library_imports_no_script_and_no_program(name):
    assert not imported_modules(FILES[name].read_text()) & (SCRIPTS | PROGRAMS)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_imports_no_program(name):
    assert not imported_modules(FILES[name].read_text()) & PROGRAMS


@pytest.mark.parametrize("statement", [
    "from ballbot_utils import console, watch",
    "import ballbot_utils.watch as w",
    "from ballbot_utils.watch import main", "from . import watch", "from .watch import main",
])  # fmt: skip
def test_every_kind_of_import_is_found(statement):
    assert "ballbot_utils.watch" in imported_modules(f"def f():\n    {statement}")
