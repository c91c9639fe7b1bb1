"""Windows: the one data format, in memory and as fixed-size records on disk.

A data set is N windows of T tokens. Position t reads `tokens[t]` and must predict `targets[t]` where
`domains[t] > 0`. `segments` numbers the documents inside a window (0 = padding); attention never crosses them
and positions restart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from phi3_jax.errors import UserError

MAX_SEGMENTS = 255  # segments, in version 1 of the records, and domains are stored in one byte
WIDE = 16_384  # tokens of a window from which on records are of version 2, whose segments have two bytes
FIELDS = ("tokens", "targets", "segments", "domains")


class Seen(NamedTuple):
    """A picture in windows: its tokens begin at `column` of window `row`; `picture` is its name."""

    row: int
    column: int
    picture: str


@dataclass(frozen=True)
class Windows:
    """N windows of T positions; all four integer arrays are (N, T). `seen`: the pictures in them, row by row."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    domains: np.ndarray
    seen: tuple[Seen, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        shapes = {getattr(self, name).shape for name in FIELDS}
        if len(shapes) != 1 or len(self.tokens.shape) != 2:
            raise ValueError(f"windows need four (N, T) arrays of one shape, got {sorted(shapes)}")

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> Windows:
        """Some of the windows: a slice, an index array or a mask over N."""
        numbers = np.arange(len(self))[rows].tolist() if self.seen else []
        seen = tuple(one._replace(row=i) for i, row in enumerate(numbers) for one in self.seen if one.row == row)
        return Windows(*(getattr(self, name)[rows] for name in FIELDS), seen=seen)

    @property
    def window(self) -> int:
        """T, tokens per window."""
        return self.tokens.shape[1]


def concatenate(parts: Sequence[Windows]) -> Windows:
    """All windows of `parts`, in order."""
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    seen = tuple(
        one._replace(row=one.row + start) for part, start in zip(parts, starts, strict=False) for one in part.seen
    )
    return Windows(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS), seen=seen)


def positions(segments: np.ndarray) -> np.ndarray:
    """Position of each token inside its own segment, int32 (..., T); padding counts like a segment."""
    segments = np.asarray(segments)
    index = np.arange(segments.shape[-1], dtype=np.int32)
    starts = np.ones(segments.shape, bool)
    starts[..., 1:] = segments[..., 1:] != segments[..., :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1).astype(np.int32)


def record_version(window: int) -> int:
    """Version of the records that windows of a length are written in; a manifest that names none has version 1."""
    return 1 if window < WIDE else 2


def most_segments(window: int) -> int:
    """Documents that a window may hold."""
    return MAX_SEGMENTS if record_version(window) == 1 else 65_535


def record_dtype(window: int, vocab: int, version: int | None = None) -> np.dtype:
    """Layout of one record: ids as uint16 (uint32 above 65,535), segments and domains as uint8, a crc32.

    Args:
      version: 2 for segments as uint16; default: that of new windows of this length.
    """
    ids = "<u2" if vocab <= 65_535 else "<u4"
    version = record_version(window) if version is None else version
    shape = (window,)
    return np.dtype(
        [
            ("tokens", ids, shape),
            ("targets", ids, shape),
            ("segments", "u1" if version == 1 else "<u2", shape),
            ("domains", "u1", shape),
            ("crc32", "<u4"),
        ]
    )


def check_ids(windows: Windows, vocab: int) -> None:
    """Raise UserError where a token or target id is outside 0..vocab-1, naming the id and its window."""
    for name in ("tokens", "targets"):
        ids = getattr(windows, name)
        bad = (ids < 0) | (ids >= vocab)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(
                f"{name[:-1]} id {ids[row, column]} in window {row} is outside the ids 0..{vocab - 1}; "
                "use the tokenizer that belongs to this data or a larger vocabulary"
            )


def encode(windows: Windows, vocab: int) -> list[bytes]:
    """One record per window, ready for ArrayRecord.

    Raises:
      UserError: an id outside the vocabulary, or a segment or domain number above what a record holds.
    """
    check_ids(windows, vocab)
    for name, most in (("segments", most_segments(windows.window)), ("domains", MAX_SEGMENTS)):
        values = getattr(windows, name)
        if values.size and (values.min() < 0 or values.max() > most):
            raise UserError(f"{name} reach {values.min()}..{values.max()}, a record holds 0..{most}; use fewer")
    dtype = record_dtype(windows.window, vocab)
    records = np.zeros(len(windows), dtype)
    for name in FIELDS:
        records[name] = getattr(windows, name)
    size, body = dtype.itemsize, dtype.itemsize - 4
    whole = records.tobytes()
    payloads = [whole[i : i + body] for i in range(0, len(whole), size)]
    return [payload + zlib.crc32(payload).to_bytes(4, "little") for payload in payloads]


def pack_documents(
    documents: Iterable[Sequence[int] | np.ndarray],
    window: int,
    eos: int,
    *,
    bos: int | None = None,
    domain: int = 1,
    chunk: int = 1024,
) -> Iterator[Windows]:
    """Pack token ids of documents into windows one after the other; yields up to `chunk` windows at a time.

    A document of n tokens becomes n + 1 positions: inputs `bos, x1 .. xn`, targets `x1 .. xn, eos`, all with
    loss in `domain`; `bos` defaults to `eos` (the separator also starts the next document). So every token
    and every eos is a target exactly once, whatever the cuts: targets = tokens + documents. A document that
    does not fit goes on in the next window, as segment 1 with positions from 0 and without the earlier
    context. No target crosses into another document. Empty documents are skipped. A window takes at most
    `most_segments`; it and the last one are zero-padded.
    """
    bos = eos if bos is None else bos
    buffers = np.zeros((4, chunk, window), np.int32)
    row = column = segment = 0
    most = most_segments(window)
    for document in documents:
        ids = np.asarray(document, np.int32)
        if not ids.size:
            continue
        pairs = np.empty((2, ids.size + 1), np.int32)
        pairs[0, 0], pairs[0, 1:], pairs[1, :-1], pairs[1, -1] = bos, ids, ids, eos
        while pairs.shape[1]:
            if column == window or segment == most:
                row, column, segment = row + 1, 0, 0
            if row == chunk:
                yield Windows(*buffers)
                buffers = np.zeros_like(buffers)
                row = 0
            segment += 1
            end = min(window, column + pairs.shape[1])
            buffers[:2, row, column:end] = pairs[:, : end - column]
            buffers[2, row, column:end] = segment
            buffers[3, row, column:end] = domain
            pairs, column = pairs[:, end - column :], end
    if column:
        yield Windows(*buffers[:, : row + 1])
