"""Reasoning items: outputs that are right, and items whose outputs all are.

row : exact      all : accuracy, nll      gap1 .. : accuracy
"""

from __future__ import annotations

import math

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Arrays, Meter, Row, row


def rows_of(nll: np.ndarray, hit: np.ndarray, domains: np.ndarray, extra: Arrays) -> list[Row]:
    """Exact rows, accuracy of outputs (mean, and by the gap of unwritten steps before them), and nll per output.

    Args:
      nll, hit, domains: (N, T); each row has the same number k of outputs, where domains > 0.
      extra: as from corpora.reasoning.extra: gap (k,), answers () possible answers per output.
    """
    gaps, answers = np.asarray(extra["gap"]), int(extra["answers"])
    outputs, k = domains > 0, len(gaps)
    if not (outputs.sum(axis=1) == k).all():
        raise ValueError(f"reasoning rows must have {k} outputs each, as extra['gap'] says")
    right, nats = hit[outputs].reshape(-1, k), nll[outputs].reshape(-1, k)
    clusters = np.repeat(np.arange(len(right)), k).reshape(-1, k)
    rows = [
        row("reasoning", "row", "exact", statistics.proportion(right.all(axis=1)), chance=float(answers) ** -k),
        row("reasoning", "all", "accuracy", statistics.proportion(right, clusters), chance=1 / answers),
    ]
    for gap in np.unique(gaps):
        share = statistics.proportion(right[:, gaps == gap], clusters[:, gaps == gap])
        rows.append(row("reasoning", f"gap{gap}", "accuracy", share, chance=1 / answers))
    loss = statistics.ratio(nats.sum(axis=1, dtype=float), np.full(len(nats), k))
    rows.append(row("reasoning", "all", "nll", loss, chance=math.log(answers), n=nats.size))
    return rows


METER = Meter(lambda e: rows_of(e.nll, e.hit, e.domains, e.extra))
