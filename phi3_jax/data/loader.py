"""Training batches from ArrayRecord through grain: batch i is a pure function of (manifest, seed, i).

    plan      which record fills which row of which batch: every source in a seeded order that changes each
              epoch, sources interleaved by weight so that any prefix holds each one's share, to rounding
    records   read rows, check their crc32; data sets up to RESIDENT_BYTES stay in memory as read
    batches   grain.MapDataset: step -> {tokens, targets, segments, positions, domains}, int32 (B, T)

Hosts take row slices of one global batch, so the data order does not depend on their number, and the resume
state is the step. The plan is made for many steps at once with numpy, and grain's chain starts at whole
batches: grain's own shuffle -> repeat -> mix -> slice -> batch works window by window in Python, which
costs more than everything else here at 24-token windows (benchmarks/loader.py measures both).
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from phi3_jax.configs import Vision
from phi3_jax.data import manifest as manifests
from phi3_jax.data.gallery import Gallery
from phi3_jax.data.windows import FIELDS, positions, record_dtype
from phi3_jax.errors import UserError

RESIDENT_BYTES = 256 << 20
PLAN_STEPS = 64
MAX_WEIGHT_SUM = (
    100_000  # smallest whole-number weights must not sum to more, so that their pattern repeats soon enough
)
READER_OPTIONS = "readahead_buffer_size:0"
ORDER = 1  # version of the order of records: `permute`, its keys in `_make_plan`, `interleave`; pinned by a test

Batch = dict[str, np.ndarray]


# --------------------------------------------------------------------------------------------- records


class RecordSource:
    """The records of one source (several shards), read by number; keeps them in memory when `resident`.

    Thread-safe. Every record's crc32 is checked when it is read.
    """

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype, vocab: int, resident: bool) -> None:
        self.name, self._folder, self._shards = entry["name"], folder, entry["shards"]
        self._dtype, self._vocab = dtype, vocab
        self._starts = np.cumsum([0] + [shard["records"] for shard in self._shards])
        self._readers: list[Any] = [None] * len(self._shards)
        self._rows = None
        if resident:
            parts = []
            for shard in range(len(self._shards)):
                parts.append(self._decode(self._read(shard, None), shard, None))
            self._rows = np.concatenate(parts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Structured array (n,) of the records with these numbers."""
        if self._rows is not None:
            return self._rows[indices]
        out = np.empty(len(indices), self._dtype)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            local = (indices[here] - self._starts[shard]).tolist()
            out[here] = self._decode(self._read(int(shard), local), int(shard), local)
        return out

    def _read(self, shard: int, local: list[int] | None) -> Sequence[bytes]:
        try:
            if self._readers[shard] is None:
                self._readers[shard] = _open(self._folder / self._shards[shard]["file"])
            reader = self._readers[shard]
            return reader.read_all() if local is None else reader.read(local)
        except UserError:
            raise
        except Exception as error:  # array_record raises plain exceptions for damaged chunks
            raise self._damage(shard, self._first_unreadable(shard, local), "cannot be read") from error

    def _first_unreadable(self, shard: int, local: list[int] | None) -> int:
        reader = _open(self._folder / self._shards[shard]["file"])
        for number in range(self._shards[shard]["records"]) if local is None else local:
            try:
                reader.read([number])
            except Exception:
                return number
        return 0 if local is None else local[0]

    def _decode(self, records: Sequence[bytes], shard: int, local: list[int] | None) -> np.ndarray:
        number = (lambda i: i) if local is None else local.__getitem__
        size = self._dtype.itemsize
        for i, record in enumerate(records):
            if len(record) != size:
                raise self._damage(shard, number(i), f"has {len(record)} bytes instead of {size}")
            if zlib.crc32(record[:-4]) != int.from_bytes(record[-4:], "little"):
                raise self._damage(shard, number(i), "fails its checksum")
        rows = np.frombuffer(b"".join(records), self._dtype)
        for name in ("tokens", "targets"):
            if rows[name].max(initial=0) >= self._vocab:
                i, column = np.argwhere(rows[name] >= self._vocab)[0]
                bad = rows[name][i, column]
                problem = f"holds token id {bad}, outside the vocabulary 0..{self._vocab - 1}"
                raise self._damage(shard, number(int(i)), problem)
        return rows

    def _damage(self, shard: int, number: int, problem: str) -> UserError:
        path = self._folder / self._shards[shard]["file"]
        again = f"remove {self._folder} to export it again"
        return UserError(f"damaged data: record {number} of shard {path} {problem}; {again}")


def _open(path: Path) -> Any:
    return array_record_module.ArrayRecordReader(str(path), options=READER_OPTIONS, file_reader_buffer_size=1 << 15)


