"""The only place a mesh is made; one device is a mesh of size one."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from phi3_jax.configs import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.sharding.rules import AXES, Degrees, check_batch, degrees


def slice_count(devices: Sequence[jax.Device]) -> int:
    """Slices (groups joined by fast links) that TPU devices belong to; 1 elsewhere."""
    return len({getattr(d, "slice_index", 0) or 0 for d in devices})


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    strategy: str = "dp",
    *,
    slices: int | None = None,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """An explicit-sharding mesh over the axes `replica`, `data`, `context`, `tensor` (outer ones cross slower links).

    Args:
      devices: default: all attached ones, of all processes.
      strategy: see `rules.STRATEGIES`.
      slices: groups of devices that the "replica" axis separates; default: what TPU devices say of themselves, else 1.
      context, tensor: sizes of those axes.

    Raises:
      UserError: see `rules.degrees`.
    """
    devices = list(devices or jax.devices())
    found = slice_count(devices)
    shape = degrees(strategy, len(devices), slices=slices or found, context=context, tensor=tensor)
    return Mesh(_arrange(devices, shape, found), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def mesh_of(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh a run asks for; checks that its microbatches divide over it.

    Raises:
      UserError: see `rules.degrees` and `rules.check_batch`.
    """
    mesh = make_mesh(
        devices, run.strategy, slices=run.slices or None, context=run.context_parallel, tensor=run.tensor_parallel
    )
    check_batch(run.strategy, mesh.shape, run.batch_windows // run.accumulation, run.data.window)
    return mesh


def _arrange(devices: list[jax.Device], shape: Degrees, slices: int) -> np.ndarray:
    """Devices as an array of the mesh's shape, neighbours on the inner axes."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices > 1:
        if shape.replica != slices:
            raise UserError(
                f"replica={shape.replica} on {slices} slices; leave replica out, it is the number of slices"
            )
        inner = (1, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
