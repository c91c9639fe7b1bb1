"""A strategy (`strategies.STRATEGIES`) turns the logical axes of tensors into shardings, once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.errors import UserError, nearest
from phi3_jax.models.layout import Layout
from phi3_jax.models.spec import ParamSpec, map_specs
from phi3_jax.strategies import AXES as AXES
from phi3_jax.strategies import STRATEGIES as STRATEGIES
from phi3_jax.strategies import Axes
from phi3_jax.units import divisors


class Degrees(NamedTuple):
    """Sizes of the mesh axes."""

    replica: int
    data: int
    context: int
    tensor: int


def rules_of(strategy: str) -> Mapping[str, Axes]:
    """The table of one strategy; a UserError names the nearest valid ones."""
    if strategy not in STRATEGIES:
        raise UserError(f"unknown strategy {strategy!r}{nearest(strategy, STRATEGIES)}")
    return STRATEGIES[strategy]


def degrees(strategy: str, devices: int, *, slices: int = 1, context: int = 1, tensor: int = 1) -> Degrees:
    """Mesh sizes of a strategy on `devices` devices in `slices` slices; "data" takes what is left.

    Raises:
      UserError: unknown strategy, an axis the strategy does not use, or sizes that do not divide the devices.
    """
    used = {axis for axes in rules_of(strategy).values() for axis in axes}
    for name, size, user in (("context", context, "fsdp_cp"), ("tensor", tensor, "fsdp_tp")):
        if size < 1:
            raise UserError(f"mesh axis {name}={size} must be 1 or more")
        if size > 1 and name not in used:
            raise UserError(f"strategy {strategy!r} has no {name} axis ({name}={size}); use strategy={user}")
    if strategy == "multislice" and slices < 2:
        raise UserError("strategy 'multislice' needs 2 slices or more, there is 1; use strategy=fsdp")
    inner = slices * context * tensor
    if devices % inner:
        parts = f"replica={slices} x context={context} x tensor={tensor}"
        raise UserError(f"{parts} = {inner} does not divide {devices} devices; use divisors of {divisors(devices)}")
    return Degrees(slices, devices // inner, context, tensor)


def _entry(axes: Axes | None) -> str | Axes | None:
    return axes[0] if axes is not None and len(axes) == 1 else axes


def resolve(spec: ParamSpec, rules: Mapping[str, Axes], ways: Mapping[str, int]) -> P:
    """PartitionSpec of one tensor over mesh axes of sizes `ways`; errors for two dimensions on one of them and for sizes
    that do not divide."""
    entries: list[Axes | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        target = rules.get(axis) if axis else None
        if axis and target is not None:
            taken = {name for entry in entries if entry for name in entry} & set(target)
            if taken:
                raise UserError(
                    f"axes {spec.axes}: two dimensions map to mesh axis {taken.pop()!r}; a strategy may map one"
                )
            check_divides(axis, size, target, ways)
        entries.append(target)
    return P(*map(_entry, entries))


def check_divides(axis: str, size: int, target: Axes, ways: Mapping[str, int]) -> None:
    """UserError unless mesh axes `target` (of `ways`) divide a dimension `axis` of `size`; lists the sizes that do."""
    split = math.prod(ways[name] for name in target)
    if size % split:
        named = " x ".join(f"{name!r}" for name in target)
        raise UserError(f"mesh axis {named}={split} does not divide {axis}={size}; use {divisors(size)}")


def param_shardings(specs: Any, strategy: str, mesh: Mesh) -> Any:
    """Tree of NamedSharding for a tree of ParamSpec."""
    rules = rules_of(strategy)
    return map_specs(lambda s: NamedSharding(mesh, resolve(s, rules, mesh.shape)), specs)


def batch_spec(strategy: str) -> P:
    """PartitionSpec of (batch, time) arrays: rows over data, time over context."""
    rules = rules_of(strategy)
    return P(_entry(rules["batch"]), "context" if "context" in rules.get("time", ()) else None)


def batch_sharding(strategy: str, mesh: Mesh) -> NamedSharding:
    """Sharding of (batch, time) arrays."""
    return NamedSharding(mesh, batch_spec(strategy))


def row_shards(mesh: Mesh) -> int:
    """Ways the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["data"]


def check_batch(strategy: str, ways: Mapping[str, int], sequences: int, time: int) -> None:
    """UserError unless a (micro)batch of `sequences` x `time` tokens divides over mesh axes of sizes `ways`."""
    rules = rules_of(strategy)
    check_divides("batch_windows", sequences, rules["batch"], ways)
    if "time" in rules:
        check_divides("window", time, rules["time"], ways)


def layout_of(strategy: str) -> Layout:
    """How activations and gathered parameters are laid out under a strategy.

    Raises:
      UserError: one that splits heads or mlp, and not both and time over the same axes: the forward pass knows sequence
        parallelism alone.
    """
    rules = rules_of(strategy)
    time = rules.get("time", ())
    inner = {rules.get("kv_heads", ()), rules.get("mlp", ())}
    if inner != {()} and inner != {time}:
        raise UserError(
            f"strategy {strategy!r} splits kv_heads or mlp; then kv_heads, mlp and time must be split over the same axes"
        )
    return Layout(
        batch=rules["batch"],
        residual_time=time,
        time=tuple(axis for axis in time if axis == "context"),
        heads=rules.get("kv_heads", ()),
        gathers="embed" in rules,
    )
