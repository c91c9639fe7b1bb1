"""JAX's splash attention for TPU: causal, window, packed documents and phi-3-small's per-head block pattern.

The static part of the mask (everything but documents) is cut into tiles when the program is traced; tiles that no query
sees cost nothing. Tiles of the block pattern are one vector register wide in keys, because every 512 keys hold a kept
block: wider ones would all be partly kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import BlockSparse
from phi3_jax.models.masks import Mask, Origin, part_rows, piece

if TYPE_CHECKING:
    from jaxtyping import Float

LANES = 128  # keys in the narrowest tile
TILE = 1024  # queries and keys in the widest tile that fits a core's memory in both passes


def obstacle(problem: Any) -> str | None:
    """Why splash cannot serve an `attention.Problem`, or None."""
    if problem.platform != "tpu":
        return f"it runs on TPU, not on {problem.platform}"
    if problem.time % LANES:
        return f"time={problem.time} is no multiple of {LANES}"
    if (part := piece(problem.time, problem.time_shards)) % LANES:
        return (
            f"time={problem.time} over {problem.time_shards} devices goes in pieces of {part}, no multiple of {LANES}"
        )
    if problem.head_dim % 8:
        return f"head_dim={problem.head_dim} is no multiple of 8"
    if problem.mask.branches is not None:
        return "it knows no branches of a document"
    if problem.mask.positions is not None:
        return (
            "its block pattern counts from the row's start, not from each packed document's (per_document=False does)"
        )
    return None


class BlockPattern(splash_masks.Mask):
    """Causal block-sparse mask of one head, made tile by tile; equal for heads that keep the same distant blocks.

    `rows` are those of the queries in their order.
    """

    def __init__(self, pattern: BlockSparse, time: int, residue: int, rows: np.ndarray) -> None:
        self.pattern, self.time, self.residue, self.rows = pattern, time, residue, rows

    @property
    def shape(self) -> tuple[int, int]:
        return (self.time, self.time)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        row, key, pattern = self.rows[index[0]][:, None], np.arange(self.time)[index[1]][None], self.pattern
        return pattern.keeps(row // pattern.block, key // pattern.block, self.residue) & (key <= row)

    def _identity(self) -> tuple[Any, ...]:
        return (self.pattern, self.time, self.residue, self.rows.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockPattern) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _head_masks(mask: Mask, time: int, heads: int, rows: np.ndarray) -> list[splash_masks.Mask]:
    """Of each head; `rows` are those of the queries in their order."""
    if mask.blocksparse is not None:
        pattern, stride = mask.blocksparse, mask.blocksparse.vert_stride
        return [BlockPattern(pattern, time, pattern.shift(head, heads) % stride, rows) for head in range(heads)]
    shape = (time, time)
    one = (
        splash_masks.CausalMask(shape)
        if mask.window is None
        else splash_masks.LocalMask(shape, (mask.window - 1, 0), 0)
    )
    one.q_sequence = rows.astype(np.int32)
    return [one] * heads


def _tile(time: int, most: int = TILE) -> int:
    """The widest tile that divides a time: a multiple of LANES, at most `most`."""
    return next(size for size in range(most, 0, -LANES) if time % size == 0)


def prepare(mask: Mask, shape: tuple[int, ...], head_shards: int, time_shards: int, interpret: bool = False) -> Any:
    """The kernel of a mask for q of `shape` (batch, time, kv_heads, queries_per_kv, head_dim), cut for the shards.

    Each shard over time has the queries of `masks.part_rows`.
    """
    time, heads = shape[1], shape[2] * shape[3]
    order = np.concatenate([part_rows(time, time_shards, i) for i in range(time_shards)])
    rows, keys = _tile(piece(time, time_shards)), LANES if mask.blocksparse is not None else _tile(time)
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=min(keys, 512), block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=min(keys, 512), block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    heads_mask = splash_masks.MultiHeadMask(_head_masks(mask, time, heads, order))
    return splash.make_splash_mha(
        heads_mask, block_sizes=sizes, head_shards=head_shards, q_seq_shards=time_shards, interpret=interpret
    )


def specs(kernel: Any, mesh: jax.sharding.AbstractMesh, spec: P) -> Any:
    """PartitionSpecs of the kernel's tile tables; `spec` says how heads and queries' times are split."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, spec))


def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    origin: Origin,
    kernel: Any,
) -> Float[jax.Array, "b t g r k"]:
    """One device's part; `kernel` is its part of `prepare`."""
    b, t, g, r, d = q.shape
    q = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, g * r, d).transpose(0, 2, 1, 3)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    segments = None
    if mask.segments is not None:
        mine = mask.segments
        if origin.rows is not None:
            mine = jnp.take(mine, origin.rows, axis=1)
        segments = splash.SegmentIds(q=mine, kv=mask.segments)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3).reshape(b, t, g, r, d)
