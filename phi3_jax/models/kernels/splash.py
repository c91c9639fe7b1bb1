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
from phi3_jax.models.masks import Mask, Origin

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
    if problem.head_dim % 8:
        return f"head_dim={problem.head_dim} is no multiple of 8"
    if problem.mask.positions is not None:
        return (
            "its block pattern counts from the row's start, not from each packed document's (per_document=False does)"
        )
    return None


class BlockPattern(splash_masks.Mask):
    """Causal block-sparse mask of one head, made tile by tile; equal for heads that keep the same distant blocks."""

    def __init__(self, pattern: BlockSparse, time: int, residue: int) -> None:
        self.pattern, self.time, self.residue = pattern, time, residue

    @property
    def shape(self) -> tuple[int, int]:
        return (self.time, self.time)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        row, key = (np.arange(self.time)[i] for i in index)
        row, key, pattern = row[:, None], key[None], self.pattern
        return pattern.keeps(row // pattern.block, key // pattern.block, self.residue) & (key <= row)

    def _identity(self) -> tuple[Any, ...]:
        return (self.pattern, self.time, self.residue)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockPattern) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _head_masks(mask: Mask, time: int, heads: int) -> list[splash_masks.Mask]:
    if mask.blocksparse is not None:
        pattern = mask.blocksparse
        return [BlockPattern(pattern, time, pattern.shift(head, heads) % pattern.vert_stride) for head in range(heads)]
    if mask.window is not None:
        return [splash_masks.LocalMask((time, time), (mask.window - 1, 0), 0)] * heads
    return [splash_masks.CausalMask((time, time))] * heads


def _tile(time: int, most: int = TILE) -> int:
    """The widest tile that divides a time: a multiple of LANES, at most `most`."""
    return next(size for size in range(most, 0, -LANES) if time % size == 0)


def prepare(mask: Mask, shape: tuple[int, ...], head_shards: int, time_shards: int, interpret: bool = False) -> Any:
    """The kernel of a mask for q of `shape` (batch, time, kv_heads, queries_per_kv, head_dim), cut for the shards."""
    time, heads = shape[1], shape[2] * shape[3]
    rows, keys = _tile(time // time_shards), LANES if mask.blocksparse is not None else _tile(time)
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=min(keys, 512), block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=min(keys, 512), block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    heads_mask = splash_masks.MultiHeadMask(_head_masks(mask, time, heads))
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
        if origin.row is not None:
            mine = jax.lax.dynamic_slice_in_dim(mine, origin.row, t, axis=1)
        segments = splash.SegmentIds(q=mine, kv=mask.segments)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3).reshape(b, t, g, r, d)