def _check_shard(folder: Path, shard: dict[str, Any], verify: str) -> None:
    """Size and record count, and the sha256 with verify="sha256"."""
    path = folder / shard["file"]
    again = f"remove {folder} to export the data set again"
    if not path.is_file():
        raise UserError(f"shard {path} is missing; {again}")
    size = path.stat().st_size
    if size < shard["size"]:
        first = shard["records"] * size // shard["size"]
        raise UserError(
            f"shard {path} is truncated: {size} of {shard['size']} bytes, records from about {first} of "
            f"{shard['records']} on are lost; {again}"
        )
    if size > shard["size"]:
        raise UserError(f"shard {path} has {size} bytes, the manifest says {shard['size']}; {again}")
    if verify == "sha256" and (found := hashlib.file_digest(path.open("rb"), "sha256").hexdigest()) != shard["sha256"]:
        raise UserError(f"shard {path} has sha256 {found[:12]}, the manifest says {shard['sha256'][:12]}; {again}")
    try:
        records = _open(path).num_records()
    except Exception as error:
        raise UserError(f"shard {path} cannot be opened, not even record 0 ({error}); {again}") from error
    if records != shard["records"]:
        raise UserError(f"shard {path} holds {records} records, the manifest says {shard['records']}; {again}")


# ------------------------------------------------------------------------------------------------ plan


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Image of `index` (n,) under the pseudo-random permutation of 0..size-1 chosen by `key` (n,), uint64.

    A four-round Feistel network on the smallest even-bit domain that holds `size`, walked until the value
    is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); it needs no memory and is
    the same on every machine and with every version of numpy.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = np.asarray(index, np.uint64).copy()
    turns = np.arange(4, dtype=np.uint64)[:, None]
    keys = np.broadcast_to(_scramble(np.asarray(key, np.uint64) + turns), (4, value.size))
    todo = np.arange(value.size)
    while todo.size:
        left, right = value[todo] >> half, value[todo] & mask
        for turn_key in keys[:, todo]:
            left, right = right, left ^ (_scramble(right + turn_key) & mask)
        value[todo] = (left << half) | right
        todo = todo[value[todo] >= size]
    return value.astype(np.int64)


def _scramble(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele, Lea and Flood 2014), array of uint64 -> uint64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Smallest whole numbers in the ratio of `weights`, e.g. (0.25, 0.75) -> (1, 3).

    Raises:
      UserError: a weight that is not positive, or weights so fine that their pattern has over
        MAX_WEIGHT_SUM windows.
    """
    if any(not w > 0 for w in weights):
        raise UserError(
            f"mixture weights must be positive, got {list(weights)}; leave out a source that should have none"
        )
    parts = [Fraction(str(w)) for w in weights]
    scale = lcm(*(p.denominator for p in parts))
    whole = [int(p * scale) for p in parts]
    whole = [w // gcd(*whole) for w in whole]
    if sum(whole) > MAX_WEIGHT_SUM:
        raise UserError(f"mixture weights {list(weights)} are too fine; round them to at most four digits")
    return tuple(whole)


def interleave(index: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source, number within the source) of each window of the mixture, both (n,) int64.

    Splits off one source after the other by floor division (the rule of grain's MapDataset.mix), so that
    any prefix holds each source's share to within rounding, and exactly where all shares are whole.
    """
    source, number = np.zeros(index.shape, np.int64), np.zeros(index.shape, np.int64)
    todo, here, rest = np.arange(index.size), np.asarray(index, np.int64), sum(weights)
    for i, weight in enumerate(weights):
        after, after_next = here * (rest - weight) // rest, (here + 1) * (rest - weight) // rest
        mine = after == after_next
        source[todo[mine]], number[todo[mine]] = i, (here - after)[mine]
        todo, here, rest = todo[~mine], after[~mine], rest - weight
    return source, number


# -------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Dataset:
    """An opened data set folder; `manifest` is documented in phi3_jax.data.manifest."""

    folder: Path
    manifest: dict[str, Any]
    weights: tuple[int, ...]
    _cache: dict[str, RecordSource] = field(default_factory=dict, compare=False, repr=False)

    @property
    def window(self) -> int:
        """T, tokens per window."""
        return self.manifest["window"]

    @property
    def vocab(self) -> int:
        """Token ids are 0..vocab-1."""
        return self.manifest["vocab"]

    @property
    def domains(self) -> list[str]:
        """Names of domains 1, 2, .."""
        return self.manifest["domains"]

    @property
    def record(self) -> np.dtype:
        """Layout of its records; sets that were written before there were versions have the first."""
        return record_dtype(self.window, self.vocab, self.manifest.get("records", 1))

    def extra(self, name: str) -> dict[str, np.ndarray]:
        """The per-item arrays that belong to an eval (empty where it has none)."""
        file = manifests.find(name, self.manifest)["extra"]
        if file is None:
            return {}
        with np.load(self.folder / file) as arrays:
            return dict(arrays)

    def _source(self, entry: dict[str, Any], resident: bool) -> RecordSource:
        key = entry["shards"][0]["file"]
        if key not in self._cache:
            dtype = self.record
            self._cache[key] = RecordSource(self.folder, entry, dtype, self.vocab, resident)
        return self._cache[key]


