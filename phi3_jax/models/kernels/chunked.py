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
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from phi3_jax.models.masks import ORIGIN, Mask, Origin, seen

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# segments, positions, branches, rows, first head
_Arrays = tuple[jax.Array | None, jax.Array | None, jax.Array | None, jax.Array | None, jax.Array | None]
# q, k, v, the mask's arrays, log normalisers
_Saved = tuple[jax.Array, jax.Array, jax.Array, _Arrays, jax.Array]


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each block: at most 16 blocks, of 128 queries or more.

    Queries that are some of the keys' (their rows known on the device only) meet all keys.
    """
    size = max(128, -(-queries // 16))
    for start in range(0, queries, size):
        stop = min(queries, start + size)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop) if keys == queries else slice(0, keys)


def _scores(
    q: Float[jax.Array, "b g r t k"], k: Float[jax.Array, "b g s k"], ok: Bool[jax.Array, ...]
) -> Float[jax.Array, "b g r t s"]:
    """Masked scores in float32 or wider; q is scaled already."""
    s = jnp.einsum("bgrtk,bgsk->bgrts", q, k)
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    return jnp.where(ok, s, jnp.finfo(s.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(
    q: Float[jax.Array, "b g r t k"],
    k: Float[jax.Array, "b g s k"],
    v: Float[jax.Array, "b g s k"],
    arrays: _Arrays,
    mask: Mask,
    of_heads: int,
    scale: float,
) -> Float[jax.Array, "b g r t k"]:
    """`mask` is without its arrays."""
    return _forward(q, k, v, arrays, mask, of_heads, scale)[0]


def _seen(arrays: _Arrays, mask: Mask, of_heads: int, rows: slice, keys: slice, heads: tuple[int, int]) -> jax.Array:
    segments, positions, branches, of_queries, head = arrays
    mask = dataclasses.replace(mask, segments=segments, positions=positions, branches=branches)
    return seen(mask, rows, keys, heads, Origin(of_queries, 0 if head is None else head, of_heads))


def _window(mask: Mask, arrays: _Arrays) -> int | None:
    """The window, where it counts by rows and not by the positions of branches."""
    return mask.window if arrays[2] is None else None


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, arrays: _Arrays, mask: Mask, of_heads: int, scale: float
) -> tuple[jax.Array, _Saved]:
    heads, scaled = (q.shape[1], q.shape[2]), q * jnp.asarray(scale, q.dtype)
    ones = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outs, logs = [], []
    for rows, keys in _blocks(q.shape[3], k.shape[2], _window(mask, arrays)):
        s = _scores(scaled[..., rows, :], k[:, :, keys], _seen(arrays, mask, of_heads, rows, keys, heads))
        top = jnp.max(s, axis=-1, keepdims=True)
        joint = jnp.einsum("bgrts,bgsk->bgrtk", jnp.exp(s - top).astype(v.dtype), ones[:, :, keys])
        total = joint[..., -1:].astype(s.dtype)
        outs.append((joint[..., :-1] / total).astype(v.dtype))
        logs.append(top + jnp.log(total))
    out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=3)
    log_z = logs[0] if len(logs) == 1 else jnp.concatenate(logs, axis=3)
    return out, (q, k, v, arrays, log_z)


def _over_queries(a: Float[jax.Array, "b g r t s"], b: Float[jax.Array, "b g r t k"]) -> Float[jax.Array, "b g s k"]:
    """Sum over queries of a times b."""
    transposed = jax.lax.optimization_barrier(a.transpose(0, 1, 4, 2, 3))
    return jnp.einsum("bgsrt,bgrtk->bgsk", transposed, b)


def _backward(
    mask: Mask, of_heads: int, scale: float, saved: _Saved, d_out: jax.Array
) -> tuple[jax.Array, jax.Array | int, jax.Array | int, None]:
    q, k, v, arrays, log_z = saved
    heads, scaled = (q.shape[1], q.shape[2]), q * jnp.asarray(scale, q.dtype)
    d_qs: list[jax.Array] = []
    d_k: jax.Array | int = 0
    d_v: jax.Array | int = 0
    for rows, keys in _blocks(q.shape[3], k.shape[2], _window(mask, arrays)):
        q_rows, d_rows = scaled[..., rows, :], d_out[..., rows, :]
        s = _scores(q_rows, k[:, :, keys], _seen(arrays, mask, of_heads, rows, keys, heads))
        p = jnp.exp(s - log_z[..., rows, :])
        d_p = jnp.einsum("bgrtk,bgsk->bgrts", d_rows, v[:, :, keys])
        d_s = p * d_p
        d_s = (d_s - p * jnp.sum(d_s, axis=-1, keepdims=True)).astype(q.dtype)
        d_qs.append(jnp.einsum("bgrts,bgsk->bgrtk", d_s, k[:, :, keys]))
        pad = ((0, 0), (0, 0), (keys.start, k.shape[2] - keys.stop), (0, 0))
        d_k += jnp.pad(_over_queries(d_s, q_rows), pad)
        d_v += jnp.pad(_over_queries(p.astype(v.dtype), d_rows), pad)
    d_q = d_qs[0] if len(d_qs) == 1 else jnp.concatenate(d_qs, axis=3)
    return d_q * jnp.asarray(scale, q.dtype), d_k, d_v, None


_attend.defvjp(_forward, _backward)


def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    origin: Origin = ORIGIN,
) -> Float[jax.Array, "b t g r k"]:
    """One device's part; see `attention.attend`."""
    q = q.transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    head = origin.head if isinstance(origin.head, jax.Array) else None
    arrays = (mask.segments, mask.positions, mask.branches, origin.rows, head)
    static = dataclasses.replace(mask, segments=None, positions=None, branches=None)
    return _attend(q, k, v, arrays, static, origin.heads, scale).transpose(0, 3, 1, 2, 4)
