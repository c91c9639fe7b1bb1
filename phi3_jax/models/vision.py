"""phi-3-vision's eyes: tiles of pictures -> rows that take the places of embeddings, and where each of them goes.

The tower is CLIP's vision transformer (arXiv:2103.00020), whose last layer never runs. Four neighbouring patches make one
token; two learned separators end the rows of tokens and the grid of tiles; one projector reads tokens and separators.
Which row stands where is the host's business (`data.images.index_of`): the program has no grids and no loop over pictures,
but one gather, so that its shape depends on the number of tiles alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig, Vision
from phi3_jax.models.layers import linear, norm
from phi3_jax.models.layout import ANYWHERE, Layout, join, per_device

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Tree = Any
MANY = 256  # patches of a tile from which on a CPU takes one head at a time
ENDS = 2  # rows after those of the tiles: a row of tokens ends, the grid ends


def patches_of(tiles: Float[jax.Array, "n c h w"], eyes: Vision) -> Float[jax.Array, "n p k"]:
    """The pixels of each patch, patches row by row, channel by channel."""
    n, count, size = tiles.shape[0], eyes.tile // eyes.patch, eyes.patch
    x = tiles.reshape(n, 3, count, size, count, size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(n, count * count, 3 * size * size)


def _mixed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of every patch to every patch: (tiles, patches, heads, head_dim)."""
    scores = jnp.einsum("nphk,nshk->nhps", q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1).astype(v.dtype)
    return jnp.einsum("nhps,nshk->nphk", weights, v)


def _by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`_mixed`, a head of a tile at a time, so that a CPU keeps its scores in its cache."""
    n, p, h, d = q.shape

    def head(one: jax.Array) -> jax.Array:
        q, k, v = one
        scores = ((q * d**-0.5) @ k.T).astype(jnp.promote_types(q.dtype, jnp.float32))
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return ((weights.astype(v.dtype) @ v) / weights.sum(-1, keepdims=True)).astype(v.dtype)

    parts = jnp.stack([q, k, v]).transpose(1, 3, 0, 2, 4).reshape(n * h, 3, p, d)
    return jax.lax.map(head, parts).reshape(n, h, p, d).transpose(0, 2, 1, 3)


def _layer(x: Float[jax.Array, "n p d"], params: Tree, eyes: Vision) -> Float[jax.Array, "n p d"]:
    """One pre-norm block: attention of every patch to every patch, and an MLP with quick-GELU, x sigmoid(1.702 x)."""
    qkv = linear(norm(x, params["attention_norm"], eyes), params["qkv"])
    q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    by_head = q.shape[1] >= MANY
    mixed = jax.lax.platform_dependent(q, k, v, cpu=_by_head, default=_mixed) if by_head else _mixed(q, k, v)
    x = x + linear(mixed[:, :, :, None], params["out"], 3)
    h = linear(norm(x, params["mlp_norm"], eyes), params["up"])
    return x + linear(h * jax.nn.sigmoid(1.702 * h), params["down"])


def embedded(
    params: Tree, tiles: Float[jax.Array, "n c h w"], eyes: Vision, dtype: jnp.dtype
) -> Float[jax.Array, "n p d"]:
    """What enters the tower's first layer: the class token, then the patches, each with its position."""
    x = patches_of(tiles.astype(dtype), eyes) @ params["patches"].astype(dtype)
    first = jnp.broadcast_to(params["class"].astype(dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1) + params["positions"].astype(dtype)
    return norm(x, params["norm"], eyes)


def tower(
    params: Tree,
    tiles: Float[jax.Array, "n c h w"],
    eyes: Vision,
    dtype: jnp.dtype = jnp.float32,
    again: bool = False,
    unroll: bool = False,
) -> Float[jax.Array, "n p d"]:
    """Features of the patches, in `dtype`: the input of the last layer, without the class token.

    Args:
      params: params["vision"] of a model.
      tiles: normalised pixels, (tiles, 3, side, side).
      eyes: the tower.
      dtype: in which it computes.
      again: the backward pass computes each layer again, and keeps their inputs alone.
      unroll: each layer is compiled by itself.
    """

    def layer(x: jax.Array, one: Tree) -> jax.Array:
        return _layer(x, one, eyes)

    x = embedded(params, tiles, eyes, dtype)
    block = jax.checkpoint(layer) if again else layer
    x = jax.lax.scan(lambda x, one: (block(x, one), None), x, params["blocks"], unroll=unroll)[0]
    return x[:, 1:]


def merged(features: Float[jax.Array, "n p d"], eyes: Vision) -> Float[jax.Array, "n s 4d"]:
    """Two by two patches side by side in one token, tokens row by row."""
    n, side, d = features.shape[0], eyes.side, features.shape[-1]
    x = features.reshape(n, side, 2, side, 2, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, side * side, 4 * d)


def rows(
    params: Tree,
    tiles: Float[jax.Array, "n c h w"],
    eyes: Vision,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout = ANYWHERE,
    again: bool = False,
    unroll: bool = False,
) -> Float[jax.Array, "r d"]:
    """What takes the places of embeddings: the tokens of all tiles, then the end of a row and the end of the grid.

    On a mesh each device sees the tiles of its own rows with the whole tower, and has a table of its own.

    Args:
      params: params["vision"] of a model.
      tiles: normalised pixels, (tiles, 3, side, side); as many on each device.
      layout: where activations lie on a mesh.
      again, unroll: see `tower`.

    Returns:
      (tiles * side**2 + ENDS, embed) of a device.
    """

    def part(tiles: jax.Array, params: Tree) -> jax.Array:
        see = lambda some: merged(tower(params, some, eyes, dtype, again, unroll), eyes)  # noqa: E731
        if tiles.shape[0] > eyes.at_once:  # so that the scores of a few tiles are in memory, not of all
            tokens = jax.lax.map(lambda one: see(one[None])[0], tiles, batch_size=eyes.at_once)
        else:
            tokens = see(tiles)
        tokens = tokens.reshape(-1, eyes.width)
        ends = jnp.stack([params["row_end"], params["whole_end"]]).astype(dtype)
        x = jnp.concatenate([tokens, ends])[None]
        return linear(jax.nn.gelu(linear(x, params["in"]), approximate=False), params["out"])[0]

    used = layout.gather({k: v for k, v in params.items() if k != "unused"}, whole=True)
    batch = P(join(layout.batch))
    return per_device(part, (batch, P()), batch, tiles, used)


def put(
    x: Float[jax.Array, "b t d"],
    table: Float[jax.Array, "r d"],
    index: Int[jax.Array, "b t"],
    layout: Layout = ANYWHERE,
) -> Float[jax.Array, "b t d"]:
    """x with table[index] where the index is no negative number.

    Args:
      x: embeddings of the tokens.
      table: of `rows`.
      index: into the table of the row's own device.
    """

    def part(x: jax.Array, table: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.where(index[..., None] >= 0, table[jnp.maximum(index, 0)].astype(x.dtype), x)

    spec = layout.residual()
    return per_device(part, (spec, P(join(layout.batch)), P(*spec[:2])), spec, x, table, index)


def rows_of(
    params: Tree,
    tiles: jax.Array,
    cfg: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout = ANYWHERE,
    again: bool = False,
    unroll: bool = False,
) -> jax.Array:
    """`rows` of a whole model's parameters."""
    assert cfg.vision is not None  # nobody gives pictures to a text model
    return rows(params["vision"], tiles, cfg.vision, dtype, layout, again, unroll)
