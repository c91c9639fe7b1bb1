"""Causal attention in blocks of queries, in plain XLA: what a CPU runs fastest.

Each block of queries meets only the keys it may see (the causal prefix, or the window's part of it), so the upper
triangle costs nothing. The backward pass makes the probabilities again from the saved log normalisers instead of keeping
them. The normaliser comes out of the same matrix product as the output, as one more column of ones beside the values:
XLA:CPU multiplies faster than it sums. Before the gradients of keys and values, the matrices over queries are written out
transposed: a product that contracts the rows of both its sides is slower than that copy and a plain product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from phi3_jax.configs import BlockSparse


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The static part of a mask."""

    window: int | None
    blocksparse: BlockSparse | None


def _blocks(time: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each block: at most 16 blocks, of 128 queries or more."""
    size = max(128, -(-time // 16))
    for start in range(0, time, size):
        stop = min(time, start + size)
        yield slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)


def _seen(
    pattern: Pattern,
    rows: slice,
    keys: slice,
    heads: tuple[int, int],
    segments: jax.Array | None,
    positions: jax.Array | None,
) -> jax.Array:
    """Boolean mask broadcastable to (b, g, r, rows, keys)."""
    from phi3_jax.models.attention import blocksparse_allowed

    row, key = jnp.arange(rows.start, rows.stop), jnp.arange(keys.start, keys.stop)
    distance = row[:, None] - key[None, :]
    ok = distance >= 0
    if pattern.window is not None:
        ok &= distance < pattern.window
    if segments is not None:
        ok = ok & (segments[:, rows, None] == segments[:, None, keys])
        ok = ok[:, None, None]
    if pattern.blocksparse is not None:
        q_pos, k_pos = (row, key) if positions is None else (positions[:, rows], positions[:, keys])
        sparse = blocksparse_allowed(pattern.blocksparse, q_pos, k_pos, heads[0] * heads[1])
        ok = ok & sparse.reshape(*sparse.shape[:-3], *heads, *sparse.shape[-2:])
    return ok


def _scores(q: jax.Array, k: jax.Array, ok: jax.Array) -> jax.Array:
    """Masked scores (b, g, r, rows, keys) in float32 or wider; q is scaled already."""
    s = jnp.einsum("bgrtk,bgsk->bgrts", q, k)
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    return jnp.where(ok, s, jnp.finfo(s.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    positions: jax.Array | None,
    pattern: Pattern,
    scale: float,
) -> jax.Array:
    """q (b, g, r, t, k), k and v (b, g, s, k) -> (b, g, r, t, k)."""
    return _forward(q, k, v, segments, positions, pattern, scale)[0]


def _forward(q, k, v, segments, positions, pattern, scale):
    heads, scaled = q.shape[1:3], q * jnp.asarray(scale, q.dtype)
    ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outs, logs = [], []
    for rows, keys in _blocks(q.shape[3], pattern.window):
        s = _scores(scaled[..., rows, :], k[:, :, keys], _seen(pattern, rows, keys, heads, segments, positions))
        top = jnp.max(s, axis=-1, keepdims=True)
        joint = jnp.einsum("bgrts,bgsk->bgrtk", jnp.exp(s - top).astype(v.dtype), ones[:, :, keys])
        total = joint[..., -1:].astype(s.dtype)
        outs.append((joint[..., :-1] / total).astype(v.dtype))
        logs.append(top + jnp.log(total))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    log_z = logs[0] if len(logs) == 1 else jnp.concatenate(logs, axis=3)
    return out, (q, k, v, segments, positions, log_z)


def _over_queries(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over queries of a (b, g, r, rows, keys) times b (b, g, r, rows, k): (b, g, keys, k)."""
    transposed = jax.lax.optimization_barrier(a.transpose(0, 1, 4, 2, 3))
    return jnp.einsum("bgsrt,bgrtk->bgsk", transposed, b)


def _backward(pattern, scale, saved, d_out):
    q, k, v, segments, positions, log_z = saved
    heads, scaled = q.shape[1:3], q * jnp.asarray(scale, q.dtype)
    d_q, d_k, d_v = [], 0, 0
    for rows, keys in _blocks(q.shape[3], pattern.window):
        q_rows, d_rows = scaled[..., rows, :], d_out[..., rows, :]
        s = _scores(q_rows, k[:, :, keys], _seen(pattern, rows, keys, heads, segments, positions))
        p = jnp.exp(s - log_z[..., rows, :])
        d_p = jnp.einsum("bgrtk,bgsk->bgrts", d_rows, v[:, :, keys])
        d_s = p * d_p
        d_s = (d_s - p * jnp.sum(d_s, axis=-1, keepdims=True)).astype(q.dtype)
        d_q.append(jnp.einsum("bgrts,bgsk->bgrtk", d_s, k[:, :, keys]))
        pad = ((0, 0), (0, 0), (keys.start, k.shape[2] - keys.stop), (0, 0))
        d_k += jnp.pad(_over_queries(d_s, q_rows), pad)
        d_v += jnp.pad(_over_queries(p.astype(v.dtype), d_rows), pad)
    d_q = d_q[0] if len(d_q) == 1 else jnp.concatenate(d_q, axis=3)
    return d_q * jnp.asarray(scale, q.dtype), d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    scale: float,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Attention of q (b, t, g, r, k) over k and v (b, t, g, k); returns (b, t, g, r, k). See `attention.attend`."""
    q = q.transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return _attend(q, k, v, segments, positions, pattern, scale).transpose(0, 3, 1, 2, 4)
