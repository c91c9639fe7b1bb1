"""Setups that several tests plan."""

from __future__ import annotations

from typing import Any

from phi3_jax.chips import parse_topology
from phi3_jax.family import published
from phi3_jax.planning.setup import Setup
from phi3_jax.sharding.rules import degrees


def setup(
    member: str = "medium",
    topology: str = "v5p:4x4x8",
    strategy: str = "fsdp",
    *,
    context: int = 1,
    tensor: int = 1,
    sequences: int = 1024,
    sequence_length: int = 4096,
    length: str | None = None,
    **more: Any,
) -> Setup:
    """A setup that divides; `length` is the member's context ("4k", "8k", "128k")."""
    where = parse_topology(topology)
    mesh = degrees(strategy, where.devices, slices=where.slices, context=context, tensor=tensor)
    return Setup(published(member, length), where, strategy, mesh, sequence_length, sequences, **more).check()
