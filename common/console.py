"""The console: how a command reports errors, messages and progress, reads prompts, and hears
signals."""

import errno
import io
import os
import reprlib
import signal
import sys
import time
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from tqdm import tqdm

LONGEST = 2000  # characters of a message: a name can be as long as a file
WILL_STOP = "will save and stop after this step; send again to quit now"
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 100
_SHORT.maxother = 100


class UserError(Exception):
    """What a user can cause. Its message is one line that names the cause and what to do."""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with the status it returns; None is 0.

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
    """An output stream that drops what nobody reads any more, such as after `| head`."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe, a terminal
                raise
            return len(data)


def _open_console() -> None:
    """Makes stdin, stdout and stderr usable however the command was started: closed ones become
    /dev/null, and characters that their encoding lacks are escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would get this number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        buffer = io.BufferedWriter(_Console(number, "w", closefd=False))
        stream = io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, stream)


def explain(error: Exception) -> str | None:
    """Returns the line for what a user can cause; None for a bug."""
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which this file does not need
        return f"{one_line(error)}; lower --micro_batch_size"
    return one_line(error) if isinstance(error, (UserError, OSError, ArgumentError)) else None


def one_line(error: Exception) -> str:
    """Returns the message; for an error of the operating system the file's name and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"[-LONGEST:]  # the reason is at the end
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def short(value: object) -> str:
    """Returns a value for a message, which stays short however large or deep the value is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def log(message: str) -> None:
    """Prints a line on the console, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stdout)


def warn(message: str) -> None:
    """Prints a line on stderr, as stdout may be the result of a command."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def track(items: Iterable, what: str, unit: str, total: int | None = None) -> Iterable:
    """Shows the progress of long work on stderr: a bar on a terminal, a line a minute in a log."""
    if sys.stderr.isatty():
        return tqdm(items, what, total, unit=unit, leave=False, dynamic_ncols=True)
    form = "{desc}: {percentage:.0f}% | {rate_fmt} | {remaining} left\n"
    return tqdm(items, what, total, unit=unit, mininterval=60, delay=60, bar_format=form)


def read_prompts() -> Iterator[str]:
    """Yields the lines of stdin: from a terminal up to an empty one, else all but empty ones.
    Raises UserError for what is not text."""
    question = "Enter a prompt (RETURN to exit): " if sys.stdin.isatty() else ""
    while True:
        print(question, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not text in {error.encoding}") from None
        prompt = line.rstrip("\r\n")
        if not line or (question and not prompt):
            return
        if prompt:
            yield prompt


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Logs an error instead of raising it."""
    try:
        yield
    except Exception as error:
        if (reason := explain(error)) is None:  # a bug, which somebody will want to see
            traceback.print_exc()
            reason = type(error).__name__
        warn(f"{what} failed ({reason}); training continues")


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second one ends the process at once. With
    several processes, signals within a second count as one: launchers send them repeatedly."""

    def __init__(self, processes: int):
        self.processes = processes
        self.stop = False

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        if not self.stop:
            self.stop = True
            self.asked = time.monotonic()
            text = f"{signal.Signals(number).name}: {WILL_STOP}\n"
            with suppress(OSError):  # print is not safe in a signal handler
                begin = "\n" if sys.stderr.isatty() else ""  # below the bar
                os.write(sys.stderr.fileno(), f"{begin}{text}".encode())
            if self.processes == 1:
                self.__exit__()
        elif time.monotonic() - self.asked > 1:
            self.__exit__()
            os.kill(os.getpid(), number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
