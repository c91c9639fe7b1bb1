"""Attention of one new token a row on a CPU, in place and without written scores (`step.cc`).

XLA writes the scores out, reads as many slots of each row as the longest has, and copies a part of the cache before it
multiplies it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from phi3_jax.models.kernels import native

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TARGET = "phi3_jax_step"


@functools.cache
def _built() -> bool:
    try:
        library = native.library("step", "-fno-math-errno", "-ffp-contract=fast", native.NATIVE)
    except native.NotBuilt:
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.phi3_jax_step), platform="cpu")
    return True


def serves(platform: str, *dtypes: jnp.dtype) -> bool:
    """Whether the kernel takes queries and keys of these dtypes on "cpu", "gpu" or "tpu"; compiles it when first asked."""
    if platform != "cpu" or native.choice() == "off":
        return False
    return all(dtype == jnp.float32 for dtype in dtypes) and _built()


def attend(
    q: Float[jax.Array, "b g r k"],
    k: Float[jax.Array, "b g k"],
    v: Float[jax.Array, "b g k"],
    keys: Float[jax.Array, "b g s k"],
    values: Float[jax.Array, "b g s k"],
    position: Int[jax.Array, " b"],
    scale: float,
    *,
    window: int | None,
    spare: int,
    before: tuple[Float[jax.Array, "g t k"], Float[jax.Array, "g t k"], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes a token's key and value, and attends from it.

    Args:
      k, v: of the token.
      keys, values: position p in slot p % (s - spare).
      position: of the token, counted from the end of `before`.
      scale: factor on q.k.
      window: positions that a token sees, its own one of them; None: all.
      before: keys and values of what all rows begin with, and how many of these there are.

    Returns:
      (attention (b, g, r, k), keys, values).
    """
    none = jnp.zeros((keys.shape[1], 0, keys.shape[3]), keys.dtype)
    before_keys, before_values, count = (none, none, 0) if before is None else before
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, keys, values)]
    call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases={3: 1, 4: 2}, vmap_method="sequential")
    counts = jnp.asarray(count, jnp.int32).reshape(1)
    out, keys, values = call(
        q, k.astype(keys.dtype), v.astype(values.dtype), keys, values, before_keys, before_values, counts,
        position.astype(jnp.int32), scale=float(scale), window=window or 0, spare=spare,
    )  # fmt: skip
    return out, keys, values
