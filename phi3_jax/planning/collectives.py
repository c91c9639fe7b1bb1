"""What devices send one another in a training step: every collective's bytes, link and time.

A device that gathers V bytes over n devices receives V (n - 1) / n; scattering sums costs the same, and an all-reduce both.
Over two kinds of links, a gather goes over the slow one first, with what is still a slice.

On a torus a mesh axis owns some of its axes, and sends both ways on each (one way where an axis does not close into a
ring); an axis of the torus that two mesh axes share gives each half. So counts "How to scale your model" (part 3).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

from phi3_jax.chips import Topology
from phi3_jax.planning.memory import MASTER
from phi3_jax.planning.setup import Setup, tensors
from phi3_jax.sharding.rules import Axes, Degrees

# (gathers, scatters) of the residual stream in one layer under tensor parallelism: before and after attention and MLP, each
# way; and those made again in the backward pass, by remat policy (a layer's last scatter is never needed again).
TENSOR_PASSES = (4, 4)
TENSOR_AGAIN = {"none": (0, 0), "dots": (2, 0), "names": (2, 1), "full": (2, 1)}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one kind of link.

    Attributes:
      name: what is moved.
      op: "all-gather", "reduce-scatter", "all-reduce" or "collective-permute".
      axes: mesh axes.
      link: "ICI", "NVLink", "DCN", ...
      slow: whether that is the network between slices or nodes.
      bytes: a device sends (and receives) in a step.
      seconds: at the link's full rate.
      overlaps: whether it may run while other work is done (weights and their gradients), or holds it up (activations).
    """

    name: str
    op: str
    axes: Axes
    link: str
    slow: bool
    bytes: float
    seconds: float
    overlaps: bool


@dataclasses.dataclass(frozen=True)
class Level:
    """Devices joined by one kind of link: how many, and bytes/s that each sends."""

    ways: int
    rate: float
    slow: bool


# ------------------------------------------------------------------------------------------------ links


@functools.lru_cache(maxsize=4096)
def rates(topology: Topology, degrees: Degrees) -> dict[str, float]:
    """Bytes/s a device sends along each mesh axis inside a slice, mesh axes laid on the torus from the innermost out."""
    chip = topology.chip
    # [size, links' worth of bandwidth]
    free = [[size, 2.0 if wrap else 1.0] for size, wrap in zip(topology.dims, topology.wraps, strict=True) if size > 1]
    if chip.cores > 1:
        free.append([chip.cores, 1.0])
    found = {}
    for axis in ("tensor", "context", "data", "replica"):
        ways = getattr(degrees, axis)
        if axis == "replica" and topology.slices > 1:
            continue
        taken, free = _take(ways, free)
        found[axis] = taken * chip.link
    return found


