"""Needles: <eval> : digits [share of value tokens that are right], exact [share of whole values]. Teacher-forced."""

from __future__ import annotations

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row


def rows_of(e: Evaluation) -> list[Row]:
    """Rows of an eval whose values, and nothing else, bear a loss; intervals over windows."""
    where = e.domains > 0
    first = where & ~np.pad(where, ((0, 0), (1, 0)))[:, :-1]
    whole, values = np.zeros(len(where)), first.sum(axis=1)
    for i in range(len(where)):
        number = np.cumsum(first[i])[where[i]] - 1
        wrong = np.bincount(number, ~e.hit[i][where[i]], values[i])
        whole[i] = (wrong == 0).sum()
    digits = statistics.ratio((e.hit & where).sum(axis=1, dtype=float), where.sum(axis=1))
    exact = statistics.ratio(whole, values)
    chance = float(e.extra["chance"])
    return [
        row("needles", e.name, "digits", digits, chance=chance, n=int(where.sum()), floor=0.0),
        row("needles", e.name, "exact", exact, chance=0.0, n=int(values.sum()), floor=0.0),
    ]


METER = Meter(rows_of, named=True)
