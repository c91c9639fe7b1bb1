"""Drawn items: answers that are right, and items whose answers all are; what cells are called where they are seen.

<eval> : exact, accuracy      <eval> gap1 .. : accuracy, of sums      <eval> cells : accuracy
"""

from __future__ import annotations

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row


def rows_of(e: Evaluation) -> list[Row]:
    """Rows of an eval, whose items have the same answers each, where domains > 1, and cells, where they are 1."""
    answers, cells = e.domains > 1, e.domains == 1
    right, chance = e.hit[answers].reshape(len(e.hit), -1), 1 / int(e.extra["answers"])
    items = np.repeat(np.arange(len(right)), right.shape[1]).reshape(right.shape)
    exact = statistics.proportion(right.all(axis=1))
    rows = [
        row("seeing", e.name, "exact", exact, chance=chance ** right.shape[1]),
        row("seeing", e.name, "accuracy", statistics.proportion(right, items), chance=chance),
    ]
    gaps = np.asarray(e.extra["gap"])
    for gap in np.unique(gaps):
        share = statistics.proportion(right[:, gaps == gap], items[:, gaps == gap])
        rows.append(row("seeing", f"{e.name} gap{gap}", "accuracy", share, chance=chance))
    named = statistics.proportion(e.hit[cells], np.nonzero(cells)[0])
    return [*rows, row("seeing", f"{e.name} cells", "accuracy", named, chance=chance)]


METER = Meter(rows_of, named=True)
