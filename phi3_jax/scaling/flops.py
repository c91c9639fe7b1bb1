"""FLOPs and parameters of the family by named conventions, so that two numbers are compared only when they mean the same.

Two FLOPs a multiply-add, matrix products only; the look-up of input embeddings is free, the output matrix counts; the
backward pass costs twice the forward. What differs is attention:

- "causal": scores and values halved for causality. Ours, and MaxText's since July 2025.
- "non_causal": the whole square, as most published MFU figures before.
- "windowed": causal, and a query meets no more keys than its window (`sliding_window` of the published config).
- "block_sparse": causal, and phi-3-small's sparse layers meet only the blocks they keep, counted token by token.
- "6n": no attention at all: 6 x parameters in matrix products.
- "6nd": 6 x all parameters, embedding included; the usual shorthand.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from phi3_jax.configs import BlockSparse, ModelConfig
from phi3_jax.errors import UserError, nearest

CONVENTIONS = ("causal", "non_causal", "windowed", "block_sparse", "6n", "6nd")


def matmul_params(model: ModelConfig, active: bool = True) -> int:
    """Parameters in matrix products: attention, MLP, router and output matrix; of experts, those a token uses.

    With `active=False` all experts count.
    """
    total = model.matrix_params + model.vocab * model.embed
    if model.experts and active:
        idle = model.experts.count - model.experts.per_token
        total -= model.layers * idle * 3 * model.embed * model.mlp
    return total


def all_params(model: ModelConfig, active: bool = False) -> int:
    """Every parameter, embedding, norms and biases included; tied embeddings once."""
    d, kv = model.embed, model.kv_heads * model.head_dim
    norms = (2 * model.layers + 1) * d * (2 if model.norm == "layer" else 1)
    biases = 0
    if model.bias:
        biases = model.layers * (2 * d + 2 * kv)  # q, k, v and the output projection
        if not model.experts:
            biases += model.layers * (2 * model.mlp + d)
    if model.experts and model.experts.head_bias:
        biases += model.vocab
    table = 0 if model.tied else model.vocab * d
    return matmul_params(model, active) + table + norms + biases


def non_embedding_params(model: ModelConfig) -> int:
    """Every parameter but the input table and the output matrix (N of most scaling laws)."""
    return all_params(model) - model.vocab * model.embed * (1 if model.tied else 2)


@lru_cache(maxsize=64)
def kept_pairs(pattern: BlockSparse, heads: int, time: int) -> int:
    """(query, key) pairs of one sparse layer, all heads, under phi-3-small's pattern and causality."""
    step = 0 if pattern.homo_head else max(1, pattern.vert_stride // heads)
    blocks = -(-time // pattern.block)
    rows = np.minimum(pattern.block, time - pattern.block * np.arange(blocks))  # queries in each block
    q, k = np.arange(blocks)[:, None], np.arange(blocks)[None]
    total = heads * int((rows * (rows + 1) // 2).sum())  # the diagonal blocks are local to every head
    for head in range(heads):
        kept = (k < q) & ((q - k < pattern.local_blocks) | ((k + head * step + 1) % pattern.vert_stride == 0))
        total += int((kept.sum(axis=1) * rows).sum()) * pattern.block
    return total


def attention_flops_per_token(model: ModelConfig, time: int, convention: str = "causal") -> float:
    """Forward FLOPs a token for scores and values, of all layers, at sequence length `time`."""
    if convention not in CONVENTIONS:
        raise UserError(f"unknown FLOP convention {convention!r}{nearest(convention, CONVENTIONS)}")
    if convention in ("6n", "6nd"):
        return 0.0
    per_pair = 4.0 * model.head_dim
    dense = model.heads * time / 2  # pairs a token and layer, over heads
    if convention == "non_causal":
        return per_pair * model.layers * model.heads * time
    window = model.sliding_window
    if convention == "windowed" and window is not None and window < time:
        # Of `time` queries all but the first `window` meet `window` keys; halves as in "causal".
        dense = model.heads * (window - window**2 / (2 * time))
    if convention != "block_sparse" or model.blocksparse is None:
        return per_pair * model.layers * dense
    every = model.blocksparse.dense_every
    full = model.layers // every if every else 0
    sparse = kept_pairs(model.blocksparse, model.heads, time) / time
    return per_pair * (full * dense + (model.layers - full) * sparse)


def forward_flops_per_token(model: ModelConfig, time: int, convention: str = "causal") -> float:
    """Forward FLOPs a token at sequence length `time`."""
    attention = attention_flops_per_token(model, time, convention)
    return 2 * (all_params(model, active=True) if convention == "6nd" else matmul_params(model)) + attention


def train_flops_per_token(model: ModelConfig, time: int, convention: str = "causal") -> float:
    """Training FLOPs a token (forward and backward) at sequence length `time`.

    Causal: phi-3-mini at 4,096: 24.75 GFLOP; -small at 8,192: 50.78 (as if dense); -medium at 4,096: 87.81.
    """
    return 3 * forward_flops_per_token(model, time, convention)
