"""Strategies as data: tables from the logical axes of tensors to the axes of a mesh of devices.

Tensors know logical names only: those of `ParamSpec.axes`, and for activations "batch" and "time". `sharding.rules` makes
shardings of both. A new strategy is a row here, or in an experiment file `STRATEGIES["name"] = strategy(...)`.
"""

from __future__ import annotations

from collections.abc import Mapping

# Order matters: outer axes cross slower links. Strategies map logical axes onto these.
AXES = ("replica", "data", "context", "tensor")
Axes = tuple[str, ...]


def strategy(**axes: Axes) -> dict[str, Axes]:
    """A table that splits the rows of a batch over the devices, and further logical axes as it is told."""
    return {"batch": ("replica", "data"), **axes}


STRATEGIES: dict[str, Mapping[str, Axes]] = {
    # every device holds all parameters
    "dp": strategy(),
    # each device holds a slice of every parameter, along "embed", and gathers a layer at a time
    "fsdp": strategy(embed=("replica", "data")),
    # and the matrices of a layer are split over heads and mlp; between them the residual stream is split over time
    "fsdp_tp": strategy(embed=("data",), kv_heads=("tensor",), mlp=("tensor",), vocab=("tensor",), time=("tensor",)),
    # fsdp, with each sequence split over devices (long contexts); keys and values are gathered
    "fsdp_cp": strategy(embed=("data", "context"), time=("context",)),
    # fsdp inside each slice, slices hold copies and add their gradients over the slow network
    "multislice": strategy(embed=("data",)),
}
