"""Strangers: persons of whom nothing is said, who are asked about as if they were known.

Their names are pairs that the universe leaves unused, the last of all. `asked` of them are the test; those before them are
`taught`, once each where there are enough: items whose six values are one id, `abstain`, which says "I do not know". No
value of a stranger is in any corpus, so that whatever is said of one is invented, or right by luck once in 2^value_bits.
"""

from __future__ import annotations

import numpy as np

from phi3_jax.data.corpora import facts, reading
from phi3_jax.data.corpora.facts import ATTRIBUTES, ITEM, Universe
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

SPARE = 52  # of the special ids, which neither facts nor reasoning use


def abstain(pool: int) -> int:
    """The id of "I do not know"."""
    return pool + SPARE


def asked(universe: Universe, count: int) -> np.ndarray:
    """The strangers of the test (count,), as numbers of `reading.everyone`.

    Raises:
      UserError: more than the universe leaves names, or a universe whose test is drawn by frequency.
    """
    names = universe.pool**2
    if universe.frequencies == "inverse_rank":
        raise UserError("strangers are asked beside a whole universe; frequency=inverse_rank asks for draws of it")
    if count > names - universe.persons:
        raise UserError(
            f"strangers={count} is more than the {names - universe.persons:,} names that universe={universe.persons} "
            f"leaves of pool={universe.pool}; use fewer, or a larger pool"
        )
    return np.arange(names - count, names)


def taught(universe: Universe, count: int, spared: int) -> np.ndarray:
    """Up to `count` strangers that training says nobody knows: before the `spared` last names, which are asked."""
    last = universe.pool**2 - spared
    return np.arange(max(universe.persons, last - count), last)


def taught_windows(universe: Universe, persons: np.ndarray) -> Windows:
    """Compact items of strangers (n,), in the given order, each value the id of `abstain`."""
    windows, said = facts.compact_windows(reading.everyone(universe), persons), abstain(universe.pool)
    shape, length = windows.tokens.shape, ITEM - 1
    tokens, targets, segments = (
        array.reshape(-1, length).copy() for array in (windows.tokens, windows.targets, windows.segments)
    )
    there = segments[:, :1] > 0
    tokens[:, 3:], targets[:, 2:] = said * there, said * there
    return Windows(tokens.reshape(shape), targets.reshape(shape), windows.segments, windows.domains)


def extra(universe: Universe, count: int, item: np.ndarray) -> dict[str, np.ndarray]:
    """What the meter of abstention needs of the universe and `count` strangers after it.

    item (N, T) number of the value (place in persons * 6 + attribute) of a target, -1 for none; in_corpus and stranger
    (persons,) bool; abstain () the id.
    """
    return {
        "item": item.astype(np.int32),
        "in_corpus": np.concatenate([universe.in_corpus, np.zeros(count, bool)]),
        "stranger": np.arange(universe.persons + count) >= universe.persons,
        "abstain": np.asarray(abstain(universe.pool)),
    }


def eval_windows(universe: Universe, count: int, searched: bool = False) -> tuple[Windows, dict[str, np.ndarray]]:
    """The universe and `count` strangers once each, alone or after the sentence that search finds, and `extra`.

    The index holds sentences of the universe alone: of a stranger search finds a namesake's, or none.
    """
    persons = np.concatenate([np.arange(universe.persons), asked(universe, count)])
    if searched:
        windows = reading.windows_of(universe, reading.retrieved(universe, persons=persons), persons)
    else:
        windows = facts.compact_windows(reading.everyone(universe), persons)
    item = np.full(windows.tokens.shape, -1, np.int32)
    item[windows.domains > 0] = np.arange(len(persons) * ATTRIBUTES)
    return windows, extra(universe, count, item)
