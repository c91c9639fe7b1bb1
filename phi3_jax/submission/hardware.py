"""What a topology is called by the clouds: hosts, chips a host, and GKE's and Cloud TPU's names (imports no jax)."""

from __future__ import annotations

import dataclasses
import math
import re

from phi3_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class TpuNames:
    """`gke`: the label gke-tpu-accelerator; `vm`: the prefix of Cloud TPU's accelerator types, followed by `cores` a
    chip times chips; `runtime`: the image of its VMs. None where the chip is not offered that way."""

    dims: int
    gke: str
    vm: str | None = None
    cores: int = 1
    runtime: str | None = None


# GKE's labels and machine shapes as in xpk 1.x (src/xpk/core/system_characteristics.py); runtime versions from Cloud
# TPU's page "TPU software versions".
TPUS = {
    "v4": TpuNames(3, "tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base"),
    "v5e": TpuNames(2, "tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": TpuNames(3, "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5"),
    "v6e": TpuNames(2, "tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": TpuNames(3, "tpu7x"),
}
GPUS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "b200": "nvidia-b200"}  # the label gke-accelerator
TPU_CHIPS_A_HOST = 4
GPUS_A_HOST = 8
EXAMPLES = "for example v5p:4x4x8, 2xv5p:4x4x4 (two slices), h200:8 or h100:4x8 (nodes x GPUs)"


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
      UserError: an unknown chip, or a shape that no machines have.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):([1-9]\d*(?:x[1-9]\d*)*)", text)
    if not match:
        raise UserError(f"topology={text!r} is no topology; {EXAMPLES}")
    slices, chip, shape = int(match[1] or 1), match[2], match[3]
    sizes = [int(n) for n in shape.split("x")]
    count = math.prod(sizes)
    if chip in TPUS:
        if len(sizes) != TPUS[chip].dims or (count > 1 and count % TPU_CHIPS_A_HOST):
            raise UserError(
                f"topology={text!r}: a {chip} slice has {TPUS[chip].dims} dimensions and fills hosts of "
                f"{TPU_CHIPS_A_HOST} chips; {EXAMPLES}"
            )
        chips = min(count, TPU_CHIPS_A_HOST)
        return Hardware(chip, shape, slices, count // chips, chips)
    if chip not in GPUS and chip != "cpu":
        raise UserError(f"topology={text!r}: unknown chip {chip!r}{nearest(chip, [*TPUS, *GPUS, 'cpu'])}")
    hosts, chips = sizes if len(sizes) == 2 else (1, count)
    if slices > 1 or len(sizes) > 2 or (chip in GPUS and chips > GPUS_A_HOST):
        raise UserError(f"topology={text!r}: write NODESxGPUS, with at most {GPUS_A_HOST} GPUs a node; {EXAMPLES}")
    return Hardware(chip, shape, 1, hosts, chips)
