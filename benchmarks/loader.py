"""Tokens/s of the loader from ArrayRecord, one process on one core: `python benchmarks/loader.py`.

Two data sets are written first: the controlled corpora (T=24, batches of 11 + 33 windows, what a pico run reads) and
packed text (T=2048, batches of 8). Each is read as training does, kept in memory and record by record, and through
grain's own window-by-window chain (source, shuffle, repeat, mix, slice, batch) as the peer. Medians of several runs;
the first batch, with opening the data set and, in memory, reading and checking all its records, is timed by itself.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.data import export, loader
from phi3_jax.data.windows import FIELDS, positions, record_dtype

PICO_TOKENS_PER_S = 144_000  # the fastest pair of pico-mini processes measured on two cores: the loader should give 10x


def grain_chain(ds: loader.Dataset, batch_windows: int) -> Callable[[int], object]:
    """The same mixture through grain's per-window transformations and its ArrayRecord source."""
    dtype = record_dtype(ds.window, ds.vocab)
    parts = []
    for i, entry in enumerate(ds.manifest["sources"]):
        source = grain.sources.ArrayRecordDataSource([str(ds.folder / s["file"]) for s in entry["shards"]])
        parts.append(grain.MapDataset.source(source).seed(i).shuffle().repeat())

    def collate(records: list[bytes]) -> dict[str, np.ndarray]:
        rows = np.frombuffer(b"".join(records), dtype)
        batch = {name: rows[name].astype(np.int32) for name in FIELDS}
        return batch | {"positions": positions(rows["segments"])}

    mixed = grain.MapDataset.mix(parts, ds.weights)
    return mixed.slice(slice(0, None, 1)).batch(batch_windows, batch_fn=collate).__getitem__


def reader(folder: Path, batch_windows: int, through_grain: bool) -> Callable[[int], object]:
    """Opens the data set; returns step -> batch."""
    ds = loader.open_dataset(folder)
    # The fresh items of millions of steps are not written for a benchmark: let them repeat.
    ds.manifest["sources"] = [entry | {"fresh": False} for entry in ds.manifest["sources"]]
    return grain_chain(ds, batch_windows) if through_grain else loader.train_batches(ds, batch_windows).__getitem__


def measure(make: Callable[[], Callable[[int], object]], tokens: int, seconds: float, runs: int) -> tuple[float, float]:
    """(median tokens/s, seconds until the first batch)."""
    start = time.perf_counter()
    get = make()
    get(0)
    first, step, rates = time.perf_counter() - start, 1, []
    for _ in range(runs):
        start, done = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds / runs:
            get(step)
            step, done = step + 1, done + 1
        rates.append(done * tokens / elapsed)
    return statistics.median(rates), first


def main(flags: Mapping[str, Any]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        print(f"{'window':>6} {'batch':>5}  {'way':26} {'tokens/s':>14} {'first batch':>12} {'x pico':>7}")
        for window, batch in ((24, 44), (2048, 8)):
            for name, resident in (("in memory", 1 << 40), ("record by record", 0), ("grain's own chain", None)):
                if resident is not None:
                    loader.RESIDENT_BYTES = resident
                make = functools.partial(reader, Path(folder) / str(window), batch, resident is None)
                rate, first = measure(make, window * batch, flags["seconds"], flags["runs"])
                row = f"{window:6} {batch:5}  {name:26} {rate:14,.0f} {first:10.3f} s"
                print(f"{row} {rate / PICO_TOKENS_PER_S:7.1f}", flush=True)


def _write(folder: Path) -> None:
    export.export(folder / "24", "facts", tokens=4_000_000)
    rng = np.random.default_rng(0)
    lines = (" ".join(map(str, rng.integers(0, 10_000, 300))) for _ in range(4000))
    (folder / "text.txt").write_text("\n\n".join(lines))
    export.export(folder / "2048", str(folder / "text.txt"), window=2048)


COMMAND = Command(
    "benchmarks/loader.py",
    __doc__,
    main,
    {
        "seconds": Flag(keys.number("of a measurement", 5.0, 1e-3, 1e6)),
        "runs": Flag(keys.whole("runs of which the median is shown", 5, 1)),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
