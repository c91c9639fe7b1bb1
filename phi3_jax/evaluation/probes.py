"""Meters: what per-token losses and hits of an evaluation say about knowledge, reasoning and text (numpy only).

A meter turns nll (N, T) [nats], hit (N, T) [argmax equals target], the windows' targets and domains, and the extra
arrays of the evaluation into metric rows. A row is a dict of suite, task, metric, value, n, low, high, chance, stderr:

    knowledge  universe, corpus : recall               share of values whose every token is the argmax
               corpus : nll, bits_per_person, bits_total, bits_per_parameter
               outside : recall_control                persons never trained on: must stay at chance
               group 001 .. : recall_by_frequency      where frequencies follow a power law
    reasoning  row : exact      all : accuracy, nll      gap1 .. : accuracy
    text       <eval> : loss [nats per token], bits_per_byte

Shares carry Wilson intervals, deflated by the measured design effect where items share a person or a row; means carry
normal intervals over independent units (persons, rows, or windows of text). `chance` is what a uniform guess over the
possible answers reaches, unrounded. Numbers that are not finite become None, so that a diverged model still has rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from phi3_jax.evaluation import statistics
from phi3_jax.evaluation.statistics import Estimate

ATTRIBUTES = 6  # values a person has, as in data.corpora.facts
Row = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


class _Dataset(Protocol):
    @property
    def vocab(self) -> int: ...

    def extra(self, name: str) -> dict[str, np.ndarray]: ...


class _Model(Protocol):
    @property
    def matrix_params(self) -> int: ...


def measure(
    entry: Mapping[str, Any], windows: Arrays, nll: np.ndarray, hit: np.ndarray, dataset: _Dataset, model: _Model
) -> list[Row]:
    """Metric rows of one evaluation of a dataset, by the meter that its manifest entry names.

    Args:
      entry: of manifest["evals"]: name, meter, bytes.
      windows: targets and domains (N, T) of all its windows, in order.
      nll, hit: (N, T), losses in nats and whether the argmax was right; read where domains > 0 only.
      dataset: gives `extra(name)` and `vocab`.
      model: gives `matrix_params`, the non-embedding parameters.
    """
    meter, extra = entry["meter"], dataset.extra(entry["name"])
    if not nll.shape == hit.shape == windows["domains"].shape:
        raise ValueError(f"nll {nll.shape}, hit {hit.shape} and windows {windows['domains'].shape} differ in shape")
    if meter == "knowledge":
        rows = knowledge(nll, hit, extra, model.matrix_params)
    elif meter == "reasoning":
        rows = reasoning(nll, hit, windows["domains"], extra)
    elif meter == "text":
        return text(nll, windows["domains"], entry["name"], entry["bytes"], dataset.vocab)
    else:
        raise ValueError(f"meter {meter!r} is none of knowledge, reasoning, text")
    if entry["name"] != meter:  # a second evaluation of the same kind keeps its rows apart
        rows = [row | {"task": f"{entry['name']} {row['task']}"} for row in rows]
    return rows


def knowledge(nll: np.ndarray, hit: np.ndarray, extra: Arrays, non_embedding: int) -> list[Row]:
    """Recall and stored bits of facts.

    Stored bits of a value: value_bits + log2 p, with log2 p summed over the value's tokens (never averaged); summed
    over a person's values, and only then floored at 0 (Allen-Zhu & Li, arXiv:2404.05405, section 3).

    Args:
      nll, hit: (N, T).
      extra: as from data.corpora.facts.extra: item (N, T), in_corpus, group, frequency (persons,), value_bits ().
      non_embedding: parameters that the bits are shared over.
    """
    value_bits = int(extra["value_bits"])
    nats, right, tokens = per_item(nll, hit, extra["item"], ATTRIBUTES * len(extra["in_corpus"]))
    nats, right = nats.reshape(-1, ATTRIBUTES), right.reshape(-1, ATTRIBUTES)
    asked = (tokens > 0).reshape(-1, ATTRIBUTES).all(axis=1)
    corpus = asked & extra["in_corpus"]
    rows = []

    def recall(task: str, persons: np.ndarray, metric: str = "recall") -> None:
        if persons.any():
            clusters = np.repeat(np.arange(persons.sum()), ATTRIBUTES)
            estimate = statistics.proportion(right[persons], clusters)
            rows.append(row("knowledge", task, metric, estimate, chance=2.0**-value_bits))

    recall("universe", asked)
    recall("corpus", corpus)
    if corpus.any():
        rows += _stored(nats[corpus], value_bits, non_embedding)
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
    """Stored bits of each person (n,) from the nll of its values (n, 6) in nats; see `knowledge`."""
    return np.maximum(0.0, (value_bits - nats / math.log(2)).sum(axis=1))


def _stored(nats: np.ndarray, value_bits: int, non_embedding: int) -> list[Row]:
    persons = len(nats)
    loss = statistics.ratio(nats.sum(axis=1), np.full(persons, ATTRIBUTES))
    bits = statistics.ratio(stored_bits(nats, value_bits), np.ones(persons))
    rows = [row("knowledge", "corpus", "nll", loss, chance=value_bits * math.log(2), n=nats.size)]
    for metric, factor in (
        ("bits_per_person", 1.0),
        ("bits_total", persons),
        ("bits_per_parameter", persons / non_embedding),
    ):
        rows.append(row("knowledge", "corpus", metric, _scaled(bits, factor), chance=0.0, floor=0.0))
    return rows


def reasoning(nll: np.ndarray, hit: np.ndarray, domains: np.ndarray, extra: Arrays) -> list[Row]:
    """Exact rows, accuracy of outputs (mean, and by the gap of unwritten steps before them), and nll an output.

    Args:
      nll, hit, domains: (N, T); each row has the same number k of outputs, where domains > 0.
      extra: as from data.corpora.reasoning.extra: gap (k,), answers () possible answers an output.
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


def text(nll: np.ndarray, domains: np.ndarray, task: str, text_bytes: int | None, vocab: int) -> list[Row]:
    """Loss in nats per target token, and bits per UTF-8 byte of the text behind the targets; intervals over windows.

    Args:
      nll, domains: (N, T).
      text_bytes: UTF-8 bytes of the text that the targets spell (bits per byte is left out without it).
      vocab: the chance level of the loss is ln(vocab).
    """
    where = domains > 0
    counts = where.sum(axis=1)
    loss = statistics.ratio(np.where(where, nll, 0.0).sum(axis=1, dtype=float), counts)
    n = int(counts.sum())
    rows = [row("text", task, "loss", loss, chance=math.log(vocab), n=n)]
    if text_bytes:
        factor = n / (text_bytes * math.log(2))
        chance = factor * math.log(vocab)
        rows.append(row("text", task, "bits_per_byte", _scaled(loss, factor), chance=chance, n=int(text_bytes)))
    return rows


def _scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(e.value * factor, e.stderr * factor, e.low * factor, e.high * factor, e.n)


def row(
    suite: str, task: str, metric: str, e: Estimate, *, chance: float, n: int | None = None, floor: float = -math.inf
) -> Row:
    numbers = {"value": e.value, "low": np.maximum(floor, e.low), "high": e.high, "chance": chance, "stderr": e.stderr}
    numbers = {key: float(number) if math.isfinite(number) else None for key, number in numbers.items()}
    return {"suite": suite, "task": task, "metric": metric, "n": e.n if n is None else n} | numbers
