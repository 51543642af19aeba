"""The error that a user can mend.

Everything raised as :class:`UserError` is one sentence: what is wrong, where, and what to do.  Programs print
it without a traceback and exit with status 2.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps

SPEAKING_SECONDS = 2.0


LISTED = 12
"""Names that a refusal lists when none is close."""


class UserError(Exception):
    """Bad input or configuration; ``str(error)`` is the whole message for the user.

    ``everywhere``: every process of the run raises this error, so the first one alone has to say it.
    """

    def __init__(self, message: str = "", everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest valid name, or the list of names if none is close."""
    names = sorted(str(v) for v in valid)
    if close := get_close_matches(name, names, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"known: {', '.join(names[:LISTED]) or 'none'}{more}"


def program(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a program's ``main``: user errors end it with one line on stderr and status 2, an interrupt with
    status 130."""

    @wraps(main)
    def wrapped(*args, **kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):  # what a terminal that is not UTF-8 lacks becomes '?'
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if not error.everywhere or os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:  # torchrun ends all processes when one has left: let the first one speak before that
                time.sleep(SPEAKING_SECONDS)
            return 2
        except BrokenPipeError:  # the reader of our output (head, less) has left
            sys.stderr.close()
            return 0
        except OSError as error:  # a full disk, a folder that may not be written
            if error.filename is None:
                raise
            print(f"error: {error.strerror}: '{error.filename}'", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return 130

    return wrapped


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough to stand in a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
