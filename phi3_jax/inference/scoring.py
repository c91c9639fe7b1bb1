"""Log-probabilities of continuations, after whole rows or after what rows share, which is read once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from phi3_jax.configs import ModelConfig
from phi3_jax.inference import decode
from phi3_jax.models.attention import attend
from phi3_jax.models.decoder import PIECE, hidden_states, logits_of, mask_of
from phi3_jax.models.layout import ANYWHERE, Layout
from phi3_jax.models.masks import blocksparse_allowed


@struct.dataclass
class Before:
    """What rows remember of the tokens that they all begin with.

    Attributes:
      keys, values: one array per layer: (slots, kv_heads, head_dim), token p in slot p; slots from `count` on hold nothing.
      count: of the tokens.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    count: jax.Array


def begin(
    params: decode.Tree,
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

    def of_layer(i: int) -> decode.Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys.append(k[0])
            values.append(v[0])
            return attend(q, k, v, mask_of(cfg, i), cfg.softmax_scale)

        return run

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    decode.hidden_of(params, tokens, positions, cfg, long, of_layer, dtype, ANYWHERE)
    return Before(keys, values, count)


def scores(
    params: decode.Tree,
    tokens: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    last: jax.Array,
    cfg: ModelConfig,
    count: int,
    *,
    dtype: jnp.dtype = jnp.float32,
    long: str | jax.Array = "auto",
    layout: Layout = ANYWHERE,
    before: Before | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of `count` tokens after each start, and of the choices after the whole row.

    Args:
      tokens: (batch, time), each row first and anything after it; without what is in `before`.
      starts, lengths: (batch,) the place of each context's last token, and the tokens of each row; both within `tokens`.
      last: (batch, choices) tokens after the row.
      long: LongRoPE list of the rows, a name or (batch,) booleans.

    Returns:
      (log-probabilities in nats (batch, count), whether each is the likeliest, the same two of the choices).
    """
    if before is None:
        hidden = hidden_states(params, tokens, cfg, dtype=dtype, rope_regime=long, layout=layout, piece=PIECE)
    else:
        hidden = _hidden_after(params, tokens, before, cfg, dtype, long)
    at = jnp.minimum(starts[:, None] + jnp.arange(count), lengths[:, None] - 1)
    logits = logits_of(jnp.take_along_axis(hidden, at[..., None], axis=1), params, cfg)
    logprobs, best = jax.nn.log_softmax(logits), jnp.argmax(logits, axis=-1)
    following = jnp.take_along_axis(tokens, jnp.minimum(at + 1, lengths[:, None] - 1), axis=1)
    inner = jnp.take_along_axis(logprobs, following[..., None], axis=-1)[..., 0]
    final = jnp.take_along_axis(logprobs[:, -1], last, axis=-1)
    return inner, best == following, final, best[:, -1:] == last


def _hidden_after(
    params: decode.Tree, tokens: jax.Array, before: Before, cfg: ModelConfig, dtype: jnp.dtype, long: str | jax.Array
) -> jax.Array:
    """Final hidden states (batch, time, embed) of tokens that follow `before`."""
    time, slots = tokens.shape[1], before.keys[0].shape[0]
    own = before.count + jnp.arange(time, dtype=jnp.int32)
    at = jnp.concatenate([jnp.arange(slots, dtype=jnp.int32), own])
    distance = own[:, None] - at
    causal = (distance >= 0) & jnp.concatenate([jnp.arange(slots) < before.count, jnp.ones(time, bool)])
    if cfg.window_keys is not None:
        causal &= distance < cfg.window_keys

    def of_layer(i: int) -> decode.Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            ok = causal
            if not cfg.is_dense(i) and cfg.blocksparse is not None:
                allowed = blocksparse_allowed(cfg.blocksparse, own, at, q.shape[2] * q.shape[3])
                ok = ok & allowed.reshape(*q.shape[2:4], *ok.shape)
            q = q * jnp.asarray(cfg.softmax_scale, q.dtype)
            earlier = jnp.einsum("btgrk,sgk->bgrts", q, before.keys[i])
            both = jnp.concatenate([earlier, jnp.einsum("btgrk,bsgk->bgrts", q, k)], axis=-1)
            both = jnp.where(ok, both.astype(jnp.promote_types(both.dtype, jnp.float32)), -jnp.inf)
            weights = jax.nn.softmax(both, axis=-1).astype(v.dtype)
            seen = jnp.einsum("bgrts,sgk->btgrk", weights[..., :slots], before.values[i])
            return seen + jnp.einsum("bgrts,bsgk->btgrk", weights[..., slots:], v)

        return run

    positions = jnp.broadcast_to(own, tokens.shape)
    return decode.hidden_of(params, tokens, positions, cfg, long, of_layer, dtype, ANYWHERE)
