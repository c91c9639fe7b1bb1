"""C++ beside this file, compiled once when first needed and kept in the cache folder.

It is compiled against the headers of the jaxlib in use, which therefore always agree with it. `PHI3_JAX_KERNEL=off` does
without.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

from phi3_jax.errors import UserError, nearest

HERE = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
VERSIONS = ("plain", "avx2", "vnni")  # of `grouped`, which alone can be asked for by version
NATIVE = "-march=native"  # what is compiled with it is kept for this kind of CPU alone


class NotBuilt(Exception):
    """Why there is no library, in one line."""


def choice() -> str:
    """PHI3_JAX_KERNEL: auto (default), off, or one of VERSIONS.

    Raises:
      UserError: another word.
    """
    choices, wish = ("auto", "off", *VERSIONS), os.environ.get("PHI3_JAX_KERNEL", "auto")
    if wish not in choices:
        raise UserError(f"PHI3_JAX_KERNEL={wish!r}{nearest(wish, choices)}")
    return wish


def library(name: str, *flags: str) -> ctypes.CDLL:
    """NAME.cc as a loaded library; `flags` are the compiler's, beside FLAGS.

    Raises:
      NotBuilt: no C++ compiler, one that fails, or a folder that cannot be written.
    """
    try:
        return ctypes.cdll.LoadLibrary(str(_compiled(HERE / f"{name}.cc", (*FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [str(error)]
        raise NotBuilt(next((line for line in lines if "error" in line), lines[-1])) from error


def _compiled(source: Path, flags: tuple[str, ...]) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    made_of = [path.read_bytes() for path in (source, *sorted(HERE.glob("*.h")))]
    made_of.append(f"{jaxlib.__version__} {compiler} {flags} {_cpu() if NATIVE in flags else ''}".encode())
    key = hashlib.sha256(b"".join(made_of)).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax" / "kernels"
    target = root / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    if compiler is None:
        raise OSError("no C++ compiler found; install g++ or set CXX")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        made = Path(folder) / source.name
        command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, target)
    return target


def _cpu() -> str:
    """What this CPU can do, as the kernel lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    listed = [line for line in lines if line.startswith(("flags", "Features"))]
    return listed[0] if listed else f"{platform.machine()} {platform.processor()}"
