"""Keys and values of earlier tokens, preallocated.

Position p of a row lies in slot p % slots. Layers with a window keep as many slots as the window has keys, so that new
keys take the places of those that no query sees any more; the others have a slot for every position.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import BlockSparse, ModelConfig
from phi3_jax.inference.before import Before, visible
from phi3_jax.models.attention import platform_of
from phi3_jax.models.kernels import step
from phi3_jax.models.layout import Layout, join, per_device
from phi3_jax.models.masks import blocksparse_allowed

SPARE = 1  # slots that are never read: XLA:CPU writes a token in place only where not the whole array is read after it


@struct.dataclass
class KVCache:
    """What decoding remembers of a batch of rows.

    Attributes:
      keys, values: one array per layer: (batch, kv_heads, slots + SPARE, head_dim).
      lengths: (batch,) tokens of each row so far; the next one's position.
      long: (batch,) booleans, which rows' keys were rotated by LongRoPE's long list; None without LongRoPE.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    lengths: jax.Array
    long: jax.Array | None = None


def slots_of(cfg: ModelConfig, layer: int, capacity: int) -> int:
    """Slots that a layer needs for `capacity` positions."""
    pattern = None if cfg.is_dense(layer) else cfg.blocksparse
    if pattern is not None:  # whole rounds of it, so that a head's far blocks are a regular part
        return -(-capacity // (round_ := pattern.block * pattern.vert_stride)) * round_
    return capacity if cfg.window_keys is None else min(capacity, cfg.window_keys)


def bytes_per_token(cfg: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of one more cached token, before any window is full."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * jnp.dtype(dtype).itemsize


def cache_bytes(cfg: ModelConfig, capacity: int, dtype: str = "bfloat16") -> int:
    """Bytes of one row's cache for `capacity` positions."""
    slots = sum(slots_of(cfg, i, capacity) for i in range(cfg.layers))
    return 2 * slots * cfg.kv_heads * cfg.head_dim * jnp.dtype(dtype).itemsize


def reads_in_place(cfg: ModelConfig, platform: str, dtype: jnp.dtype) -> bool:
    """Whether `attend_one` reads what each row has, in all layers, and never its `extent`."""
    return all(map(cfg.is_dense, range(cfg.layers))) and step.serves(platform, dtype)


def remembered(new: jax.Array, lengths: jax.Array, slots: int) -> jax.Array:
    """A prompt's keys or values in their slots.

    (batch, time, kv_heads, head_dim) -> (batch, kv_heads, slots + SPARE, head_dim). Slot s gets the last position
    p < length with p % slots = s; slots without one hold what is never seen.
    """
    time = new.shape[1]
    new = new.transpose(0, 2, 1, 3)
    if time <= slots:
        return jnp.pad(new, ((0, 0), (0, 0), (0, slots - time + SPARE), (0, 0)))
    positions = _position_in(jnp.arange(slots + SPARE), lengths[:, None] - 1, slots)
    index = jnp.clip(positions, 0, time - 1)[:, None, :, None]
    return jnp.take_along_axis(new, index, axis=2)


def _position_in(slot: jax.Array, newest: jax.Array, slots: int) -> jax.Array:
    """Position that lies in a slot when `newest` is the last one written; negative: none yet."""
    return newest - (newest - slot) % slots


def attend_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    cfg: ModelConfig,
    layer: int,
    extent: int,
    layout: Layout,
    before: Before | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes one token's key and value, and attends from it.

    Args:
      q: (batch, 1, kv_heads, queries_per_kv, head_dim), rotated; k, v: (batch, 1, kv_heads, head_dim).
      keys, values: of `layer`: (batch, kv_heads, slots + SPARE, head_dim).
      position: (batch,) of the token.
      extent: slots that are read: no row may have written beyond them unless all are read.
      before: what the rows begin with, on one device; the slots are of the positions after it.

    Returns:
      (attention (batch, 1, kv_heads, queries_per_kv, head_dim), keys, values); no gradient where `step` has a kernel.
    """
    sparse = None if cfg.is_dense(layer) else cfg.blocksparse
    extent = min(slots_of(cfg, layer, extent), keys.shape[2] - SPARE)
    narrow = (
        before is None and sparse is not None and extent > sparse.block * (sparse.local_blocks + sparse.vert_stride)
    )
    heads, platform = (cfg.kv_heads, cfg.queries_per_kv), platform_of(q)
    start = 0 if before is None else before.count

    def part(
        q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        own, slots = position - start, keys.shape[2] - SPARE
        begun = None if before is None else (before.keys[layer], before.values[layer], before.count)
        if sparse is None and step.serves(platform, *(x.dtype for x in (q, keys, values, *(begun or ())[:2]))):
            out, keys, values = step.attend(
                q[:, 0], k[:, 0], v[:, 0], keys, values, own, cfg.softmax_scale, window=cfg.window_keys, spare=SPARE,
                before=begun,
            )  # fmt: skip
            return out[:, None], keys, values
        slot = own % slots
        keys, values = _write(keys, k, slot), _write(values, v, slot)
        first = jax.lax.axis_index(layout.heads) * q.shape[2] * q.shape[3] if split else 0
        query = q[:, 0] * jnp.asarray(cfg.softmax_scale, q.dtype)
        if sparse is not None and narrow:
            out = _attend_blocks(query, keys[:, :, :extent], values[:, :, :extent], position, sparse, first, heads)
        else:
            # A part of an array is copied before it is multiplied. So where all slots are read the spare one is as well,
            # but not of one row, which is written in place only for its sake.
            whole = len(q) > 1 and extent == slots
            read = extent + SPARE if whole else extent
            places = jnp.arange(read)
            at = _position_in(places, own[:, None], slots)
            ok = ((at >= 0) & (places < extent))[:, None, None]
            at = at + start
            if cfg.window_keys is not None:
                ok &= (position[:, None] - at < cfg.window_keys)[:, None, None]
            if sparse is not None:
                allowed = blocksparse_allowed(
                    sparse, position[:, None], at, q.shape[2] * q.shape[3], first, heads[0] * heads[1]
                )
                ok &= allowed.reshape(q.shape[0], *q.shape[2:4], read)
            parts = [(_scores(query, keys[:, :, :read], ok), values[:, :, :read], "bgsk")]
            if before is not None:
                ok = visible(cfg, layer, before, position[:, None], q.shape[2] * q.shape[3])[:, :, 0]
                ok = ok.reshape(len(ok), *(q.shape[2:4] if ok.shape[1] > 1 else (1, 1)), before.slots)
                parts.append((_scores(query, before.keys[layer], ok), before.values[layer], "gsk"))
            out = _softmax(parts, q.dtype)
        return out[:, None], keys, values

    split = bool(layout.heads) and _explicit(q)
    batch, head = join(layout.batch), join(layout.heads)
    fresh, kept = P(batch, None, head, None), P(batch, head, None, None)
    specs = P(*fresh, None), fresh, fresh, kept, kept, P(batch)
    return per_device(part, specs, (P(*fresh, None), kept, kept), q, k, v, keys, values, position)


def _write(cached: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """One token's keys (or values) (batch, 1, kv_heads, head_dim) put into their slots."""
    new = new.transpose(0, 2, 1, 3).astype(cached.dtype)
    if len(new) == 1:  # in place, which XLA:CPU's scatter is not; but several of these would wait for one another
        return jax.lax.dynamic_update_slice(cached, new, (0, 0, slot[0], 0))
    return cached.at[jnp.arange(len(new)), :, slot].set(new[:, :, 0])


def _explicit(x: jax.Array) -> bool:
    return not jax.typeof(x).sharding.mesh.empty


def _scores(q: jax.Array, k: jax.Array, ok: jax.Array) -> jax.Array:
    """Masked float32 scores (b, g, r, s) of q (b, g, r, k); k: (g, s, k), (b, g, s, k) or, a set each, (b, g, r, s, k)."""
    s = jnp.einsum(f"bgrk,{('gsk', 'bgsk', 'bgrsk')[k.ndim - 3]}->bgrs", q, k.astype(q.dtype))
    s = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    return jnp.where(ok, s, jnp.finfo(s.dtype).min)


def _softmax(parts: list[tuple[jax.Array, jax.Array, str]], dtype: jnp.dtype) -> jax.Array:
    """One softmax over several sets of (scores, values, letters of the values): (b, g, r, k)."""
    top = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s, *_ in parts]), axis=0)[..., None]
    weights = [jnp.exp(s - top) for s, *_ in parts]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    products = (
        jnp.einsum(f"bgrs,{letters}->bgrk", (w / total).astype(dtype), v.astype(dtype))
        for w, (_, v, letters) in zip(weights, parts, strict=True)
    )
    return functools.reduce(operator.add, products)


