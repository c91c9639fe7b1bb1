"""The CPU kernels for group-quantised and bfloat16 matrices (`grouped.cc`): compiled once, when first needed.

It is compiled against the headers of the jaxlib in use, which therefore always agree with it, and kept in the cache
folder. Without a C++ compiler the products run in plain XLA, about 60 times slower; one line says so.
`PHI3_JAX_KERNEL` chooses: auto (default), off, or a version of the inner loop: vnni, avx2, plain.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from phi3_jax.errors import UserError, nearest

SOURCE = Path(__file__).with_name("grouped.cc")
TARGET, HALF = "phi3_jax_grouped", "phi3_jax_half"
VERSIONS = ("plain", "avx2", "vnni")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno")


@functools.cache
def _load() -> int | None:
    """Number of the best inner loop of this CPU, with the target registered; None without a kernel."""
    try:
        library = ctypes.cdll.LoadLibrary(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        text = str(getattr(error, "stderr", None) or error).strip().splitlines()
        print(f"note: no compiled CPU kernel ({text[-1] if text else error}); plain XLA is slower", file=sys.stderr)
        return None
    jax.ffi.register_ffi_target(HALF, jax.ffi.pycapsule(library.phi3_jax_half), platform="cpu")
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.phi3_jax_grouped), platform="cpu")
    return int(library.phi3_jax_grouped_version())


def _compiled() -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{jaxlib.__version__} {compiler} {FLAGS}".encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax" / "kernels"
    target = root / f"grouped-{key}.so"
    if target.exists():
        return target
    if compiler is None:
        raise OSError("no C++ compiler found; install g++ or set CXX")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        made = Path(folder) / "grouped.so"
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, target)
    return target


def _wish() -> str:
    wish = os.environ.get("PHI3_JAX_KERNEL", "auto")
    if wish not in ("auto", "off", *VERSIONS):
        raise UserError(f"PHI3_JAX_KERNEL={wish!r}{nearest(wish, ('auto', 'off', *VERSIONS))}")
    return wish


def available() -> bool:
    """Whether products on this machine's default backend run in the kernel; compiles it at the first call."""
    return jax.default_backend() == "cpu" and _wish() != "off" and _load() is not None


def version() -> str:
    """The inner loop in use: "vnni", "avx2" or "plain"; "none" without a kernel."""
    best = _load() if available() else None
    if best is None:
        return "none"
    return VERSIONS[best if _wish() == "auto" else min(VERSIONS.index(_wish()), best)]


def multiply(x: jax.Array, tiles: jax.Array, rows: int, bits: int, group: int) -> jax.Array:
    """x (m, columns) float32 times the matrix in `tiles` (tile rows, groups, bytes): (m, rows) float32.

    The kernel rounds x to int8 with a scale for 32 values, as llama.cpp does: an error of about 0.5 % of each product.
    """
    number = -1 if _wish() == "auto" else VERSIONS.index(_wish())
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((x.shape[0], rows), jnp.float32))
    return call(x, tiles, bits=bits, per_group=group // 32, version=number)


def multiply_half(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (m, k) float32 times weight (k, n) bfloat16: (m, n) float32, exact but for the order of its sums."""
    return jax.ffi.ffi_call(HALF, jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), jnp.float32))(x, weight)
