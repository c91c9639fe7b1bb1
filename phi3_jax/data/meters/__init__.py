"""Meters by name: what per-token losses and hits of an evaluation say about knowledge, reasoning and text (numpy only).

Each is a module here with a `METER` (see `meter`); a new one is a file and a line.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from phi3_jax.data.meters.meter import Arrays, Evaluation, Meter, Row
from phi3_jax.data.meters.meter import row as row
from phi3_jax.errors import UserError, nearest

METERS: dict[str, Meter] = {
    name: importlib.import_module(f"{__name__}.{name}").METER
    for name in (
        "knowledge",
        "reasoning",
        "text",
        "preference",
        "chat",
        "needles",
        "abstention",
        "guard",
        "seeing",
        "cloze",
    )
}


class _Dataset(Protocol):
    @property
    def vocab(self) -> int: ...

    def extra(self, name: str) -> dict[str, np.ndarray]: ...


class _Model(Protocol):
    @property
    def matrix_params(self) -> int: ...


def find(name: str) -> Meter:
    """The meter of an eval; UserError for one that this version does not know."""
    if name not in METERS:
        raise UserError(f"unknown meter {name!r}{nearest(name, METERS)}")
    return METERS[name]


def measure(
    entry: Mapping[str, Any],
    windows: Arrays,
    nll: np.ndarray,
    hit: np.ndarray,
    dataset: _Dataset,
    model: _Model,
    free: np.ndarray | None = None,
    reply: np.ndarray | None = None,
    sure: np.ndarray | None = None,
    free_sure: np.ndarray | None = None,
) -> list[Row]:
    """Metric rows of one evaluation of a dataset, by the meter that its manifest entry names.

    Args:
      entry: of manifest["evals"]: name, meter, bytes.
      windows: targets and domains (N, T) of all its windows, in order.
      nll, hit: (N, T), losses in nats and whether the argmax was right; read where domains > 0 only.
      dataset: gives `extra(name)` and `vocab`.
      model: gives `matrix_params`, the non-embedding parameters.
      free: as hit, where the model's own earlier answers were its input; None where that was not asked.
      reply: the ids of those answers.
      sure, free_sure: the probability of what is said, in the two ways.
    """
    name, meter = entry["name"], find(entry["meter"])
    if not nll.shape == hit.shape == windows["domains"].shape == (hit if free is None else free).shape:
        raise ValueError(f"nll {nll.shape}, hit {hit.shape} and windows {windows['domains'].shape} differ in shape")
    rows = meter.measure(
        Evaluation(
            name=name, nll=nll, hit=hit, free=free, reply=reply, targets=windows["targets"], domains=windows["domains"],
            extra=dataset.extra(name), bytes=entry.get("bytes"), vocab=dataset.vocab, non_embedding=model.matrix_params,
            sure=sure, free_sure=free_sure,
        )
    )  # fmt: skip
    if name != entry["meter"] and not meter.named:  # a second evaluation of the same kind keeps its rows apart
        rows = [row | {"task": f"{name} {row['task']}"} for row in rows]
    if meter.version > 1:
        rows = [row | {"scorer": meter.version} for row in rows]
    return rows
