"""Log-probabilities of continuations, after whole rows or after what rows share, which is read once."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from phi3_jax.configs import ModelConfig
from phi3_jax.inference import decode
from phi3_jax.models.attention import attend
from phi3_jax.models.decoder import PIECE, hidden_states, logits_of, mask_of
from phi3_jax.models.layout import ANYWHERE, Layout
from phi3_jax.models.masks import Mask, blocksparse_allowed, seen

LOGITS = 512  # places whose logits are made at once


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


class Rows(NamedTuple):
    """What a program scores, see `trees.Packed`; `columns` is how many of `at` and `said` are asked for.

    `documents` and `branches` are None where every row is one read.
    """

    tokens: jax.Array
    positions: jax.Array
    documents: jax.Array | None
    branches: jax.Array | None
    at: jax.Array
    said: jax.Array
    columns: jax.Array


def scores(
    params: decode.Tree,
    rows: Rows,
    cfg: ModelConfig,
    *,
    dtype: jnp.dtype = jnp.float32,
    long: str | jax.Array = "auto",
    layout: Layout = ANYWHERE,
    before: Before | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Of `rows.said` after the tokens at `rows.at`, the first `rows.columns` columns.

    Args:
      rows: without what is in `before`, from whose end on its positions count.
      long: LongRoPE list of the tokens, a name or (rows, time) booleans.

    Returns:
      (log-probabilities in nats, whether each is the likeliest, the first of equals), (rows, time) each.
    """
    if cfg.blocksparse is not None:  # a read that does not begin its row is masked as it is alone
        cfg = dataclasses.replace(cfg, blocksparse=dataclasses.replace(cfg.blocksparse, per_document=True))
    if before is None:
        hidden = hidden_states(
            params, rows.tokens, cfg, positions=None if rows.documents is None else rows.positions,
            segments=rows.documents, branches=rows.branches, dtype=dtype, rope_regime=long, layout=layout, piece=PIECE,
        )  # fmt: skip
    else:
        hidden = _hidden_after(params, rows, before, cfg, dtype, long)
    # A power of two that divides the length.
    piece = math.gcd(hidden.shape[1], 1 << max(32, LOGITS // hidden.shape[0]).bit_length() - 1)

    def part(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        at, said = (jax.lax.dynamic_slice_in_dim(x, first, piece, 1)[..., None] for x in (rows.at, rows.said))
        logits = logits_of(jnp.take_along_axis(hidden, at, axis=1), params, cfg)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        chosen, top = jnp.take_along_axis(logits, said, axis=-1), jnp.max(logits, axis=-1, keepdims=True)
        total = jnp.sum(jnp.exp(logits - top), axis=-1)
        beaten = jnp.any((logits > chosen) | ((logits == chosen) & (jnp.arange(cfg.vocab) < said)), axis=-1)
        return chosen[..., 0] - top[..., 0] - jnp.log(total), ~beaten

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, logprobs, hits = state
        logprob, hit = part(first)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, 1)  # noqa: E731
        return first + piece, put(logprobs, logprob), put(hits, hit)

    # Logits of all places at once would be the largest array by far, and a program for every number of them.
    empty = [jnp.zeros_like(hidden[..., 0], x.dtype) for x in jax.eval_shape(part, rows.columns)]
    _, logprobs, hits = jax.lax.while_loop(
        lambda state: state[0] < rows.columns, body, (jnp.zeros_like(rows.columns), empty[0], empty[1])
    )
    return logprobs, hits


def _hidden_after(
    params: decode.Tree, rows: Rows, before: Before, cfg: ModelConfig, dtype: jnp.dtype, long: str | jax.Array
) -> jax.Array:
    """Final hidden states (batch, time, embed) of rows that follow `before`."""
    time, slots = rows.tokens.shape[1], before.keys[0].shape[0]
    earlier, own = jnp.arange(slots, dtype=jnp.int32), before.count + rows.positions
    at = jnp.concatenate([jnp.broadcast_to(earlier, (len(own), slots)), own], axis=1)
    known = jnp.broadcast_to(earlier < before.count, (*own.shape, slots))
    whole = slice(0, time)
    mask = Mask(segments=rows.documents, branches=rows.branches)  # the window comes below, for what is before as well
    seen_of_own = jnp.broadcast_to(seen(mask, whole, whole, (1, 1)).reshape(-1, time, time), (*own.shape, time))
    causal = jnp.concatenate([known, seen_of_own], axis=-1)
    if cfg.window_keys is not None:
        causal &= own[..., None] - at[:, None] < cfg.window_keys

    def of_layer(i: int) -> decode.Attention:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            ok = causal[:, None, None]
            if not cfg.is_dense(i) and cfg.blocksparse is not None:
                allowed = blocksparse_allowed(cfg.blocksparse, own, at, q.shape[2] * q.shape[3])
                ok = ok & allowed.reshape(len(own), *q.shape[2:4], *causal.shape[1:])
            q = q * jnp.asarray(cfg.softmax_scale, q.dtype)
            first = jnp.einsum("btgrk,sgk->bgrts", q, before.keys[i])
            both = jnp.concatenate([first, jnp.einsum("btgrk,bsgk->bgrts", q, k)], axis=-1)
            both = jnp.where(ok, both.astype(jnp.promote_types(both.dtype, jnp.float32)), -jnp.inf)
            weights = jax.nn.softmax(both, axis=-1).astype(v.dtype)
            found = jnp.einsum("bgrts,sgk->btgrk", weights[..., :slots], before.values[i])
            return found + jnp.einsum("bgrts,bsgk->btgrk", weights[..., slots:], v)

        return run

    return decode.hidden_of(params, rows.tokens, own, cfg, long, of_layer, dtype, ANYWHERE)
