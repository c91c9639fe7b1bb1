"""One way to train one model: model, devices, strategy, batch, remat; and how much of it each device has."""

from __future__ import annotations

import dataclasses
import functools
import math

from phi3_jax.chips import CHIPS, Topology
from phi3_jax.configs import LoraConfig, ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.keys import PARTS, rates_of
from phi3_jax.models.layout import Layout
from phi3_jax.models.lora import adapter_specs
from phi3_jax.models.parts import part_of
from phi3_jax.models.spec import ParamSpec, named, named_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.rules import Axes, Degrees
from phi3_jax.units import divisors


@functools.lru_cache(maxsize=64)
def tensors(model: ModelConfig) -> tuple[tuple[str, ParamSpec], ...]:
    """(name, spec) of every parameter, of `named_specs`; stacked layers are one tensor, whose name starts with "blocks"."""
    return tuple(named_specs(model).items())


@functools.lru_cache(maxsize=64)
def learning(model: ModelConfig, parts: tuple[str, ...]) -> tuple[tuple[str, ParamSpec], ...]:
    """(name, spec) of every parameter in the parts that are trained; in none is a tower's layer that never runs."""
    if model.vision is None:
        return tensors(model)
    rates = rates_of(parts) or dict.fromkeys(PARTS, 1.0)
    return tuple((name, spec) for name, spec in tensors(model) if part_of(name) in rates)


@functools.lru_cache(maxsize=64)
def adapters(model: ModelConfig, how: LoraConfig) -> tuple[tuple[str, ParamSpec], ...]:
    """(name, spec) of every tensor of the adapters of a model."""
    return tuple(named(adapter_specs(model, how), is_leaf=lambda x: isinstance(x, ParamSpec)).items())


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
      degrees: sizes of the mesh axes.
      sequence_length: in tokens.
      sequences: in a global batch.
      accumulation: microbatches per step.
      remat: what the backward pass keeps, see `decoder.REMAT`.
      value_bytes: bytes of a value in the compute dtype.
      optimizer: its name in `keys.OPTIMIZERS`.
      lora: adapters that are trained in the place of the parameters, or None.
      frozen_bytes: bytes of a value of those parameters then.
      pairs: the batch holds preference pairs, and so the reference's log-probabilities.
      parts: of a phi-3-vision, what is trained (`keys.rates_of`); none: all.
      tiles: of pictures that come with a sequence, on average.
    """

    model: ModelConfig
    topology: Topology
    strategy: str
    degrees: Degrees
    sequence_length: int
    sequences: int
    accumulation: int = 1
    remat: str = "full"
    value_bytes: int = 2
    optimizer: str = "adamw"
    lora: LoraConfig | None = None
    frozen_bytes: int = 2
    pairs: bool = False
    parts: tuple[str, ...] = ()
    tiles: float = 0.0

    @property
    def trained(self) -> tuple[tuple[str, ParamSpec], ...]:
        """(name, spec) of every tensor that has a gradient and a state of the optimiser."""
        return adapters(self.model, self.lora) if self.lora else learning(self.model, self.parts)

    @property
    def batch_tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def devices(self) -> int:
        return math.prod(self.degrees)

    @property
    def rows(self) -> float:
        """Sequences of a microbatch that one device has (with those it shares a sequence with)."""
        return self.sequences / (row_ways(self.degrees) * self.accumulation)

    @property
    def layout(self) -> Layout:
        return rules.layout_of(self.strategy)

    @property
    def embed_axes(self) -> Axes:
        """Mesh axes over which parameters are sliced along embed."""
        return rules.rules_of(self.strategy).get("embed", ())

    def ways(self, axes: Axes) -> int:
        """Devices along mesh axes."""
        return math.prod(getattr(self.degrees, axis) for axis in axes)

    def inner_tokens(self) -> float:
        """Tokens of a microbatch a device has inside attention and MLP."""
        return self.rows * self.sequence_length / self.ways(self.layout.time)

    def residual_tokens(self) -> float:
        """Tokens of a microbatch a device has of the residual stream between the matrices."""
        return self.rows * self.sequence_length / self.ways(self.layout.residual_time)

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
          UserError: a mesh axis that does not divide a dimension, the batch or the sequence; lists the sizes that do.
        """
        ways, table = self.degrees._asdict(), rules.rules_of(self.strategy)
        for _, spec in tensors(self.model):
            rules.resolve(spec, table, ways)
        rules.check_divides("batch_windows", self.sequences, self.layout.batch, ways)
        if self.sequences % self.accumulation:
            rows = self.sequences // row_ways(self.degrees)
            raise UserError(
                f"train.accumulation={self.accumulation} does not divide the batch of {self.sequences} sequences; "
                f"use {divisors(rows)}"
            )
        rules.check_batch(self.strategy, ways, self.sequences // self.accumulation, self.sequence_length)
        return self


def row_ways(mesh: Degrees) -> int:
    """Ways in which every strategy splits the sequences of a batch."""
    return mesh.replica * mesh.data


def on_one_device(
    model: ModelConfig,
    rows: int,
    length: int,
    *,
    remat: str,
    value_bytes: int,
    platform: str = "gpu",
    optimizer: str = "adamw",
) -> Setup:
    """A setup with everything on one device of a platform, whatever its memory."""
    chip = next(chip for chip in CHIPS.values() if chip.platform == platform)
    topology = Topology(f"{chip.name}:1", chip, 1, (1,) * max(2, len(chip.pod)))
    return Setup(model, topology, "dp", Degrees(1, 1, 1, 1), length, rows, 1, remat, value_bytes, optimizer)
