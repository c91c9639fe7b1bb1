"""phi-3.5-MoE's mixture of experts, as it works in evaluation. Training it (router jitter, its gradient) is out of scope.

Source: SparseMixer as published with phi-3.5-MoE (arXiv:2409.12136), evaluation mode of Microsoft's and transformers' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from phi3_jax.configs import Experts

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def route(
    scores: Float[jax.Array, "tokens experts"], jitter: float
) -> tuple[Int[jax.Array, "tokens 2"], Float[jax.Array, "tokens 2"]]:
    """The two experts of each token and their weights.

    Args:
      scores: router logits, float32 or wider.
      jitter: router_jitter_noise; experts more than 2 jitter (relative to the larger of |score| and the best) below the
        best one are left out of its softmax.

    Returns:
      (experts, weights), best first. The weights do not sum to one: each comes from a softmax of its
      own, the second one's without the first expert.
    """
    chosen, weights, left = [], [], scores
    for _ in range(2):
        best = jnp.max(left, axis=-1, keepdims=True)
        index = jnp.argmax(left, axis=-1)[:, None]
        far = (best - scores) / jnp.maximum(jnp.abs(scores), best) > 2 * jitter
        shares = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        chosen.append(index)
        weights.append(jnp.take_along_axis(shares, index, axis=-1))
        left = jnp.where(jax.nn.one_hot(index[:, 0], scores.shape[-1], dtype=bool), -jnp.inf, left)
    return jnp.concatenate(chosen, axis=-1), jnp.concatenate(weights, axis=-1)


def mixture(x: Float[jax.Array, "b t d"], params: dict[str, Any], experts: Experts) -> Float[jax.Array, "b t d"]:
    """x through the two experts of each token.

    Tokens are sorted by expert, so that each expert's weights meet only the tokens that chose it.
    """
    flat = x.reshape(-1, x.shape[-1])
    scores = flat @ params["router"]["weight"].astype(x.dtype)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    chosen, weights = route(scores, experts.jitter)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    token = order // 2
    counts = jnp.bincount(chosen.reshape(-1), length=experts.count)
    rows, gate_up = flat[token], params["gate_up"]["weight"].astype(x.dtype)
    gate, up = (jax.lax.ragged_dot(rows, gate_up[:, :, i], counts) for i in range(2))
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, params["down"]["weight"].astype(x.dtype), counts)
    out = out * weights.reshape(-1)[order].astype(out.dtype)[:, None]
    return jnp.zeros_like(flat).at[token].add(out).reshape(x.shape)
