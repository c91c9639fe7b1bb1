"""What rows that begin alike remember of their beginning, which is read once and not in every row."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from phi3_jax.configs import ModelConfig
from phi3_jax.models.masks import Mask, blocksparse_allowed, seen

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@struct.dataclass
class Before:
    """What rows remember of the tokens that they all begin with.

    Attributes:
      keys, values: one array per layer: (kv_heads, slots, head_dim), token p in slot p; slots from `count` on hold nothing.
      count: of the tokens.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    count: jax.Array

    @property
    def slots(self) -> int:
        """Tokens that there is room for."""
        return int(self.keys[0].shape[1])


def visible(cfg: ModelConfig, layer: int, before: Before, position: jax.Array, heads: int) -> jax.Array:
    """Which tokens of `before` queries at `position` (batch, time) see: (batch, 1 or heads, time, slots)."""
    at = jnp.broadcast_to(jnp.arange(before.slots, dtype=jnp.int32), (len(position), before.slots))
    ok = jnp.broadcast_to((at < before.count)[:, None], (*position.shape, before.slots))
    if cfg.window_keys is not None:
        ok &= position[..., None] - at[:, None] < cfg.window_keys
    ok = ok[:, None]
    if not cfg.is_dense(layer) and cfg.blocksparse is not None:
        ok = ok & blocksparse_allowed(cfg.blocksparse, position, at, heads)
    return ok


def follow(
    before: Before,
    cfg: ModelConfig,
    positions: jax.Array,
    documents: jax.Array | None = None,
    branches: jax.Array | None = None,
) -> Callable[[int], Attention]:
    """Attention, by layer, of rows that go on after `before`.

    Args:
      positions: (batch, time), counted from the end of `before`; documents, branches: see `Mask`.
    """
    time, slots = positions.shape[1], before.slots
    own = before.count + positions
    mask = Mask(
        segments=documents, branches=branches
    )  # the window comes below, where positions count from the beginning
    whole = slice(0, time)
    of_own = jnp.broadcast_to(seen(mask, whole, whole, (1, 1)).reshape(-1, time, time), (*own.shape, time))
    if cfg.window_keys is not None:
        of_own &= own[..., None] - own[:, None] < cfg.window_keys

    def of_layer(i: int) -> Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            groups, heads = q.shape[2:4], q.shape[2] * q.shape[3]
            ok = of_own[:, None]
            if not cfg.is_dense(i) and cfg.blocksparse is not None:
                ok = ok & blocksparse_allowed(cfg.blocksparse, own, own, heads)
            both = [visible(cfg, i, before, own, heads), ok]
            width = max(x.shape[1] for x in both)
            ok = jnp.concatenate([jnp.broadcast_to(x, (len(x), width, *x.shape[2:])) for x in both], axis=-1)
            ok = ok.reshape(len(ok), *(groups if width > 1 else (1, 1)), *ok.shape[2:])
            q = q * jnp.asarray(cfg.softmax_scale, q.dtype)
            first = jnp.einsum("btgrk,gsk->bgrts", q, before.keys[i])
            scores = jnp.concatenate([first, jnp.einsum("btgrk,bsgk->bgrts", q, k)], axis=-1)
            scores = jnp.where(ok, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            found = jnp.einsum("bgrts,gsk->btgrk", weights[..., :slots], before.values[i])
            return found + jnp.einsum("bgrts,bsgk->btgrk", weights[..., slots:], v)

        return run

    return of_layer
