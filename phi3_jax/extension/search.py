"""Population search of RoPE lists (LongRoPE, arXiv:2402.13753; LongRoPE2, arXiv:2502.20082), whatever they are judged by.

Settings are those of the released code: of a population the better half are parents; of as many new lists as parents half
are mutants of one and half children of two. A factor is redrawn with probability .3 on a grid of .01 between its
neighbours; a child takes over one factor of the other parent.

    longrope    every factor is searched, from 1 to 1 + s, never falling
    longrope2   factors from the critical pair on are searched, from s to 2 s, the last one at most 4 above its neighbour;
                those before it are NTK-like. The critical pair itself moves by one at times, down from the theoretical one

A list is a tuple of floats, so that two lists are the same where they are equal. What is drawn in a generation depends on
the seed, the generation and the values so far alone: values that are kept make the same search again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phi3_jax.extension import lists
from phi3_jax.extension.lists import Task

METHODS = ("longrope2", "longrope")
GRID, SHARE, ABOVE = 0.01, 0.3, 4.0
POPULATION, LEAST = 64, 8
TRIES = 20
DEEPER = 4  # pairs by which the critical one may lie below the theoretical one

List = tuple[float, ...]
Evaluate = Callable[[Sequence[List]], Sequence[float]]


def as_list(factors: np.ndarray) -> List:
    """Rounded, so that a list survives JSON and equal ones are equal."""
    return tuple(np.round(np.asarray(factors, np.float64), 6).tolist())


def seeds(task: Task, released: Sequence[float] | None = None) -> dict[str, List]:
    """{name: list} that a search begins with: closed forms, and the list of the released model where there is one."""
    found = {
        "pi": lists.pi(task),
        "ntk": lists.ntk(task),
        "yarn": lists.yarn(task),
        "yarn_factors": lists.yarn_factors(task),
        "critical": lists.longrope2_start(task, lists.critical(task)),
    }
    if released is not None:
        found["released"] = np.asarray(released)
    return {name: as_list(factors) for name, factors in found.items()}


@dataclass(frozen=True)
class Space:
    """The lists that a method may take."""

    task: Task
    method: str

    def mutant(self, parent: List, rng: np.random.Generator) -> List:
        """A list near a parent."""
        return self._longrope(parent, rng) if self.method == "longrope" else self._longrope2(parent, rng)

    def _longrope(self, parent: List, rng: np.random.Generator) -> List:
        top, factors = 1 + self.task.scale, list(parent)
        for i in range(len(factors)):
            if rng.random() < SHARE:
                low = factors[i - 1] if i else 1.0
                factors[i] = _drawn(low, factors[i + 1] if i + 1 < len(factors) else top, rng)
        return as_list(np.asarray(factors))

    def _longrope2(self, parent: List, rng: np.random.Generator) -> List:
        scale, most = self.task.scale, lists.critical(self.task)
        pair = self.pair(parent)
        if rng.random() < SHARE:
            pair = int(np.clip(pair + rng.choice((-1, 1)), max(1, most - DEEPER), most))
        tail = np.clip(parent[pair:], scale, 2 * scale)
        for i in reversed(range(len(tail))):
            if rng.random() < SHARE:
                low = tail[i - 1] if i else scale
                high = tail[i + 1] if i + 1 < len(tail) else min(2 * scale, low + ABOVE)
                tail[i] = _drawn(low, high, rng)
        return as_list(np.r_[lists.to_critical(self.task, pair, float(tail[0])), tail])

    def pair(self, factors: List) -> int:
        """The critical pair of a list of longrope2: the first that is stretched by s."""
        most = lists.critical(self.task)
        stretched = np.flatnonzero(np.asarray(factors) >= self.task.scale)
        return int(np.clip(stretched[0] if stretched.size else most, max(1, most - DEEPER), most))

    def child(self, one: List, other: List, rng: np.random.Generator, known: Mapping[List, float]) -> List:
        """The first list that takes over one factor of `other`, is new and does not fall; else a mutant."""
        if self.method == "longrope2" and self.pair(one) != self.pair(other):
            return self.mutant(one, rng)
        first = self.pair(one) if self.method == "longrope2" else 0
        for _ in range(TRIES):
            for i in range(first, len(one)):
                if rng.random() < SHARE * 0.5:
                    made = np.asarray(one)
                    made[i] = other[i]
                    if self.method == "longrope2":
                        made[:first] = lists.to_critical(self.task, first, made[first])
                    if (np.diff(made) >= 0).all() and as_list(made) not in known:
                        return as_list(made)
        return self.mutant(one, rng)


def _drawn(low: float, high: float, rng: np.random.Generator) -> float:
    """A point of the grid from low to high; low where there is none."""
    first, last = np.ceil(low / GRID - 1e-9), np.floor(high / GRID + 1e-9)
    return float(GRID * rng.integers(int(first), int(last) + 1)) if first <= last else low


def _new(make: Callable[[], List], count: int, known: Mapping[List, float]) -> list[List]:
    """`count` lists that are not known, fewer where there seem to be no more."""
    drawn: dict[List, None] = {}
    for _ in range(100 * max(count, 0)):
        if len(drawn) == count:
            break
        if (one := make()) not in known:
            drawn[one] = None
    return list(drawn)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      best: the list of the least value.
      values: {list: value} of all that were evaluated, in order.
      curve: (evaluations, least value so far) after each generation.
    """

    best: List
    values: Mapping[List, float]
    curve: tuple[tuple[int, float], ...]


