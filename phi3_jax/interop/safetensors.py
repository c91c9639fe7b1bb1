"""Safetensors files, read and written piece by piece so that memory never holds a whole one.

Format: eight bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.foreign import Fields
from phi3_jax.records import files

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ = DTYPES | {"F64": np.dtype(np.float64)}  # read as float32, never written
# Bits of every dtype of the format.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
HEADER_BYTES = 100_000_000  # the format's own limit
LARGEST = 2**63 - 1  # of an offset
SUFFIX = ".safetensors"
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
    """Entries of one file: tensors of known dtypes that fill the file, each its own bytes, without gap or overlap.

    Raises:
      UserError: the file is missing, cut, damaged, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise UserError(f"{path} is truncated: {size} bytes, its header alone needs more; fetch it again")
            if length > HEADER_BYTES:
                raise UserError(f"{path} is no safetensors file: a header of {length} bytes; at most {HEADER_BYTES}")
            content = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    table = Fields(files.parse_json(content, f"{path} is no safetensors file: its header"), path)
    names = [name for name in table.names() if name != "__metadata__"]
    spans = {name: _span(path, name, table.raw(name)) for name in names}
    end = 0
    for name, (entry, stop) in sorted(spans.items(), key=lambda item: (item[1][0].offset, item[1][1])):
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise UserError(f"{path} is damaged: {name} begins at byte {entry.offset} and {what}; fetch it again")
        end = stop
    whole = 8 + length + end
    if whole != size:
        problem = "truncated" if size < whole else "damaged"
        raise UserError(f"{path} is {problem}: {size} bytes, its header says {whole}; fetch it again")
    return {k: dataclasses.replace(entry, offset=8 + length + entry.offset) for k, (entry, _) in spans.items()}


def _span(path: Path, name: str, tree: object) -> tuple[Entry, int]:
    """(entry with its offset among the data, where it ends) of one tensor."""
    fields = Fields({} if tree is None else tree, path, f"{name}.")
    dtype, shape = fields.text("dtype", valid=BITS), fields.wholes("shape", high=LARGEST)
    offsets = fields.wholes("data_offsets", high=LARGEST)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fields.refuse("data_offsets", "must be two integers, begin and end; fetch the file again")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise UserError(f"{path} is damaged: {name} is {dtype}{list(shape)} in {end - begin} bytes; fetch it again")
    return Entry(path, begin, dtype, shape), end


def find(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder, by its index or, without one, from every safetensors file in it.

    Files of adapters ("adapter_*") beside the weights are left out, and a line on stderr says so.

    Raises:
      UserError: no such folder, only pickle files or an adapter, an index that names absent files, a file that is not
        whole.
    """
    if folder.suffix in PICKLES:
        raise UserError(f"{folder} is a pickle file, which can run code when read; only safetensors folders are read")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name a folder with config.json and *.safetensors")
    adapters = sorted(p.name for p in folder.iterdir() if is_adapter(p.name) and p.suffix in (SUFFIX, *PICKLES))
    index = folder / INDEX
    if index.exists():
        paths = [folder / name for name in _indexed(index)]
    else:
        paths = sorted(p for p in folder.glob(f"*{SUFFIX}") if not is_adapter(p.name))
    others = [p for p in folder.iterdir() if not is_adapter(p.name)]
    pickles = [p.name for p in (paths or sorted(others)) if p.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickle files, which can run code when read: {', '.join(pickles)}; only "
            "safetensors are read: convert them first"
        )
    if not paths:
        only = (
            f" but an adapter ({', '.join(adapters)}); merge it into its base model and save that" if adapters else ""
        )
        raise UserError(f"{folder} holds no *.safetensors files{only}")
    if adapters:
        print(f"note: {folder / adapters[0]} is an adapter and is not read; merge it first to use it", file=sys.stderr)
    entries: dict[str, Entry] = {}
    for path in paths:
        found = header(path)
        if twice := sorted(set(found) & set(entries)):
            raise UserError(f"{path} and {entries[twice[0]].path.name} both hold {', '.join(twice)}; remove one file")
        entries |= found
    return entries


def is_adapter(name: str) -> bool:
    """Whether a file is part of a low-rank adapter (PEFT's names), not of the model beside it."""
    return name.startswith("adapter_")


def _indexed(index: Path) -> list[str]:
    """Names of the files of an index, all of which are there."""
    fields = Fields(files.read_json(index), index)
    weights = fields.inside("weight_map")
    if weights is None:
        raise UserError(f"{index} is no index of safetensors files (weight_map is missing)")
    names = sorted({weights.text(name) for name in weights.names()})
    if odd := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {', '.join(map(repr, odd))}; weights lie in the folder of their index")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(absent)}; fetch them")
    return names


class Files:
    """Positioned reads and writes of files, from several threads; each opens its file, so that none stay open."""

    def __init__(self, paths: Iterable[Path], write: bool = False) -> None:
        self._paths, self._write = set(paths), write

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        if self._write:
            for path in self._paths:
                with _opened(path, os.O_RDWR) as handle:
                    os.fsync(handle)  # of the file, whoever wrote to it

    def read_into(self, path: Path, offset: int, array: np.ndarray) -> None:
        """Fills a contiguous array from the bytes at `offset`."""
        view, done = array.reshape(-1).view(np.uint8).data, 0
        with _opened(path, os.O_RDONLY) as handle:
            while done < len(view):
                count = os.preadv(handle, [view[done:]], offset + done)
                if count == 0:
                    raise UserError(f"{path} is truncated at byte {offset + done}; fetch it again")
                done += count

    def write_at(self, path: Path, offset: int, array: np.ndarray) -> None:
        """Writes a contiguous array's bytes at `offset`."""
        view, done = array.reshape(-1).view(np.uint8).data, 0
        with _opened(path, os.O_RDWR) as handle:
            while done < len(view):
                done += os.pwrite(handle, view[done:], offset + done)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], folder: Path, single: str | None = None
) -> dict[str, Entry]:
    """Creates the files for `tensors` ({name: (dtype, shape)}): headers written, space reserved, index beside them.

    One `model.safetensors`, or shards of at most 5 GB (one tensor at least) and an index; or one file called `single`.
    """
    sizes = {k: math.prod(shape) * BITS[dtype] // 8 for k, (dtype, shape) in tensors.items()}
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
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
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
        files.write_json(folder / INDEX, index, indent=2)
    return entries
