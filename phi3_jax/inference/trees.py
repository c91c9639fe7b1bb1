"""Rows that begin alike, packed: what they share is read once, and several of them lie in one row of a program.

A tree is a trunk, the tokens that all of its reads begin with, and what each read goes on with. It lies in a row as one
document: trunk first, then one branch after the other, each at the positions that it has alone. Attention lets a branch see
the trunk and itself (`Mask.branches`), so that every number is that of the read alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Read = tuple[int, ...]
LEAST = 8  # tokens that are shared, at least
FULL = 512  # tokens of a row that holds several trees, where there are so many
MOST = 1536  # of a tree of several reads: within mini's window, and what attention writes out is small


@dataclass(frozen=True)
class Tree:
    """Reads that begin with the same `trunk` tokens.

    Attributes:
      size: tokens of it in a row, or the numbers that are read off it where those are more.
    """

    trunk: int
    reads: tuple[Read, ...]
    size: int


def grow(reads: Mapping[Read, int], most: int = MOST) -> list[Tree]:
    """Trees of reads, each of which is in one; read -> how many numbers are read off it.

    A read joins its neighbours in the alphabet where that saves tokens, where the next one is not much more like it, and
    where the tree stays within `most`.
    """
    rows = sorted(reads)
    alike = [*map(_alike, rows, rows[1:]), 0]
    found, first = [], 0
    while first < len(rows):
        trunk, asked, total = len(rows[first]), reads[rows[first]], len(rows[first])
        stop = first + 1
        while stop < len(rows):
            count, common = stop - first, min(trunk, alike[stop - 1])
            total, asked = total + len(rows[stop]), asked + reads[rows[stop]]
            joins = common >= LEAST and count * common > (count - 1) * trunk and 2 * alike[stop - 1] >= alike[stop]
            if not joins or max(total - count * common, asked) > most:
                total, asked = total - len(rows[stop]), asked - reads[rows[stop]]
                break
            trunk, stop = common, stop + 1
        found.append(Tree(trunk, tuple(rows[first:stop]), max(total - (stop - first - 1) * trunk, asked)))
        first = stop
    return found


def _alike(a: Read, b: Read) -> int:
    """Tokens that two reads begin with."""
    most = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:most]) != np.asarray(b[:most]))
    return int(differ[0]) if differ.size else most


def length_of(n: int, least: int = 32) -> int:
    """n rounded up to `least` (a power of two), its doubles, and from 256 on half octaves: 256, 384, 512, 768, .."""
    size = max(least, 1 << (n - 1).bit_length())
    return size * 3 // 4 if size > 256 and least < n <= size * 3 // 4 else size


@dataclass
class Packed:
    """Rows of one program, (rows, time) int32 each.

    Attributes:
      tokens, positions: of each place; a tree begins at position 0.
      documents: number of the tree, from 1 on; 0 is padding.
      branches: 0 in a trunk, from 1 on in the branches of a tree.
      at, said: places off which numbers are read, and the tokens that are said there; as many as there are, then zeros.
      counts: (rows,) how many of them there are.
      places: read -> (row, where each of its tokens lies).
      parted: whether any row has more than one read.
    """

    tokens: np.ndarray
    positions: np.ndarray = field(init=False)
    documents: np.ndarray = field(init=False)
    branches: np.ndarray = field(init=False)
    at: np.ndarray = field(init=False)
    said: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    places: dict[Read, tuple[int, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("positions", "documents", "branches", "at", "said"):
            setattr(self, name, np.zeros_like(self.tokens))
        self.positions[:] = np.arange(self.tokens.shape[1])
        self.counts = np.zeros(len(self.tokens), np.int32)

    @property
    def parted(self) -> bool:
        return bool((self.documents > 1).any() or self.branches.any())

    def put(self, tree: Tree, row: int, start: int, number: int) -> int:
        """Lays a tree down from `start` on; the first free place after it."""
        trunk = np.arange(start, start + tree.trunk)
        self._lay(row, trunk, tree.reads[0][: tree.trunk], 0, number, 0)
        start += tree.trunk
        for branch, read in enumerate(tree.reads, 1):
            own = np.arange(start, start + len(read) - tree.trunk)
            self._lay(row, own, read[tree.trunk :], tree.trunk, number, branch)
            self.places[read] = row, np.concatenate([trunk, own])
            start += own.size
        return start

    def _lay(self, row: int, places: np.ndarray, ids: Sequence[int], first: int, number: int, branch: int) -> None:
        self.tokens[row, places] = ids
        self.positions[row, places] = first + np.arange(places.size)
        self.documents[row, places], self.branches[row, places] = number, branch

    def ask(self, read: Read, first: int, said: Sequence[int]) -> tuple[int, slice]:
        """Asks for `said[i]` after token first + i of a read; the row and columns of the answers."""
        row, places = self.places[read]
        columns = slice(int(self.counts[row]), int(self.counts[row]) + len(said))
        self.at[row, columns] = places[first : first + len(said)]
        self.said[row, columns] = said
        self.counts[row] = columns.stop
        return row, columns


def pack(trees: Sequence[Tree], batch: int, full: int = FULL) -> Iterator[Packed]:
    """All trees, the largest first, in at most `batch` rows of a length of `length_of` at a time.

    A row of more than `full` tokens holds one tree: long rows are what the fast kernels of attention are for, and those
    know no documents.
    """
    left = sorted(trees, key=lambda tree: (-tree.size, tree.reads))
    while left:
        long = left[0].size > full
        time = length_of(left[0].size if long else min(full, sum(tree.size for tree in left[:full])))
        rows: list[list[Tree]] = []
        room: list[int] = []
        later: list[Tree] = []
        for at, tree in enumerate(left):
            if (len(rows) == batch and max(room) < left[-1].size) or (long and tree.size <= full):
                later += left[at:]
                break
            row = next((i for i, free in enumerate(room) if tree.size <= free), None)
            if row is None and len(rows) < batch:
                row = len(rows)
                rows.append([])
                room.append(0 if long else time)
            if row is None:
                later.append(tree)
                continue
            rows[row].append(tree)
            room[row] -= 0 if long else tree.size
        count = min(1 << (len(rows) - 1).bit_length(), batch)
        packed = Packed(np.zeros((count, time), np.int32))
        for row, some in enumerate(rows):
            start = 0
            for number, tree in enumerate(some, 1):
                start = packed.put(tree, row, start, number)
        yield packed
        left = later
