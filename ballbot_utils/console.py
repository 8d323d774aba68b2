"""What programs print: messages, progress, and one line for each error that a user can fix."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

CLEAR_LINE = "\r\x1b[K"
MACHINE_FAULT = os.EX_TEMPFAIL  # exit status after faults of the machine: the flags are right, try again


def is_rank_zero() -> bool:
    """Whether this process is the first of a run: only this one prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def print_rank0(text: str, file: Any = None) -> None:
    """Print a line, in the first process only."""
    if is_rank_zero():
        ProgressLine.clear()
        print(text, file=file, flush=True)


def has_display() -> bool:
    """Whether a window can be opened."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def exit_with_error(message: str | Exception, code: int = 1) -> NoReturn:
    """Exit with one line on stderr. All ranks call it: the first prints."""
    message = "".join(c if c.isprintable() else "?" for c in f"error: {message}")
    if code == 1:
        raise SystemExit(message if is_rank_zero() else 1)
    print_rank0(message, file=sys.stderr)
    raise SystemExit(code)


def check_argument(valid: Any, message: str) -> None:
    """Exit with one line unless `valid`."""
    if not valid:
        exit_with_error(message)


class ProgressLine:
    """The progress of a long job: one line on a terminal; in a file, a line every `interval` s."""

    is_shown = False  # whether the terminal's last line is one

    def __init__(self, interval: float = 10) -> None:
        self.is_terminal = bool(sys.stderr and sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
        self.interval, self.last = 0.2 if self.is_terminal else interval, -1e9

    def is_due(self) -> bool:
        """Whether `show` would print now."""
        return time.perf_counter() - self.last >= self.interval and is_rank_zero() and bool(sys.stderr)

    def show(self, done: float, total: float, seconds: float, text: str) -> None:
        """Show the share that is done, the time left if `done` took `seconds`, and `text`."""
        if not self.is_due():
            return
        self.last, share = time.perf_counter(), done / total
        left = timedelta(seconds=int(seconds * (1 / share - 1))) if share > 0 else "?"
        line = f"[{'#' * int(10 * share):<10}] {left} left, {text}"
        if self.is_terminal:
            line = CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1]
            ProgressLine.is_shown = True
        print(line, end="" if self.is_terminal else "\n", file=sys.stderr, flush=True)

    @classmethod
    def clear(cls) -> None:
        """Remove the line from a terminal."""
        if cls.is_shown:
            print(end=CLEAR_LINE, file=sys.stderr, flush=True)
            cls.is_shown = False


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A block that is a whole program: interrupts and faults of the machine end it with one line.

    In a rank the process ends without Python's own shutdown: ProcessGroupGloo's thread "pt_gloo_runloop" aborts if it
    waits for the GIL at that time.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        try:
            yield
        finally:
            sys.stdout and sys.stdout.flush()
    except SystemExit as end:
        ProgressLine.clear()
        code = end.code
    except (KeyboardInterrupt, OSError, RuntimeError, MemoryError) as error:
        code, fault = MACHINE_FAULT, describe_fault(error)
        if not fault:
            raise
        if isinstance(error, OSError):
            sys.stdout = None  # it may be the closed one
        if is_rank_zero() or isinstance(error, MemoryError):
            with contextlib.suppress(OSError):
                ProgressLine.clear()
                print(fault, file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            if isinstance(code, str):
                print(code, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else bool(code))
    if code:
        sys.exit(code)


def describe_fault(error: BaseException) -> str | None:
    """One line on a fault that is not the program's, or None."""
    hint = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        return f"stopped{hint}"
    if any(words in repr(error) for words in ("MemoryError", "out of memory", "allocate memory")):
        return f"error: there is not enough memory{hint}"
    if isinstance(error, OSError):
        return f"error: {error}{hint}"
    if any(words in str(error) for words in ("gloo", "NCCL", "signal SIG")):
        return f"error: a process of this run has died{hint}"
    return None
