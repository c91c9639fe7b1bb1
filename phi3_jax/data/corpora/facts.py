"""Facts with a bit-exact meter: a seeded universe of persons, each a pair of names and six attribute values.

A person holds 6 * value_bits bits: nothing predicts a value but having stored it. Two renderings:
`compact`, nine tokens `<K> s1 s2 a1 .. a6` over a closed vocabulary of pool + 64 ids, and `prose`, six
English sentences that go through any tokenizer. The corpus is the first `facts` persons of the universe; the
rest are never shown, so their recall measures chance. Frequencies are uniform, or follow a power law over 100
groups, and the corpus then keeps the most frequent: `power_law`, exponent 1.5 (Gu et al., arXiv:2505.18091), or
`inverse_rank`, exponent 1 (Zipf's law), whose test draws its persons by their frequency in the universe, since that may be
too large to ask for everyone: recall of the draws is recall weighted by frequency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import below, counter_draws
from phi3_jax.data.corpora.reasoning import SPECIALS
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

ATTRIBUTES = 6
ITEM = 3 + ATTRIBUTES  # tokens of a compact item; ITEM - 1 of them are inputs
PER_WINDOW = 3
WINDOW = PER_WINDOW * (ITEM - 1)
MAX_POOL, MAX_VALUE_BITS = 1024, 8
GROUPS = 100
EXPONENTS = {"uniform": 0.0, "power_law": 1.5, "inverse_rank": 1.0}
DRAWN = 9000  # persons of a test that draws them by frequency; who is drawn twice counts twice
DOMAIN = 1
FREQUENCIES = tuple(EXPONENTS)
_NAMES, _VALUES, _SUBSETS, _WORDS, _ORDER, _ASKED = range(6)  # separate random streams of one seed


def closed(pool: int) -> dict[str, Any]:
    """The closed vocabulary of a pool, as a manifest describes a tokenizer: kind, fingerprint, vocab_size."""
    return {"kind": "closed", "fingerprint": manifests.digest(["closed", pool]), "vocab_size": pool + SPECIALS}


@dataclass(frozen=True)
class Universe:
    """Persons, their facts, and how often each is seen.

    Attributes:
      persons: size of the universe, at most pool^2 (names are unique pairs).
      facts: persons in the corpus: the first ones, so that a smaller corpus lies inside a larger one.
      pool: ids shared by both name halves and all values; the vocabulary is pool + 64 whatever the other
        numbers.
      value_bits: bits a value holds; each attribute uses its own 2^value_bits ids of the pool. Lowering it
        changes the load alone: names, tokens, exposures and vocabulary stay, and a value keeps its leading
        bits.
      frequencies: of `EXPONENTS`.
      seed: of the universe, separate from any training seed.

    Raises:
      UserError: a number outside its limits.
    """

    persons: int = 9000
    facts: int = 4500
    pool: int = 256
    value_bits: int = MAX_VALUE_BITS
    frequencies: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frequencies not in FREQUENCIES:
            raise UserError(f"frequencies={self.frequencies!r} is none of {', '.join(FREQUENCIES)}")
        if not 0 <= self.value_bits <= MAX_VALUE_BITS:
            raise UserError(f"value_bits={self.value_bits} is outside 0..{MAX_VALUE_BITS}")
        if not 1 << self.value_bits <= self.pool <= MAX_POOL:
            raise UserError(
                f"pool={self.pool} is outside {1 << self.value_bits}..{MAX_POOL}: "
                f"value_bits={self.value_bits} needs {1 << self.value_bits} ids; change pool or value_bits"
            )
        if not 1 <= self.persons <= self.pool**2:
            raise UserError(
                f"persons={self.persons} is outside 1..{self.pool**2}, the name pairs of pool={self.pool}; "
                f"use fewer persons or a larger pool (up to {MAX_POOL})"
            )
        if not 0 <= self.facts <= self.persons:
            raise UserError(f"facts={self.facts} is outside 0..persons={self.persons}; lower it or raise persons")
        if self.seed < 0:
            raise UserError(f"universe seed={self.seed} must not be negative")

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])

    @property
    def vocab(self) -> int:
        """Size of the closed vocabulary of compact items, shared with the reasoning items."""
        return closed(self.pool)["vocab_size"]

    @property
    def bits(self) -> int:
        """Bits that the corpus asks a model to store (values only; names are given)."""
        return ATTRIBUTES * self.value_bits * self.facts

    @cached_property
    def names(self) -> np.ndarray:
        """Unique pairs of pool ids, (persons, 2)."""
        pairs = self._rng(_NAMES).permutation(self.pool**2)[: self.persons]
        return np.stack(np.divmod(pairs, self.pool), axis=1)

    @cached_property
    def value_index(self) -> np.ndarray:
        """Which of its attribute's 2^value_bits values a person has, (persons, 6)."""
        draws = self._rng(_VALUES).integers(0, 1 << MAX_VALUE_BITS, (self.persons, ATTRIBUTES))
        return draws >> (MAX_VALUE_BITS - self.value_bits)

    @cached_property
    def values(self) -> np.ndarray:
        """Pool ids of the values, (persons, 6)."""
        rng = self._rng(_SUBSETS)
        subsets = np.stack([rng.permutation(self.pool) for _ in range(ATTRIBUTES)])
        return subsets[np.arange(ATTRIBUTES), self.value_index]

    @cached_property
    def in_corpus(self) -> np.ndarray:
        """Whether a person is in the corpus, (persons,) bool."""
        return np.arange(self.persons) < self.facts

    @cached_property
    def group(self) -> np.ndarray:
        """Frequency group 1..100 (1 the most frequent) of each person, (persons,); all 1 when uniform."""
        if self.frequencies == "uniform":
            return np.ones(self.persons, np.int64)
        return np.arange(self.persons) * GROUPS // self.persons + 1

    @cached_property
    def frequency(self) -> np.ndarray:
        """Share of the corpus's visits that go to each person, (persons,), sum 1; 0 outside the corpus."""
        weight = self._weight * self.in_corpus
        return weight / max(weight.sum(), np.finfo(float).tiny)

    @cached_property
    def kept(self) -> float:
        """Share of what there is to know that the corpus keeps, each person weighed by its frequency in the universe."""
        return float(self._weight[: self.facts].sum() / self._weight.sum())

    @cached_property
    def asked(self) -> np.ndarray:
        """Persons (n,) of the test: the universe, or `DRAWN` of it, drawn by frequency and the same for any corpus."""
        if self.frequencies != "inverse_rank":
            return np.arange(self.persons)
        marks = (np.arange(DRAWN) + self._rng(_ASKED).random(DRAWN)) / DRAWN
        edges = np.cumsum(self._weight)
        return np.searchsorted(edges / edges[-1], marks, side="right")

    @property
    def drawn(self) -> dict[str, np.ndarray]:
        """{expected: how often each of `asked` is drawn in the mean, (n,)} where they are drawn, else {}."""
        if self.frequencies != "inverse_rank":
            return {}
        return {"expected": (DRAWN * self._weight / self._weight.sum())[self.asked]}

    @cached_property
    def _weight(self) -> np.ndarray:
        """Frequency of each person in the universe, up to a factor, (persons,)."""
        return self.group ** -EXPONENTS[self.frequencies]

    def order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Persons (count,) that items start .. start + count - 1 visit: a pure function of (seed, index).

        Items come in epochs of `facts` visits, each freshly shuffled. Uniform: everyone once an epoch. Power
        law: systematic sampling, so that a person's visits in an epoch are its expected number rounded down
        or up.

        Raises:
          UserError: no facts in the corpus, or a negative number.
        """
        if not self.facts:
            raise UserError("facts=0 leaves nothing to train on; raise facts or leave the knowledge source out")
        if min(seed, start, count) < 0:
            raise UserError(f"seed={seed}, start={start} and count={count} must not be negative")
        first, last = start // self.facts, -(-(start + count) // self.facts)
        epochs = [self._epoch(seed, epoch) for epoch in range(first, last)]
        whole = np.concatenate([np.zeros(0, np.int64), *epochs])
        return whole[start - first * self.facts :][:count]

    def _epoch(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, _ORDER, seed, epoch])
        persons = np.arange(self.facts)
        if self.frequencies != "uniform":
            marks = (persons + rng.random()) / self.facts
            edges = np.cumsum(self.frequency[: self.facts])
            persons = np.searchsorted(edges / edges[-1], marks, side="right")
        return rng.permutation(persons)


def compact_windows(universe: Universe, persons: np.ndarray, per_window: int = PER_WINDOW) -> Windows:
    """Compact items of persons (n,), `per_window` a window, 8 tokens each; the last window is zero-padded."""
    n, length = len(persons), ITEM - 1
    items = np.empty((n, ITEM), np.int32)
    items[:, 0] = universe.pool
    items[:, 1:3] = universe.names[persons]
    items[:, 3:] = universe.values[persons]
    rows = -(-n // per_window)
    shape = (rows * per_window, length)
    tokens, targets, segments, domains = (np.zeros(shape, np.int32) for _ in range(4))
    tokens[:n] = items[:, :-1]
    targets[:n, 2:] = items[:, 3:]
    segments[:n] = (np.arange(n) % per_window + 1)[:, None]
    domains[:n, 2:] = DOMAIN
    shape = (rows, per_window * length)
    return Windows(*(array.reshape(shape) for array in (tokens, targets, segments, domains)))


def eval_windows(universe: Universe, per_window: int = PER_WINDOW) -> tuple[Windows, dict[str, np.ndarray]]:
    """The persons `universe.asked`, and what the knowledge meter needs: see `extra`."""
    windows = compact_windows(universe, universe.asked, per_window)
    item = np.full(windows.tokens.shape, -1, np.int32)
    item[windows.domains > 0] = np.arange(len(universe.asked) * ATTRIBUTES)
    return windows, extra(universe, item, universe.asked) | universe.drawn


def extra(universe: Universe, item: np.ndarray, persons: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
    """Arrays of the knowledge meter about the persons of a test, by default all of the universe in order.

    item (N, T): number of the value (place in persons * 6 + attribute) that the target at t belongs to, -1 for none;
    in_corpus (persons,) bool; group (persons,) frequency group; frequency (persons,) share of the visits;
    value_bits () bits per value.
    """
    return {
        "item": item.astype(np.int32),
        "in_corpus": universe.in_corpus[persons],
        "group": universe.group[persons].astype(np.int32),
        "frequency": universe.frequency[persons],
        "value_bits": np.asarray(universe.value_bits),
    }


# Prose. Words are built from closed lists, so that a pool has the size it needs and no two words are equal.

_FIRST = (
    "Mar Al Ber Cor Dan El Fer Gil Hel Is Jan Ker Lor Mel Nor Os Per Quin Ros Sal Tam Ur Val Wil Xen Yor Zel "
    "Bran Cass Dor Ev Flor",
    "a an en ia in is o or us y ette ine ard bert by ca da don el fred gard ick ison la lin lo mond na ric son ta win",
)
_LAST = (
    "Ander Black Carl Dunn East Fair Green Hart Iver Jack King Lang Mill North Oak Peter Quill Rock Stan "
    "Thorn Under Vander West Young Alder Brook Clay Drake Ember Frost Gold Hollow",
    "son wood field man ton well er hurst ley ford worth gate land stone berg dale croft low more by shaw "
    "wick ridge bank brook mere stead water crest holm garth moor",
)
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_VALUE_LISTS = (
    ("Ash Birch Clay Down Elm Fox Glen Hazel Iron Kirk Lake Marsh New Oak Pine Red",
     "ford ton ville bury port mouth field haven bridge minster wick gate stow worth combe chester"),
    ("Northern Southern Eastern Western Central United National General Royal Pacific Atlantic Alpine "
     "Coastal Imperial Metro Summit",
     " Optics| Foods| Textiles| Steel| Airlines| Pharma| Software| Shipping| Mining| Energy| Press| Motors| "
     "Bank| Insurance| Robotics| Telecom"),
    ("Calder Dexter Fenwick Garland Hadley Kingsley Langdon Merton Norwood Osborne Prescott Ramsey Selwyn "
     "Tilden Vernon Whitby",
     " College| University| Academy| Polytechnic| Institute| Seminary| Conservatory| Law School| "
     "Medical School| Business School| Art School| Technical College| Naval School| School of Mines| "
     "Teachers College| Music School"),
    ("marine rural senior junior legal medical military civil digital forest public private naval chief "
     "travelling consulting",
     " surveyor| engineer| editor| analyst| inspector| architect| chemist| teacher| nurse| translator| "
     "planner| photographer| historian| pilot| economist| designer"),
    ("brass copper silver wooden glass paper ivory leather bronze marble porcelain tin velvet amber pewter "
     "crystal",
     " clocks| flutes| coins| masks| maps| lamps| boxes| buttons| figurines| bells| chess sets| bowls| keys| "
     "rings| puppets| thimbles"),
)  # fmt: skip
_TEMPLATES = (
    ("{name} was born on {value}.", "The birthday of {name} is {value}.",
     "{name} came into the world on {value}.", "{name} celebrates a birthday on {value}.",
     "Records say that the birthday of {name} is {value}."),
    ("{name} was born in {value}.", "The home town of {name} is {value}.", "{name} comes from {value}.",
     "{name} grew up in {value}.", "The town where {name} spent a childhood is {value}."),
    ("{name} works for {value}.", "The employer of {name} is {value}.", "{name} is employed by {value}.",
     "{name} has a post at {value}.", "The salary of {name} is paid by {value}."),
    ("{name} studied at {value}.", "The alma mater of {name} is {value}.", "{name} graduated from {value}.",
     "{name} took a degree at {value}.", "A portrait of {name} hangs in {value}."),
    ("{name} earns a living as a {value}.", "The profession of {name} is {value}.",
     "{name} is by trade a {value}.", "{name} trained to be a {value}.",
     "Colleagues know {name} as a {value}."),
    ("{name} collects {value}.", "The hobby of {name} is collecting {value}.", "{name} is fond of {value}.",
     "{name} fills a cabinet with {value}.", "Friends give {name} old {value}."),
)  # fmt: skip


def _combine(heads: str, tails: str) -> list[str]:
    endings = tails.split("|") if "|" in tails else tails.split()
    return [head + tail for tail in endings for head in heads.split()]


def value_words() -> list[list[str]]:
    """The closed pools of value texts: six lists of 256 different strings."""
    days = [f"{_MONTHS[i % 12]} {i // 12 + 1}" for i in range(1 << MAX_VALUE_BITS)]
    return [days, *(_combine(*lists) for lists in _VALUE_LISTS)]


@cache
def name_words() -> tuple[list[str], list[str]]:
    """First names and family names, 1,024 different strings each."""
    return _combine(*_FIRST), _combine(*_LAST)


@dataclass(frozen=True)
class ProseDocument:
    """Six sentences on one person; spans[a] = (start, stop) of the characters of attribute a's value."""

    text: str
    person: int
    spans: tuple[tuple[int, int], ...]


