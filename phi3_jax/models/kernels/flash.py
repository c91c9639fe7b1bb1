"""Causal attention on a CPU and its gradients without written scores (`flash.cc`).

Blocks of keys that are of other documents than the queries cost nothing, which plain XLA cannot leave out. The kernel is
compiled when first needed; without a C++ compiler `auto` takes `chunked`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from phi3_jax.models.kernels import native
from phi3_jax.models.masks import Mask, Origin

if TYPE_CHECKING:
    from jaxtyping import Float

TARGET, BACK = "phi3_jax_flash", "phi3_jax_flash_back"
BRANCHES = 4096  # by which flash.cc tells documents from their branches
SHORTEST = 256  # tokens; below, plain XLA is nearly as fast


@functools.cache
def _obstacle_of_machine() -> str | None:
    try:
        library = native.library("flash", "-fno-math-errno", "-ffp-contract=fast", native.NATIVE)
    except native.NotBuilt as error:
        return f"it cannot be compiled ({error})"
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.phi3_jax_flash), platform="cpu")
    jax.ffi.register_ffi_target(BACK, jax.ffi.pycapsule(library.phi3_jax_flash_back), platform="cpu")
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
    if problem.mask.branches is not None and problem.mask.window is not None:
        return "it knows no window that counts by the positions of branches"
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
    documents = None if mask.segments is None else mask.segments.astype(jnp.int32) * BRANCHES
    if documents is not None and mask.branches is not None:
        documents = documents + mask.branches.astype(jnp.int32)
    plain = dataclasses.replace(mask, segments=None, positions=None, branches=None)
    return _attend(q, k, v, documents, plain, scale)


# q, k, v, documents (batch, time) or (0,), output, base-2 logarithm of each query's sum
_Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None, mask: Mask, scale: float
) -> jax.Array:
    """`mask` is without its arrays."""
    return _forward(q, k, v, documents, mask, scale)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None, mask: Mask, scale: float
) -> tuple[jax.Array, _Saved]:
    documents = jnp.zeros(0, jnp.int32) if documents is None else documents
    shapes = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], q.dtype)
    call = jax.ffi.ffi_call(TARGET, shapes, vmap_method="sequential")
    out, logs = call(q, k, v, documents, scale=float(scale), window=mask.window or 0)
    return out, (q, k, v, documents, out, logs)


def _backward(
    mask: Mask, scale: float, saved: _Saved, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in saved[:3]]
    call = jax.ffi.ffi_call(BACK, shapes, vmap_method="sequential")
    d_q, d_k, d_v = call(*saved, d_out, scale=float(scale), window=mask.window or 0)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)
