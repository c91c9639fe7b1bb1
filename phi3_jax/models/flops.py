"""FLOPs and parameters of the family by named conventions, so that two numbers are compared only when they mean the same.

Two FLOPs a multiply-add, matrix products only; the look-up of input embeddings is free, the output matrix counts; the
backward pass costs twice the forward. What differs is attention:

- "causal": scores and values halved for causality. Ours, and MaxText's since July 2025.
- "non_causal": the whole square, as most published MFU figures before.
- "windowed": causal, and a query meets no more keys than its window (`window_keys` of the config).
- "block_sparse": causal, and phi-3-small's sparse layers meet only the blocks they keep, counted token by token.
- "6n": no attention at all: 6 x parameters in matrix products.
- "6nd": 6 x all parameters, embedding included; the usual shorthand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import lru_cache

import numpy as np

from phi3_jax.configs import BlockSparse, LoraConfig, ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import PARTS, rates_of
from phi3_jax.models.lora import adapter_specs
from phi3_jax.models.parts import part_of
from phi3_jax.models.spec import ParamSpec, count_params, named

CONVENTIONS = ("causal", "non_causal", "windowed", "block_sparse", "6n", "6nd")


def matmul_params(model: ModelConfig) -> int:
    """Parameters in matrix products: attention, MLP, router and output matrix; of experts, those a token uses."""
    return model.matrix_params + model.vocab * model.embed - idle_params(model)


def all_params(model: ModelConfig, active: bool = False) -> int:
    """Every parameter, embedding, norms and biases included; tied embeddings once. `active`: without idle experts."""
    return count_params(model) - (idle_params(model) if active else 0)


def idle_params(model: ModelConfig) -> int:
    """Parameters of the experts that a token does not use."""
    idle = model.experts.count - model.experts.per_token if model.experts else 0
    return idle * model.layers * 3 * model.embed * model.mlp


def masked(model: ModelConfig) -> str:
    """The convention that counts the pairs which a model's mask keeps, and no others."""
    return "windowed" if model.blocksparse is None else "block_sparse"


