"""cuDNN's flash attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`: causal, window, packed documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from phi3_jax.models.masks import Mask, Origin, seen

if TYPE_CHECKING:
    from jaxtyping import Float

# Packed documents go in as a boolean matrix of all pairs of a row; beyond this length it would be the largest array.
LONGEST_PACKED = 8192


def obstacle(problem: Any) -> str | None:
    """Why cuDNN cannot serve an `attention.Problem`, or None."""
    if problem.platform != "gpu":
        return f"it runs on GPU, not on {problem.platform}"
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype={jnp.dtype(problem.dtype).name}; it computes in bfloat16 or float16"
    if problem.head_dim % 8 or problem.head_dim > 128:
        return f"head_dim={problem.head_dim}; it needs a multiple of 8, at most 128"
    if problem.mask.blocksparse is not None:
        return "it knows no block pattern per head"
    if problem.time_shards > 1:
        return "it knows no queries that are part of the keys' times"
    if problem.mask.segments is not None and problem.time > LONGEST_PACKED:
        return f"packed rows of {problem.time} tokens; it takes packed rows up to {LONGEST_PACKED}"
    if problem.mask.branches is not None:
        return "it knows no branches of a document"
    return None


def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    origin: Origin,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> Float[jax.Array, "b t g r k"]:
    """One device's part; `backend="xla"` computes the same anywhere."""
    del origin  # dense over heads and whole in time
    b, t, g, r, d = q.shape
    options: dict[str, Any] = {"is_causal": True}
    if mask.segments is not None:
        every = slice(0, t)
        options = {"mask": jnp.squeeze(seen(mask, every, every, (g, r)), 2)}
    elif mask.window is not None:
        options["local_window_size"] = (mask.window - 1, 0)
    out = jax.nn.dot_product_attention(q.reshape(b, t, g * r, d), k, v, scale=scale, implementation=backend, **options)
    return out.reshape(b, t, g, r, d)
