"""The search: the same lists from the same seed, also when it goes on; inside its space; the best there is on a toy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from phi3_jax.extension import lists, search
from phi3_jax.extension.lists import Task

TASK = Task(16, 10000.0, 128, 8.0)
GOAL = np.array([1, 1.3, 3.1, 6.2, 8.1, 8.3, 8.4, 8.5])


def distance(some: Sequence[search.List]) -> list[float]:
    return [float(np.square(np.log(np.asarray(one)) - np.log(GOAL)).sum()) for one in some]


@pytest.mark.parametrize("method", search.METHODS)
def test_the_same_seed_makes_the_same_search_and_another_another(method: str) -> None:
    start = search.seeds(TASK)
    one, same, other = (search.search(search.Space(TASK, method), start, distance, 300, s) for s in (3, 3, 4))
    assert list(one.values.items()) == list(same.values.items()) and one.curve == same.curve
    assert list(one.values) != list(other.values)
    assert len(one.values) == one.curve[-1][0] == 300
    assert list(one.values)[: len(start)] == list(dict.fromkeys(start.values()))
    assert all(later <= earlier for (_, earlier), (_, later) in itertools.pairwise(one.curve))


def test_values_that_are_known_make_it_go_on_where_it_was() -> None:
    space, start = search.Space(TASK, "longrope"), search.seeds(TASK)
    kept: dict[search.List, float] = {}
    asked: list[search.List] = []

    def remembered(some: Sequence[search.List]) -> list[float]:
        for one in some:
            if one not in kept:
                if len(kept) == 117:
                    raise KeyboardInterrupt
                asked.append(one)
                kept[one] = distance([one])[0]
        return [kept[one] for one in some]

    with pytest.raises(KeyboardInterrupt):
        search.search(space, start, remembered, 200, 0)
    whole = search.search(space, start, distance, 200, 0)
    kept |= {one: whole.values[one] for one in list(whole.values)[117:180]}
    again = search.search(space, start, lambda some: [kept.get(one, distance([one])[0]) for one in some], 200, 0)
    assert again.values == whole.values and asked == list(whole.values)[:117]


def test_longrope_finds_more_than_its_seeds_and_never_falls() -> None:
    found = search.search(search.Space(TASK, "longrope"), search.seeds(TASK), distance, 1344, 0)
    best = min(distance(list(search.seeds(TASK).values())))
    assert found.values[found.best] < 0.2 * best
    for one in found.values:
        assert (np.diff(one) >= 0).all() and one[0] >= 1 and one[-1] <= 9


def test_longrope2_keeps_to_its_space() -> None:
    space, start = search.Space(TASK, "longrope2"), search.seeds(TASK)
    found = search.search(space, start, distance, 400, 0)
    pairs = set()
    for one in list(found.values)[len(start) :]:
        pair = space.pair(one)
        pairs.add(pair)
        assert (np.diff(one) >= 0).all() and 8 <= one[pair] <= one[-1] <= 16 and one[-1] <= one[-2] + search.ABOVE
        np.testing.assert_allclose(one[:pair], lists.to_critical(TASK, pair, one[pair]), atol=1e-6)
    assert pairs == {1, 2, 3}  # 3 is the theoretical one


def test_two_pairs_end_at_the_best_of_all() -> None:
    """Against every list of the grid."""
    task = Task(4, 100.0, 16, 2.0)
    goal = np.array([1.37, 2.41])

    def value(one: search.List) -> float:
        return float(np.square(np.asarray(one) - goal).sum())

    grid = np.round(np.arange(1, 3.005, 0.01), 6)
    best = min(value((a, b)) for a, b in itertools.product(grid, grid) if a <= b)
    found = search.search(
        search.Space(task, "longrope"), search.seeds(task), lambda some: [value(one) for one in some], 4000, 0
    )
    assert found.values[found.best] == pytest.approx(best, abs=1e-12)


def test_a_value_that_is_no_number_is_the_worst() -> None:
    start = search.seeds(TASK)
    nan = start["pi"]
    found = search.search(
        search.Space(TASK, "longrope"),
        start,
        lambda some: [float("nan") if o == nan else distance([o])[0] for o in some],
        60,
        0,
    )
    assert found.values[nan] == float("inf") and found.best != nan
