"""How a command reports errors: what a user can cause in one line, a bug with its traceback."""

import errno
import io
import os
import reprlib
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


class UserError(ValueError):
    """What a user can cause. Its message is one line that names the cause and the cure."""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status it returns; None is 0.

    UserError, OSError and a parser's ArgumentError become one line `error: ...` on stderr and
    status 1, an interrupt from the keyboard status 130. Every other exception is a bug and keeps
    its traceback.
    """
    _open_console()
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        status = 1
    sys.exit(status)


class _Console(io.FileIO):
    """Where a command writes; what nobody reads any more, as Ctrl-C ends `| tee` too, is lost."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe, a terminal
                raise
            return len(data)


def _open_console() -> None:
    """Makes stdin, stdout and stderr usable however the command was started: closed ones lead to
    nowhere, and what their encoding lacks is escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would take this number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        number = number if before else os.open(os.devnull, os.O_WRONLY)
        buffer = io.BufferedWriter(_Console(number, "w", closefd=False))
        encoding = before.encoding if before else "utf-8"
        after = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, after)


def explain(error: Exception) -> str | None:
    """The line for what a user can cause; None for a bug."""
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which this file does not need
        return f"{_one_line(error)}; lower --micro_batch_size"
    return _one_line(error) if isinstance(error, (UserError, OSError, ArgumentError)) else None


def short(value: object) -> str:
    """A value of a file in a message, which stays short however large or deep the value is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


_LONGEST = 2000  # characters of a message: a name can be as long as a file
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def _one_line(error: Exception) -> str:
    """The message; for an error of the operating system the file's name and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"[-_LONGEST:]  # the reason is at the end
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one does what it always does. One
    of several systems takes what comes within a second for one: launchers send it several times."""

    def __init__(self, systems: int):
        self.stop, self.systems = False, systems

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if not self.stop:
            self.stop, self.asked = True, time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # print could meet itself here, or a pipe whose reader is gone
                text = f"{name}: going on to the next step that can be saved; again to quit\n"
                os.write(sys.stderr.fileno(), text.encode())
            if self.systems == 1:
                self.__exit__()
        elif time.monotonic() - self.asked > 1:
            self.__exit__()
            os.kill(os.getpid(), number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
