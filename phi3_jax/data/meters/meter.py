"""What a meter is, for the table `METERS` of this folder: it turns losses and hits of an evaluation into metric rows.

A row is a dict of suite, task, metric, value, n, low, high, chance, stderr. Shares carry Wilson intervals, deflated by the
measured design effect where items share a person or a row; means carry normal intervals over independent units (persons,
rows, or windows of text). `chance` is what a uniform guess over the possible answers reaches, unrounded. Numbers that are
not finite become None, so that a diverged model still has rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax.statistics import Estimate

Row = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """All windows of an eval, in order, and what a model made of them.

    Attributes:
      name: of the eval.
      nll, hit: (N, T), losses in nats and whether the argmax was right; read where domains > 0 only.
      free: (N, T), as hit, where the model's own earlier answers were its input; None where that was not asked.
      reply: (N, T) ids that the model says then; None likewise.
      sure, free_sure: (N, T) probability of what is said, after the right earlier answers and after the model's own; None
        where it was not kept, or not asked.
      targets, domains: (N, T) of the windows.
      extra: the eval's own arrays.
      bytes: UTF-8 bytes of the text that the targets spell, or None.
      vocab: of the data set.
      non_embedding: parameters of the model in matrices.
    """

    name: str
    nll: np.ndarray
    hit: np.ndarray
    free: np.ndarray | None
    reply: np.ndarray | None
    targets: np.ndarray
    domains: np.ndarray
    extra: Arrays
    bytes: int | None
    vocab: int
    non_embedding: int
    sure: np.ndarray | None = None
    free_sure: np.ndarray | None = None


@dataclass(frozen=True)
class Meter:
    """One way to score an evaluation.

    Attributes:
      measure: the rows of an evaluation.
      named: a row's task names the eval already; else an eval with another name than the meter's gets its name before it.
      free: it reads what is right where the model's own answers are its input, at a run's end.
      version: raised when the same model gets other numbers under the same name; rows carry it as `scorer` from 2 on.
    """

    measure: Callable[[Evaluation], list[Row]]
    named: bool = False
    free: bool = False
    version: int = 1


def row(
    suite: str, task: str, metric: str, e: Estimate, *, chance: float, n: int | None = None, floor: float = -math.inf
) -> Row:
    """A row of metrics; numbers that are not finite are None, and a lower bound is `floor` at least."""
    numbers = {"value": e.value, "low": np.maximum(floor, e.low), "high": e.high, "chance": chance, "stderr": e.stderr}
    numbers = {key: float(number) if math.isfinite(number) else None for key, number in numbers.items()}
    return {"suite": suite, "task": task, "metric": metric, "n": e.n if n is None else n} | numbers


def scaled(e: Estimate, factor: float) -> Estimate:
    """An estimate in another unit."""
    return Estimate(e.value * factor, e.stderr * factor, e.low * factor, e.high * factor, e.n)
