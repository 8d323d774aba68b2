"""Files of users that flags and arguments name: `my_terrain.py:canyon`, `heights.png`, `my_terms.py:energy`.

A file is in the working directory or in a folder below it. Checkpoints store its name with the start of its SHA-256,
`my_terrain.py@3b7c24ae8f2b:canyon`: the programs find it again, and reject it with one line if it has changed. What
the file imports is not checked.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"(?P<file>[^:@]+(?P<suffix>\.\w+))(@(?P<sha>[0-9a-f]{12}))?(:(?P<rest>.*))?")


def split_spec(spec: str, *suffixes: str) -> tuple[Path, str] | None:
    """The file that `spec` names and what follows its colon, or None if it names no file with one of the `suffixes`.

    Raises ValueError if the file is missing, outside of the working directory, or changed.
    """
    match = NAME.fullmatch(spec)
    if not match or match["suffix"] not in suffixes:
        return None
    path = Path(match["file"])
    if not path.resolve().is_relative_to(Path.cwd().resolve()):
        raise ValueError(f"{path} is not in the working directory or a folder below it: put it there")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file in the working directory, {Path.cwd()}")
    if match["sha"] and match["sha"] != hash_file(path):
        raise ValueError(f"{path} has changed: its SHA-256 was {match['sha']}..., now it is {hash_file(path)}...")
    return path, match["rest"] or ""


def hash_file(path: Path) -> str:
    """The first 12 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def pin(spec: str) -> str:
    """`spec` with the SHA-256 of the file that it names; unchanged if it names none. Raises ValueError."""
    match = NAME.fullmatch(spec)
    found = match and split_spec(spec, match["suffix"])
    return f"{match['file']}@{hash_file(found[0])}{spec[match.end('sha' if match['sha'] else 'file') :]}" if found else spec


def load_function(path: Path, name: str) -> Callable:
    """The function `name` of a Python file. Raises ValueError if there is none."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{hash_file(path)}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}: give {path}:NAME")
    return function
