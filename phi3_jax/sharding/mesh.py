"""The only place a mesh is made; one device is a mesh of size one."""

from __future__ import annotations

from collections.abc import Sequence

import jax

# Order matters: outer axes cross the slower network. Strategies map logical axes onto these.
AXES = ("replica", "data", "context", "tensor")


def make_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """An explicit-sharding mesh with every device on the "data" axis."""
    devices = list(devices or jax.devices())
    shape = (1, len(devices), 1, 1)
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES), devices=devices)
