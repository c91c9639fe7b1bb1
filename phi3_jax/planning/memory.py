"""Bytes a training run needs, by category, and whether the attached devices have them."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from phi3_jax.configs import ModelConfig

# Memory of one accelerator chip in bytes, from the makers' data sheets; used to suggest a mesh.
CHIPS = {"H100": 80e9, "H200": 141e9, "TPU v5e": 16e9, "TPU v5p": 95e9, "TPU v6e": 32e9}
# Resident set of a process before it holds any array: Python, jax, orbax, the compiled program and XLA's own
# compile-time peak, as measured on CPU with jax 0.10.2.
CPU_RUNTIME_BYTES = 650e6


@dataclasses.dataclass(frozen=True)
class Memory:
    """Predicted bytes over all devices; `replicas` multiplies what every data-parallel replica holds again."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    runtime: float

    @property
    def state(self) -> float:
        """Training state: fp32 master weights and two Adam moments."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def predict(
    model: ModelConfig, params: int, rows: int, time: int, *, remat: str, bytes_per_value: int, on_cpu: bool
) -> Memory:
    """Memory of one training step.

    Args:
      model: the model.
      params: its parameter count.
      rows: windows in a (micro)batch.
      time: tokens in a window.
      remat: "none" keeps every intermediate of every layer, other policies the residual stream and one layer.
      bytes_per_value: of the compute dtype.
      on_cpu: adds the process itself.

    Activations kept for the backward pass, in values a token and layer: two norm inputs and outputs (4 d), qkv
    twice (before and after rotation), attention output (d), gate and up (2 f) and their product and activation
    (2 f), and the attention probabilities (heads x time). A step's temporary copies are counted once more for one layer.
    """
    d, f = model.embed, model.mlp
    kv = 2 * model.kv_heads * model.head_dim
    per_layer = 4 * d + 2 * (d + kv) + d + 4 * f + model.heads * time
    kept = model.layers * per_layer if remat == "none" else model.layers * d + per_layer
    chunk = min(rows * time * model.vocab, 64 * 2**20)
    return Memory(
        parameters=4.0 * params,
        optimizer=8.0 * params,
        gradients=4.0 * params,
        activations=float(rows * time * (kept + per_layer) * bytes_per_value),
        logits=2.0 * 4 * chunk,
        runtime=CPU_RUNTIME_BYTES if on_cpu else 0.0,
    )


def host_bytes() -> float:
    """Memory this process may use: the machine's, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.exists() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return float(total)


def device_bytes() -> tuple[str, int, float]:
    """(kind, count, total bytes) of the attached devices. Starts jax's backend."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return "CPU", len(devices), host_bytes()
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    per_device = min((s.get("bytes_limit", 0) for s in stats), default=0)
    return devices[0].device_kind, len(devices), float(per_device * len(devices))


def mesh_that_holds(needed: float, share: float = 0.85) -> str:
    """Smallest power-of-two fsdp meshes of common chips that hold `needed` bytes, as text."""
    parts = []
    for chip in ("H200", "TPU v5p"):
        count = 2 ** math.ceil(math.log2(max(1.0, needed / (CHIPS[chip] * share))))
        parts.append(f"data={count} on {count} x {chip}")
    return " or ".join(parts)


def human(size: float) -> str:
    """Bytes with a decimal prefix: 167.5 GB."""
    power = min(5, max(0, int(math.log10(max(size, 1)) // 3)))
    value = size / 1000**power
    return f"{value:.1f} {('', 'k', 'M', 'G', 'T', 'P')[power]}B" if power else f"{size:.0f} B"


def short_count(number: float) -> str:
    """A token count in the shortest exact-looking form: 4M, 1.05M, 4.8T."""
    power = min(4, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{float(f'{number / 1000**power:.3g}'):g}{('', 'k', 'M', 'B', 'T')[power]}"
