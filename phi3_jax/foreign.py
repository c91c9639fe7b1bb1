"""JSON that others wrote: each field is read with its type and its range, and what nobody read is known.

`Fields` stands on one object of a file. Errors are one line with the file, the field, its value and what it must be. What
JSON lets through and a model cannot take is refused here: NaN and infinities, numbers as text, booleans as numbers,
whole numbers that no float holds.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from phi3_jax.errors import UserError, nearest

NEEDED: Any = object()  # as a default: the field must be there
SIZE = 2**31 - 1  # sizes and ids are 32 bits wide
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_ONE_IS_NEUTRAL = re.compile(r"factor|multipl|scal|mup")


def shown(value: Any) -> str:
    """A value as an error shows it, cut where it is long or deep."""
    return _SHORT.repr(value)


class Fields:
    """The fields of one JSON object.

    Attributes:
      where: the file, and the field that holds the object where it is not the outermost.
    """

    def __init__(self, tree: Any, where: object, prefix: str = "") -> None:
        """`prefix` ("rope_scaling.") stands before the names of fields in errors.

        Raises:
          UserError: `tree` is no object.
        """
        if not isinstance(tree, dict):
            inside = f"{prefix.removesuffix('.')}={shown(tree)} must be" if prefix else f"{shown(tree)} is no"
            raise UserError(f"{where}: {inside} {'an object' if prefix else 'JSON object'} {{...}}; correct the file")
        self.where, self._prefix, self._tree = where, prefix, tree
        self._read: set[str] = set()

    def refuse(self, name: str, what: str) -> UserError:
        """The error for a field: `FILE: NAME=VALUE what`."""
        return UserError(f"{self.where}: {self._prefix}{name}={shown(self._tree.get(name))} {what}")

    def raw(self, name: str) -> Any:
        """A field as it is; None where it is missing or null."""
        self._read.add(name)
        return self._tree.get(name)

    def _get(self, name: str, default: Any, what: str) -> tuple[Any, bool]:
        value = self.raw(name)
        if value is None and default is NEEDED:
            raise UserError(f"{self.where}: {self._prefix}{name} is missing; it must be {what}")
        return (default, True) if value is None else (value, False)

    def whole(self, name: str, default: Any = NEEDED, low: int = 0, high: int = SIZE) -> Any:
        """An integer from `low` to `high`; null is the default."""
        what = f"an integer from {low} to {high}"
        value, absent = self._get(name, default, what)
        if absent or _whole(value, low, high):
            return value
        raise self.refuse(name, f"must be {what}")

    def number(self, name: str, default: Any = NEEDED, low: float = -math.inf, above: float = -math.inf) -> Any:
        """A finite number of at least `low` and more than `above`, as a float."""
        limits = [f"at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        what = " ".join(["a finite number", *limits])
        value, absent = self._get(name, default, what)
        if absent:
            return value
        found = _number(value)
        if found is None or found < low or found <= above:
            raise self.refuse(name, f"must be {what}")
        return found

    def flag(self, name: str, default: Any = NEEDED) -> Any:
        """true or false."""
        value, absent = self._get(name, default, "true or false")
        if absent or isinstance(value, bool):
            return value
        raise self.refuse(name, "must be true or false")

    def text(self, name: str, default: Any = NEEDED, valid: Iterable[str] = ()) -> Any:
        """A text, one of `valid` where those are given."""
        valid = tuple(valid)
        value, absent = self._get(name, default, "a text")
        if absent:
            return value
        if not isinstance(value, str):
            raise self.refuse(name, f"must be a text{f': {valid}' if valid else ''}")
        if valid and value not in valid:
            raise self.refuse(name, f"is not supported{nearest(value, valid)}")
        return value

    def numbers(self, name: str, default: Any = NEEDED, above: float = -math.inf) -> Any:
        """A list of finite numbers above `above`, as a tuple of floats."""
        what = f"a list of finite numbers{f' above {above:g}' if above > -math.inf else ''}"
        value, absent = self._get(name, default, what)
        if absent:
            return value
        found = [_number(x) for x in value] if isinstance(value, list) else [None]
        if odd := [i for i, x in enumerate(found) if x is None or x <= above]:
            at = f"; element {odd[0]} is {shown(value[odd[0]])}" if isinstance(value, list) else ""
            raise self.refuse(name, f"must be {what}{at}")
        return tuple(found)

    def wholes(self, name: str, default: Any = NEEDED, low: int = 0, high: int = SIZE) -> Any:
        """A list of integers from `low` to `high`, as a tuple."""
        what = f"a list of integers from {low} to {high}"
        value, absent = self._get(name, default, what)
        if absent:
            return value
        if not isinstance(value, list) or not all(_whole(x, low, high) for x in value):
            raise self.refuse(name, f"must be {what}")
        return tuple(value)

    def inside(self, name: str) -> Fields | None:
        """The object in a field; None where it is missing, null or empty."""
        value = self.raw(name)
        if value is None or value == {}:
            return None
        return Fields(value, self.where, f"{self._prefix}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """The objects of a list; none where it is missing or null."""
        value = self.raw(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(name, "must be a list of objects")
        return [Fields(x, self.where, f"{self._prefix}{name}[{i}].") for i, x in enumerate(value)]

    def names(self) -> list[str]:
        """Every field's name."""
        return list(self._tree)

    def refuse_unread(self, changes: re.Pattern[str], harmless: re.Pattern[str]) -> None:
        """UserError for fields that nobody read although their name says that they change the model.

        Args:
          changes: names (searched) of what may change it.
          harmless: names (whole) of what is known not to.
        """
        odd = [
            f"{self._prefix}{name}={shown(value)}"
            for name, value in self._tree.items()
            if name not in self._read and changes.search(name) and not harmless.fullmatch(name)
            if not is_neutral(name, value)
        ]
        if odd:
            raise UserError(
                f"{self.where}: {', '.join(odd)} may change what the model computes and is not understood here; take the "
                "field out if the weights were trained without it"
            )


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field's value asks for nothing: null, false, empty, "default", 1 of a factor, 0 of anything else."""
    if value is None or isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value == (1 if _ONE_IS_NEUTRAL.search(name) else 0)
    return value in ("", "default", "none") if isinstance(value, str) else not value


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
