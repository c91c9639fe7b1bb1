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

from functools import lru_cache

import jax
import numpy as np

from phi3_jax.configs import BlockSparse, LoraConfig, ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.models.lora import adapter_specs
from phi3_jax.models.spec import ParamSpec, count_params

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
    model: ModelConfig, time: int, convention: str = "causal", lora: LoraConfig | None = None
) -> float:
    """Training FLOPs a token (forward and backward) at sequence length `time`; beside adapters no matrix has a gradient.

    Causal: phi-3-mini at 4,096: 24.75 GFLOP; -small at 8,192: 50.78 (as if dense); -medium at 4,096: 87.81.
    """
    forward = forward_flops_per_token(model, time, convention)
    if lora is None:
        return 3 * forward
    specs = jax.tree.leaves(adapter_specs(model, lora), is_leaf=lambda x: isinstance(x, ParamSpec))
    return 3 * forward - 2 * matmul_params(model) + 6 * sum(spec.size for spec in specs)
