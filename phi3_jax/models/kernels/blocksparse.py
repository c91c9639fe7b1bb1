"""phi-3-small's block-sparse causal attention in plain XLA, doing only about the work that its pattern keeps.

A query meets two sets of keys: the band of its last `local_blocks` blocks, one slice for all heads; and, further back,
every `vert_stride`-th block, which ones depending on the head. The latter are gathered once per layer into a compact array
for each head, so that a block of queries meets a prefix of it. Both share one softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import BlockSparse

if TYPE_CHECKING:
    from jaxtyping import Float, Int

QUERIES = 256  # queries in a block of work; a multiple of the pattern's block is taken


def _columns(
    x: Float[jax.Array, "b g s k"], pattern: BlockSparse, residues: Int[np.ndarray, "g r"]
) -> Float[jax.Array, "b g r far k"]:
    """The far blocks of each head."""
    b, g, t, k = x.shape
    groups = -(-t // (pattern.block * pattern.vert_stride))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, groups * pattern.block * pattern.vert_stride - t), (0, 0)))
    x = x.reshape(b, g, groups, pattern.vert_stride, pattern.block, k)
    heads = [[x[:, i, :, residue] for residue in row] for i, row in enumerate(residues)]
    far = jnp.stack([jnp.stack(row, axis=1) for row in heads], axis=1)
    return far.reshape(b, *residues.shape, groups * pattern.block, k)


def _work(
    rows: slice, band: slice, far: int, pattern: BlockSparse, residues: np.ndarray
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Attention of one block of queries: q (b, g, r, rows, k), near keys (b, g, band, k), far keys (b, g, r, far, k)."""
    block, local = pattern.block, pattern.local_blocks
    row, key = np.arange(rows.start, rows.stop)[:, None], np.arange(band.start, band.stop)[None]
    near_ok = (key <= row) & (row // block - key // block < local)
    index = np.arange(far)
    number = index // block * pattern.vert_stride + residues[..., None]  # block number of each far key: (g, r, far)

    @jax.checkpoint
    def run(q: jax.Array, k_near: jax.Array, v_near: jax.Array, k_far: jax.Array, v_far: jax.Array) -> jax.Array:
        wide = jnp.promote_types(q.dtype, jnp.float32)
        near = jnp.einsum("bgrtk,bgsk->bgrts", q, k_near).astype(wide)
        near = jnp.where(near_ok, near, jnp.finfo(wide).min)
        top = jnp.max(near, axis=-1, keepdims=True)
        if far:
            far_ok = jnp.asarray(number)[:, :, None] <= jnp.asarray(row // block - local)
            away = jnp.einsum("bgrtk,bgrsk->bgrts", q, k_far).astype(wide)
            away = jnp.where(far_ok, away, jnp.finfo(wide).min)
            top = jnp.maximum(top, jnp.max(away, axis=-1, keepdims=True))
        top = jax.lax.stop_gradient(top)
        # The values carry a column of ones: the softmax's sum comes out of the same product.
        joint = jnp.einsum("bgrts,bgsk->bgrtk", jnp.exp(near - top).astype(q.dtype), v_near)
        if far:
            joint += jnp.einsum("bgrts,bgrsk->bgrtk", jnp.exp(away - top).astype(q.dtype), v_far)
        return joint[..., :-1] / joint[..., -1:]

    return run


@functools.partial(jax.jit, static_argnums=(3, 4))
def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    pattern: BlockSparse,
    scale: float,
) -> Float[jax.Array, "b t g r k"]:
    """Block-sparse causal attention of whole sequences that start at position 0.

    Args:
      q: head h is kv head times queries_per_kv plus query.
      pattern: blocks kept, see `configs.BlockSparse`.
      scale: factor on q.k.
    """
    time, (g, r) = q.shape[1], q.shape[2:4]
    residues = pattern.first_far(np.arange(g * r).reshape(g, r), g * r)
    block, pad = pattern.block, -time % pattern.block
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2))) for x in (q, k, v))
    q = q.transpose(0, 2, 3, 1, 4) * jnp.asarray(scale, q.dtype)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    k_far, v_far = (_columns(x, pattern, residues) for x in (k, v))
    size, outs = max(1, QUERIES // block) * block, []
    for start in range(0, time + pad, size):
        rows = slice(start, min(start + size, time + pad))
        band = slice(max(0, start - (pattern.local_blocks - 1) * block), rows.stop)
        last = (rows.stop - 1) // block - pattern.local_blocks  # furthest block that the last query has in its far part
        far = (last // pattern.vert_stride + 1) * block if last >= 0 else 0
        run = _work(rows, band, far, pattern, residues)
        outs.append(run(q[..., rows, :], k[:, :, band], v[:, :, band], k_far[..., :far, :], v_far[..., :far, :]))
    return jnp.concatenate(outs, axis=3)[..., :time, :].transpose(0, 3, 1, 2, 4)
