"""FLOPs of the family by a stated convention.

Convention "causal": matrix products only, two FLOPs a multiply-add, the input embedding's look-up not counted, the
output matrix counted, attention scores halved for causality, windows and block sparsity not deducted, the backward
pass twice the forward. "6nd" is 6 x all parameters, the usual shorthand.
"""

from __future__ import annotations

from phi3_jax.configs import ModelConfig


def matmul_params(model: ModelConfig) -> int:
    """Parameters that take part in matrix products: non-embedding matrices and the output matrix."""
    return model.matrix_params + model.vocab * model.embed


def forward_flops_per_token(model: ModelConfig, time: int) -> float:
    """Forward FLOPs a token at sequence length `time`, causal convention."""
    return 2 * matmul_params(model) + 2 * model.layers * model.heads * model.head_dim * time


def train_flops_per_token(model: ModelConfig, time: int) -> float:
    """Training FLOPs a token (forward and backward) at sequence length `time`, causal convention.

    phi-3-mini at 4,096: 24.75 GFLOP; -small at 8,192: 50.78 (as if dense); -medium at 4,096: 87.81.
    """
    return 3 * forward_flops_per_token(model, time)
