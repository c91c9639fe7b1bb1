"""Norms and activations; statistics in float32 or wider, results in the input's dtype."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig
from phi3_jax.models.layout import explicit, join, spec_of


def norm(x: jax.Array, params: dict[str, jax.Array], cfg: ModelConfig) -> jax.Array:
    """RMSNorm, or LayerNorm with gain and bias (phi-3-small); x (..., embed)."""
    dtype = x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    x = x.astype(wide)
    if cfg.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps)
    x = x * params["scale"].astype(wide)
    if cfg.norm == "layer":
        x = x + params["bias"].astype(wide)
    return x.astype(dtype)


def activate(gate: jax.Array, up: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Gated activation of gate and linear part, both (..., mlp).

    SwiGLU: silu(g) u. gegelu (Microsoft's phi-3-small code): a = min(g, limit), b = clip(u, -limit, limit),
    a sigmoid(1.702 a) (b + 1).
    """
    if cfg.activation == "swiglu":
        return jax.nn.silu(gate) * up
    if cfg.gegelu_limit is not None:
        # Infinities pass through unclipped, as in the original.
        limit = cfg.gegelu_limit
        gate = jnp.where(jnp.isinf(gate), gate, jnp.minimum(gate, limit))
        up = jnp.where(jnp.isinf(up), up, jnp.clip(up, -limit, limit))
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def _reshape(x: jax.Array, shape: tuple[int, ...], axes: dict[int, Any]) -> jax.Array:
    """Reshape that says how the result is sharded: `axes` maps its dimensions to mesh axes."""
    return jax.lax.reshape(x, shape, out_sharding=P(*map(axes.get, range(len(shape)))) if explicit(x) else None)


def flat(x: jax.Array, lead: int) -> jax.Array:
    """x as a matrix: its first `lead` dimensions made one, and the others another."""
    spec = spec_of(x)
    shape = math.prod(x.shape[:lead]), math.prod(x.shape[lead:])
    return _reshape(x, shape, {0: join(spec[0]), 1: join(spec[lead])})


def linear(x: jax.Array, params: dict[str, Any], inputs: int = 1, out: P | None = None) -> jax.Array:
    """Contracts the last `inputs` dimensions of x (batch, time, ...) with the weight's first ones; in x's dtype.

    Computed as one product of two matrices where batch and time can be joined: with them apart, XLA:CPU would copy the
    gradient of the result transposed to make the weight's gradient.

    Args:
      x: (batch, time, ...).
      params: "weight", and "bias" where there is one.
      inputs: dimensions that contract.
      out: sharding of the result where the contracted dimensions are split over devices, whose parts have to be added.
    """
    weight, lead = params["weight"].astype(x.dtype), x.ndim - inputs
    spec, split = spec_of(x), spec_of(weight)
    adds = {axis for axes in split[:inputs] for axis in axes}
    if spec[1] or adds or jax.typeof(weight).sharding.spec.reduced:
        parts = P(*map(join, spec[:lead] + split[inputs:]), unreduced=adds)
        numbers = (tuple(range(lead, x.ndim)), tuple(range(inputs))), ((), ())
        y = jax.lax.dot_general(x, weight, numbers, out_sharding=parts)
        y = jax.reshard(y, out) if adds else y
    else:
        y = flat(x, lead) @ flat(weight, inputs)
        y = _reshape(y, (*x.shape[:lead], *weight.shape[inputs:]), {0: join(spec[0]), lead: join(split[inputs])})
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def split_linear(params: dict[str, Any], sizes: tuple[int, ...], axis: int) -> list[dict[str, Any]]:
    """Cuts a fused projection into several along a weight axis.

    Cutting the weights costs less than cutting the activations they make, whose gradients would be joined again.
    """
    weights = jax.lax.split(params["weight"], sizes, axis=axis)
    if "bias" not in params:
        return [{"weight": w} for w in weights]
    biases = jax.lax.split(params["bias"], sizes, axis=axis - 1)
    return [{"weight": w, "bias": b} for w, b in zip(weights, biases, strict=True)]
