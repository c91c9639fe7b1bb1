"""How long a training step takes at least: compute, memory and links each at their full rate.

Assumed: weights and gradients travel while other work is done; what activations need of other devices (the residual stream
under tensor parallelism, keys and values under context parallelism) holds it up. So

    step = activations' collectives + max(compute, HBM, other ICI, other DCN).

Compute counts what the hardware does: the parts of a layer made again, the tiles of attention that a kernel works on, head
dimensions padded to a TPU's 128 lanes (phi-3-mini's 96). Model FLOPs utilisation (MFU) counts the model only, and of
attention the pairs which its mask keeps (`flops.masked`), so that no bound exceeds 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from types import MappingProxyType

import numpy as np

from phi3_jax.configs import BlockSparse, ModelConfig
from phi3_jax.keys import rates_of
from phi3_jax.models import flops
from phi3_jax.models.masks import part_rows, piece
from phi3_jax.planning import tiles
from phi3_jax.planning.collectives import Collective, collectives
from phi3_jax.planning.memory import (
    GRADIENT,
    KEPT,
    LANES,
    LOGIT_BYTES,
    MASTER,
    layer_params,
    layer_values,
    state_bytes,
    trained_params,
)
from phi3_jax.planning.setup import Setup, adapters

# Parts of a layer that the backward pass makes again, by remat policy. Attention is made again wherever its log normalisers
# are not kept; the MLP's last product and the output matrix never are.
AGAIN: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {"none": (), "dots": ("attention",), "names": ("attention", "out"), "full": ("qkv", "attention", "out", "gate_up")}
)
# Matrix products of attention: forward 2; backward 5 in one kernel that makes scores again, 7 in splash's two kernels
# (dq: 3; dk and dv: 4).
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, MappingProxyType({"tpu": 7, "gpu": 5, "cpu": 5})
# (queries, keys) of a kernel's tile: splash's widest (models/kernels/splash.py), cuDNN's; and keys under a block pattern.
TILES = MappingProxyType({"tpu": (1024, 1024), "gpu": (128, 128), "cpu": (256, 256)})
BLOCK_KEYS = 128
# HBM traffic, rough. Of a gathered weight: written and read in the forward pass, written and read twice in the backward,
# its gradient written and read; of a layer's tensor in each pass: written and read.
WEIGHT_PASSES, GRADIENT_PASSES, TENSOR_READS = 7, 2, 2
TRAVELS = ("residual", *KEPT["none"][:8])  # the others stay in fused loops


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step a device, and what they say.

    Attributes:
      model_flops: of the step per device, by `flops.masked`.
      hardware_flops: what the device computes.
      compute, hbm, ici, dcn: seconds of each alone; ici is the fast link whatever its name, dcn the slow one.
      exposed: seconds of the collectives that hold work up; part of ici or dcn.
      step: predicted least time of a step.
      serial: the time if nothing ran at the same time.
      mfu: model FLOPs a second over the peak.
      bound_by: "compute", "HBM", or the name of a link.
    """

    model_flops: float
    hardware_flops: float
    compute: float
    hbm: float
    ici: float
    dcn: float
    exposed: float
    step: float
    serial: float
    mfu: float
    bound_by: str
    moved: tuple[Collective, ...]


def roofline(setup: Setup) -> Roofline:
    """The least time of one step, and what bounds it."""
    return with_collectives(setup, collectives(setup))


def with_collectives(setup: Setup, found: Iterable[Collective]) -> Roofline:
    """The roofline of a step that moves what is given, which a plan or a compiler found."""
    chip = setup.topology.chip
    tokens = setup.batch_tokens / setup.devices
    convention = flops.masked(setup.model)
    each = flops.train_flops_per_token(setup.model, setup.sequence_length, convention, setup.lora, setup.parts)
    model = (each + tiles.model_flops_per_token(setup)) * tokens
    hardware = hardware_flops_per_token(setup) * tokens
    moved = tuple(found)
    seconds = {
        (slow, overlaps): sum(c.seconds for c in moved if (c.slow, c.overlaps) == (slow, overlaps))
        for slow in (False, True)
        for overlaps in (False, True)
    }
    exposed = seconds[False, False] + seconds[True, False]
    compute, hbm = hardware / chip.peak_flops, hbm_bytes(setup) / chip.memory_bandwidth
    ici, dcn = sum(seconds[False, o] for o in (False, True)), sum(seconds[True, o] for o in (False, True))
    step = exposed + max(compute, hbm, seconds[False, True], seconds[True, True])
    parts = {"compute": compute, "HBM": hbm, chip.fast: ici, chip.slow: dcn}
    return Roofline(
        model_flops=model,
        hardware_flops=hardware,
        compute=compute,
        hbm=hbm,
        ici=ici,
        dcn=dcn,
        exposed=exposed,
        step=step,
        serial=compute + hbm + ici + dcn,
        mfu=model / chip.peak_flops / step,
        bound_by=max(parts, key=parts.__getitem__),
        moved=moved,
    )


# ------------------------------------------------------------------------------------------------ compute


