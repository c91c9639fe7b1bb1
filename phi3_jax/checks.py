"""Numbers and token ids that a caller gives: refused in one line where they are of a wrong kind, never bent to fit."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from phi3_jax.errors import UserError


def integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """A whole number; numpy's are taken, True and 4.0 are not."""
    limit = f"{least} or more" if most is None else f"{least} to {most}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Integral, np.integer)):
        raise UserError(f"{name}={value!r:.60} is a {type(value).__name__}; give a whole number, {limit}")
    found = int(value)
    if found < least or (most is not None and found > most):
        raise UserError(
            f"{name}={found:.6g} must be {limit}" if abs(found) > 10**30 else f"{name}={found} must be {limit}"
        )
    return found


def real(value: Any, name: str, limit: str) -> float:
    """A finite number; the caller checks its `limit`, which the error names."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.number)):
        raise UserError(f"{name}={value!r:.60} is a {type(value).__name__}; give a number, {limit}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise UserError(f"{name}={found} must be {limit}")
    return found


def integers(values: Any, name: str, least: int, most: int, *, what: str, where: str = "") -> np.ndarray:
    """An int32 array of any shape.

    Args:
      values: nested lists of whole numbers, or an array of some integer type.
      name: what to call one value in errors: "token id".
      least, most: what is valid, within int32.
      what: what to give instead: "a string or integers (batch, time)".
      where: what the limits are of: "the vocabulary: ".

    Raises:
      UserError: rows of unlike lengths, another type (floats, text, booleans), a value outside the limits.
    """
    try:
        found = np.asarray(values)
    except (ValueError, TypeError, OverflowError):  # rows of unlike lengths, which numpy takes for no array
        raise UserError(f"{name}s are ragged or no numbers; give {what}, rows of one length") from None
    if found.dtype == object and found.size and all(isinstance(v, int) for v in found.flat):  # beyond 64 bits
        _within(min(found.flat), max(found.flat), name, least, most, where)
    if found.size and (not np.issubdtype(found.dtype, np.integer) or _booleans(values)):
        kind = "bool" if _booleans(values) else "text" if found.dtype.kind in "US" else str(found.dtype)
        raise UserError(f"{name}s of type {kind}; give {what}")
    if found.size:
        _within(int(found.min()), int(found.max()), name, least, most, where)
    return found.astype(np.int32)


def _booleans(values: Any) -> bool:
    if isinstance(values, (list, tuple)):
        return any(map(_booleans, values))
    return isinstance(values, (bool, np.bool_))


def _within(low: int, high: int, name: str, least: int, most: int, where: str) -> None:
    if low < least or high > most:
        bad = low if low < least else high
        shown = bad if abs(bad) < 10**24 else f"of {len(str(abs(bad)))} digits"
        raise UserError(f"{name} {shown} is outside {where}{least} to {most}")