def open_dataset(folder: str | Path, verify: str = "records") -> Dataset:
    """Open a data set folder and check that it is whole.

    Args:
      verify: "records" checks sizes and counts now and each record's crc32 when it is read; "sha256" also
        hashes every shard now.

    Raises:
      UserError: missing, empty or damaged data; names the file.
    """
    folder = Path(folder)
    if verify not in ("records", "sha256"):
        raise UserError(f"verify={verify!r} is unknown; use 'records' or 'sha256'")
    manifest = manifests.read(folder)
    shown = [manifest["pictures"]] if "pictures" in manifest else []
    for part in [*manifest["sources"], *manifest["evals"], *shown]:
        for shard in part["shards"]:
            _check_shard(folder, shard, verify)
    return Dataset(folder, manifest, whole_weights([s["weight"] for s in manifest["sources"]]))


def pictures(ds: Dataset, eyes: Vision | None) -> Gallery:
    """The pictures of a data set that has some, for a model with these eyes."""
    return Gallery(ds.folder, ds.manifest, _open, eyes)


# --------------------------------------------------------------------------------------------- batches


class _BatchSource:
    """Global step -> some rows of the batch; a grain RandomAccessDataSource."""

    def __init__(self, ds: Dataset, batch_windows: int, seed: int, rows: slice | np.ndarray) -> None:
        self._ds, self._batch, self._seed = ds, batch_windows, seed
        self._dtype = ds.record
        self._rows = rows
        whole = len(np.arange(batch_windows)[rows]) == batch_windows
        entries = ds.manifest["sources"]
        # A host that feeds some rows reads those records and no others.
        resident = whole and sum(e["windows"] for e in entries) * self._dtype.itemsize <= RESIDENT_BYTES
        self._sources = [ds._source(entry, resident) for entry in entries]
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __len__(self) -> int:
        return sys.maxsize // (self._batch * MAX_WEIGHT_SUM)

    def __repr__(self) -> str:
        name = self._ds.manifest["fingerprint"][:12]
        return f"_BatchSource({name}, batch={self._batch}, seed={self._seed}, rows={self._rows})"

    def _make_plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, record) of the rows of PLAN_STEPS batches, (PLAN_STEPS, B); -1: a fresh source ended."""
        size = PLAN_STEPS * self._batch
        source, number = interleave(np.arange(block * size, (block + 1) * size), self._ds.weights)
        for i, entry in enumerate(self._ds.manifest["sources"]):
            mine = source == i
            epoch, place = np.divmod(number[mine], entry["windows"])
            stream = _scramble(_scramble(np.array([self._seed], np.uint64)) + np.uint64(i))
            key = _scramble(epoch.astype(np.uint64) + stream)
            record = permute(place, entry["windows"], key)
            number[mine] = np.where(epoch > 0, -1, record) if entry["fresh"] else record
        return source.reshape(PLAN_STEPS, -1), number.reshape(PLAN_STEPS, -1)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, record) of the rows of the whole batch of a step."""
        sources, records = self._plan(step // PLAN_STEPS)
        return sources[step % PLAN_STEPS], records[step % PLAN_STEPS]

    def __getitem__(self, step: int) -> np.ndarray:
        step = int(step)
        sources, records = self._plan(step // PLAN_STEPS)
        # The whole global batch is checked, so that all hosts stop at the same step.
        if (ended := records[step % PLAN_STEPS] < 0).any():
            check_fresh(self._ds, self._batch, step + 1)
            raise AssertionError(f"{ended.sum()} rows without a record")
        source, record = sources[step % PLAN_STEPS, self._rows], records[step % PLAN_STEPS, self._rows]
        if len(self._sources) == 1:
            return self._sources[0].take(record)
        rows = np.empty(len(record), self._dtype)
        for i, reader in enumerate(self._sources):
            mine = np.flatnonzero(source == i)
            if mine.size:
                rows[mine] = reader.take(record[mine])
        return rows


def _to_batch(rows: np.ndarray) -> Batch:
    batch = {name: rows[name].astype(np.int32) for name in FIELDS}
    batch["positions"] = positions(rows["segments"])
    return batch


def train_batches(
    ds: Dataset,
    batch_windows: int,
    seed: int = 0,
    steps: int | None = None,
    rows: np.ndarray | None = None,
) -> grain.MapDataset:
    """Batches by step: `[step]` is {tokens, targets, segments, positions, domains}, int32 (rows, T).

    `rows` (ascending) chooses rows of the global batch; None: all. Sources shorter than needed start a new, differently
    shuffled epoch. `.to_iter_dataset()` adds prefetching.

    Raises:
      UserError: a batch of no windows, a seed out of range, or, with `steps` at once and otherwise at the step that needs
        it, a fresh source that would have to repeat.
    """
    if batch_windows < 1:
        raise UserError(f"batch_windows={batch_windows} must be 1 or more")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"data seed {seed} is outside 0..2^63-1; use a number in it")
    if steps is not None:
        check_fresh(ds, batch_windows, steps)
    chosen = slice(None) if rows is None else rows
    return grain.MapDataset.source(_BatchSource(ds, batch_windows, seed, chosen)).map(_to_batch)


def records_of(ds: Dataset, batch_windows: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """By step: (source, record in it) of each window of the global batch, both (B,)."""
    source = _BatchSource(ds, batch_windows, seed, slice(None))
    return source.places


def eval_batches(
    ds: Dataset, name: str, batch_windows: int, rows: np.ndarray | None = None
) -> Iterator[tuple[Batch, int]]:
    """(batch, n_valid) over an eval's windows in file order; the last batch is filled up with empty windows.

    `rows` (ascending) chooses rows of each batch; `n_valid` counts those of the whole batch.

    Raises:
      UserError: no such eval, or damaged data.
    """
    yield from _in_order(ds, manifests.find(name, ds.manifest), batch_windows, rows)


def source_batches(
    ds: Dataset, number: int, batch_windows: int, rows: np.ndarray | None = None, begin: int = 0
) -> Iterator[tuple[Batch, int]]:
    """As `eval_batches`, over the windows of a source, by its number in the manifest, from the window `begin` on."""
    yield from _in_order(ds, ds.manifest["sources"][number], batch_windows, rows, begin)


def _in_order(
    ds: Dataset, entry: dict[str, Any], batch_windows: int, rows: np.ndarray | None, begin: int = 0
) -> Iterator[tuple[Batch, int]]:
    size = entry["windows"] * ds.record.itemsize
    rows = np.arange(batch_windows) if rows is None else rows
    source = ds._source(entry, len(rows) == batch_windows and size <= RESIDENT_BYTES)
    for start in range(begin, len(source), batch_windows):
        numbers = start + rows
        batch = _to_batch(source.take(numbers[numbers < len(source)]))
        missing = int(np.count_nonzero(numbers >= len(source)))
        if missing:
            batch = {k: np.pad(v, ((0, missing), (0, 0))) for k, v in batch.items()}
        yield batch, min(batch_windows, len(source) - start)


def windows_needed(ds: Dataset, batch_windows: int, steps: int) -> dict[str, int]:
    """Windows that each source gives in the first `steps` batches."""
    here, rest, needed = steps * batch_windows, sum(ds.weights), {}
    for entry, weight in zip(ds.manifest["sources"], ds.weights, strict=True):
        after = here * (rest - weight) // rest
        needed[entry["name"]], here, rest = here - after, after, rest - weight
    return needed


def check_fresh(ds: Dataset, batch_windows: int, steps: int) -> None:
    """Raise UserError where `steps` batches need more windows of a fresh source than there are."""
    needed = windows_needed(ds, batch_windows, steps)
    for entry in ds.manifest["sources"]:
        if entry["fresh"] and needed[entry["name"]] > entry["windows"]:
            tokens = steps * batch_windows * ds.window
            raise UserError(
                f"source {entry['name']!r} of {ds.folder} has {entry['windows']} windows that must not "
                f"repeat, {steps} steps of {batch_windows} windows need {needed[entry['name']]}; export with "
                f"--tokens {tokens} or more, or train fewer steps"
            )


def max_targets(ds: Dataset, batch_windows: int, shards: int = 1) -> int:
    """Most loss targets in any shard's part of any batch; exact where a source's windows are alike in it.

    The mixture's pattern repeats after sum(weights) windows, so all compositions that occur are looked at.
    """
    period = sum(ds.weights) // gcd(sum(ds.weights), batch_windows)
    source, _ = interleave(np.arange(period * batch_windows), ds.weights)
    per_window = np.array([entry["max_targets_per_window"] for entry in ds.manifest["sources"]])
    return int(per_window[source].reshape(period * shards, -1).sum(1).max())
