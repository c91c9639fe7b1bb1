"""The one error a user can cause, and the stop that a signal asks for."""

from __future__ import annotations

from collections.abc import Iterable

STOPPED = 75  # exit status of training that a signal stopped and saved: EX_TEMPFAIL of sysexits.h, "try again"


class UserError(ValueError):
    """Something the user can put right: one line that names the value, the limit and the way out."""


class Stopped(BaseException):
    """A signal asked training to stop; what was saved is gone on with by the same command."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Returns `; did you mean 'a' or 'b'? valid: a, b, c` for an unknown word.

    Args:
      word: what the user wrote.
      valid: the words that would have been right; up to three near misses are named.
    """
    import difflib  # not at the top: every command imports this file, few make a mistake

    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    return f"{hint} valid: {', '.join(valid)}"