def _attend_blocks(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    pattern: BlockSparse,
    first: jax.Array | int,
    heads: tuple[int, int],
) -> jax.Array:
    """phi-3-small's pattern for one query per row, reading the last blocks and, of the earlier, those of each head."""
    b, g, extent, k = keys.shape
    r, block, near = q.shape[2], pattern.block, pattern.local_blocks * pattern.block
    start = jnp.clip((position // block + 1) * block - near, 0, extent - near)
    band = lambda x: jax.vmap(lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, near, axis=1))(x, start)  # noqa: E731
    at = start[:, None] + jnp.arange(near)
    q_block = (position // block)[:, None]
    ok = (at <= position[:, None]) & (q_block - at // block < pattern.local_blocks)
    parts = [(_scores(q, band(keys), ok[:, None, None]), band(values), "bgsk")]
    rounds = extent // (block * pattern.vert_stride)
    head = first + jnp.arange(g * r).reshape(g, r)
    residue = pattern.first_far(head, heads[0] * heads[1])

    def far(x: jax.Array) -> jax.Array:  # (b, g, extent, k) -> (b, g, r, rounds x block, k)
        x = x.reshape(b, g, rounds, pattern.vert_stride, block, k)
        rows = jax.vmap(lambda one, i: jnp.take(one, i, axis=2), in_axes=(1, 0), out_axes=1)(x, residue)
        return rows.transpose(0, 1, 3, 2, 4, 5).reshape(b, g, r, rounds * block, k)

    number = jnp.arange(rounds)[None, None] * pattern.vert_stride + residue[..., None]  # (g, r, rounds)
    ok = number[None] <= (position // block - pattern.local_blocks)[:, None, None, None]
    ok = jnp.repeat(ok, block, axis=-1)
    parts.append((_scores(q, far(keys), ok), far(values), "bgrsk"))
    return _softmax(parts, q.dtype)
