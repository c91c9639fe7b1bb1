"""Causal attention on a CPU without written scores (`flash.cc`), where nothing is differentiated; training keeps `chunked`.

Gradients are those of `chunked`, whose backward pass needs its own log normalisers; so a training step computes what it
would without this kernel. It is compiled when first needed; without a C++ compiler `auto` takes `chunked`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from phi3_jax.models.kernels import chunked, native
from phi3_jax.models.masks import Mask, Origin

if TYPE_CHECKING:
    from jaxtyping import Float

TARGET = "phi3_jax_flash"
SHORTEST = 256  # tokens; below, plain XLA is nearly as fast


@functools.cache
def _obstacle_of_machine() -> str | None:
    try:
        library = native.library("flash", "-fno-math-errno", "-ffp-contract=fast", native.NATIVE)
    except native.NotBuilt as error:
        return f"it cannot be compiled ({error})"
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.phi3_jax_flash), platform="cpu")
    return None


def obstacle(problem: Any) -> str | None:
    """Why the kernel cannot serve an `attention.Problem`, or None."""
    if problem.platform != "cpu":
        return f"it runs on CPU, not on {problem.platform}"
    if problem.dtype != jnp.float32:
        return f"dtype={jnp.dtype(problem.dtype).name}; it computes in float32"
    if problem.time < SHORTEST:
        return f"rows of {problem.time} tokens; it takes {SHORTEST} or more"
    if problem.mask.blocksparse is not None:
        return "it knows no block pattern per head"
    if problem.time_shards > 1:
        return "it knows no queries that are part of the keys' times"
    return "PHI3_JAX_KERNEL=off" if native.choice() == "off" else _obstacle_of_machine()


def attend(
    q: Float[jax.Array, "b t g r k"],
    k: Float[jax.Array, "b s g k"],
    v: Float[jax.Array, "b s g k"],
    mask: Mask,
    scale: float,
    origin: Origin,
) -> Float[jax.Array, "b t g r k"]:
    """One device's part; see `attention.attend`."""
    del origin  # dense over heads and whole in time
    return _attend(q, k, v, mask.segments, dataclasses.replace(mask, segments=None), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, mask: Mask, scale: float
) -> jax.Array:
    """`mask` is without its arrays."""
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype), vmap_method="sequential")
    documents = jnp.zeros(0, jnp.int32) if segments is None else segments.astype(jnp.int32)
    return call(q, k, v, documents, scale=float(scale), window=mask.window or 0)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, mask: Mask, scale: float
) -> tuple[jax.Array, Callable[..., Any]]:
    whole = dataclasses.replace(mask, segments=segments)
    return jax.vjp(lambda q, k, v: chunked.attend(q, k, v, whole, scale), q, k, v)


def _backward(mask: Mask, scale: float, vjp: Callable[..., Any], d_out: jax.Array) -> tuple[Any, ...]:
    return *vjp(d_out), None


_attend.defvjp(_forward, _backward)
