"""Text: <eval> : loss [nats per token], bits_per_byte."""

from __future__ import annotations

import math

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Meter, Row, row, scaled


def rows_of(nll: np.ndarray, domains: np.ndarray, task: str, text_bytes: int | None, vocab: int) -> list[Row]:
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
        rows.append(row("text", task, "bits_per_byte", scaled(loss, factor), chance=chance, n=int(text_bytes)))
    return rows


METER = Meter(lambda e: rows_of(e.nll, e.domains, e.name, e.bytes, e.vocab), named=True)
