"""How a command reports errors: what a user can cause in one line, a bug with its traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """What a user can cause. Its message is one line that names the cause and the cure."""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with the status it returns; None is 0.

    UserError and OSError become one line `error: ...` on stderr and status 1, an interrupt from
    the keyboard status 130. Every other exception is a bug and keeps its traceback.
    """
    try:
        status = main()
    except (UserError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _one_line(error: Exception) -> str:
    """The message; for an error of the operating system the file's name and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
