"""What attention may see (`Mask`), and which implementation computes it (`attend`).

A mask is a small description, not an array; each implementation builds what it needs from it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from phi3_jax.configs import BlockSparse
from phi3_jax.errors import UserError
from phi3_jax.models.kernels import blocksparse, chunked

IMPLEMENTATIONS = ("auto", "reference", "chunked", "blocksparse")


@dataclasses.dataclass(frozen=True)
class Mask:
    """Causal attention, narrowed by a window, documents and phi-3-small's block pattern.

    Attributes:
      window: number of keys a query sees, itself included; None = all earlier ones.
      blocksparse: per-head pattern, or None for dense.
      segments: (batch, time) document numbers; 0 is padding. None = one document a row.
      positions: (batch, time) positions inside each document; needed by `blocksparse` with `segments`, so that a
        packed document is masked as it is alone.
    """

    window: int | None = None
    blocksparse: BlockSparse | None = None
    segments: jax.Array | None = None
    positions: jax.Array | None = None


def blocksparse_allowed(pattern: BlockSparse, q_pos: jax.Array, k_pos: jax.Array, heads: int) -> jax.Array:
    """Block pattern without causality: (..., heads, q, k) from q_pos (..., q) and k_pos (..., k).

    Head h keeps key block K for query block Q when Q - K < local_blocks or (K + h step + 1) % vert_stride == 0,
    step = max(1, vert_stride // heads) (Microsoft's block-sparse attention layer; h is the global head index).
    """
    step = 0 if pattern.homo_head else max(1, pattern.vert_stride // heads)
    q_block = (q_pos // pattern.block)[..., None, :, None]
    k_block = (k_pos // pattern.block)[..., None, None, :]
    head = jnp.arange(heads)[:, None, None]
    return (q_block - k_block < pattern.local_blocks) | ((k_block + head * step + 1) % pattern.vert_stride == 0)


def allowed(mask: Mask, time: int, heads: int) -> jax.Array:
    """Dense boolean mask (batch or 1, heads or 1, query, key)."""
    index = jnp.arange(time)
    distance = index[:, None] - index[None, :]
    ok = distance >= 0
    if mask.window is not None:
        ok &= distance < mask.window
    ok = ok[None, None]
    if mask.segments is not None:
        ok = ok & (mask.segments[:, None, :, None] == mask.segments[:, None, None, :])
    if mask.blocksparse is not None:
        position = index[None] if mask.positions is None else mask.positions
        ok = ok & blocksparse_allowed(mask.blocksparse, position, position, heads)
    return ok


def reference(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> jax.Array:
    """Plain attention with the whole score matrix; softmax in float32 or wider. Shapes as `attend`."""
    _, t, g, r, _ = q.shape
    scores = jnp.einsum("btgrk,bsgk->bgrts", q * jnp.asarray(scale, q.dtype), k)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    ok = allowed(mask, t, g * r)
    ok = ok.reshape(ok.shape[0], g, r, t, t) if ok.shape[1] > 1 else ok[:, :, None]
    scores = jnp.where(ok, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def _blocksparse_obstacle(mask: Mask) -> str | None:
    """Why `kernels.blocksparse` cannot serve a mask, or None."""
    if mask.blocksparse is None:
        return "it has no block pattern at this length"
    if mask.segments is not None:
        return "the pattern starts anew in each packed document"
    return "it has a window too" if mask.window is not None else None


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, implementation: str = "auto"
) -> jax.Array:
    """Attention of queries over keys.

    Args:
      q: (batch, time, kv_heads, queries_per_kv, head_dim).
      k, v: (batch, time, kv_heads, head_dim).
      mask: what each query may see.
      scale: factor on q.k.
      implementation: "reference" (the whole score matrix), "chunked" (causal blocks in XLA: skips the upper triangle), or
        "blocksparse" (skips what phi-3-small's pattern leaves out). "auto" takes the last where it can serve the mask,
        and "chunked" otherwise.

    Returns:
      (batch, time, kv_heads, queries_per_kv, head_dim).

    Raises:
      UserError: unknown implementation, or one that cannot serve the mask.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation!r}; valid: {', '.join(IMPLEMENTATIONS)}")
    time = q.shape[1]
    if mask.window is not None and mask.window >= time:
        mask = dataclasses.replace(mask, window=None)
    if mask.blocksparse is not None and time <= mask.blocksparse.block * mask.blocksparse.local_blocks:
        mask = dataclasses.replace(mask, blocksparse=None, positions=None)
    obstacle = _blocksparse_obstacle(mask)
    if implementation == "blocksparse" and obstacle:
        raise UserError(f"attention='blocksparse' cannot serve this mask: {obstacle}; use 'auto'")
    if implementation in ("auto", "blocksparse") and not obstacle:
        return blocksparse.attend(q, k, v, mask.blocksparse, scale)
    if implementation == "reference":
        return reference(q, k, v, mask, scale)
    pattern = chunked.Pattern(mask.window, mask.blocksparse)
    positions = mask.positions if mask.blocksparse and mask.segments is not None else None
    return chunked.attend(q, k, v, pattern, scale, mask.segments, positions)
