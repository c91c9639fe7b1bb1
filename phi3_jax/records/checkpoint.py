"""Checkpoints: written in the background, checked by content, found again after any crash.

A checkpoint is the folder `<root>/<step>/`: `state/`, which any Orbax can load (a flat dictionary from leaf names
such as `params.layers.qkv` to arrays), and `checkpoint.json`: step, extra JSON, shapes, every file's size and CRC-32.
It is written as `<step>.partial` and renamed when whole, so a folder with a plain number was complete once, and the
checksums tell whether it still is. `step` counts finished steps: training goes on with step number `step`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from phi3_jax import distributed
from phi3_jax.errors import UserError
from phi3_jax.models.spec import named
from phi3_jax.records import files

RECORD = "checkpoint.json"
CHUNK_BYTES = 64 << 20  # one file of a large array; small enough that several are written at a time
LAYER_BYTES = 1 << 20  # smaller slices of the first axis would make too many files


class CheckpointWarning(UserWarning):
    """A checkpoint that cannot be used was skipped."""


@dataclass(frozen=True)
class Restored:
    """What `restore` found: `skipped` has one line for each newer checkpoint that was not whole."""

    step: int
    state: Any
    extra: dict[str, Any]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the newest `latest`, and `steps`."""

    latest: int = 2
    steps: frozenset[int] = frozenset()

    def superseded(self, steps: Iterable[int], newest: int) -> list[int]:
        """The steps to delete. Those above `newest`, the one just saved, are never touched: they were set aside."""
        past = sorted(step for step in steps if step <= newest)
        return [step for step in past[: -max(1, self.latest)] if step not in self.steps]


class Checkpointer:
    """Writes checkpoints of one run, one at a time, while training goes on.

    Raises `UserError` at once where the folder cannot be written. A save that fails (a full disk) is removed, and the
    failure is raised as `UserError` by the next `check`, `save` or `wait`; older checkpoints are untouched.
    """

    def __init__(self, root: str | Path, keep: Keep = Keep()) -> None:
        self.root, self.keep = Path(root).resolve(), keep
        self._buffers: dict[str, np.ndarray] = {}
        self._pending: concurrent.futures.Future[None] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        files.require_writable(self.root)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Starts saving `state`, a pytree of arrays (none of size 0), and returns once a donation can do it no harm."""
        self.wait()
        partial = self.root / f"{step}.partial"
        leaves = named(state)
        size = sum(x.nbytes for x in leaves.values())
        record = {"step": step, "extra": extra, "leaves": {k: _form(x) for k, x in leaves.items()}}
        try:
            self._sweep()
            if distributed.is_first():
                partial.mkdir()
            distributed.barrier("save")
            with _orbax_options():
                response = ocp.save_async(partial / "state", _snapshot(leaves, self._buffers))
        except Exception as error:
            self._abandon(partial)
            raise self._failure(step, size, error) from error
        self._pending = self._pool.submit(self._finish, step, size, partial, response, record)

    def check(self) -> None:
        """Raises the `UserError` of a save that has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in flight is on the disk and committed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self, step: int, size: int, partial: Path, response: Any, record: dict[str, Any]) -> None:
        """In the background: waits for the arrays, adds checksums, commits by rename, deletes what is not kept."""
        try:
            response.result()  # on process 0 when all have written
            if distributed.is_first():
                _commit(partial, self.root / str(step), record)
                self._collect(step)
            distributed.barrier("commit")
        except Exception as error:
            self._abandon(partial)
            raise self._failure(step, size, error) from error

    def _failure(self, step: int, size: int, error: Exception) -> UserError:
        older = [s for s in list_steps(self.root) if s != step]
        reason = _reason(error)
        what = "free some space" if reason == files.FULL else "put that right"
        return UserError(
            f"saving the checkpoint of step {step} ({_mb(size)}) to {self.root} ({_mb(_free(self.root))} free) failed: "
            f"{reason}; {f'step {older[-1]} is intact' if older else 'there is no older one'}, "
            f"{what} and run again to continue"
        )

    def _abandon(self, partial: Path) -> None:
        if distributed.is_first():  # the others may have writes in flight
            _remove(partial)

    def _collect(self, newest: int) -> None:
        for step in self.keep.superseded(list_steps(self.root), newest):
            _discard(self.root / str(step))

    def _sweep(self) -> None:
        if distributed.is_first():
            for path in (*self.root.glob("*.partial"), *self.root.glob("*.trash")):
                if path.stem.isdigit():
                    _remove(path)


