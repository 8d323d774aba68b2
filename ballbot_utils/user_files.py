"""Files of users that flags and arguments name: `my_terrain.py:canyon`, `heights.png`, `my_terms.py:energy`.

A file is in the working directory or in a folder below it. Checkpoints store its name with the start of its SHA-256,
`my_terrain.py@3b7c24ae8f2b:canyon`: the programs find it again, and reject it with one line if it has changed. What
the file imports is not checked. A process that has read a file keeps to that version, also if the file changes later.
"""

import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"(?P<file>[^:@]+(?P<suffix>\.(py|png|npy)))(@(?P<sha>[0-9a-f]{12}))?(:(?P<rest>.*))?")
_seen: set[tuple[str, str]] = set()  # files and SHA-256 that this process has checked


class UserFile(NamedTuple):
    """A user's file, the first 12 digits of its SHA-256, and what follows the colon after its name."""

    path: Path
    sha: str
    rest: str


def find_file(spec: str) -> UserFile | None:
    """The file that `spec` names, or None if it names none.

    Raises ValueError if the file is missing, outside of the working directory, or changed.
    """
    match = NAME.fullmatch(spec)
    if not match:
        return None
    path, sha = Path(match["file"]), match["sha"]
    if (match["file"], sha) not in _seen:
        if not path.resolve().is_relative_to(Path.cwd().resolve()):
            raise ValueError(f"{path} is not in the working directory or a folder below it: put it there")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file in the working directory, {Path.cwd()}")
        now = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        if sha not in (None, now):
            raise ValueError(f"{path} has changed: restore the file whose SHA-256 starts with {sha}")
        sha = now
        _seen.add((match["file"], sha))
    return UserFile(path, sha, match["rest"] or "")


def pin(spec: str) -> str:
    """`spec` with the SHA-256 of the file that it names; unchanged if it names none. Raises ValueError."""
    file = find_file(spec)
    return f"{file.path}@{file.sha}" + (f":{file.rest}" if file.rest else "") if file else spec


@functools.lru_cache
def load_function(path: Path, sha: str, name: str) -> Callable:
    """The function `name` of a Python file with this SHA-256. Raises ValueError if it has no such function."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{sha}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name!r}: give {path}:NAME")
    return function
