"""Log-probabilities of responses under the weights that a run starts from, made once before its first step.

They lie in the run's folder, two numbers per pair, so that no second model is held while the run trains. They
are made where there is no checkpoint yet, from the very parameters that training starts with.

The pass is kept in parts, `reference/SOURCE-FIRST-STOP.npy`, each whole or absent: a pass that was killed goes on after
the last of them. Parts and the whole carry a fingerprint of what they were made from.
"""

from __future__ import annotations

import functools
import io
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax import distributed
from phi3_jax.configs import RunConfig
from phi3_jax.data import loader, manifest
from phi3_jax.errors import UserError
from phi3_jax.records import files
from phi3_jax.sharding import feed, rules
from phi3_jax.training import pictures

NAME, PARTS = "reference.npz", "reference"
TOKENS = 16384  # a batch
SECONDS = 20.0  # of work that a part holds
Arrays = list[np.ndarray]  # of each source: (windows, pairs, 2) float32, chosen first, in nats


def fingerprint(run: RunConfig) -> str:
    """Of what decides the numbers: weights, dtypes, and data, whose own fingerprint covers template and length."""
    how = run.lora and [run.lora.base_content, run.base_dtype]
    return manifest.digest([run.init_content, run.model.name, run.seed, run.data.fingerprint, run.dtype, how])


def make(
    ds: loader.Dataset,
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    eval_fn: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    folder: Path,
) -> None:
    """Goes once over all training windows and writes what `read` gives, by process 0; goes on where a pass was killed.

    Args:
      eval_fn: gives `nll` (rows, positions) of a batch, in nats.
      params: of the reference.
    """
    shards, first, mark = rules.row_shards(mesh), distributed.is_first(), fingerprint(run)
    if distributed.from_first(lambda: _is_whole(folder, mark)):
        return
    count = max(shards, TOKENS // run.data.window // shards * shards)
    sharding = rules.batch_sharding(run.strategy, mesh)
    mine = np.arange(count) if first else feed.local_rows(sharding, (count, run.data.window))
    distributed.on_first(lambda: _prepare(folder / PARTS, mark))
    shown = pictures.of(ds, run)
    for number, entry in enumerate(ds.manifest["sources"]):
        begin = distributed.from_first(functools.partial(_stop, folder / PARTS, number))
        found: list[np.ndarray] = []
        since, at = time.monotonic(), begin
        for batch, valid in loader.source_batches(ds, number, count, mine, begin):
            placed = {k: feed.place(v, mine, count, sharding) for k, v in batch.items()}
            if shown:
                each = [shown.of(entry, at + i) for i in range(count)]
                placed |= pictures.fields(shown, each, run, mesh, mine)
            nll = feed.gather(eval_fn(params, placed)["nll"])
            at += valid
            if first:
                found.append(sums(-nll[:valid], batch["segments"][:valid], batch["domains"][:valid]))
                if time.monotonic() - since >= SECONDS:
                    _keep(folder / PARTS, number, at, found)
                    found, since = [], time.monotonic()
        if found:
            _keep(folder / PARTS, number, at, found)
    if first:
        arrays = [
            _joined([np.load(path) for path in _chain(folder / PARTS, n)]) for n in range(len(ds.manifest["sources"]))
        ]
        content = io.BytesIO()
        np.savez(content, *arrays, fingerprint=np.array(mark))
        files.write_bytes(folder / NAME, content.getvalue(), durable=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    distributed.agree("reference", True)


def _is_whole(folder: Path, mark: str) -> bool:
    """Whether a pass over the same weights and data has ended here."""
    try:
        with np.load(folder / NAME) as arrays:
            return str(arrays["fingerprint"]) == mark
    except (OSError, ValueError, KeyError):
        return False


def _prepare(parts: Path, mark: str) -> None:
    """The folder of parts, without those that were made from other weights or data."""
    if files.read_state(parts / "made_from.json").get("fingerprint") != mark:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        files.write_json(parts / "made_from.json", {"fingerprint": mark}, durable=True)


def _chain(parts: Path, number: int) -> list[Path]:
    """Parts of a source, each beginning where the one before it stops, from window 0 on."""
    found = {}
    for path in parts.glob(f"{number}-*.npy"):
        if place := re.fullmatch(r"\d+-(\d+)-(\d+)\.npy", path.name):
            found[int(place[1])] = path
    chain, at = [], 0
    while at in found:
        chain.append(found[at])
        at = int(found[at].stem.rpartition("-")[2])
    return chain


def _stop(parts: Path, number: int) -> int:
    """The window of a source from which the pass goes on."""
    chain = _chain(parts, number)
    return int(chain[-1].stem.rpartition("-")[2]) if chain else 0


def _keep(parts: Path, number: int, stop: int, found: Arrays) -> None:
    content = io.BytesIO()
    np.save(content, _joined(found))
    files.write_bytes(parts / f"{number}-{stop - sum(map(len, found))}-{stop}.npy", content.getvalue(), durable=True)


def _joined(parts: Arrays) -> np.ndarray:
    """Windows after one another, as wide as the one with the most pairs."""
    pairs = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, pairs - p.shape[1]), (0, 0))) for p in parts])


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
            return [arrays[name] for name in sorted(arrays.files, key=lambda n: (len(n), n)) if name.startswith("arr_")]
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
