"""The one error a user can cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right: one line that names the value, the limit and the way out."""


def nearest(word: str, valid: Iterable[str], count: int = 3) -> str:
    """Returns `; did you mean 'a' or 'b'? valid: a, b, c` for an unknown word.

    Args:
      word: what the user wrote.
      valid: the words that would have been right.
      count: how many near misses to name at most.
    """
    valid = list(valid)
    near = difflib.get_close_matches(word, valid, n=count, cutoff=0.4)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    return f"{hint} valid: {', '.join(valid)}"
