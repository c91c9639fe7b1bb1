"""Preference pairs that are held out: how often the chosen response is the likelier one, by how much, and its loss.

pairs : accuracy, margin      chosen : loss
"""

from __future__ import annotations

import math

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Meter, Row, row


def rows_of(nll: np.ndarray, domains: np.ndarray, vocab: int) -> list[Row]:
    """Rows over pairs, which lie one after another in a window, chosen before rejected.

    Args:
      nll, domains: (N, T); domain 1 on the tokens of chosen responses, 2 on those of rejected ones.
      vocab: the chance level of the loss is ln(vocab).
    """
    chosen, rejected, counts = [], [], []
    for nats, where in zip(nll, domains, strict=True):
        bears = np.flatnonzero(where > 0)
        which, nats = where[bears], nats[bears]
        first = (which == 1) & (np.r_[2, which[:-1]] == 2)  # a pair begins
        pair = np.cumsum(first) - 1
        size = int(first.sum())
        chosen += np.bincount(pair, nats * (which == 1), size).tolist()
        rejected += np.bincount(pair, nats * (which == 2), size).tolist()
        counts += np.bincount(pair, which == 1, size).tolist()
    margin = np.array(rejected) - np.array(chosen)
    right = statistics.proportion(margin > 0)
    mean = statistics.ratio(margin, np.ones(len(margin)))
    loss = statistics.ratio(np.array(chosen), np.array(counts))
    return [
        row("preference", "pairs", "accuracy", right, chance=0.5),
        row("preference", "pairs", "margin", mean, chance=0.0),
        row("preference", "chosen", "loss", loss, chance=math.log(vocab), n=int(sum(counts))),
    ]


METER = Meter(lambda e: rows_of(e.nll, e.domains, e.vocab))