@lru_cache(maxsize=64)
def kept_pairs(pattern: BlockSparse, heads: int, time: int) -> int:
    """(query, key) pairs of one sparse layer, all heads, under phi-3-small's pattern and causality."""
    blocks = -(-time // pattern.block)
    rows = np.minimum(pattern.block, time - pattern.block * np.arange(blocks))  # queries in each block
    q, k = np.arange(blocks)[:, None], np.arange(blocks)[None]
    total = heads * int((rows * (rows + 1) // 2).sum())  # the diagonal blocks are local to every head
    for head in range(heads):
        kept = (k < q) & pattern.keeps(q, k, pattern.shift(head, heads))
        total += int((kept.sum(axis=1) * rows).sum()) * pattern.block
    return total


def attention_flops_per_token(model: ModelConfig, time: int, convention: str = "causal") -> float:
    """Forward FLOPs a token for scores and values, of all layers, at sequence length `time`."""
    if convention not in CONVENTIONS:
        raise UserError(f"unknown FLOP convention {convention!r}{nearest(convention, CONVENTIONS)}")
    if convention in ("6n", "6nd"):
        return 0.0
    per_pair = 4.0 * model.head_dim
    dense = model.heads * time / 2  # pairs per token and layer, over heads
    if convention == "non_causal":
        return per_pair * model.layers * model.heads * time
    window = model.window_keys
    if convention == "windowed" and window is not None and window < time:
        # Of `time` queries all but the first `window` meet `window` keys; halves as in "causal".
        dense = model.heads * (window - window**2 / (2 * time))
    if convention != "block_sparse" or model.blocksparse is None:
        return per_pair * model.layers * dense
    full = model.dense_layers
    sparse = kept_pairs(model.blocksparse, model.heads, time) / time
    return per_pair * (full * dense + (model.layers - full) * sparse)


def forward_flops_per_token(model: ModelConfig, time: int, convention: str = "causal") -> float:
    """Forward FLOPs a token at sequence length `time`."""
    attention = attention_flops_per_token(model, time, convention)
    return 2 * (all_params(model, active=True) if convention == "6nd" else matmul_params(model)) + attention


def train_flops_per_token(
    model: ModelConfig,
    time: int,
    convention: str = "causal",
    lora: LoraConfig | None = None,
    parts: Collection[str] = (),
) -> float:
    """Training FLOPs a token (forward and backward) at sequence length `time`; beside adapters no matrix has a gradient.

    Nor have those of the language model where it is not among the `parts` of a phi-3-vision that are trained. Tiles of
    pictures come on top.

    Causal: phi-3-mini at 4,096: 24.75 GFLOP; -small at 8,192: 50.78 (as if dense); -medium at 4,096: 87.81.
    """
    forward = forward_flops_per_token(model, time, convention)
    if lora is None:
        return 3 * forward - (2 * matmul_params(model) if parts and "lm" not in rates_of(parts) else 0)
    return 3 * forward - 2 * matmul_params(model) + 6 * _adapter_sizes(model, lora)["lm"]


def _adapter_sizes(model: ModelConfig, lora: LoraConfig) -> Counter[str]:
    """{part: parameters of its adapters}."""
    specs = named(adapter_specs(model, lora), is_leaf=lambda x: isinstance(x, ParamSpec))
    sizes: Counter[str] = Counter()
    for name, spec in specs.items():
        sizes[part_of(name)] += spec.size
    return sizes


def tile_flops(model: ModelConfig) -> float:
    """Forward FLOPs of one tile of a picture: through the tower but for its unused layer, and the projector.

    phi-3-vision: 372 GFLOP, of which the projector is 6.
    """
    matrices, attention, projector = _of_tile(model)
    return matrices + attention + sum(projector)


def _of_tile(model: ModelConfig) -> tuple[float, float, tuple[float, float]]:
    """Forward FLOPs of the tower's matrices, of its attention, and of the projector's two matrices."""
    eyes = model.vision
    if eyes is None:
        return 0.0, 0.0, (0.0, 0.0)
    tokens, layers, d = eyes.patches + 1, eyes.layers - 1, eyes.embed
    matrices = 2.0 * eyes.patches * 3 * eyes.patch**2 * d + 2.0 * tokens * layers * (4 * d * d + 2 * d * eyes.mlp)
    projector = 2.0 * eyes.side**2 * eyes.width * model.embed, 2.0 * eyes.side**2 * model.embed**2
    return matrices, 4.0 * layers * tokens**2 * d, projector


def train_tile_flops(model: ModelConfig, lora: LoraConfig | None = None, parts: Collection[str] = ()) -> float:
    """Training FLOPs of one tile. What does not learn, and feeds nothing that does, runs forward alone.

    Args:
      lora: adapters that are trained.
      parts: of the model that are, as `keys.rates_of` reads them; none: all.
    """
    eyes = model.vision
    if eyes is None:
        return 0.0
    matrices, attention, (first, second) = _of_tile(model)
    sizes = _adapter_sizes(model, lora) if lora else Counter()
    whole = set() if lora else set(rates_of(parts) or PARTS)
    learns = {part for part in PARTS if part in whole or sizes[part]}
    total = tile_flops(model)
    if "tower" in learns:  # gradients of what enters each matrix, but for pixels
        total += matrices - 2.0 * eyes.patches * 3 * eyes.patch**2 * eyes.embed + 2 * attention
    if "tower" in learns or "projector" in whole:  # the separators, which enter beside the tower's features, learn too
        total += first
    if learns & {"tower", "projector"}:
        total += second
    total += matrices * ("tower" in whole) + (first + second) * ("projector" in whole)
    per_tower, per_projector = sizes["tower"] * (eyes.patches + 1), sizes["projector"] * eyes.side**2
    return total + 6.0 * (per_tower + per_projector)
