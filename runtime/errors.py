"""Errors that the user can repair: one line each, exit code 2, no traceback."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """An error that the user can repair. Its text, one line a problem, is all that is printed."""

    code = 2  # the exit code


class Taken(UserError):
    """A folder or lock that another process has, or had first."""


def refuse(problems: list[str]) -> None:
    """UserError of these lines, each once, if there are any."""
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


@contextmanager
def user_errors(program: str, show: bool = True, at_once: bool = False) -> Iterator[None]:
    """Turn UserError and OSError into "program: error: .." and an exit code, 2 unless the error has its own."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where it is ASCII or Latin-1, and for names of bytes
    try:
        yield
        return
    except (UserError, OSError) as e:
        if isinstance(e, BrokenPipeError):  # the reader of our output is gone, as with `| head`
            os._exit(141)
        lines, code = describe(e).splitlines(), getattr(e, "code", 2)
    except KeyboardInterrupt:
        sys.exit(130)
    for line in lines if show else []:
        print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    if at_once:  # not after threads and destructors, which may hang in a collective
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def describe(e: BaseException) -> str:
    """An error in words: ours as it is, the disk's with its file, a library's first line."""
    if isinstance(e, OSError):
        return f"{e.filename or 'disk'}: {e.strerror or e}"
    return str(e) if isinstance(e, UserError) else first_line(e)


def first_line(e: BaseException) -> str:
    """The first sentence of a library's error, without its source location and advice."""
    text = (str(e).strip().splitlines() or [type(e).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", text).split(". ")[0]


def optional(module: str, package: str, purpose: str) -> Any:
    """Import an optional package. UserError with its install command if it is missing."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None
