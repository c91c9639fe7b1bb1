"""Facts of the real world: short values of the CIA World Factbook, each with the bits that it is worth in its field.

`factbook.tsv.gz`, beside this file, holds lines COUNTRY, FIELD, VALUE that `extract` took from the profiles of
github.com/factbook/factbook.json at commit 8662a8b17a78 (a work of the US government, in the public domain; the repository
is CC0). A field is in it where at least 180 countries have a value of at most 20 bytes; estimates lose the year in brackets
behind them. 80 fields of 249 countries hold 16,396 values.

A fact is a short sequence over a closed vocabulary: a token of the country, one of the field, the bytes of the value, END.
It is worth -log2 of the share of countries whose value in this field is the same. That is less than what a model has to
store, since which values a field can have is itself nowhere but in the facts.

`Book.kept` is the knowledge filter of `phi3_jax.curation.knowledge`, whose groups are subjects: the facts of a country stay
or go together, countries of few bits a token stay first, until so many of all bits are kept. The order knows nothing of the
share, so that what a smaller share keeps lies inside what a larger one does.
"""

from __future__ import annotations

import functools
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import reasoning
from phi3_jax.data.windows import Windows
from phi3_jax.records import files

SHIPPED = Path(__file__).with_name("factbook.tsv.gz")
LONGEST, LEAST, REPEATED = 20, 180, 0.05  # bytes of a value; countries of a field; of them, those that have it twice
BYTES, HEAD, DOMAIN = 256, 2, 1  # ids of bytes come first; country and field come before a value
WINDOW = reasoning.Layout().window
_RANDOM, _SHUFFLED = range(2)  # separate random streams


class Fact(NamedTuple):
    """A line of the Factbook: "Country, field: value"."""

    country: str
    field: str
    value: str