def list_steps(root: str | Path) -> list[int]:
    """Steps of the committed checkpoints in `root`, ascending; their content is not looked at."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(entry.name) for entry in os.scandir(root) if entry.name.isdigit())
    return []


def newest_whole(root: str | Path, at_most: int | None = None) -> tuple[int | None, tuple[str, ...]]:
    """The newest checkpoint <= `at_most` whose every byte is as written, and a line for each newer unusable one."""
    root, skipped = Path(root), []
    for path in sorted(root.glob("[0-9]*.partial")) if root.is_dir() else ():
        skipped.append(f"{path}: half written")
    for step in reversed(list_steps(root)):
        if at_most is not None and step > at_most:
            continue
        problem = _problem(root / str(step))
        if problem is None:
            return step, tuple(skipped)
        skipped.append(f"{root / str(step)}: {problem}")
    return None, tuple(skipped)


def newest_extra(root: str | Path) -> dict[str, Any]:
    """What the newest checkpoint with a readable record holds beside the state, its arrays unread; {} where none has."""
    for step in reversed(list_steps(root)):
        record = files.read_state(Path(root) / str(step) / RECORD).get("record")
        if isinstance(record, dict) and isinstance(record.get("extra"), dict):
            return record["extra"]
    return {}


def restore(
    root: str | Path,
    abstract: Any,
    at_most: int | None = None,
    *,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Restored | None:
    """Loads the newest whole checkpoint <= `at_most`, or returns None where there is none. Writes nothing.

    `abstract`: pytree of arrays or `ShapeDtypeStruct`s; their shardings say where each leaf goes, whatever mesh
    wrote it. `check(extra)` may raise before anything is loaded.
    Warns (`CheckpointWarning`) of every checkpoint skipped. Raises `UserError` where the leaves don't fit.
    """
    step, skipped = distributed.from_first(lambda: newest_whole(root, at_most))  # reads it all: once is enough
    for line in skipped if distributed.is_first() else ():
        warnings.warn(f"checkpoint skipped: {line}", CheckpointWarning, stacklevel=2)
    if step is None:
        return None
    path = Path(root).resolve() / str(step)
    record = files.read_json(path / RECORD)["record"]
    if check is not None:
        check(record["extra"])
    wanted = {name: abstract_leaf(leaf) for name, leaf in named(abstract).items()}
    _check_leaves(path, wanted, record["leaves"])
    with _orbax_options():
        loaded = ocp.load(path / "state", wanted)
    state = jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])
    return Restored(step, state, record["extra"], tuple(skipped))


def _snapshot(leaves: dict[str, Any], buffers: dict[str, np.ndarray]) -> dict[str, Any]:
    """Real copies, for Orbax reads the memory of CPU arrays later, when a step may have reused it by donation.

    They go into `buffers`, kept from save to save: fresh memory would cost more than the copying (7x, measured).
    """

    def copy(name: str, x: Any) -> Any:
        if isinstance(x, jax.Array):
            if next(iter(x.devices())).platform != "cpu":
                return x  # copied to the host by Orbax before save_async returns
            if not x.is_fully_addressable:
                return jax.block_until_ready(jnp.copy(x))
        x = np.asarray(x)
        if name not in buffers or _form(buffers[name]) != _form(x):
            buffers[name] = np.empty_like(x)
        np.copyto(buffers[name], x)
        return buffers[name]

    return {name: copy(name, leaf) for name, leaf in leaves.items()}


def _form(x: Any) -> list[Any]:
    return [list(x.shape), str(x.dtype)]


def abstract_leaf(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array; the first local device where it names none."""
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check_leaves(path: Path, wanted: dict[str, Any], saved: dict[str, Any]) -> None:
    lost = sorted(set(wanted) - set(saved)) + sorted(set(saved) - set(wanted))
    if lost:
        side = "checkpoint" if lost[0] in wanted else "model"
        raise UserError(f"{path} does not fit this model: {len(lost)} leaves differ, {lost[0]!r} is not in the {side}")
    for name, leaf in wanted.items():
        (shape, dtype), (want_shape, want_dtype) = saved[name], _form(leaf)
        if (shape, dtype) != (want_shape, want_dtype):
            raise UserError(
                f"{path} does not fit this model: {name} is {dtype}{shape} there and {want_dtype}{want_shape} here; "
                "use the config it was trained with"
            )


