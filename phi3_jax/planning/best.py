"""The best way to train a model on given devices: strategy, mesh, remat and microbatch, by predicted tokens per second."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from phi3_jax.chips import Topology
from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.planning.memory import KEPT, Memory, limit, predict
from phi3_jax.planning.roofline import Roofline, roofline
from phi3_jax.planning.setup import Setup, row_ways
from phi3_jax.sharding.rules import STRATEGIES, Degrees, degrees
from phi3_jax.units import human_bytes

MIN_BATCH = 4 * 2**20  # tokens: the recipe's batch (experiments/scaling.py)
MAX_GROWTH = 1.25  # a larger batch than asked for is another experiment; that much is taken so that it divides


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setup with its prediction."""

    setup: Setup
    memory: Memory
    roofline: Roofline

    @property
    def fits(self) -> bool:
        return self.memory.total <= limit(self.setup)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.setup.batch_tokens / self.roofline.step


def evaluate(setup: Setup) -> Candidate:
    """A setup with its memory and time."""
    return Candidate(setup, predict(setup), roofline(setup))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def meshes(model: ModelConfig, topology: Topology, length: int) -> Iterator[tuple[str, Degrees]]:
    """Every strategy and mesh that divides the devices and the model."""
    for strategy in STRATEGIES:
        tensors = _divisors(model.kv_heads) if strategy == "fsdp_tp" else (1,)
        contexts = [2**i for i in range(int(math.log2(length)))] if strategy == "fsdp_cp" else (1,)
        for tensor in tensors:
            for context in contexts:
                if (strategy, tensor, context) in (("fsdp_tp", 1, 1), ("fsdp_cp", 1, 1)):
                    continue  # plain fsdp
                try:
                    sizes = degrees(strategy, topology.devices, slices=topology.slices, context=context, tensor=tensor)
                except UserError:
                    continue
                yield strategy, sizes


def candidates(
    model: ModelConfig, topology: Topology, length: int, tokens: int, exact: bool, **how: Any
) -> Iterator[Candidate]:
    """Everything that divides; with `exact` only a batch of just `tokens`, else one of at least that many.

    `how`: further fields of `Setup`, which every candidate has.
    """
    for strategy, sizes in meshes(model, topology, length):
        unit = row_ways(sizes) * length
        batch = tokens if exact else math.ceil(tokens / unit) * unit
        if batch % unit:
            continue
        for parts in _divisors(batch // unit):
            setup = Setup(model, topology, strategy, sizes, length, batch // length, parts, **how)
            try:
                setup.check()
            except UserError:
                break
            for remat in KEPT:
                yield evaluate(dataclasses.replace(setup, remat=remat))


def best(
    model: ModelConfig,
    topology: Topology,
    length: int,
    tokens: int = MIN_BATCH,
    exact: bool = False,
    **how: Any,
) -> Candidate:
    """The candidate that fits with the most predicted tokens per second.

    Parameters stay inside a slice where they can.
    Among equals, the one that would be fastest if nothing overlapped, then the one that needs least memory.

    Args:
      length: of a sequence, in tokens.
      tokens: of a global batch, at least; a batch more than `MAX_GROWTH` times larger is taken only if none else fits.
      exact: whether the batch must have just `tokens`.
      how: further fields of `Setup`: optimizer, lora.

    Raises:
      UserError: nothing divides, or nothing fits; says what the least demanding one needs.
    """
    found = list(candidates(model, topology, length, tokens, exact, **how))
    if not found:
        raise UserError(
            f"{model.name} on {topology.text}: no strategy divides {topology.devices} devices and a batch of {tokens:,} "
            f"tokens in sequences of {length:,}; choose another topology or train.batch_tokens"
        )
    fitting = [c for c in found if c.fits]
    if not fitting:
        least = min(found, key=lambda c: c.memory.total)
        room = topology.chip.memory
        raise UserError(
            f"{model.name} does not fit {topology.text}: of what divides the least is "
            f"{human_bytes(least.memory.total)} per device ({words(least.setup)}); each has {human_bytes(room)}, "
            f"{human_bytes(limit(least.setup))} of them for a plan; "
            "take another topology"
        )
    close = [c for c in fitting if c.setup.batch_tokens <= MAX_GROWTH * tokens]
    return min(close or fitting, key=_rank)


def _rank(c: Candidate) -> tuple[float, ...]:
    batch = c.setup.batch_tokens
    # Parameters gathered between slices before every layer need a network that never waits: where nothing else fits.
    across = c.setup.topology.slices > 1 and "replica" in c.setup.embed_axes
    return across, float(f"{c.roofline.step / batch:.3g}"), c.roofline.serial / batch, c.memory.total


def words(setup: Setup) -> str:
    """The setup as overrides of a config, for messages and commands."""
    parts = [f"--config.train.strategy={setup.strategy}"]
    for name in ("context", "tensor"):
        if (size := getattr(setup.degrees, name)) > 1:
            parts.append(f"--config.train.{name}={size}")
    parts.append(f"--config.train.remat={setup.remat}")
    if setup.accumulation > 1:
        parts.append(f"--config.train.accumulation={setup.accumulation}")
    return " ".join(parts)
