"""Checkpoints larger than memory: written and read a layer at a time, in the same format as `checkpoint`.

Orbax saves whole arrays only. Here it writes the description of a small stand-in with the same names, which `stream`
then enlarges to the true shapes and fills through tensorstore.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from phi3_jax import finite
from phi3_jax.errors import UserError
from phi3_jax.records import checkpoint, files

Forms = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def _chunks(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Chunk of at most CHUNK_BYTES: cut along the first axes, one layer at most of a large stack."""
    chunk = list(shape)
    for axis in range(len(shape)):
        size = math.prod(chunk) * itemsize
        if size <= checkpoint.CHUNK_BYTES:
            break
        chunk[axis] = max(1, chunk[axis] * checkpoint.CHUNK_BYTES // size)
    return chunk


def _open(folder: Path, **options: Any) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return ts.open(spec | options).result()


def _array_folder(state: Path, name: str) -> Path:
    found = [path for path in (state / name, state / "state" / name) if (path / "zarr.json").exists()]
    if not found:
        raise UserError(f"{state} holds no array {name}; the checkpoint is of another kind of model")
    return found[0]


@contextlib.contextmanager
def stream(root: Path, step: int, forms: Forms, extra: dict[str, Any]) -> Iterator[Callable[..., None]]:
    """Context in which `put(name, layer, array)` writes checkpoint `step` of `root`; it appears whole at the end.

    Args:
      root: folder of the checkpoints; made.
      step: number of the checkpoint.
      forms: {leaf name: (shape, dtype)}.
      extra: JSON for the record.

    Yields:
      put(name, layer, array): array is the leaf at index `layer` of its first axis, or all of it where layer is None.

    Raises:
      UserError: the disk is full or cannot be written; what was written is removed.
    """
    partial = root / f"{step}.partial"
    try:
        partial.mkdir(parents=True)
        with checkpoint._orbax_options():
            ocp.save(partial / "state", {k: np.zeros((1,) * len(s), d) for k, (s, d) in forms.items()})
        arrays = {name: _enlarge(partial / "state", name, *form) for name, form in forms.items()}

        def put(name: str, layer: int | None, array: np.ndarray) -> None:
            target = arrays[name] if layer is None else arrays[name][layer]
            target.write(array).result()

        yield put
        leaves = {name: [list(shape), str(np.dtype(dtype))] for name, (shape, dtype) in forms.items()}
        checkpoint._commit(partial, root / str(step), {"step": step, "extra": extra, "leaves": leaves})
    except BaseException as error:
        checkpoint._remove(partial)
        if isinstance(error, UserError) or not isinstance(error, (OSError, ValueError)):
            raise
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in forms.values())
        raise UserError(
            f"writing {checkpoint._mb(size)} to {root} ({checkpoint._mb(checkpoint._free(root))} free) failed: "
            f"{checkpoint._reason(error)}; put that right and run again"
        ) from error


def _enlarge(state: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> ts.TensorStore:
    """Gives the stand-in of a leaf its true shape, and opens it."""
    folder = _array_folder(state, name)
    metadata = files.read_json(folder / "zarr.json")
    # One plain chunk per file; the stand-in's codec would cut it into its own chunks of one element.
    metadata |= {"shape": list(shape), "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = _chunks(shape, np.dtype(dtype).itemsize)
    return _open(folder, metadata=metadata, create=True, delete_existing=True, store_data_equal_to_fill_value=True)


class Reader:
    """Reads the leaves of one checkpoint whose names begin with a prefix, part by part.

    Attributes:
      path: folder of the checkpoint.
      dtypes: {name without prefix: dtype}.
    """

    def __init__(self, root: Path, prefix: str, step: int | None = None) -> None:
        """Takes checkpoint `step` of `root`, or the newest whole one; UserError where there is none."""
        found, skipped = checkpoint.newest_whole(root, at_most=step)
        if found is None or (step is not None and found != step):
            raise UserError(f"{root} holds no whole checkpoint{': ' + '; '.join(skipped) if skipped else ''}")
        self.path, self._prefix = (root / str(found)).resolve(), prefix
        leaves = files.read_json(self.path / checkpoint.RECORD)["record"]["leaves"]
        mine = {k.removeprefix(prefix): form for k, form in leaves.items() if k.startswith(prefix)}
        self._shapes = {k: tuple(shape) for k, (shape, _) in mine.items()}
        self.dtypes = {k: np.dtype(getattr(ml_dtypes, dtype, dtype)) for k, (_, dtype) in mine.items()}
        self._arrays: dict[str, ts.TensorStore] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError naming every leaf that `shapes` and the checkpoint do not share."""
        wrong = [k for k in sorted({*shapes, *self._shapes}) if shapes.get(k) != self._shapes.get(k)]
        if wrong:
            texts = (f"{k} {self._shapes.get(k)} instead of {shapes.get(k)}" for k in wrong)
            raise UserError(f"{self.path} does not hold the model of its config.json: {', '.join(texts)}")

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """A leaf, or one index of its first axis; UserError where it holds NaN or infinities."""
        if name not in self._arrays:
            self._arrays[name] = _open(_array_folder(self.path / "state", self._prefix + name), open=True)
        array = self._arrays[name]
        part = np.ascontiguousarray((array if layer is None else array[layer]).read().result())
        finite.require(part, self.path, name if layer is None else f"{name}[{layer}]")
        return part

    def read_parts(self, name: str, put: Callable[[int | None, np.ndarray], None]) -> None:
        """Gives a leaf to `put` along its first axis where it is large, whole otherwise."""
        shape, dtype = self._shapes[name], self.dtypes[name]
        stacked = len(shape) > 2 and math.prod(shape) * dtype.itemsize > checkpoint.CHUNK_BYTES
        for layer in range(shape[0]) if stacked else [None]:
            put(layer, self.read(name, layer))