@contextlib.contextmanager
def _orbax_options() -> Iterator[None]:
    """Plain uncompressed zarr3 chunks: trained weights don't compress, and they are written in parallel."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_compression = False
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    saving.scoped_storage_options_creator = _in_one_piece
    with context:
        yield


def _in_one_piece(_: Any, leaf: Any) -> Any:
    """Cuts large stacks of layers into layers: chunks that lie in one piece in memory are written without a copy."""
    stack = leaf.ndim > 1 and leaf.nbytes > CHUNK_BYTES and leaf.nbytes // leaf.shape[0] >= LAYER_BYTES
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,)) if stack else None


def _commit(partial: Path, final: Path, record: dict[str, Any]) -> None:
    content: dict[str, Any] = {"record": record, "files": checksums(partial)}
    content["crc32"] = _crc_of_json(content)
    files.write_json(partial / RECORD, content, indent=None, durable=True)
    if final.exists():
        _discard(final)
    os.rename(partial, final)
    _sync_folder(final.parent)


def checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder` but the record: {relative path: [bytes, crc32]}."""
    names = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != RECORD
    )
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _crc_of_file(folder / name), names), strict=True))


def _crc_of_file(path: Path) -> list[int]:
    buffer, crc, size = bytearray(1 << 20), 0, 0
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            crc, size = zlib.crc32(memoryview(buffer)[:n], crc), size + n
    return [size, crc]


def _crc_of_json(content: dict[str, Any]) -> int:
    body = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _problem(path: Path) -> str | None:
    """What is wrong with the bytes of the checkpoint at `path`, or None."""
    try:
        if not (path / RECORD).exists():
            return f"{RECORD} is missing"
        content = files.read_json(path / RECORD)
        if content["crc32"] != _crc_of_json(content):
            return f"{RECORD} is damaged"
        found = checksums(path)
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (UserError, KeyError, TypeError):
        return f"{RECORD} is damaged"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for name, (size, crc) in content["files"].items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} of {size} bytes"
        if found[name][1] != crc:
            return f"{name} is damaged (checksum differs)"
    return None


def _discard(path: Path) -> None:
    """Deletes a whole checkpoint; the rename first, so that a crash never leaves half of one under its number."""
    trash = path.with_name(f"{path.name}.trash")
    _remove(trash)
    os.rename(path, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    for _ in range(20):  # a failed save may have writes in flight
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return files.FULL if "No space left" in text else text[:160]


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


class _Quiet(logging.Filter):
    """Drops what Orbax logs though it is no news: that a layout without OCDBT has no OCDBT files (on every save and
    load), and the tracebacks of writes whose failure `Checkpointer` raises."""

    NO_NEWS = ("Skipping merge of OCDBT", "TensorStore data files not found", "run() raised an exception")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in self.NO_NEWS)


logging.getLogger("absl").addFilter(_Quiet())
