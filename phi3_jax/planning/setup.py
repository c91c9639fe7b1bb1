"""One way to train one model: model, devices, strategy, batch, remat; and how much of it each device has."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax

from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.models.layout import Layout
from phi3_jax.models.spec import ParamSpec, param_specs
from phi3_jax.planning.chips import CHIPS, Topology
from phi3_jax.sharding import rules
from phi3_jax.sharding.rules import AXES, Axes, Degrees


@functools.lru_cache(maxsize=64)
def tensors(model: ModelConfig) -> tuple[tuple[str, ParamSpec], ...]:
    """(path, spec) of every parameter; stacked layers are one tensor, whose path starts with "blocks"."""
    leaves = jax.tree_util.tree_leaves_with_path(param_specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
    return tuple((jax.tree_util.keystr(path, simple=True, separator="/"), spec) for path, spec in leaves)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      degrees: sizes of the mesh axes.
      window: tokens in a window.
      windows: windows in a global batch.
      accumulation: microbatches a step.
      remat: what the backward pass keeps, see `decoder.REMAT`.
      value_bytes: bytes of a value in the compute dtype.
    """

    model: ModelConfig
    topology: Topology
    strategy: str
    degrees: Degrees
    window: int
    windows: int
    accumulation: int = 1
    remat: str = "full"
    value_bytes: int = 2

    @property
    def batch_tokens(self) -> int:
        return self.windows * self.window

    @property
    def devices(self) -> int:
        return math.prod(self.degrees)

    @property
    def rows(self) -> float:
        """Windows of a microbatch that one device has (with those it shares a window with)."""
        return self.windows / (row_ways(self.degrees) * self.accumulation)

    @property
    def layout(self) -> Layout:
        return rules.layout_of(self.strategy)

    @property
    def embed_axes(self) -> Axes:
        """Mesh axes over which parameters are sliced along embed."""
        return rules.rules_of(self.strategy).get("embed", ())

    @property
    def period(self) -> int:
        """Layers rematerialised together: the period of the pattern of layers (2 for phi-3-small)."""
        sparse = self.model.blocksparse
        return max(1, sparse.dense_every) if sparse else 1

    def ways(self, axes: Axes) -> int:
        """Devices along mesh axes."""
        return math.prod(getattr(self.degrees, axis) for axis in axes)

    def inner_tokens(self) -> float:
        """Tokens of a microbatch a device has inside attention and MLP."""
        return self.rows * self.window / self.ways(self.layout.time)

    def residual_tokens(self) -> float:
        """Tokens of a microbatch a device has of the residual stream between the matrices."""
        return self.rows * self.window / self.ways(self.layout.residual_time)

    def stored_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """A device's piece of a parameter."""
        table = rules.rules_of(self.strategy)
        return tuple(
            size // self.ways(table.get(axis, ()) if axis else ())
            for axis, size in zip(spec.axes, spec.shape, strict=True)
        )

    def kept_split(self, spec: ParamSpec) -> int:
        """Pieces that a gathered parameter of a layer stays cut into (its heads or mlp)."""
        table, heads = rules.rules_of(self.strategy), set(self.layout.heads)
        split = [axes for axis in spec.axes if axis and (axes := table.get(axis)) and set(axes) <= heads]
        return math.prod(self.ways(axes) for axes in split)

    def check(self) -> Setup:
        """This setup, when its parameters and batch divide over its mesh.

        Raises:
          UserError: a mesh axis that does not divide a dimension, the batch or the window; lists the sizes that do.
        """
        mesh, table = SimpleNamespace(shape=dict(zip(AXES, self.degrees, strict=True))), rules.rules_of(self.strategy)
        for _, spec in tensors(self.model):
            rules.resolve(spec, table, mesh)
        rules.check_divides("batch_windows", self.windows, self.layout.batch, mesh)
        if self.windows % self.accumulation:
            rows = self.windows // row_ways(self.degrees)
            raise UserError(
                f"train.accumulation={self.accumulation} does not divide the batch of {self.windows} windows; "
                f"use {rules.divisors(rows)}"
            )
        rules.check_batch(self.strategy, mesh, self.windows // self.accumulation, self.window)
        return self


def row_ways(mesh: Degrees) -> int:
    """Ways in which every strategy splits the windows of a batch."""
    return mesh.replica * mesh.data


def on_one_device(
    model: ModelConfig, rows: int, window: int, *, remat: str, value_bytes: int, platform: str = "gpu"
) -> Setup:
    """A setup with everything on one device of a platform, whatever its memory."""
    chip = next(chip for chip in CHIPS.values() if chip.platform == platform)
    topology = Topology(f"{chip.name}:1", chip, 1, (1,) * max(2, len(chip.pod)))
    return Setup(model, topology, "dp", Degrees(1, 1, 1, 1), window, rows, 1, remat, value_bytes)
