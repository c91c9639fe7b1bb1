"""Rows that lists are judged by: windows of documents that nobody trains on, and questions for needles in such windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from phi3_jax.data import needles
from phi3_jax.data.corpora import text
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError

HELD_OUT = 0.06  # share of documents, by hash: the first half is searched with, the second evaluated with
SIDES = ("search", "evaluation", "training")
MOST = 4096  # pieces that are kept of a side
DEPTHS = 10


@dataclass(frozen=True)
class Rows:
    """Rows with the positions that count.

    Attributes:
      tokens, targets: (n, T) int32; position t is to say targets[t].
      index: (n, c) int32, positions that count, ascending.
    """

    tokens: np.ndarray
    targets: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """Twelve hex digits of their content."""
        content = hashlib.sha256()
        for part in (self.tokens, self.targets, self.index):
            content.update(np.ascontiguousarray(part, np.int32).tobytes())
        return content.hexdigest()[:12]


def of_ids(ids: np.ndarray, first: int) -> Rows:
    """Rows of ids (n, T + 1) in which the targets from position `first` on count."""
    index = np.broadcast_to(np.arange(first, ids.shape[1] - 1), (len(ids), ids.shape[1] - 1 - first))
    return Rows(ids[:, :-1], ids[:, 1:], index)


@dataclass
class Pieces:
    """Windows of `size` ids, each inside one document, by side; `longest` is the longest document's tokens."""

    size: int
    sides: dict[str, list[np.ndarray]]
    longest: int = 0
    documents: int = 0

    def draw(self, side: str, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` pieces of a side, of training's where it has none; all come once before one comes twice."""
        found = self.sides[side] or self.sides["training"]
        order = np.concatenate([rng.permutation(len(found)) for _ in range(-(-count // len(found)))])
        return np.stack([found[i] for i in order[:count]])


def pieces(documents: Iterable[str], tokenizer: Tokenizer, size: int) -> Pieces:
    """Cuts documents into pieces that do not overlap.

    Raises:
      UserError: no document has `size` tokens; names the longest's length.
    """
    found = Pieces(size, {side: [] for side in SIDES})
    for document in documents:
        here = side_of(document)
        ids = np.asarray(tokenizer.encode(document), np.int32)
        found.longest, found.documents = max(found.longest, ids.size), found.documents + 1
        side = found.sides[here]
        side += list(ids[: ids.size // size * size].reshape(-1, size)[: MOST - len(side)])
    if not any(found.sides.values()):
        raise UserError(
            f"--to {size - 1}: the data's longest document has {found.longest:,} tokens, and rows of {size - 1:,} lie "
            "inside one document; give longer documents, or a nearer target"
        )
    return found


def side_of(document: str) -> str:
    """Which of `SIDES` a document is on, by a hash of its text."""
    shares = (HELD_OUT / 2, HELD_OUT, 1.0)
    return next(side for side, share in zip(SIDES, shares, strict=True) if text.is_held_out(document, share))


def text_rows(found: Pieces, side: str, count: int, first: int, seed: int) -> Rows:
    """Rows of text of which the targets from `first` on count."""
    return of_ids(found.draw(side, count, np.random.default_rng([seed, 1, SIDES.index(side)])), first)


def needle_rows(found: Pieces, side: str, count: int, form: needles.Form, seed: int, length: int | None = None) -> Rows:
    """Questions for needles at depths from the beginning to the end of the row, of which the answers count.

    Args:
      length: tokens of a row; default: those of a piece less one.
    """
    length = found.size - 1 if length is None else length
    rng = np.random.default_rng([seed, 2, SIDES.index(side), length])
    drawn = found.draw(side, count, rng)
    depths = [(i % DEPTHS + 0.5) / DEPTHS for i in range(count)]
    ids = np.stack([needles.question(p[: length + 1], form, rng, d) for p, d in zip(drawn, depths, strict=True)])
    return of_ids(ids, length - form.value)


def bins(first: int, last: int) -> list[tuple[int, int]]:
    """Positions in bins that double: (0, first), (first, 2 first), .. up to `last`."""
    found = [(0, min(first, last))]
    while found[-1][1] < last:
        found.append((found[-1][1], min(2 * found[-1][1], last)))
    return found
