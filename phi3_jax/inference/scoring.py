"""Log-probabilities of continuations, after whole rows or after what rows share, which is read once."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax.configs import ModelConfig
from phi3_jax.inference import decode
from phi3_jax.inference.before import Before, follow
from phi3_jax.models.decoder import PIECE, hidden_states, logits_of
from phi3_jax.models.layout import ANYWHERE, Layout

LOGITS = 512  # places whose logits are made at once


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
        at = before.count + rows.positions
        of_layer = follow(before, cfg, rows.positions, rows.documents, rows.branches)
        hidden = decode.hidden_of(params, rows.tokens, at, cfg, long, of_layer, dtype, ANYWHERE)
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