def _take(ways: int, free: list[list[float]]) -> tuple[float, list[list[float]]]:
    """(links' worth of bandwidth for a mesh axis of `ways` devices, what is left of the torus)."""
    if ways == 1:
        return 0.0, free
    for count in range(1, len(free) + 1):
        for chosen in itertools.combinations(range(len(free)), count):
            if math.prod(free[i][0] for i in chosen) == ways:
                return sum(free[i][1] for i in chosen), [f for i, f in enumerate(free) if i not in chosen]
    links, left = 0.0, []
    for size, bandwidth in free:
        part = math.gcd(int(size), ways)
        ways //= part
        if part == size:
            links += bandwidth
        else:
            links += bandwidth / 2 if part > 1 else 0.0
            left.append([size // part, bandwidth / 2 if part > 1 else bandwidth])
    return links, left


def levels(setup: Setup, axes: Axes) -> tuple[Level, ...]:
    """The links that a collective over mesh axes uses, fast ones first."""
    topology, chip = setup.topology, setup.topology.chip
    axes = tuple(axis for axis in axes if getattr(setup.degrees, axis) > 1)
    if chip.pod:
        outer = setup.ways(tuple(a for a in axes if a == "replica")) if topology.slices > 1 else 1
        own = rates(topology, setup.degrees)
        fast = Level(setup.ways(axes) // outer, sum(own.get(axis, 0.0) for axis in axes), False)
        found = (fast, Level(outer, chip.network, True))
    else:
        inner, node = 1, topology.dims[-1]
        for axis in ("tensor", "context", "data", "replica"):  # inner axes fill a node first
            here = math.gcd(getattr(setup.degrees, axis), node)
            node //= here
            inner *= here if axis in axes else 1
        found = (Level(inner, chip.link, False), Level(setup.ways(axes) // inner, chip.network, True))
    return tuple(level for level in found if level.ways > 1)


def moved(setup: Setup, name: str, op: str, axes: Axes, size: float, overlaps: bool = True) -> list[Collective]:
    """The collective of `size` bytes (gathered, or before scattering) over mesh axes, one row a kind of link."""
    rows, factor = [], 2 if op == "all-reduce" else 1
    axes = tuple(axis for axis in axes if getattr(setup.degrees, axis) > 1)
    for level in levels(setup, axes):
        sent = factor * size * (level.ways - 1) / level.ways
        link = setup.topology.chip.slow if level.slow else setup.topology.chip.fast
        rows.append(Collective(name, op, axes, link, level.slow, sent, sent / level.rate, overlaps))
        size /= level.ways
    return rows


def _permuted(setup: Setup, name: str, axes: Axes, size: float) -> list[Collective]:
    """`size` bytes that each device sends to the one as far from the other end of an axis, over its slowest link.

    On a ring the pairs are half of it apart at most: the same bytes cross a link as in a gather of half of the ring.
    """
    level = levels(setup, axes)[-1]
    link = setup.topology.chip.slow if level.slow else setup.topology.chip.fast
    crossed = size * max(1.0, level.ways / 4)
    return [Collective(name, "collective-permute", axes, link, level.slow, size, crossed / level.rate, False)]


# ------------------------------------------------------------------------------------------------ a step


def collectives(setup: Setup) -> list[Collective]:
    """Everything a step moves, by kind; scalars and statistics are left out."""
    return [*_weights(setup), *_activations(setup)]


def _weights(setup: Setup) -> list[Collective]:
    """Parameters gathered before use and gradients reduced, for every microbatch.

    Matrices of layers travel in the compute dtype, gains in fp32, the embedding in fp32, the output matrix in the compute
    dtype. A layer is gathered again in the backward pass unless nothing is rematerialised.
    """
    width, times = setup.value_bytes, setup.accumulation
    blocks = [spec for path, spec in tensors(setup.model) if path.startswith("blocks")]
    layers = sum(spec.size / setup.kept_split(spec) * (width if len(spec.shape) > 2 else MASTER) for spec in blocks)
    table = float(setup.model.vocab * setup.model.embed)
    stored = setup.embed_axes
    everywhere = ("replica", "data", "context")  # where tokens are split
    rest = tuple(axis for axis in everywhere if axis not in stored)
    whole = stored + tuple(a for a in setup.layout.heads if a not in stored)  # the tables are split over vocab too
    parts = (("layers", layers, stored), ("embedding", MASTER * table, whole), ("output matrix", width * table, whole))
    rows = []
    for name, size, axes in parts:
        passes = 2 if name == "layers" and setup.remat != "none" else 1
        if setup.layout.gathers:
            rows += moved(setup, f"{name}: weights", "all-gather", axes, size * passes * times)
        if not setup.lora:
            rows += _reduced(setup, name, size * times, axes, rest)
    if setup.lora:  # the frozen have no gradients
        rows += _reduced(setup, "adapters", float(MASTER * sum(s.size for _, s in setup.trained)) * times, stored, rest)
    return rows


def _reduced(setup: Setup, name: str, size: float, axes: Axes, rest: Axes) -> list[Collective]:
    """Gradients of `size` bytes, of parameters that are cut over `axes`."""
    rows = []
    if setup.layout.gathers:
        rows += moved(setup, f"{name}: gradients", "reduce-scatter", axes, size)
    return rows + moved(setup, f"{name}: gradients", "all-reduce", rest, size / setup.ways(axes))


def _activations(setup: Setup) -> list[Collective]:
    """The residual stream around the matrices of a layer (tensor); keys, values and half of the queries (context)."""
    model, layers = setup.model, setup.model.layers * setup.accumulation
    heads, rows = setup.layout.heads, []
    if setup.ways(heads) > 1:
        size = setup.rows * setup.sequence_length / setup.ways(setup.layout.time) * model.embed * setup.value_bytes
        gathers, scatters = map(sum, zip(TENSOR_PASSES, TENSOR_AGAIN[setup.remat], strict=True))
        rows += moved(setup, "residual stream", "all-gather", heads, layers * gathers * size, overlaps=False)
        rows += moved(setup, "residual stream", "reduce-scatter", heads, layers * scatters * size, overlaps=False)
    time = setup.layout.time
    if setup.ways(time) > 1:
        size = setup.rows * setup.sequence_length * 2 * model.kv_heads * model.head_dim * setup.value_bytes
        passes = 1 if setup.remat == "none" else 2
        rows += moved(setup, "keys and values", "all-gather", time, layers * passes * size, overlaps=False)
        rows += moved(setup, "keys and values", "reduce-scatter", time, layers * size, overlaps=False)
        # Half of a device's queries and of their outputs, there, back, and again where a layer is made again.
        half = setup.rows * setup.sequence_length / setup.ways(time) * model.inner * setup.value_bytes / 2
        rows += _permuted(setup, "queries and outputs", time, layers * 2 * (passes + 1) * half)
    return rows
