"""Facts: what a model recalls of them, and how many bits of them it stores.

universe, corpus : recall               share of values said right from the name alone: the model goes on from its own
                                        earlier answers, right or wrong (free-running)
universe, corpus : recall_name_only     share of first values said right; nothing but the name comes before them
universe, corpus : recall_teacher_forced   share of values said right after the right earlier values of the same person
corpus : nll, bits_per_person, bits_total, bits_per_parameter    of the right values, one after the other
outside : recall_control                persons never trained on, free-running: must stay at chance
group 001 .. : recall_by_frequency      free-running, where frequencies follow a power law

Right is a value whose every token is the argmax. Version 1 had one recall, the teacher-forced one.
"""

from __future__ import annotations

import math

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.corpora.facts import ATTRIBUTES
from phi3_jax.data.meters.meter import Arrays, Meter, Row, row, scaled


def rows_of(
    nll: np.ndarray, hit: np.ndarray, extra: Arrays, non_embedding: int, free: np.ndarray | None = None
) -> list[Row]:
    """Recall and stored bits of facts.

    Stored bits of a value: value_bits + log2 p, with log2 p summed over the value's tokens (never averaged); summed
    over a person's values, and only then floored at 0 (Allen-Zhu & Li, arXiv:2404.05405, section 3).

    Args:
      nll, hit: (N, T), where the right earlier values are the input.
      extra: as from corpora.facts.extra: item (N, T), in_corpus, group, frequency (persons,), value_bits (), and expected
        (persons,) where they are drawn: recall is of the draws, stored bits of the whole corpus.
      non_embedding: parameters that the bits are shared over.
      free: (N, T), hits where the model's own answers are the input; without, nothing free-running is said.
    """
    value_bits, items = int(extra["value_bits"]), ATTRIBUTES * len(extra["in_corpus"])
    nats, forced, tokens = (x.reshape(-1, ATTRIBUTES) for x in per_item(nll, hit, extra["item"], items))
    right = None if free is None else per_item(nll, free, extra["item"], items)[1].reshape(-1, ATTRIBUTES)
    asked = np.all(tokens > 0, axis=1)
    corpus: np.ndarray = asked & extra["in_corpus"]
    rows = []

    def recall(task: str, persons: np.ndarray, metric: str = "recall", right: np.ndarray | None = right) -> None:
        if right is not None and persons.any():
            clusters = np.repeat(np.arange(persons.sum()), right.shape[1])
            estimate = statistics.proportion(right[persons], clusters)
            rows.append(row("knowledge", task, metric, estimate, chance=2.0**-value_bits))

    for task, persons in (("universe", asked), ("corpus", corpus)):
        recall(task, persons)
        recall(task, persons, "recall_name_only", forced[:, :1])
        recall(task, persons, "recall_teacher_forced", forced)
    if corpus.any():
        expected = extra["expected"] if "expected" in extra else np.ones(len(corpus))
        rows += _stored(nats[corpus], value_bits, non_embedding, 1 / expected[corpus])
    recall("outside", asked & ~extra["in_corpus"], "recall_control")
    groups = np.unique(extra["group"])
    if len(groups) > 1:
        for group in groups:
            recall(f"group {group:03d}", asked & (extra["group"] == group), "recall_by_frequency")
    return rows


def per_item(
    nll: np.ndarray, hit: np.ndarray, item: np.ndarray, items: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed nll, whether every token is right, and number of tokens, of each item; `item` (N, T) is -1 for none."""
    where = item >= 0
    index = item[where]
    nats = np.bincount(index, weights=nll[where].astype(float), minlength=items)
    tokens = np.bincount(index, minlength=items)
    hits = np.bincount(index, weights=hit[where], minlength=items)
    return nats, (hits == tokens) & (tokens > 0), tokens


def stored_bits(nats: np.ndarray, value_bits: int) -> np.ndarray:
    """Stored bits of each person (n,) from the nll of its values (n, 6) in nats; see `rows_of`."""
    return np.maximum(0.0, (value_bits - nats / math.log(2)).sum(axis=1))


def _stored(nats: np.ndarray, value_bits: int, non_embedding: int, weights: np.ndarray) -> list[Row]:
    """Loss and bits of asked persons (n,), of whom each stands for `weights` (n,) of the corpus."""
    persons = round(weights.sum())
    loss = statistics.ratio(nats.sum(axis=1), np.full(len(nats), ATTRIBUTES))
    bits = statistics.ratio(weights * stored_bits(nats, value_bits), weights)
    rows = [row("knowledge", "corpus", "nll", loss, chance=value_bits * math.log(2), n=nats.size)]
    for metric, factor in (
        ("bits_per_person", 1.0),
        ("bits_total", persons),
        ("bits_per_parameter", persons / non_embedding),
    ):
        rows.append(row("knowledge", "corpus", metric, scaled(bits, factor), chance=0.0, floor=0.0, n=persons))
    return rows


METER = Meter(lambda e: rows_of(e.nll, e.hit, e.extra, e.non_embedding, e.free), free=True, version=2)
