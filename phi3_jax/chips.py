"""Chips and how they are wired: the one place of such numbers (imports no jax).

All are makers' data sheets; none is measured here. A device is what jax calls one: a TPU chip (for tpu7x one of its two
cores, which share the chip's memory and links evenly), a GPU, or a CPU.

Sources.
  TPU peak, HBM bandwidth, torus: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; tpu7x's HBM bandwidth and peak as in
    jax's own table, jax/_src/pallas/mosaic/tpu_info.py.
  TPU link and data-centre network: "How to scale your model", part 2 (jax-ml.github.io/scaling-book/tpus): bytes/s one way
    a link, bytes/s per chip. tpu7x is announced with 1.2 TB/s of links both ways, v5p's total, so that its links are taken
    as v5p's; its network is taken as v6e's.
  TPU memory: what XLA lets a program use, as its out-of-memory messages say (30.75, 15.75, 95.74, 31.25 and 94.75 GiB).
  GPU: NVIDIA's data sheets of H100 SXM, H200 SXM and DGX B200 (dense bf16); NVLink and network one way per GPU: the same
    book, part 12 (450 or 900 GB/s per GPU, 8 network cards of 400 Gbit/s per node).
  CPU: nominal, one core; plans for it show sizes, not speed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from types import MappingProxyType

from phi3_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Numbers of one device.

    Attributes:
      kinds: beginnings of jax's `device_kind`.
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes a program may use.
      memory_bandwidth: bytes/s.
      link: bytes/s one way; of one link of the torus, or of all of a GPU's NVLinks together.
      network: bytes/s one way between slices or nodes.
      pod: largest torus; () where devices of a node are joined by a switch.
      node: devices of a node joined by a switch.
      cores: devices per chip.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    pod: tuple[int, ...] = ()
    node: int = 8
    cores: int = 1

    @property
    def fast(self) -> str:
        """Name of the fast link."""
        return {"tpu": "ICI", "gpu": "NVLink", "cpu": "memory"}[self.platform]

    @property
    def slow(self) -> str:
        """Name of the network between slices or nodes."""
        return "DCN" if self.platform == "tpu" else "network"


_TABLE = (
    Chip("v4", "tpu", ("TPU v4",), 275e12, 30.75 * GIB, 1.2e12, 4.5e10, 6.25e9, (16, 16, 16)),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 8.19e11, 4.5e10, 3.125e9, (16, 16)),
    Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2.765e12, 9e10, 6.25e9, (16, 20, 28)),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1.638e12, 9e10, 12.5e9, (16, 16)),
    # Halves of a chip: 2,307 TFLOP/s, 7.4 TB/s, 6 links.
    Chip("tpu7x", "tpu", ("TPU7x",), 1153.5e12, 94.75 * GIB, 3.7e12, 4.5e10, 6.25e9, (16, 24, 24), cores=2),
    Chip("h100", "gpu", ("NVIDIA H100",), 989e12, 80e9, 3.35e12, 4.5e11, 5e10),
    Chip("h200", "gpu", ("NVIDIA H200",), 989e12, 141e9, 4.8e12, 4.5e11, 5e10),
    Chip("b200", "gpu", ("NVIDIA B200",), 2250e12, 180e9, 8e12, 9e11, 5e10),
    Chip("cpu", "cpu", (), 1e11, 16e9, 2e10, 1e10, 1e9, node=1024),
)
CHIPS: MappingProxyType[str, Chip] = MappingProxyType({chip.name: chip for chip in _TABLE})
EXAMPLES = "v5p:4x4x8, 2xv5p:4x4x4 (two slices), v5e:16x16, v6e:16x16, h200:8, h100:4x8 (nodes x GPUs), cpu:8"
# Tori below a full cube or pod (the chips' pages); they have no wraparound.
_SMALL = {2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), 3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4")}


def of_device(kind: str) -> Chip | None:
    """The chip of a jax `device_kind`, or None for one with no agreed numbers (a CPU among them)."""
    found = [(len(k), chip) for chip in _TABLE for k in chip.kinds if kind.startswith(k)]
    return max(found, key=lambda pair: pair[0])[1] if found else None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how many of them.

    Attributes:
      text: as the user wrote it.
      slices: groups joined by the data-centre network only.
      dims: of one slice's torus in chips; of GPUs (nodes, GPUs a node).
    """

    text: str
    chip: Chip
    slices: int
    dims: tuple[int, ...]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.dims)

    @property
    def devices(self) -> int:
        """Of all slices, as jax counts them."""
        return self.chips * self.chip.cores

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes of the torus close into rings: those of whole 4x4x4 cubes, and the 16s of two-dimensional pods."""
        if len(self.chip.pod) == 3:
            return (all(d % 4 == 0 for d in self.dims),) * 3
        return tuple(d == 16 for d in self.dims)


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x8`, `2xv5p:4x4x4` (slices), `h200:8`, `h100:4x8` (nodes x GPUs), `cpu:8` as a Topology.

    Raises:
      UserError: unknown chip or topology, naming the nearest valid ones.
    """
    head, colon, shape = text.strip().lower().partition(":")
    count, times, name = head.partition("x")
    slices, name = (int(count), name) if times and count.isdigit() else (1, head)
    if name not in CHIPS:
        raise UserError(f"unknown chip {name!r} in topology {text!r}{nearest(name, CHIPS)}; for example {EXAMPLES}")
    chip = CHIPS[name]
    sizes = shape.split("x")
    if slices < 1 or not colon or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise UserError(f"topology {text!r} is not CHIP:SIZES; for example {EXAMPLES}")
    dims = tuple(int(s) for s in sizes)
    if chip.pod:
        _check_torus(chip, dims, text)
    else:
        dims = _nodes(chip, dims, slices, text)
    return Topology(text.strip().lower(), chip, slices, dims)


def _nodes(chip: Chip, dims: tuple[int, ...], slices: int, text: str) -> tuple[int, int]:
    """(nodes, devices per node) of `8` or `4x8`."""
    dims = dims if len(dims) > 1 else (1, *dims)
    if slices > 1 or len(dims) > 2:
        raise UserError(
            f"topology {text!r}: {chip.name} has nodes, not slices; write NODESxDEVICES, as {chip.name}:4x8"
        )
    if dims[1] > chip.node:
        wanted = math.prod(dims)
        near = f"{chip.name}:{max(1, wanted // chip.node)}x{chip.node}"
        raise UserError(f"unknown topology {text!r}: a node has at most {chip.node} x {chip.name}; nearest: {near}")
    return dims[0], dims[1]


def _valid_tori(chip: Chip) -> Iterator[tuple[int, ...]]:
    for small in _SMALL[len(chip.pod)]:
        yield tuple(int(s) for s in small.split("x"))
    if len(chip.pod) == 3:
        for dims in itertools.product(*(range(4, most + 1, 4) for most in chip.pod)):
            if list(dims) == sorted(dims):
                yield dims


def _check_torus(chip: Chip, dims: tuple[int, ...], text: str) -> None:
    valid = list(_valid_tori(chip))
    if dims in valid:
        return
    size = math.prod(dims)

    def distance(other: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.log(math.prod(other) / size)), -len(set(dims) & set(other))

    near = ", ".join("x".join(map(str, v)) for v in sorted(valid, key=distance)[:3])
    rule = ", ".join(_SMALL[len(chip.pod)])
    if len(chip.pod) == 3:
        rule += f", and ascending multiples of 4 up to {'x'.join(map(str, chip.pod))}"
    raise UserError(f"unknown topology {text!r}; nearest: {near}; {chip.name} comes as {rule}")