def search(
    space: Space,
    start: Mapping[str, List],
    evaluate: Evaluate,
    evaluations: int,
    seed: int,
    tell: Callable[[int, Found], None] = lambda generation, found: None,
) -> Found:
    """The list of the least value.

    Args:
      start: lists that are evaluated first.
      evaluate: values of lists, the lower the better; NaN counts as the worst.
      evaluations: how many at most, those of `start` among them.
      tell: called after each generation.
    """
    values: dict[List, float] = {}
    curve: list[tuple[int, float]] = []
    size = max(LEAST, min(POPULATION, evaluations // 5))

    def book(new: Sequence[List]) -> None:
        new = list(dict.fromkeys(new))[: evaluations - len(values)]
        if not new:
            return
        found = evaluate(new)
        values.update(zip(new, (float(v) if v == v else float("inf") for v in found), strict=True))
        curve.append((len(values), min(values.values())))
        tell(len(curve) - 1, Found(ranked(values)[0], values, tuple(curve)))

    def ranked(among: Mapping[List, float]) -> list[List]:
        return sorted(among, key=lambda one: (among[one], one))

    book(list(start.values()))
    rng, first = np.random.default_rng([seed, 0]), ranked(values)
    # a better seed has twice as many mutants
    near = lambda: space.mutant(first[min(int(rng.geometric(0.5)) - 1, len(first) - 1)], rng)  # noqa: E731
    book(_new(near, size - len(values), values))
    population, generation = ranked(values)[:size], 0
    while len(values) < evaluations:
        generation += 1
        rng, parents = np.random.default_rng([seed, generation]), population[: size // 2]
        drawn = _new(lambda: space.mutant(parents[rng.integers(len(parents))], rng), size // 4, values)  # noqa: B023
        known = values | dict.fromkeys(drawn, 0.0)

        def child() -> List:
            one, other = rng.integers(len(parents), size=2)  # noqa: B023
            return space.child(parents[one], parents[other], rng, known)  # noqa: B023

        drawn += _new(child, size // 2 - len(drawn), known)
        if not drawn:  # every list that is near has been evaluated
            break
        book(drawn)
        population = ranked({one: values[one] for one in (*parents, *drawn) if one in values})
    return Found(ranked(values)[0], values, tuple(curve))
