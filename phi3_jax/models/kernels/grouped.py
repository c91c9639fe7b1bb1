"""The CPU kernels for group-quantised matrices, and for few rows times whole ones (`grouped.cc`).

They are compiled once, when first needed. Without a C++ compiler the products run in plain XLA, those of 4 bits about 60
times slower; one line says so.
`PHI3_JAX_KERNEL` may name a version of the inner loop: vnni, avx2, plain.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp

from phi3_jax.models.kernels import native

TARGET, HALF, WHOLE = "phi3_jax_grouped", "phi3_jax_half", "phi3_jax_whole"
VERSIONS = native.VERSIONS


@functools.cache
def _load() -> int | None:
    """Number of the best inner loop of this CPU, with the target registered; None without a kernel."""
    try:
        library = native.library("grouped", "-fno-math-errno")
    except native.NotBuilt as error:
        print(f"note: no compiled CPU kernel ({error}); plain XLA is slower", file=sys.stderr)
        return None
    jax.ffi.register_ffi_target(HALF, jax.ffi.pycapsule(library.phi3_jax_half), platform="cpu")
    jax.ffi.register_ffi_target(WHOLE, jax.ffi.pycapsule(library.phi3_jax_whole), platform="cpu")
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.phi3_jax_grouped), platform="cpu")
    return int(library.phi3_jax_grouped_version())


def available() -> bool:
    """Whether products on this machine's default backend run in the kernel; compiles it at the first call."""
    return jax.default_backend() == "cpu" and native.choice() != "off" and _load() is not None


def version() -> str:
    """The inner loop in use: "vnni", "avx2" or "plain"; "none" without a kernel."""
    best = _load() if available() else None
    if best is None:
        return "none"
    return VERSIONS[best if native.choice() == "auto" else min(VERSIONS.index(native.choice()), best)]


def multiply(x: jax.Array, tiles: jax.Array, rows: int, bits: int, group: int) -> jax.Array:
    """x (m, columns) float32 times the matrix in `tiles` (tile rows, groups, bytes): (m, rows) float32.

    The kernel rounds x to int8 with a scale for 32 values, as llama.cpp does: an error of about 0.5 % of each product.
    """
    number = -1 if native.choice() == "auto" else VERSIONS.index(native.choice())
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], rows), jnp.float32))
    return call(x, tiles, bits=bits, per_group=group // 32, version=number)


def multiply_few(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (m, k) float32 times weight (k, n), float32 or bfloat16: (m, n) float32, exact but for the order of its sums."""
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), jnp.float32)
    target = HALF if weight.dtype == jnp.bfloat16 else WHOLE
    found: jax.Array = jax.ffi.ffi_call(target, shape, vmap_method="sequential")(x, weight)
    return found
