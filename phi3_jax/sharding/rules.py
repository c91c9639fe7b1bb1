"""Strategies as data: frozen tables from logical axes to mesh axes.

Tensors know logical names only (`ParamSpec.axes`); a strategy turns them into shardings, once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.errors import UserError, nearest
from phi3_jax.models.spec import ParamSpec, map_specs

# dp: every device holds all parameters. fsdp: each holds a slice along "embed" and gathers a layer at a time.
STRATEGIES = MappingProxyType(
    {
        "dp": MappingProxyType({"batch": "data"}),
        "fsdp": MappingProxyType({"batch": "data", "embed": "data"}),
    }
)


def rules_of(strategy: str) -> MappingProxyType[str, str]:
    """The table of one strategy; a UserError names the nearest valid ones."""
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}{nearest(strategy, STRATEGIES)}")
    return STRATEGIES[strategy]


def resolve(spec: ParamSpec, rules: MappingProxyType[str, str], mesh: Mesh) -> P:
    """PartitionSpec of one tensor; errors for two dimensions on one mesh axis and for sizes that do not divide."""
    entries: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        target = rules.get(axis) if axis else None
        if target is not None:
            if target in entries:
                raise UserError(f"axes {spec.axes}: two dimensions map to mesh axis {target!r}; a strategy may map one")
            ways = mesh.shape[target]
            if size % ways:
                valid = [str(d) for d in range(1, size + 1) if size % d == 0 and d <= 512]
                raise UserError(
                    f"mesh axis {target!r}={ways} does not divide {axis}={size}; use {', '.join(valid)} devices"
                )
        entries.append(target)
    return P(*entries)


def param_shardings(specs: Any, strategy: str, mesh: Mesh) -> Any:
    """Tree of NamedSharding for a tree of ParamSpec."""
    rules = rules_of(strategy)
    return map_specs(lambda s: NamedSharding(mesh, resolve(s, rules, mesh)), specs)


def batch_sharding(strategy: str, mesh: Mesh) -> NamedSharding:
    """Sharding of (batch, ...) arrays."""
    return NamedSharding(mesh, P(rules_of(strategy)["batch"]))


def gatherer(strategy: str) -> Callable[[Any], Any]:
    """What a model calls on stored parameters before use: all-gathers them under fsdp, nothing under dp."""
    if "embed" not in rules_of(strategy):
        return lambda tree: tree
    return lambda tree: jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), tree)
