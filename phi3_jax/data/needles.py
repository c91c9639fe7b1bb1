"""Needles: `#ab=48213;` stated in a text and asked again later. What a model must have kept to answer is in its window.

A key is two letters, a value five digits. A tokenizer may write the digits of a value in fewer tokens, as long as every
value takes as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError

DIGITS = 5
STATED, REPEATED = (2, 4), (3, 6)  # needles of a training window, and how often they come again, least and most
TEXT, VALUE = 1, 2  # kinds of tokens: text, and a value that was stated earlier; 0: the rest of a needle
_SAMPLES = 64  # values that are looked at for their length


@dataclass(frozen=True)
class Form:
    """How a tokenizer writes needles; UserError, from `value`, where it splits values unevenly."""

    tokenizer: Tokenizer

    def ids(self, key: str, number: int) -> tuple[list[int], list[int], list[int]]:
        """Ids of `#key=`, of the value, and of what ends the needle."""
        head = self.tokenizer.encode(f"#{key}=")
        whole = self.tokenizer.encode(f"#{key}={number:0{DIGITS}};")
        return head, whole[len(head) : len(head) + self.value], whole[len(head) + self.value :]

    @cached_property
    def value(self) -> int:
        """Tokens of a value."""
        rng, found = np.random.default_rng(0), set()
        for _ in range(_SAMPLES):
            key, number = draw(rng)
            head, whole = self.tokenizer.encode(f"#{key}="), self.tokenizer.encode(f"#{key}={number:0{DIGITS}}")
            found.add((whole[: len(head)] == head, len(whole) - len(head)))
        if len(found) > 1 or not next(iter(found))[0]:
            raise UserError(
                "this tokenizer writes the digits of a number in now more, now fewer tokens, so that needles are uneven; "
                "take the text fitness, or a tokenizer that splits digits"
            )
        return found.pop()[1]

    @property
    def chance(self) -> float:
        """Share of a value's tokens that a guess of digits gets right."""
        return float(10.0 ** (-DIGITS / self.value))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest of some needles."""
        rng = np.random.default_rng(0)
        return max(sum(map(len, self.ids(*draw(rng)))) for _ in range(_SAMPLES))


def draw(rng: np.random.Generator) -> tuple[str, int]:
    """A key and a value."""
    letters = rng.integers(97, 123, 2)
    return "".join(map(chr, letters)), int(rng.integers(10**DIGITS))


def _distinct(rng: np.random.Generator, count: int) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    while len(found) < count:
        key, number = draw(rng)
        found.setdefault(key, number)
    return list(found.items())


def planted(
    text: np.ndarray,
    form: Form,
    rng: np.random.Generator,
    stated: tuple[int, int] = STATED,
    again: tuple[int, int] = REPEATED,
) -> tuple[np.ndarray, np.ndarray]:
    """A text with needles at random places; as long as it was, for its end is left out.

    Args:
      text: ids (n,).
      stated, again: least and most needles, and repetitions of them.

    Returns:
      ids and kinds, both (n,) int32; a value counts as VALUE from its second time on.
    """
    needles = _distinct(rng, int(rng.integers(stated[0], stated[1] + 1)))
    order = np.r_[np.arange(len(needles)), rng.integers(len(needles), size=rng.integers(again[0], again[1] + 1))]
    pieces, seen = [], set()
    for index in rng.permutation(order):
        head, value, tail = form.ids(*needles[index])
        kinds = [0] * len(head) + [VALUE if index in seen else 0] * len(value) + [0] * len(tail)
        seen.add(int(index))
        pieces.append((head + value + tail, kinds))
    return _inserted(text, pieces, rng)


def _inserted(
    text: np.ndarray, pieces: Sequence[tuple[list[int], list[int]]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    room = len(text) - sum(len(ids) for ids, _ in pieces)
    if room < 0:
        raise UserError(f"a window of {len(text)} tokens holds no {len(pieces)} needles; use a longer one")
    ids, kinds, at = [], [], 0
    for place, (piece, kind) in zip(np.sort(rng.integers(0, room + 1, len(pieces))), pieces, strict=True):
        ids += [text[at:place], np.asarray(piece)]
        kinds += [np.full(place - at, TEXT), np.asarray(kind)]
        at = place
    ids.append(text[at:room])
    kinds.append(np.full(room - at, TEXT))
    return np.concatenate(ids).astype(np.int32), np.concatenate(kinds).astype(np.int32)


def question(text: np.ndarray, form: Form, rng: np.random.Generator, depth: float, needles: int = 3) -> np.ndarray:
    """A text in which needles are stated, and at its end the question for one of them with its answer.

    Args:
      text: ids (n,), more than are needed.
      depth: where the needle that is asked for stands, 0 for the beginning, 1 right before the question.
      needles: how many are stated.

    Returns:
      ids (n,) int32, of which the last `form.value` are the answer.

    Raises:
      UserError: the needles do not fit.
    """
    asked, *others = _distinct(rng, needles)
    head, value, _ = form.ids(*asked)
    stated, *pieces = ([*head, *value, *tail] for head, value, tail in (form.ids(*n) for n in (asked, *others)))
    room = len(text) - sum(map(len, pieces)) - len(stated) - len(head) - len(value)
    if room < 0:
        raise UserError(f"a window of {len(text)} tokens holds no {needles} needles and a question; use a longer one")
    places = [(round(depth * room), 0, stated), *((int(rng.integers(room + 1)), 1, piece) for piece in pieces)]
    parts, at = [], 0
    for place, _, piece in sorted(places, key=lambda entry: entry[:2]):
        parts += [text[at:place], np.asarray(piece)]
        at = place
    return np.concatenate([*parts, text[at:room], np.asarray(head), np.asarray(value)]).astype(np.int32)
