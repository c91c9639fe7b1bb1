"""How activations lie on a mesh, as the names of mesh axes; the default lies nowhere in particular.

Outside the matrices of a layer the residual stream may be split over time more finely (`residual_time`) than inside
them (`time`), where heads and mlp are split instead (sequence parallelism, arXiv:2205.05198).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]


def join(axes: Axes) -> str | Axes | None:
    """Mesh axes as one entry of a PartitionSpec."""
    return None if not axes else axes[0] if len(axes) == 1 else axes


def explicit(x: jax.Array) -> bool:
    """Whether x lives on a mesh whose shardings are part of its type, not inside `per_device`."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and mesh.are_all_axes_explicit


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes of the dimensions of activations.

    Attributes:
      batch: of the rows.
      residual_time: of time in the residual stream.
      time: of time inside attention and MLP.
      heads: of kv heads (and mlp) inside a layer.
      gathers: whether stored parameters are slices that have to be gathered.
    """

    batch: Axes = ()
    residual_time: Axes = ()
    time: Axes = ()
    heads: Axes = ()
    gathers: bool = False

    def residual(self) -> P:
        """Of the residual stream (batch, time, embed)."""
        return P(join(self.batch), join(self.residual_time), None)

    def inner(self) -> P:
        """Of (batch, time, embed) where a layer's matrices read it."""
        return P(join(self.batch), join(self.time), None)

    def decoding(self) -> Layout:
        """The same for one token per row: nothing is split over time."""
        return dataclasses.replace(self, residual_time=(), time=())

    def put(self, x: jax.Array, spec: P) -> jax.Array:
        """x moved to a spec; as it is outside a mesh."""
        return jax.reshard(x, spec) if explicit(x) and jax.typeof(x).sharding.spec != spec else x

    def gather(self, tree: Any, dtype: jnp.dtype | None = None, whole: bool = False) -> Any:
        """Stored parameters made usable: gathered but for their split over heads, or `whole`.

        With `dtype`, stacked matrices (three dimensions or more) are cast first, so that half the bytes travel; gains
        and biases keep their own.
        """
        if not self.gathers:
            return tree

        def one(path: Any, x: jax.Array) -> jax.Array:
            if not explicit(x):
                return x
            kept = () if whole else self.heads
            entries = spec_of(x)
            spec = [join(axes) if set(axes) <= set(kept) else None for axes in entries]
            if whole or path[-1].key != "weight":
                return self.put(x, P(*spec))
            # "reduced": gradients of a matrix stay parts that the devices have not added up until they are back in slices.
            return jax.reshard(x if dtype is None else x.astype(dtype), P(*spec, reduced={*self.batch, *self.time}))

        return jax.tree_util.tree_map_with_path(one, tree)


ANYWHERE = Layout()


def spec_of(x: jax.Array) -> tuple[Axes, ...]:
    """Mesh axes of each dimension of x; empty where it is not split, or on no mesh."""
    entries = tuple(jax.typeof(x).sharding.spec.partitions)
    return tuple(_names(entry) for entry in entries + (None,) * (x.ndim - len(entries)))


def ways(mesh: jax.sharding.AbstractMesh, axes: Axes) -> int:
    """Devices that mesh axes split a dimension over."""
    return math.prod(mesh.shape[axis] for axis in axes)


def per_device(fn: Callable[..., Any], specs: Sequence[Any], out_specs: Any, *args: Any) -> Any:
    """fn(*args) on each device's own part of the arguments, laid out by `specs` (trees of PartitionSpec).

    The first argument says whether there is a mesh; off it, the call itself.
    """
    if not explicit(args[0]):
        return fn(*args)
    specs = tuple(specs)
    args = jax.tree.map(lambda spec, arg: jax.tree.map(lambda x: _put(x, spec), arg), specs, args, is_leaf=_is_spec)
    # Without the checks the gradient of what is whole on every device is added up over them by itself.
    return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


def sum_over(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum of the devices' x over mesh axes, inside `per_device`."""
    return jax.lax.psum(x, axes) if axes else x


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _put(x: jax.Array, spec: P) -> jax.Array:
    return jax.reshard(x, P(*spec, *[None] * (x.ndim - len(spec))))


def _names(entry: str | Axes | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
