"""The decoder of the whole family: pure functions of (params, tokens, config).

Letters of shapes and einsums: b batch, t query time, s key time, d embed, g kv groups, r queries per group, k head_dim,
f mlp, v vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.models import experts, vision
from phi3_jax.models.attention import Mask, attend
from phi3_jax.models.layers import activate, has_kernel, linear, linears, norm, product
from phi3_jax.models.layout import ANYWHERE, Layout, explicit, join, spec_of
from phi3_jax.models.quantized import Product, QuantizedTensor
from phi3_jax.models.rotary import rope_table, rotate

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Tree = Any
PIECE = 8192  # positions of a long row that feed-forward layers take at a time where nothing is trained
# What a backward pass keeps of each layer; the rest is computed again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "gate_up"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layer(
    x: Float[jax.Array, "b t d"],
    params: Tree,
    table: Float[jax.Array, "b t 2 k/2"],
    cfg: ModelConfig,
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    layout: Layout = ANYWHERE,
    piece: int | None = None,
) -> Float[jax.Array, "b t d"]:
    """One pre-norm block.

    `attention` gets queries, keys and values of these tokens, rotated, and gives what `attention.attend` does; decoding
    brings the keys and values of earlier tokens in with it. `piece` is as in `hidden_states`.
    """
    name = checkpoint_name
    with jax.named_scope("attention"):
        h = layout.put(norm(x, params["attention_norm"], cfg), layout.inner())
        q, k, v = (name(y, "qkv") for y in linears(h, params["qkv"], (cfg.queries_per_kv, 1, 1), axis=2))
        q, k, v = rotate(q, table), jnp.squeeze(rotate(k, table), 3), jnp.squeeze(v, 3)
        a = name(attention(q, k, v), "attention")
        x = x + cfg.residual_multiplier * linear(a, params["out"], 3, layout.residual())

    def mlp(x: jax.Array) -> jax.Array:
        h = layout.put(norm(x, params["mlp_norm"], cfg), layout.inner())
        if cfg.experts:
            return x + cfg.residual_multiplier * experts.mixture(h, params, cfg.experts)
        gate, up = (name(y, "gate_up").squeeze(2) for y in linears(h, params["gate_up"], (1, 1), axis=1))
        return x + cfg.residual_multiplier * linear(activate(gate, up, cfg), params["down"], 1, layout.residual())

    with jax.named_scope("mlp"):
        return _in_pieces(mlp, x, piece)


def _in_pieces(block: Callable[[jax.Array], jax.Array], x: jax.Array, piece: int | None) -> jax.Array:
    """block(x), x (batch, time, embed), `piece` positions at a time where they all lie on the same device."""
    (rows, columns, width), time = spec_of(x), x.shape[1]
    if piece is None or time <= piece or columns:
        return block(x)
    count, rest = divmod(time, piece)
    head, tail = jax.lax.split(x, [count * piece, rest], axis=1) if rest else (x, None)

    def shaped(x: jax.Array, *time: int) -> jax.Array:
        spec = P(join(rows), *[None] * len(time), join(width)) if explicit(x) else None
        return jax.lax.reshape(x, (x.shape[0], *time, x.shape[-1]), out_sharding=spec)

    done = jax.lax.map(block, jnp.moveaxis(shaped(head, count, piece), 1, 0))
    done = shaped(jnp.moveaxis(done, 0, 1), count * piece)
    return done if tail is None else jnp.concatenate([done, block(tail)], axis=1)


def mask_of(
    cfg: ModelConfig,
    index: int,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    branches: jax.Array | None = None,
) -> Mask:
    """What a query of layer `index` may see."""
    return Mask(cfg.window_keys, None if cfg.is_dense(index) else cfg.blocksparse, segments, positions, branches)


def hidden_states(
    params: Tree,
    tokens: Int[jax.Array, "b t"],
    cfg: ModelConfig,
    *,
    positions: Int[jax.Array, "b t"] | None = None,
    segments: Int[jax.Array, "b t"] | None = None,
    branches: Int[jax.Array, "b t"] | None = None,
    dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
    unroll: bool = False,
    attention: str = "auto",
    rope_regime: str | jax.Array = "auto",
    rope: Float[jax.Array, "b t 2 k/2"] | None = None,
    pictures: tuple[jax.Array, jax.Array] | None = None,
    layout: Layout = ANYWHERE,
    piece: int | None = None,
) -> Float[jax.Array, "b t d"]:
    """Final hidden states, after the last norm, in `dtype`.

    Args:
      params: tree of `param_specs(cfg)`; "blocks" may be a list of one-layer stacks, matrices `QuantizedTensor`.
      tokens: ids below cfg.vocab.
      positions: default 0..time-1, or restarting per document where `segments` is given.
      segments: document numbers; attention never crosses them. Padding has a number of its own (0 in our
        data). Default: one document per row.
      branches: numbers inside each document, see `Mask.branches`; with `segments` and `positions`.
      dtype: compute dtype of the matrices.
      remat: what the backward pass keeps: "none" (everything), "dots", "names", "full" (nothing).
      unroll: layers one after the other in one program (fastest on CPU) instead of a scan over stacked layers.
      attention: implementation, see `attention.attend`.
      rope_regime: LongRoPE list: "auto" (of each document by its own last position), "short", "long", or booleans, see
        `rope_table`.
      rope: cos and sin in the place of those of the config, see `rotary.table_of`.
      pictures: rows (of `vision.rows`) and index (batch, time): which row takes a token's place, -1 for none.
      layout: where activations lie on a mesh, and whether stored parameters have to be gathered, a layer at a time.
      piece: positions that the feed-forward layers take at a time, for rows that are not trained on: their inner
        activations, the largest arrays of a long row, are then of `PIECE` positions and not of all.
    """
    if remat not in REMAT:
        raise UserError(f"unknown remat policy {remat!r}{nearest(remat, REMAT)}")
    if positions is None:
        positions = default_positions(tokens, segments)
    top = layout.gather({k: v for k, v in params.items() if k not in ("blocks", "vision")}, whole=True)
    x = layout.put(embed(top["embedding"], tokens, cfg, dtype), layout.residual())
    if pictures is not None:
        x = vision.put(x, *pictures, layout)
    # Without the barrier XLA:CPU computes every sine again in every layer.
    made = rope_table(positions, cfg, rope_regime, dtype, segments) if rope is None else rope
    table = jax.lax.optimization_barrier(made)
    masks = [mask_of(cfg, i, segments, positions, branches) for i in range(cfg.period)]
    attends = [lambda q, k, v, m=m: attend(q, k, v, m, cfg.softmax_scale, attention) for m in masks]

    def block(x: jax.Array, stacked: Tree, first: int = 0) -> jax.Array:
        stacked = layout.gather(stacked, dtype)
        depth = jax.tree.leaves(stacked)[0].shape[0]
        for i in range(depth):
            see = attends[(first + i) % len(attends)]
            x = layer(x, jax.tree.map(lambda w: w[i], stacked), table, cfg, see, layout, piece)  # noqa: B023
        return x

    if isinstance(params["blocks"], list):  # a layer each, as decoding keeps them
        for i, one in enumerate(params["blocks"]):
            x = block(x, one, i)
        return norm(x, top["final_norm"], cfg)
    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=unroll)
    x = _run_blocks(block, x, params["blocks"], len(masks), unroll)
    return norm(x, top["final_norm"], cfg)


def _run_blocks(
    block: Callable[[jax.Array, Tree], jax.Array], x: jax.Array, stacked: Tree, period: int, unroll: bool
) -> jax.Array:
    """Runs `block` over groups of `period` stacked layers, the last of which may be shorter."""
    leaves, treedef = jax.tree.flatten(stacked)
    count, rest = divmod(leaves[0].shape[0], period)
    # split, unlike indexing, has one concatenation as its transpose instead of a padded sum per layer.
    if unroll:
        sizes = [period] * count + [rest] * bool(rest)
    else:
        sizes = [period * count] * bool(count) + [rest] * bool(rest)
    groups = zip(*(jax.lax.split(leaf, sizes, axis=0) for leaf in leaves), strict=True)
    for i, group in enumerate(groups):
        params = jax.tree.unflatten(treedef, group)
        if unroll or i > 0 or not count:
            x = block(x, params)
        else:
            params = jax.tree.map(lambda w: w.reshape(count, period, *w.shape[1:]), params)
            x = jax.lax.scan(lambda x, p: (block(x, p), None), x, params)[0]
    return x


def default_positions(tokens: Int[jax.Array, "b t"], segments: Int[jax.Array, "b t"] | None) -> Int[jax.Array, "b t"]:
    """Positions 0..time-1, restarting where the segment number changes; int32."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return index
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def embed(
    table: Float[jax.Array, "v d"], tokens: Int[jax.Array, "b t"], cfg: ModelConfig, dtype: jnp.dtype
) -> Float[jax.Array, "b t d"]:
    """Looks tokens up and applies the embedding multiplier."""
    spec = P(*map(join, spec_of(tokens)), None) if explicit(tokens) else None
    if isinstance(table, QuantizedTensor):
        x = table.lookup(tokens)
    else:
        x = table.at[tokens].get(out_sharding=spec) if spec is not None else table[tokens]
    return x.astype(dtype) * jnp.asarray(cfg.embed_multiplier, dtype)


