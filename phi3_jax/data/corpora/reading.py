"""Reading facts from context: the sentence of a person, then an item to answer, in one window and one segment.

    <K> s1 s2 a1 .. a6 | <K> s1 s2 a1 .. a5        9 + 8 of the window's 24 tokens; loss on the item's six values alone

Trained on persons outside the universe (names that it leaves unused), so that no person who is asked about is ever read
about, and with distractors: a sentence of somebody else, half of whose name is the same, before an item of the corpus,
so that copying without a look at the name is wrong (at pico scale proxies do so nevertheless). The place never varies:
what is learned is to read this layout. In the loss reading counts as reasoning does, together half of it. In the domain of
knowledge its few targets weigh too little to be learned within 4M tokens; as a third domain they leave a proxy no memory
(experiments/search.py).

In the evaluations everyone of the universe is asked once with

    retrieved    the best passage by BM25 for the two halves of the name; the index holds a share SEEN of the persons, drawn
                 at random: what search can see. The others get a namesake's sentence (or none, where nobody has a half)
    oracle       one's own sentence
    distractor   the sentence of another person, drawn at random

and extra["passage"] (persons,) says whose sentence that is, -1 for none.
"""

from __future__ import annotations

import dataclasses
import sqlite3  # noqa: F401  before any TensorFlow: its own SQLite, without FTS5, would take this one's place

import numpy as np

from phi3_jax.data.corpora import facts, reasoning
from phi3_jax.data.corpora.facts import ATTRIBUTES, ITEM, Universe
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

DISTRACTORS = 0.1  # of the windows in training
SEEN = 0.9  # of the universe's persons have their sentence in the index
LENGTH = ITEM + ITEM - 1  # tokens of sentence and item
DOMAIN = reasoning.DOMAIN
_INDEX, _TRAIN, _WRONG = 5, 6, 7  # random streams beside those of facts


def everyone(universe: Universe) -> Universe:
    """All pool^2 names; the first `persons` are the universe's, with the same names and values."""
    return dataclasses.replace(universe, persons=universe.pool**2)


def windows_of(universe: Universe, passage: np.ndarray, asked: np.ndarray) -> Windows:
    """One window for each pair of persons (n,): the sentence of `passage` (none where -1), the item of `asked`."""
    people, n = everyone(universe), len(asked)
    tokens, targets, segments, domains = (np.zeros((n, facts.WINDOW), np.int32) for _ in range(4))

    def items(persons: np.ndarray) -> np.ndarray:
        return np.column_stack([np.full(n, universe.pool), people.names[persons], people.values[persons]])

    given, item = passage >= 0, items(asked)
    tokens[:, :ITEM] = items(passage) * given[:, None]
    segments[:, :ITEM] = given[:, None]
    tokens[:, ITEM:LENGTH], segments[:, ITEM:LENGTH] = item[:, :-1], 1
    values = slice(LENGTH - ATTRIBUTES, LENGTH)
    targets[:, values], domains[:, values] = item[:, -ATTRIBUTES:], DOMAIN
    return Windows(tokens, targets, segments, domains)


def train_pairs(universe: Universe, seed: int, count: int, spared: int = 0) -> np.ndarray:
    """Persons (2, count), passage and asked: readers in a random order, again and again, and among them distractors.

    Nobody reads about the `spared` last names.

    Raises:
      UserError: a universe that leaves no names to read about, or without facts for the distractors.
    """
    readers = np.arange(universe.persons, universe.pool**2 - spared)
    if len(readers) < 2:
        raise UserError(
            f"universe={universe.persons}{f' and {spared} strangers' if spared else ''} leaves {len(readers)} of "
            f"{universe.pool**2} names for reading; use fewer persons or a larger pool"
        )
    rng = np.random.default_rng([universe.seed, _TRAIN, seed])
    asked = np.resize(rng.permutation(readers), count)
    passage, wrong = asked.copy(), rng.random(count) < DISTRACTORS
    asked[wrong] = universe.order(seed, 0, int(wrong.sum()))
    passage[wrong] = _namesakes(everyone(universe).names, readers, asked[wrong], rng)
    return np.stack([passage, asked])


def _namesakes(names: np.ndarray, among: np.ndarray, persons: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of `persons` one of `among` that shares the first or the second half of the name; anyone where none does."""
    found = rng.choice(among, len(persons))
    half = rng.integers(0, 2, len(persons))
    for side in (0, 1):
        by_name = among[np.argsort(names[among, side], kind="stable")]
        mine = np.flatnonzero(half == side)
        first, last = (np.searchsorted(names[by_name, side], names[persons[mine], side], s) for s in ("left", "right"))
        some = last > first
        found[mine[some]] = by_name[rng.integers(first[some], last[some])]
    return found


def sentence(universe: Universe, person: int) -> str:
    """A person's sentence as text, a word per token; first names, family names and values are different words.

    With one word for an id in every role, names would be found among values: see tests/evaluation/test_retrieval_probe.py.
    """
    return f"{name(universe, person)} " + " ".join(f"w{value}" for value in universe.values[person])


def name(universe: Universe, person: int) -> str:
    """A person's name as text."""
    first, family = universe.names[person]
    return f"first{first} family{family}"


def retrieved(universe: Universe, seen: float = SEEN, persons: np.ndarray | None = None) -> np.ndarray:
    """Whose sentence BM25 puts first for the name of each of `persons` (n,), -1 where it finds none; default: everyone.

    Those outside the universe are numbers of `everyone`; the index holds none of them.
    """
    from phi3_jax.data.retrieval import Index  # data needs no search but here

    order = np.random.default_rng([universe.seed, _INDEX]).permutation(universe.persons)
    indexed = np.sort(order[: max(1, round(seen * universe.persons))])
    index = Index.build(((str(person), sentence(universe, person)) for person in indexed), ":memory:")
    people = everyone(universe) if persons is not None else universe
    best = [index.search(name(people, p), 1) for p in (range(universe.persons) if persons is None else persons)]
    index.close()
    return np.array([int(passages[0].source) if passages else -1 for passages in best])


def passages(universe: Universe) -> dict[str, np.ndarray]:
    """{evaluation: whose sentence (persons,) comes before each one's item}."""
    ring = np.random.default_rng([universe.seed, _WRONG]).permutation(universe.persons)
    wrong = np.empty_like(ring)
    wrong[ring] = np.roll(ring, 1)
    return {"retrieved": retrieved(universe), "oracle": np.arange(universe.persons), "distractor": wrong}


def eval_windows(universe: Universe, passage: np.ndarray) -> tuple[Windows, dict[str, np.ndarray]]:
    """The whole universe once, each after its passage, and what the knowledge meter needs."""
    windows = windows_of(universe, passage, np.arange(universe.persons))
    item = np.full(windows.tokens.shape, -1, np.int32)
    item[windows.domains > 0] = np.arange(universe.persons * ATTRIBUTES)
    return windows, facts.extra(universe, item) | {"passage": passage.astype(np.int32)}
