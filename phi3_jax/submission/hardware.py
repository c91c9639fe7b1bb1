"""What a topology is called by the clouds: hosts, chips per host, and GKE's and Cloud TPU's names (imports no jax)."""

from __future__ import annotations

import dataclasses
import math

from phi3_jax.chips import EXAMPLES, parse_topology

__all__ = ["EXAMPLES", "GPUS", "TPUS", "Hardware", "parse"]


@dataclasses.dataclass(frozen=True)
class TpuNames:
    """`gke`: the label gke-tpu-accelerator; `vm`: the prefix of Cloud TPU's accelerator types, followed by `cores` a
    chip times chips; `runtime`: the image of its VMs. None where the chip is not offered that way."""

    gke: str
    vm: str | None = None
    cores: int = 1
    runtime: str | None = None


# GKE's labels and machine shapes as in xpk 1.x (src/xpk/core/system_characteristics.py); runtime versions from Cloud
# TPU's page "TPU software versions".
TPUS = {
    "v4": TpuNames("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": TpuNames("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": TpuNames("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": TpuNames("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": TpuNames("tpu7x"),
}
GPUS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "b200": "nvidia-b200"}  # the label gke-accelerator
TPU_CHIPS_A_HOST = 4


@dataclasses.dataclass(frozen=True)
class Hardware:
    """`slices` equal groups of `hosts` machines with `chips` accelerators each; `shape` is "4x4x8" for TPUs.

    Of "cpu", a chip is a process.
    """

    chip: str
    shape: str
    slices: int
    hosts: int
    chips: int

    @property
    def tpu(self) -> TpuNames | None:
        return TPUS.get(self.chip)

    @property
    def gpu(self) -> str | None:
        return GPUS.get(self.chip)


def parse(text: str) -> Hardware:
    """Reads `v5p:4x4x8`, `2xv5p:4x4x4` (slices), `h200:8`, `h100:4x8` (nodes x GPUs), `cpu:2x1` (nodes x processes).

    Raises:
      UserError: see `parse_topology`.
    """
    topology = parse_topology(text)
    chip, shape, count = topology.chip.name, "x".join(map(str, topology.dims)), math.prod(topology.dims)
    if chip in TPUS:
        chips = min(count, TPU_CHIPS_A_HOST)
        return Hardware(chip, shape, topology.slices, count // chips, chips)
    hosts, chips = topology.dims
    return Hardware(chip, shape, 1, hosts, chips)
