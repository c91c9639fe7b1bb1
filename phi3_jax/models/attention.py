"""What attention may see (`Mask`), and which implementation computes it (`attend`).

A mask is a small description, not an array; each implementation builds what it needs from it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.errors import UserError, nearest
from phi3_jax.models.kernels import blocksparse, chunked, cudnn, flash, splash
from phi3_jax.models.layout import explicit, join, per_device, spec_of, ways
from phi3_jax.models.masks import ORIGIN, Mask, Origin, part_rows, piece, seen

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["IMPLEMENTATIONS", "Mask", "attend", "reference"]


def reference(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    origin: Origin = ORIGIN,
) -> Float[jax.Array, "b t g r k"]:
    """Plain attention with the whole score matrix; softmax in float32 or wider."""
    t, g, r = q.shape[1:4]
    scores = jnp.einsum("btgrk,bsgk->bgrts", q * jnp.asarray(scale, q.dtype), k)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    ok = seen(mask, slice(0, t), slice(0, k.shape[1]), (g, r), origin)
    scores = jnp.where(ok, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bgrts,bsgk->btgrk", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation must know to say whether it can serve: shapes, dtype, mask, and how it is split."""

    platform: str
    time: int
    head_dim: int
    dtype: jnp.dtype
    mask: Mask
    time_shards: int
    splits_heads: bool


def _blocksparse(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, _: Origin) -> jax.Array:
    return blocksparse.attend(q, k, v, mask.blocksparse, scale)


def _never(_: Problem) -> str | None:
    return None


def _blocksparse_obstacle(p: Problem) -> str | None:
    if p.mask.blocksparse is None:
        return "the mask has no block pattern at this length"
    if p.mask.segments is not None:
        return "it knows no packed documents"
    if p.mask.window is not None:
        return "the mask has a window too"
    return "it knows no heads or times split over devices" if p.time_shards > 1 or p.splits_heads else None


# name -> (kernel of one device's part, why it cannot serve a problem or None)
_KERNELS: dict[str, tuple[Callable[..., jax.Array], Callable[[Problem], str | None]]] = {
    "reference": (reference, _never),
    "chunked": (chunked.attend, _never),
    "blocksparse": (_blocksparse, _blocksparse_obstacle),
    "splash": (splash.attend, splash.obstacle),
    "cudnn": (cudnn.attend, cudnn.obstacle),
    "flash": (flash.attend, flash.obstacle),
}
IMPLEMENTATIONS = ("auto", *_KERNELS)
# What "auto" tries, in order; "chunked" always serves.
_AUTO = {
    "tpu": ("splash", "chunked"),
    "gpu": ("blocksparse", "cudnn", "chunked"),
    "cpu": ("blocksparse", "flash", "chunked"),
}
_FAST = ("splash", "cudnn")


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def choose(implementation: str, problem: Problem) -> str:
    """The implementation to take; "auto" the first that can serve, saying once why a fast one cannot.

    Raises:
      UserError: unknown implementation, or one that cannot serve the problem.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"unknown attention {implementation!r}{nearest(implementation, IMPLEMENTATIONS)}")
    if implementation != "auto":
        if obstacle := _KERNELS[implementation][1](problem):
            raise UserError(f"attention={implementation!r} cannot serve this: {obstacle}; use 'auto'")
        return implementation
    skipped: list[str] = []
    for name in _AUTO.get(problem.platform, ("blocksparse", "chunked")):
        obstacle = _KERNELS[name][1](problem)
        if obstacle is None:
            if skipped and name not in _FAST and name != "blocksparse":
                _say_once(f"note: attention falls back to {name!r}: {'; '.join(skipped)}")
            return name
        if name in _FAST:
            skipped.append(f"{name!r} cannot serve: {obstacle}")
    raise AssertionError("chunked serves everything")


def platform_of(x: jax.Array) -> str:
    """ "cpu", "gpu" or "tpu": of the mesh that x lives on (which may be a topology not attached), else the default's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) if explicit(x) else None
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    implementation: str = "auto",
) -> Float[jax.Array, "b t g r k"]:
    """Attention of queries over keys.

    On an explicit mesh each device computes its own rows and heads. Over a split time keys and values are gathered, and
    devices exchange half of their queries, so that each has as much to do (`masks.part_rows`). Letters of shapes are those
    of `decoder`.

    Args:
      mask: what each query may see.
      scale: factor on q.k.
      implementation: "reference" (the whole score matrix), "chunked" (causal blocks in XLA: skips the upper triangle),
        "blocksparse" (skips what phi-3-small's pattern leaves out), "splash" (TPU), "cudnn" (NVIDIA GPU),
        "flash" (CPU, where nothing is differentiated); "auto" takes the fastest that can serve on the platform.

    Raises:
      UserError: unknown implementation, or one that cannot serve.
    """
    mask, mesh = mask.simplified(q.shape[1]), jax.typeof(q).sharding.mesh
    batch, time, heads = spec_of(q)[:3]
    shards, splits_heads, length = ways(mesh, time), ways(mesh, heads) > 1, q.shape[1]
    problem = Problem(platform_of(q), length, q.shape[-1], q.dtype, mask, shards, splits_heads)
    name = choose(implementation, problem)
    kernel, total = _KERNELS[name][0], q.shape[2] * q.shape[3]
    tiles, tile_specs = None, P()
    if name == "splash":
        tiles = splash.prepare(mask, q.shape, ways(mesh, heads), shards)
        tile_specs = splash.specs(tiles, mesh, P(join(heads), join(time))) if explicit(q) else P()

    def part(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        branches: jax.Array | None,
        tiles: Any,
    ) -> jax.Array:
        rows = None
        if shards > 1:
            q, rows = _exchanged(q, time, shards), part_rows(length, shards, jax.lax.axis_index(time))
            k, v = _gathered(k, time), _gathered(v, time)
            segments, positions, branches = (
                None if x is None else _gathered(x, time) for x in (segments, positions, branches)
            )
        origin = Origin(
            rows=rows,
            head=jax.lax.axis_index(heads) * q.shape[2] * q.shape[3] if splits_heads else 0,
            heads=total,
        )
        here = dataclasses.replace(mask, segments=segments, positions=positions, branches=branches)
        out = kernel(q, k, v, here, scale, origin, *([] if tiles is None else [tiles]))
        return out if rows is None else _exchanged(out, time, shards)

    rows, keys = P(join(batch), join(time)), P(join(batch), join(time), join(heads), None)
    queries = P(*keys, None)
    specs = (queries, keys, keys, rows, rows, rows, tile_specs)
    return per_device(part, specs, queries, q, k, v, mask.segments, mask.positions, mask.branches, tiles)


def _exchanged(x: jax.Array, axes: tuple[str, ...], shards: int) -> jax.Array:
    """Rows of each device in order, made those of `part_rows`; those, put back in order."""
    half = piece(shards * x.shape[1], shards)
    if half == x.shape[1]:
        return x
    pairs = [(i, shards - 1 - i) for i in range(shards)]
    return jnp.concatenate([x[:, :half], jax.lax.ppermute(x[:, half:], axes, pairs)], axis=1)


def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=1, tiled=True)
