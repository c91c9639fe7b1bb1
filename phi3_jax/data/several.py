"""Several sources in one word, `A@3+B@1`: rows in files, by the name of a data set, and text of pre-training."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from phi3_jax.data.corpora import files, guarded, text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.corpora.instructions import VERSION, World
from phi3_jax.errors import UserError
from phi3_jax.keys import Key, number

TEXT = "text:"  # before a source of text, which bears loss on every token
# Rows of a small world (`corpora.instructions`, `corpora.guarded`): what gives them.
GENERATED: dict[str, Callable[[World], Iterator[dict[str, Any]]]] = {
    "talks:": World.talks,
    "pairs:": World.pairs,
    guarded.OPEN: functools.partial(guarded.talks, guarded=False),
    guarded.GUARDED: functools.partial(guarded.talks, guarded=True),
}
NAMED = ("tfds:", "seqio:", *GENERATED)
WEIGHT = number("weight", 1.0, 1e-4, 1e4)


@dataclass(frozen=True)
class One:
    """A source as it is named, and its weight: how many of so many windows are its."""

    spec: str
    weight: float = 1.0

    @property
    def text(self) -> str | None:
        """The source of text that it names; None: it holds rows."""
        return self.spec.removeprefix(TEXT) if self.spec.startswith(TEXT) else None

    @property
    def generated(self) -> str:
        """The name in `GENERATED` that its spec begins with, or ""."""
        return next((name for name in GENERATED if self.spec.startswith(name)), "")

    @property
    def name(self) -> str:
        """What a manifest calls it, without the folder that a path happens to lie in."""
        if self.text is not None or self.spec.startswith(NAMED):
            return self.spec
        return files.local(self.spec).resolve().name


def split(word: str, weights: Key = WEIGHT) -> list[One]:
    """The sources of a word; a path that is there is one, whatever is in its name.

    Raises:
      UserError: a weight that is no number, or a place without a name.
    """
    if os.path.lexists(files.local(word)):
        return [One(word)]
    found = []
    for piece in word.split("+"):
        spec, at, weight = piece.rpartition("@")
        if not at or os.path.lexists(files.local(piece)):
            spec, weight = piece, "1"
        if not spec:
            raise UserError(f"data={word} names nothing between its + signs; write A@3+B@1")
        found.append(One(spec, weights.read(weight, f"data={word}: the weight {weight}")))
    return found


def slugs(sources: list[One]) -> list[str]:
    """A name for each, for files and tables: words that differ."""
    names = [re.sub(r"[^A-Za-z0-9]+", "-", one.name.removesuffix(".jsonl")).strip("-") or "rows" for one in sources]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def rows_of(one: One) -> tuple[Callable[[], Iterator[tuple[str, Any]]], Inputs]:
    """(what gives its rows with their places, as often as asked; what is read for them)."""
    if one.generated:
        make = functools.partial(GENERATED[one.generated], World.of(one.spec.removeprefix(one.generated)))
        versions = [one.spec, VERSION, *([guarded.VERSION] if one.generated in (guarded.OPEN, guarded.GUARDED) else [])]
        return lambda: ((f"{one.spec}:{i}", row) for i, row in enumerate(make(), 1)), Inputs(versions=versions)
    if one.spec.startswith(NAMED):
        from phi3_jax.data import tasks  # the only way to TensorFlow

        return functools.partial(tasks.rows, one.spec), Inputs(versions=[one.spec])
    account = files.account(one.spec)
    return functools.partial(text.rows, account), Inputs([account])
