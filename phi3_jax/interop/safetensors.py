"""Safetensors files, read and written piece by piece so that memory never holds a whole one.

Format: eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from phi3_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
STORED = DTYPES | {"U8": np.dtype(np.uint8)}  # also of quantised models, which are no Hugging Face folders
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD_BYTES = 5_000_000_000  # as transformers cuts


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, first byte in it, dtype name of the format, shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def header(path: Path) -> dict[str, Entry]:
    """Entries of one file, each checked to lie inside it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise UserError(f"{path} is truncated: {size} bytes, its header alone needs more; fetch it again")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        fields = {k: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no safetensors file: its header cannot be read; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    whole = 8 + length + max((end for *_, end in fields.values()), default=0)
    if whole != size:
        problem = "truncated" if size < whole else "damaged"
        raise UserError(f"{path} is {problem}: {size} bytes, its header says {whole}; fetch it again")
    for name, (dtype, shape, begin, end) in fields.items():
        if dtype in STORED and end - begin != math.prod(shape) * STORED[dtype].itemsize:
            raise UserError(f"{path} is damaged: {name} is {dtype}{list(shape)} in {end - begin} bytes; fetch it again")
    return {k: Entry(path, 8 + length + begin, dtype, shape) for k, (dtype, shape, begin, _) in fields.items()}


def find(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder, by its index or, without one, from every safetensors file in it.

    Raises:
      UserError: no such folder, only pickle files, an index that names absent files, a file that is not whole.
    """
    if folder.suffix in PICKLES:
        raise UserError(f"{folder} is a pickle file, which can run code when read; only safetensors folders are read")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name a folder with config.json and *.safetensors")
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no index of safetensors files (weight_map is missing)") from error
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{index} names files that are not there: {', '.join(absent)}; fetch them")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    pickles = [p.name for p in (paths or sorted(folder.iterdir())) if p.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickle files, which can run code when read: {', '.join(pickles)}; only "
            "safetensors are read: convert them first"
        )
    if not paths:
        raise UserError(f"{folder} holds no *.safetensors files")
    entries: dict[str, Entry] = {}
    for path in paths:
        found = header(path)
        if twice := sorted(set(found) & set(entries)):
            raise UserError(f"{path} and {entries[twice[0]].path.name} both hold {', '.join(twice)}; remove one file")
        entries |= found
    return entries


class Files:
    """Open files by path, for positioned reads and writes from several threads."""

    def __init__(self, paths: Iterable[Path], write: bool = False) -> None:
        self._write, self._open = write, {path: os.open(path, os.O_RDWR if write else os.O_RDONLY) for path in paths}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            if self._write:
                os.fsync(handle)
            os.close(handle)

    def read_into(self, path: Path, offset: int, array: np.ndarray) -> None:
        """Fills a contiguous array from the bytes at `offset`."""
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            count = os.preadv(self._open[path], [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{path} is truncated at byte {offset + done}; fetch it again")
            done += count

    def write_at(self, path: Path, offset: int, array: np.ndarray) -> None:
        """Writes a contiguous array's bytes at `offset`."""
        view, done = memoryview(array.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            done += os.pwrite(self._open[path], view[done:], offset + done)


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path, single: str | None = None
) -> dict[str, Entry]:
    """Creates the files for `tensors` ({name: (dtype, shape)}): headers written, space reserved, index beside them.

    One `model.safetensors`, or shards of at most 5 GB (one tensor at least) and an index; or one file called `single`.
    """
    sizes = {k: math.prod(shape) * STORED[dtype].itemsize for k, (dtype, shape) in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES and single is None:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    entries, where = {}, {}
    for i, names in enumerate(shards):
        one = len(shards) == 1
        path = folder / (
            single or "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            dtype, shape = tensors[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
            where[name] = path.name
            offset += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)  # a full disk is found out now
        for name in names:
            dtype, shape = tensors[name]
            entries[name] = Entry(path, 8 + len(text) + header[name]["data_offsets"][0], dtype, shape)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return entries
