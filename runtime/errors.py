"""Errors that the user can repair: one line each, exit code 2, no traceback."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something only the user can mend. Its text, a line a problem, is all that is shown."""

    code = 2  # the exit code


@contextmanager
def user_errors(program: str, show: bool = True, at_once: bool = False) -> Iterator[None]:
    """Turn UserError, and what the disk refuses, into one line and an exit code, 2 if nothing else is said."""
    code = 2
    try:
        yield
    except UserError as e:
        lines, code = str(e).splitlines(), e.code
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as head does
        os._exit(141)
    except OSError as e:
        lines = [f"{e.filename or 'disk'}: {e.strerror or e}"]
    else:
        return
    for line in lines if show else []:
        print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    if at_once:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def describe(e: BaseException) -> str:
    """What to tell the user of an error of the disk or of our own."""
    if isinstance(e, OSError):
        return f"{e.filename or 'disk'}: {e.strerror or e}"
    return str(e) if isinstance(e, UserError) else first_line(e)


def first_line(e: BaseException) -> str:
    """What a library says, without where in its source it says so, and its advice."""
    text = (str(e).strip().splitlines() or [type(e).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", text).split(". ")[0]