def output_matrix(params: Tree, cfg: ModelConfig) -> jax.Array | QuantizedTensor:
    """The unembedding (embed, vocab); the transposed table where embeddings are tied."""
    return params["embedding"].T if cfg.tied else params["unembedding"]


def logit_scale(cfg: ModelConfig) -> float:
    """Factor on the logits: 1 / (published divisor x muP width ratio)."""
    return 1.0 / (cfg.logit_divisor * cfg.width_ratio)


def dummy_mask(cfg: ModelConfig) -> Bool[jax.Array, " v"] | None:
    """True where a logit must never win (phi-3-small's unused ids), or None."""
    if not cfg.dummy_tokens:
        return None
    ids = jnp.arange(cfg.vocab)
    return functools.reduce(jnp.logical_or, [(ids >= a) & (ids < b) for a, b in cfg.dummy_tokens])


def logits_of(hidden: Float[jax.Array, "... d"], params: Tree, cfg: ModelConfig) -> Float[jax.Array, "... v"]:
    """Float32 logits of hidden states; product in the hidden dtype, then cast, scaled, masked."""
    matrix = output_matrix(params, cfg)
    if isinstance(matrix, Product):
        out = matrix.apply(hidden)
    elif not cfg.tied and has_kernel(hidden, hidden.ndim - 1, matrix):  # which would copy a table transposed
        out = product(hidden.reshape(-1, hidden.shape[-1]), matrix).reshape(*hidden.shape[:-1], -1)
    else:
        out = jnp.einsum("...d,dv->...v", hidden, matrix.astype(hidden.dtype))
    if "unembedding_bias" in params:
        out = out + params["unembedding_bias"].astype(out.dtype)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32)) * logit_scale(cfg)
    mask = dummy_mask(cfg)
    return out if mask is None else jnp.where(mask, jnp.finfo(out.dtype).min, out)


def forward(params: Tree, tokens: Int[jax.Array, "b t"], cfg: ModelConfig, **options: Any) -> Float[jax.Array, "b t v"]:
    """Float32 logits; options as `hidden_states`."""
    return logits_of(hidden_states(params, tokens, cfg, **options), params, cfg)
