"""Log-probabilities of responses under the weights that a run starts from, made once before its first step.

They lie in the run's folder, two numbers per pair, so that no second model is held while the run trains. They
are made where there is no checkpoint yet, from the very parameters that training starts with.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax import distributed
from phi3_jax.configs import RunConfig
from phi3_jax.data import loader
from phi3_jax.errors import UserError
from phi3_jax.records import files
from phi3_jax.sharding import feed, rules

NAME = "reference.npz"
TOKENS = 16384  # a batch
Arrays = list[np.ndarray]  # of each source: (windows, pairs, 2) float32, chosen first, in nats


def make(
    ds: loader.Dataset,
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    eval_fn: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    folder: Path,
) -> None:
    """Goes once over all training windows and writes what `read` gives, by process 0.

    Args:
      eval_fn: gives `nll` (rows, positions) of a batch, in nats.
      params: of the reference.
    """
    shards = rules.row_shards(mesh)
    count = max(shards, TOKENS // run.data.window // shards * shards)
    sharding, first = rules.batch_sharding(run.strategy, mesh), distributed.is_first()
    mine = np.arange(count) if first else feed.local_rows(sharding, (count, run.data.window))
    found = []
    for number in range(len(ds.manifest["sources"])):
        parts = []
        for batch, valid in loader.source_batches(ds, number, count, mine):
            placed = {k: feed.place(v, mine, count, sharding) for k, v in batch.items()}
            nll = feed.gather(eval_fn(params, placed)["nll"])
            if first:
                parts.append(sums(-nll[:valid], batch["segments"][:valid], batch["domains"][:valid]))
        if first:
            pairs = max(part.shape[1] for part in parts)
            found.append(np.concatenate([np.pad(p, ((0, 0), (0, pairs - p.shape[1]), (0, 0))) for p in parts]))
    if first:
        content = io.BytesIO()
        np.savez(content, *found)
        files.write_bytes(folder / NAME, content.getvalue(), durable=True)
    distributed.agree("reference", True)


def sums(logp: np.ndarray, segments: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """(rows, pairs, 2) float32 sums of log-probabilities (rows, positions) over each response."""
    pairs = int(segments.max(initial=0)) // 2
    out = np.zeros((len(segments), pairs, 2), np.float64)
    rows, columns = np.nonzero(domains > 0)
    segment = segments[rows, columns] - 1
    np.add.at(out, (rows, segment // 2, segment % 2), logp[rows, columns])
    return out.astype(np.float32)


def read(folder: Path) -> Arrays:
    """What `make` wrote.

    Raises:
      UserError: it is gone or damaged; the way out is to train the run again.
    """
    try:
        with np.load(folder / NAME) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / NAME} cannot be read ({error}): the reference's log-probabilities are part of this run; remove "
            f"{folder} to train it again"
        ) from error


def spread(reference: Arrays, sources: np.ndarray, records: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The batch field `reference`, (rows, positions) float32: each response's number where its segment begins, else 0.

    Args:
      sources, records: (rows,), which window each row is.
      segments: (rows, positions).
    """
    out = np.zeros(segments.shape, np.float32)
    begins = segments > 0
    begins[:, 1:] &= segments[:, 1:] != segments[:, :-1]
    rows, columns = np.nonzero(begins)
    segment = segments[rows, columns] - 1
    for number, values in enumerate(reference):
        here = sources[rows] == number
        where = records[rows[here]], segment[here] // 2, segment[here] % 2
        out[rows[here], columns[here]] = values[where]
    return out