def extract(profiles: Iterable[str]) -> list[Fact]:
    """The facts of profiles, in the order of countries and fields.

    Args:
      profiles: texts whose first line is a country, an empty line follows, and a field is a line "NAME: value".
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for profile in profiles:
        country, *lines = profile.split("\n")
        if lines and not lines[0]:  # oceans and the world have no name in their first line
            for field, colon, value in (line.partition(": ") for line in lines):
                if colon:
                    found[field][country].append(re.sub(r" \([^()]*\)$", "", value).strip())
    facts = []
    for field, values in found.items():
        once = {country: value[0] for country, value in values.items() if len(value) == 1}
        short = {c: v for c, v in once.items() if 0 < len(v.encode()) <= LONGEST and v != "NA"}
        if len(values) - len(once) <= REPEATED * len(values) and len(short) >= LEAST:
            facts += [Fact(country, field, value) for country, value in short.items()]
    return sorted(facts)


@functools.cache
def shipped() -> Book:
    """The facts that come with the package."""
    lines = gzip.decompress(SHIPPED.read_bytes()).decode().splitlines()
    return Book(tuple(Fact(*line.split("\t")) for line in lines))


@dataclass(frozen=True)
class Book:
    """Facts, at most one of a country and field; arrays have an entry a fact, in their order."""

    facts: tuple[Fact, ...]

    @cached_property
    def countries(self) -> list[str]:
        """All, sorted; country i is id 256 + i."""
        return sorted({fact.country for fact in self.facts})

    @cached_property
    def fields(self) -> list[str]:
        """All, sorted; their ids follow those of the countries."""
        return sorted({fact.field for fact in self.facts})

    @property
    def pool(self) -> int:
        """Ids before those that reasoning items use."""
        return BYTES + len(self.countries) + len(self.fields)

    @property
    def end(self) -> int:
        """The id after a value; the first special one, which no reasoning item has."""
        return self.pool

    def closed(self) -> dict[str, Any]:
        """The closed vocabulary, as a manifest describes a tokenizer: kind, fingerprint, vocab_size."""
        names = manifests.digest(["factbook", self.countries, self.fields])
        return {"kind": "closed", "fingerprint": names, "vocab_size": self.pool + reasoning.SPECIALS}

    @cached_property
    def country(self) -> np.ndarray:
        """Number of the country (n,)."""
        places = {name: i for i, name in enumerate(self.countries)}
        return np.array([places[fact.country] for fact in self.facts])

    @cached_property
    def field(self) -> np.ndarray:
        """Number of the field (n,)."""
        places = {name: i for i, name in enumerate(self.fields)}
        return np.array([places[fact.field] for fact in self.facts])

    @cached_property
    def tokens(self) -> np.ndarray:
        """Inputs that a fact takes (n,); its targets are the bytes of its value and END."""
        return np.array([HEAD + len(fact.value.encode()) for fact in self.facts])

    @cached_property
    def _alike(self) -> np.ndarray:
        """Countries that have the same value in the same field (n,)."""
        counts = Counter((fact.field, fact.value) for fact in self.facts)
        return np.array([counts[fact.field, fact.value] for fact in self.facts])

    @cached_property
    def bits(self) -> np.ndarray:
        """-log2 of the share of the field's countries that have the value (n,)."""
        return np.log2(np.bincount(self.field)[self.field] / self._alike)

    @cached_property
    def usual(self) -> np.ndarray:
        """Whether the value is the most frequent of its field (n,): right for who knows fields and no country.

        Of equally frequent values it is the first by its letters.
        """
        best: dict[str, str] = {}
        for i in sorted(range(len(self.facts)), key=lambda i: (-self._alike[i], self.facts[i].value)):
            best.setdefault(self.facts[i].field, self.facts[i].value)
        return np.array([best[fact.field] == fact.value for fact in self.facts])

    def kept(self, share: float, seed: int | None = None) -> np.ndarray:
        """Which facts (n,) bool stay where a share of all bits does, to half a country; nested in the share.

        Args:
          seed: of a random order of the countries instead of that of bits a token.
        """
        bits, tokens = (np.bincount(self.country, weights=of) for of in (self.bits, self.tokens))
        order = np.argsort(bits / tokens, kind="stable") if seed is None else _rng(_RANDOM, seed).permutation(len(bits))
        reached = np.cumsum([0.0, *bits[order]])
        return np.isin(self.country, order[: np.abs(reached - share * reached[-1]).argmin()])

    def shuffled(self, seed: int, epoch: int) -> Book:
        """The same lines with the values of each field dealt anew among its countries: the format without the facts."""
        rng, values = _rng(_SHUFFLED, seed, epoch), np.array([fact.value for fact in self.facts], object)
        for field in range(len(self.fields)):
            here = np.flatnonzero(self.field == field)
            values[here] = values[rng.permutation(here)]
        return Book(tuple(fact._replace(value=value) for fact, value in zip(self.facts, values, strict=True)))

    def windows(self, chosen: np.ndarray) -> tuple[Windows, np.ndarray]:
        """Facts (k,) by number, a segment each, packed by best fit; and which fact a target is of, (N, T), -1 for none."""
        rows = _packed(self.tokens, chosen)
        fields = np.zeros((4, len(rows), WINDOW), np.int32)
        tokens, targets, segments, domains = fields
        item = np.full((len(rows), WINDOW), -1, np.int32)
        for row, members in enumerate(rows):
            at = 0
            for segment, i in enumerate(members, 1):
                value, here = list(self.facts[i].value.encode()), slice(at, at + self.tokens[i])
                said = slice(at + HEAD - 1, here.stop)
                country, field = BYTES + self.country[i], BYTES + len(self.countries) + self.field[i]
                tokens[row, here], segments[row, here] = [country, field, *value], segment
                targets[row, said], domains[row, said], item[row, said] = [*value, self.end], DOMAIN, i
                at = here.stop
        return Windows(tokens, targets, segments, domains), item


def _packed(tokens: np.ndarray, chosen: np.ndarray) -> list[list[int]]:
    """Facts of each window: the longest first, each where the least room is left that holds it."""
    rows: list[list[int]] = []
    open_: list[list[int]] = [[] for _ in range(WINDOW + 1)]  # rows by the room that they have
    for i in sorted(map(int, chosen), key=lambda i: -tokens[i]):
        room = next((room for room in range(tokens[i], WINDOW) if open_[room]), WINDOW)
        row = open_[room].pop() if room < WINDOW else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        open_[room - tokens[i]].append(row)
    return rows


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def write(facts: Sequence[Fact], path: Path = SHIPPED) -> None:
    """Writes the file that ships; the same facts give the same bytes."""
    files.write_bytes(path, gzip.compress("".join("\t".join(fact) + "\n" for fact in facts).encode(), 9, mtime=0))
