"""What a query may see: a small description, and the boolean arrays that implementations make of its parts."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import BlockSparse


@dataclasses.dataclass(frozen=True)
class Mask:
    """Causal attention, narrowed by a window, documents and phi-3-small's block pattern.

    Attributes:
      window: number of keys a query sees, itself included; None = all earlier ones.
      blocksparse: per-head pattern, or None for dense.
      segments: (batch, time) document numbers; 0 is padding. None = one document per row.
      positions: (batch, time) positions inside each document, from which the block pattern counts, so that a packed
        document is masked as it is alone. None = the pattern counts from the row's start.
      branches: (batch, time) numbers: of its own document a query sees what has number 0, with which all branches begin,
        and what has its own number; window and pattern count by `positions`, which must be there. None = no branches.
    """

    window: int | None = None
    blocksparse: BlockSparse | None = None
    segments: jax.Array | None = None
    positions: jax.Array | None = None
    branches: jax.Array | None = None

    def simplified(self, time: int) -> Mask:
        """The same mask without the parts that leave out nothing at this length or mean nothing."""
        window = None if self.window is not None and self.window >= time else self.window
        pattern = self.blocksparse
        if pattern is not None and time <= pattern.block * pattern.local_blocks:
            pattern = None
        counts = pattern is not None and self.segments is not None and pattern.per_document
        counts = counts or (window is not None and self.branches is not None)
        return dataclasses.replace(
            self, window=window, blocksparse=pattern, positions=self.positions if counts else None
        )


class Origin(NamedTuple):
    """Which part one device has: the row of each of its queries, (t,) (None: all rows in order), its first head, and how
    many heads there are in all (0: the part's own)."""

    rows: jax.Array | None = None
    head: jax.Array | int = 0
    heads: int = 0


ORIGIN = Origin()


def piece(time: int, shards: int) -> int:
    """Rows that lie in order in each part of `part_rows`: half of a part, where halves are whole numbers."""
    return time // (2 * shards) if shards > 1 and time % (2 * shards) == 0 else time // shards


def part_rows(time: int, shards: int, part: Any) -> Any:
    """(time / shards,) rows of the queries of one of `shards` parts, each of which sees as many keys as any other.

    A later query sees more keys. So part i has its own first half, and the second half of the part as far from the end as i
    is from the beginning. `part` may be traced.
    """
    half, here = piece(time, shards), np.arange(time // shards, dtype=np.int32)
    first = (here < half).astype(np.int32)
    return here + time // shards * (first * part + (1 - first) * (shards - 1 - part))


def blocksparse_allowed(
    pattern: BlockSparse, q_pos: jax.Array, k_pos: jax.Array, heads: int, first: jax.Array | int = 0, total: int = 0
) -> jax.Array:
    """Block pattern without causality: (..., heads, q, k) from q_pos (..., q) and k_pos (..., k).

    The `heads` heads here start at `first` of `total` (0: they are all).
    """
    q_block = (q_pos // pattern.block)[..., None, :, None]
    k_block = (k_pos // pattern.block)[..., None, None, :]
    head = (first + jnp.arange(heads))[:, None, None]
    return pattern.keeps(q_block, k_block, pattern.shift(head, total or heads))


def seen(mask: Mask, rows: slice, keys: slice, heads: tuple[int, int], origin: Origin = ORIGIN) -> jax.Array:
    """Boolean mask of some queries of a part and some keys, broadcastable to (b, g, r, rows, keys).

    `heads` are (kv heads, queries a kv head) of the part.
    """
    key = jnp.arange(keys.start, keys.stop)
    row = jnp.arange(rows.start, rows.stop) if origin.rows is None else origin.rows[rows]
    of_rows = lambda x: x[:, rows] if origin.rows is None else jnp.take(x, row, axis=1)  # noqa: E731
    both = lambda x: (of_rows(x)[:, :, None], x[:, None, keys])  # noqa: E731
    ok = row[:, None] >= key[None, :]
    if mask.window is not None and mask.branches is None:
        ok &= row[:, None] - key[None, :] < mask.window
    if mask.segments is not None:
        of_query, of_key = both(mask.segments)
        ok = ok & (of_query == of_key)
        if mask.branches is not None:
            of_query, of_key = both(mask.branches)
            ok &= (of_key == 0) | (of_query == of_key)
            if mask.window is not None:
                of_query, of_key = both(mask.positions)
                ok &= of_query - of_key < mask.window
        ok = ok[:, None, None]
    if mask.blocksparse is not None:
        q_pos, k_pos = (row, key) if mask.positions is None else (of_rows(mask.positions), mask.positions[:, keys])
        sparse = blocksparse_allowed(mask.blocksparse, q_pos, k_pos, heads[0] * heads[1], origin.head, origin.heads)
        ok = ok & sparse.reshape(*sparse.shape[:-3], *heads, *sparse.shape[-2:])
    return ok