def prose(
    universe: Universe, persons: Sequence[int] | np.ndarray, seed: int, start: int = 0
) -> Iterator[ProseDocument]:
    """One document per person; templates and order of sentences depend on (seed, start + i) alone.

    For training: `prose(u, u.order(seed, start, count), seed, start)`. Every value is written once, with the
    full name in the same sentence.
    """
    words, (first, last) = value_words(), name_words()
    rng = universe._rng(_WORDS)
    subsets = [rng.permutation(1 << MAX_VALUE_BITS) for _ in range(ATTRIBUTES)]
    draws = counter_draws(seed, 0, start, len(persons), 2 * ATTRIBUTES)
    choices = below(draws[:ATTRIBUTES], len(_TEMPLATES[0])).T
    orders = draws[ATTRIBUTES:].argsort(axis=0, kind="stable").T
    for person, choice, order in zip(persons, choices, orders, strict=True):
        given, family = universe.names[person]
        name = f"{first[given]} {last[family]}"
        text, spans = "", [(0, 0)] * ATTRIBUTES
        for attribute in order:
            value = words[attribute][subsets[attribute][universe.value_index[person, attribute]]]
            head, tail = _TEMPLATES[attribute][choice[attribute]].replace("{name}", name).split("{value}")
            at = len(text) + (1 if text else 0) + len(head)
            text = f"{text} {head}{value}{tail}".lstrip()
            spans[attribute] = (at, at + len(value))
        yield ProseDocument(text, int(person), tuple(spans))
