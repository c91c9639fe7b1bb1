"""Prefill and one-token steps: pure functions of (params, tokens, cache, config)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig
from phi3_jax.inference.before import Attention, Before, follow
from phi3_jax.inference.cache import KVCache, attend_one, remembered, slots_of
from phi3_jax.models import vision
from phi3_jax.models.attention import attend
from phi3_jax.models.decoder import PIECE, embed, layer, logits_of, mask_of
from phi3_jax.models.layers import norm
from phi3_jax.models.layout import ANYWHERE, Layout, join, per_device
from phi3_jax.models.rotary import rope_table

Tree = Any


def unstack(params: Tree) -> Tree:
    """Parameters with "blocks" as a list of one-layer stacks.

    Decoding reads every weight once per token: taken out of a stack inside the program, each would be copied first.
    """
    if isinstance(params["blocks"], list):
        return params
    leaves, treedef = jax.tree.flatten(params["blocks"])
    layers = [jax.lax.split(leaf, [1] * leaf.shape[0], axis=0) for leaf in leaves]
    return {**params, "blocks": [jax.tree.unflatten(treedef, one) for one in zip(*layers, strict=True)]}


def begin(
    params: Tree,
    tokens: jax.Array,
    count: jax.Array,
    cfg: ModelConfig,
    *,
    dtype: jnp.dtype = jnp.float32,
    long: str | jax.Array = "short",
) -> Before:
    """Reads the first `count` of tokens (1, slots); `long` is the LongRoPE list of the rows that go on, a name or (1,)."""
    keys: list[jax.Array] = []
    values: list[jax.Array] = []

    def of_layer(i: int) -> Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(k[0].swapaxes(0, 1))
            values.append(v[0].swapaxes(0, 1))
            return attend(q, k, v, mask_of(cfg, i), cfg.softmax_scale)

        return run

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    hidden_of(params, tokens, positions, cfg, long, of_layer, dtype, ANYWHERE)
    return Before(keys, values, count)


def prefill(
    params: Tree,
    tokens: jax.Array,
    lengths: jax.Array,
    cfg: ModelConfig,
    capacity: int,
    *,
    dtype: jnp.dtype = jnp.float32,
    long: str | jax.Array = "auto",
    layout: Layout = ANYWHERE,
    every: bool = False,
    pictures: tuple[jax.Array, jax.Array] | None = None,
    before: Before | None = None,
) -> tuple[jax.Array, KVCache]:
    """Reads prompts.

    Args:
      params: of `unstack`.
      tokens: (batch, time), each row's prompt first and anything after it.
      lengths: (batch,) tokens of each prompt, 1 to time.
      capacity: positions that the cache gets room for.
      dtype: of the computation and of the cache.
      long: LongRoPE list, "short" or "long", or (batch,) booleans; "auto" goes by the length of each prompt. The cache
        remembers it.
      every: logits of every token, not of the last of each prompt.
      pictures: as in `decoder.hidden_states`.
      before: what all prompts begin with; tokens, lengths and capacity are then of what comes after it.

    Returns:
      (logits (batch, vocab) of the token after each prompt, or (batch, time, vocab); cache).
    """
    kept_keys: list[jax.Array] = []
    kept_values: list[jax.Array] = []
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    after = None if before is None else follow(before, cfg, positions)
    start = 0 if before is None else before.count

    def of_layer(i: int) -> Attention:
        slots, mask = slots_of(cfg, i, capacity), mask_of(cfg, i)

        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            for kept, new in ((kept_keys, k), (kept_values, v)):
                kept.append(_remember(new, lengths, slots, layout).astype(dtype))
            if after is not None:
                return after(i)(q, k, v)
            return attend(q, k, v, mask, cfg.softmax_scale)

        return run

    if cfg.longrope and isinstance(long, str) and long == "auto":
        long = lengths + start > cfg.longrope.original_context
    hidden = hidden_of(params, tokens, positions + start, cfg, long, of_layer, dtype, layout, pictures)
    if not every:
        last = P(join(layout.batch), None, None)
        pick = lambda h, n: jnp.take_along_axis(h, (n - 1)[:, None, None], axis=1)  # noqa: E731
        hidden = per_device(pick, (last, P(join(layout.batch))), last, layout.put(hidden, last), lengths)[:, 0]
    rows = jnp.full_like(lengths, long == "long", dtype=bool) if isinstance(long, str) else long
    cache = KVCache(kept_keys, kept_values, lengths + start, None if cfg.longrope is None else rows)
    return _logits(hidden, params, cfg, layout), cache


def step(
    params: Tree,
    token: jax.Array,
    cache: KVCache,
    cfg: ModelConfig,
    extent: int,
    *,
    dtype: jnp.dtype = jnp.float32,
    long: str | jax.Array = "auto",
    layout: Layout = ANYWHERE,
    before: Before | None = None,
) -> tuple[jax.Array, KVCache]:
    """Reads one more token per row.

    Args:
      params: of `unstack`.
      token: (batch,).
      cache: of `prefill` or an earlier step; its position is cache.lengths.
      extent: positions that are read: at least max(cache.lengths) + 1, or the capacity; those of `before` do not count.
      long: as given to `prefill`; "auto" is what the cache remembers.
      before: as given to `prefill`.

    Returns:
      (logits (batch, vocab) of the next token, cache).
    """
    keys, values = list(cache.keys), list(cache.values)
    position = cache.lengths

    def of_layer(i: int) -> Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out, keys[i], values[i] = attend_one(q, k, v, keys[i], values[i], position, cfg, i, extent, layout, before)
            return out

        return run

    if cache.long is not None and isinstance(long, str) and long == "auto":
        long = cache.long
    hidden = hidden_of(params, token[:, None], position[:, None], cfg, long, of_layer, dtype, layout)
    return _logits(hidden[:, 0], params, cfg, layout), KVCache(keys, values, position + 1, cache.long)


def hidden_of(
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    cfg: ModelConfig,
    long: str | jax.Array,
    of_layer: Callable[[int], Attention],
    dtype: jnp.dtype,
    layout: Layout,
    pictures: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Final hidden states (batch, time, embed) of tokens at `positions`; `of_layer(i)` is the attention of layer i."""
    top = layout.gather({k: v for k, v in params.items() if k not in ("blocks", "vision")}, whole=True)
    x = layout.put(embed(top["embedding"], tokens, cfg, dtype), layout.residual())
    if pictures is not None:
        x = vision.put(x, *pictures, layout)
    # Without the barrier XLA:CPU computes every sine again in every layer.
    table = jax.lax.optimization_barrier(rope_table(positions, cfg, long, dtype))
    for i, stacked in enumerate(params["blocks"]):
        weights = jax.tree.map(lambda w: w[0], layout.gather(stacked, dtype))
        x = layer(x, weights, table, cfg, of_layer(i), layout, PIECE)
    return norm(x, top["final_norm"], cfg)


def _logits(hidden: jax.Array, params: Tree, cfg: ModelConfig, layout: Layout) -> jax.Array:
    top = layout.gather({k: v for k, v in params.items() if k not in ("blocks", "vision")}, whole=True)
    return logits_of(hidden, top, cfg)


def _remember(new: jax.Array, lengths: jax.Array, slots: int, layout: Layout) -> jax.Array:
    batch, head = join(layout.batch), join(layout.heads)
    specs = P(batch, None, head, None), P(batch)
    put = lambda x, n: remembered(x, n, slots)  # noqa: E731
    return per_device(put, specs, P(batch, head, None, None), new, lengths)
