"""How the tests compile: in about half of the CPU time that level 1 takes, since most programs here run once.

LLVM optimises nothing, and the emitters that XLA had before its fusion emitters write the kernels: less code for LLVM. The
numbers are float32's all the same, but the last bits may differ from a user's.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import jaxlib

LEVEL = "--xla_backend_optimization_level=0"
OLD_EMITTERS = "xla_cpu_use_fusion_emitters"
_LIBRARY = Path(jaxlib.__file__).with_name("libjax_common.so")


def _known(flag: str) -> bool:
    """Whether this XLA has the flag; it ends the process where it meets one that it does not know."""
    if not _LIBRARY.is_file():
        return False
    with _LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(flag.encode()) >= 0


COMPILATION = f"{LEVEL} --{OLD_EMITTERS}=false" if _known(OLD_EMITTERS) else LEVEL


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a process with so many fake CPU devices."""
    return f"{COMPILATION} --xla_force_host_platform_device_count={devices}"
