"""Single facts of unequal worth: what share of them a model says from what they are asked by alone.

universe, corpus : recall          share of the bits of all facts, and of those that were trained on, whose value is said
                                   right, each weighed by its bits
universe, corpus : recall_unweighted   the same, each fact weighing the same
universe, corpus : recall_bytes    share of the values' tokens that are right after the right tokens before them
outside : recall_control           facts never trained on, by their bits
corpus : nll                       nats of a value, the end of it included

Right is a value whose every token, the end of it included, is the argmax. Nothing comes before a value but its question, so
that what is right here after the right tokens before is what is said where the model goes on from its own (free-running).
"""

from __future__ import annotations

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.knowledge import per_item
from phi3_jax.data.meters.meter import Arrays, Meter, Row, row


def rows_of(nll: np.ndarray, hit: np.ndarray, extra: Arrays) -> list[Row]:
    """Recall of facts.

    Args:
      nll, hit: (N, T).
      extra: item (N, T), the fact that a target belongs to, -1 for none; of the facts (n,): in_corpus, bits, subject (facts
        of a subject share their noise), usual (the value is the likeliest for who does not know the subject).
    """
    bits, subject, usual = extra["bits"], extra["subject"], extra["usual"]
    nats, right, tokens = per_item(nll, hit, extra["item"], len(bits))
    where = extra["item"] >= 0
    said = np.bincount(extra["item"][where], weights=hit[where], minlength=len(bits))
    everyone: np.ndarray = tokens > 0
    rows = []

    def share(task: str, facts: np.ndarray, metric: str, won: np.ndarray, worth: np.ndarray, chance: float) -> None:
        if worth[facts].sum() > 0:
            totals, counts = (np.bincount(subject[facts], weights=(x * worth)[facts]) for x in (won, np.ones(len(won))))
            rows.append(row("knowledge", task, metric, statistics.ratio(totals, counts), chance=chance, n=facts.sum()))

    def blind(facts: np.ndarray, worth: np.ndarray) -> float:
        return float((worth * usual)[facts].sum() / max(worth[facts].sum(), np.finfo(float).tiny))

    for task, facts in (("universe", everyone), ("corpus", everyone & extra["in_corpus"])):
        share(task, facts, "recall", right, bits, blind(facts, bits))
        share(task, facts, "recall_unweighted", right, np.ones(len(bits)), blind(facts, np.ones(len(bits))))
        share(task, facts, "recall_bytes", said / np.maximum(tokens, 1), tokens, 0.0)
    outside = everyone & ~extra["in_corpus"]
    share("outside", outside, "recall_control", right, bits, blind(outside, bits))
    if (kept := everyone & extra["in_corpus"]).any():
        loss = statistics.ratio(np.bincount(subject[kept], weights=nats[kept]), np.bincount(subject[kept]))
        rows.append(row("knowledge", "corpus", "nll", loss, chance=float("nan"), n=kept.sum()))
    return rows


# Version 2, as of the meter of knowledge, which has the same names: its first one was teacher-forced.
METER = Meter(lambda e: rows_of(e.nll, e.hit, e.extra), named=True, version=2)
