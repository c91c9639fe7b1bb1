"""Bytes and FLOPs that tiles of pictures add to a training step on a device: pixels, the tower, the projector.

Padding of tiles to a bucket, a fifth at most, is not counted. A tower that learns keeps each layer's input where it
computes its layers again (`Setup.remat`), and all of their insides where it does not.
"""

from __future__ import annotations

from phi3_jax.keys import rates_of
from phi3_jax.models import flops
from phi3_jax.planning.setup import Setup

WIDE = 4  # bytes of a score's softmax


def of_microbatch(setup: Setup) -> float:
    """Tiles of a microbatch that one device has."""
    return setup.tiles * setup.rows


def batch_bytes(setup: Setup) -> float:
    """Bytes of a batch's pixels on a device, and of the int32 index of its tokens."""
    if not setup.tiles or setup.model.vision is None:
        return 0.0
    pixels = 3 * setup.model.vision.tile**2 * setup.value_bytes
    tokens = setup.rows * setup.sequence_length / setup.ways(setup.layout.time)
    return setup.accumulation * (of_microbatch(setup) * pixels + 4 * tokens)


def kept_bytes(setup: Setup) -> float:
    """Bytes that the tower and the projector keep from their forward pass to their backward pass."""
    eyes = setup.model.vision
    if not setup.tiles or eyes is None:
        return 0.0
    learns = _learns(setup)
    values: float = eyes.side**2 * setup.model.embed  # what takes the places of embeddings
    if learns & {"tower", "projector"}:
        values += eyes.side**2 * (eyes.width + 2 * setup.model.embed)
    if "tower" in learns:
        patches = eyes.patches + 1
        values += (eyes.layers - 1) * (patches * eyes.embed if setup.remat != "none" else _layer(setup))
    return of_microbatch(setup) * values * setup.value_bytes


def work_bytes(setup: Setup) -> float:
    """Bytes of a layer's work on the tiles that are in the tower at once, with its gradients where it learns."""
    eyes = setup.model.vision
    if not setup.tiles or eyes is None:
        return 0.0
    several = 2 if "tower" in _learns(setup) else 1
    return several * min(eyes.at_once, of_microbatch(setup)) * _layer(setup) * setup.value_bytes


def _layer(setup: Setup) -> float:
    """Values of the inside of a tower's layer on one tile, in the compute dtype; scores and their softmax too."""
    eyes = setup.model.vision
    assert eyes is not None
    patches = eyes.patches + 1
    scores = eyes.heads * patches**2 * (1 + WIDE / setup.value_bytes)
    return patches * (8 * eyes.embed + 2 * eyes.mlp) + scores


def _learns(setup: Setup) -> set[str]:
    if setup.lora:
        return {"tower", "projector"}  # adapters may stand in both, and gradients pass through
    return set(rates_of(setup.parts) or ("lm", "projector", "tower"))


def model_flops_per_token(setup: Setup) -> float:
    """FLOPs of training tiles, a token of the batch."""
    return (
        setup.tiles * flops.train_tile_flops(setup.model, setup.lora, setup.parts) / setup.sequence_length
        if setup.tiles
        else 0.0
    )


def hardware_flops_per_token(setup: Setup) -> float:
    """What the devices compute for them: with a learning tower's second forward pass."""
    again = setup.remat != "none" and "tower" in _learns(setup)
    more = setup.tiles * flops.tile_flops(setup.model) / setup.sequence_length if setup.tiles and again else 0.0
    return model_flops_per_token(setup) + more