def hardware_flops_per_token(setup: Setup) -> float:
    """FLOPs a token that the devices compute in a training step, recomputation and padding included."""
    model = setup.model
    again = AGAIN[setup.remat]
    per_layer = {
        "qkv": model.embed * (model.heads + 2 * model.kv_heads) * model.head_dim,
        "out": model.embed * model.heads * model.head_dim,
        "gate_up": 2 * model.embed * model.mlp,
    }
    # Forward, gradient of what enters, gradient of the matrix: frozen ones have no third.
    products = 4 if setup.lora or (setup.parts and "lm" not in rates_of(setup.parts)) else 6
    matrices = products * flops.matmul_params(model) + 2 * model.layers * sum(per_layer.get(name, 0) for name in again)
    if setup.lora:
        matrices += 6 * sum(spec.size for _, spec in adapters(model, setup.lora))
    scores = FORWARD_PRODUCTS * (1 + ("attention" in again)) + BACKWARD_PRODUCTS[setup.topology.chip.platform]
    return matrices + scores * 2 * padded_head(setup) * pairs_per_token(setup) + tiles.hardware_flops_per_token(setup)


def forward_seconds(setup: Setup, tokens: float) -> float:
    """Least seconds of one forward pass over so many tokens, of all devices at their full rate."""
    attention = FORWARD_PRODUCTS * 2 * padded_head(setup) * pairs_per_token(setup)
    each = 2 * flops.matmul_params(setup.model) + attention
    return tokens * each / (setup.devices * setup.topology.chip.peak_flops)


def padded_head(setup: Setup) -> int:
    """Head dimension as the hardware multiplies it: a TPU pads it to 128 lanes."""
    k = setup.model.head_dim
    return math.ceil(k / LANES) * LANES if setup.topology.chip.platform == "tpu" else k


def pairs_per_token(setup: Setup) -> float:
    """(query, key) pairs per token over all layers and heads, in whole tiles of the kernel.

    Under context parallelism those of the device with the most. Off TPUs its kernel meets every key.
    """
    model, tile = setup.model, TILES[setup.topology.chip.platform]
    parts = setup.ways(setup.layout.time)
    if parts > 1 and setup.topology.chip.platform != "tpu":
        return float(model.layers * model.heads * setup.sequence_length)
    dense = model.heads * _tiled(setup.sequence_length, parts, model.window_keys, None, 0, tile)
    if model.blocksparse is None:
        return model.layers * dense
    narrow = tile[0], min(tile[1], BLOCK_KEYS)
    full, sparse = model.dense_layers, _sparse(model, model.blocksparse, setup.sequence_length, parts, narrow)
    return full * dense + (model.layers - full) * sparse


def _sparse(model: ModelConfig, pattern: BlockSparse, length: int, parts: int, tile: tuple[int, int]) -> float:
    """Pairs a token of one block-sparse layer, over heads; heads whose shifts agree keep the same blocks."""
    shifts = [pattern.shift(head, model.heads) % pattern.vert_stride for head in range(model.heads)]
    return sum(shifts.count(s) * _tiled(length, parts, model.window_keys, pattern, s, tile) for s in set(shifts))


@functools.lru_cache(maxsize=256)
def _tiled(
    length: int, parts: int, keys: int | None, pattern: BlockSparse | None, shift: int, tile: tuple[int, int]
) -> float:
    """Pairs a token of one head, counting whole every tile that some pair of the mask falls into; of the fullest part."""
    rows, columns = min(tile[0], piece(length, parts)), min(tile[1], length)
    first = np.arange(0, length, rows)[:, None]
    last, start = np.minimum(first + rows, length) - 1, np.arange(0, length, columns)[None]
    stop = np.minimum(start + columns, length) - 1
    seen = start <= last
    if keys is not None:
        seen &= stop > first - keys
    if pattern is not None:
        near = first // pattern.block - stop // pattern.block < pattern.local_blocks
        # Whether a block of the tile is one of the distant ones: a number in [a, b] that vert_stride divides.
        a, b = start // pattern.block + shift + 1, stop // pattern.block + shift + 1
        seen &= near | (b // pattern.vert_stride * pattern.vert_stride >= a)
    pairs = (seen * (last - first + 1) * (stop - start + 1)).sum(axis=1)
    owner = np.empty(length, int)
    for part in range(parts):
        owner[part_rows(length, parts, part)] = part
    return float(np.bincount(owner[first[:, 0]], pairs).max()) * parts / length


# ------------------------------------------------------------------------------------------------ HBM


def hbm_bytes(setup: Setup) -> float:
    """Rough bytes a device reads and writes in a step: weights, optimiser, a layer's tensors in each pass, logits."""
    passes = WEIGHT_PASSES - (GRADIENT_PASSES if setup.lora else 0)
    weights = passes * setup.value_bytes * layer_params(setup) * setup.model.layers * setup.accumulation
    optimizer = 2 * (MASTER + GRADIENT * setup.accumulation) * trained_params(setup) + 2 * state_bytes(setup)
    passes = 3 if setup.remat == "none" else 4  # forward, again, and a gradient for each tensor and weight
    layer = sum(n for name, n in layer_values(setup).items() if name in TRAVELS) * setup.value_bytes
    tensors_moved = TENSOR_READS * passes * layer * setup.model.layers * setup.accumulation
    logits = 2 * LOGIT_BYTES * setup.batch_tokens / setup.devices * setup.model.vocab
    return weights + optimizer + tensors_moved + logits
