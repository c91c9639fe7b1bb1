"""Norms and activations; statistics in float32 or wider, results in the input's dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig, Vision
from phi3_jax.models.kernels import grouped
from phi3_jax.models.layout import explicit, join, spec_of
from phi3_jax.models.quantized import Product

FEW_ROWS = 8  # rows up to which `product` beats XLA:CPU's dot


def norm(x: jax.Array, params: dict[str, jax.Array], cfg: ModelConfig | Vision) -> jax.Array:
    """RMSNorm, or LayerNorm with gain and bias (phi-3-small, the tower); x (..., embed)."""
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

    Args:
      x: (batch, time, ...).
      params: "weight", "bias" where there is one, and "lora_a" and "lora_b" where there is an adapter (`lora.joined`).
      inputs: dimensions that contract.
      out: sharding of the result where the contracted dimensions are split over devices, whose parts have to be added.
    """
    low = times(x, params["lora_a"], inputs, out) if "lora_a" in params else None
    return _linear(x, params, low, inputs, out)


def _linear(
    x: jax.Array, params: dict[str, Any], low: jax.Array | None, inputs: int = 1, out: P | None = None
) -> jax.Array:
    """`linear`, of which `low` is x times "lora_a" (batch, time, rank)."""
    y = times(x, params["weight"], inputs, out)
    if low is not None:
        y = y + times(low, params["lora_b"])
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def times(x: jax.Array, weight: jax.Array | Product, inputs: int = 1, out: P | None = None) -> jax.Array:
    """The product of `linear`, with its arguments.

    Computed as one product of two matrices where batch and time can be joined: with them apart, XLA:CPU would copy the
    gradient of the result transposed to make the weight's gradient.
    """
    lead = x.ndim - inputs
    if isinstance(weight, Product):
        return weight.apply(x)
    if has_kernel(x, lead, weight):
        rows, depth, width = (math.prod(d) for d in (x.shape[:lead], weight.shape[:inputs], weight.shape[inputs:]))
        y = product(x.reshape(rows, depth), weight.reshape(depth, width))
        return y.reshape(*x.shape[:lead], *weight.shape[inputs:])
    weight = weight.astype(x.dtype)
    spec, split = spec_of(x), spec_of(weight)
    adds = {axis for axes in split[:inputs] for axis in axes}
    if spec[1] or adds or jax.typeof(weight).sharding.spec.reduced:
        parts = P(*map(join, spec[:lead] + split[inputs:]), unreduced=adds)
        numbers = (tuple(range(lead, x.ndim)), tuple(range(inputs))), ((), ())
        y = jax.lax.dot_general(x, weight, numbers, out_sharding=parts)
        return jax.reshard(y, out) if adds else y
    y = flat(x, lead) @ flat(weight, inputs)
    return _reshape(y, (*x.shape[:lead], *weight.shape[inputs:]), {0: join(spec[0]), lead: join(split[inputs])})


def linears(x: jax.Array, params: dict[str, Any], sizes: tuple[int, ...], axis: int) -> Sequence[jax.Array]:
    """The products of x with the parts of a fused projection, cut along a weight axis.

    Cutting the weights costs less than cutting the activations they make, whose gradients would be joined again; not so
    while a few tokens are decoded, where it would copy the weights.
    """
    if isinstance(params["weight"], Product) or (x.shape[1] == 1 and not explicit(x)):
        return jax.lax.split(linear(x, params), sizes, axis=axis + 1)
    axes = {
        "weight": axis,
        "bias": axis - 1,
        "lora_b": axis,
    }  # of B the rank is before its outputs, as x's dimension is
    cut = {name: jax.lax.split(params[name], sizes, axis=at) for name, at in axes.items() if name in params}
    low = times(x, params["lora_a"]) if "lora_a" in params else None
    return [_linear(x, dict(zip(cut, part, strict=True)), low) for part in zip(*cut.values(), strict=True)]


def has_kernel(x: jax.Array, lead: int, weight: jax.Array) -> bool:
    """Whether `product` serves: on a CPU, a few rows (the first `lead` dimensions of x) and a matrix in bfloat16.

    With more than one row also a matrix in float32 like x.
    """
    rows = math.prod(x.shape[:lead])
    same = weight.dtype == x.dtype == jnp.float32 and rows > 1
    return rows <= FEW_ROWS and (same or weight.dtype == jnp.bfloat16) and not explicit(x) and grouped.available()


@jax.custom_jvp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """A few rows x (rows, k) @ weight (k, n), added up in float32; in x's dtype.

    XLA:CPU's own product takes up to twice as long with a float32 matrix, and with a bfloat16 one ten times as long as
    reading it.
    """
    return grouped.multiply_few(x.astype(jnp.float32), weight).astype(x.dtype)


product.defjvps(
    lambda dx, _, x, weight: dx @ weight.astype(dx.dtype),
    lambda d_weight, _, x, weight: x @ d_weight.astype(x.dtype),
)
