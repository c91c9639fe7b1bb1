"""Eight fake CPU devices for every test, so that sharding is tested on any machine; quick compilation; bounded memory."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quick import COMPILATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags = f"{COMPILATION} {flags} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags

SHARED = Path(__file__).resolve().parents[2] / "shared"
MAINTAINED = ("shared", "slurm", "libtpu", "peer", "gguf")  # each needs something that a clone has not
MEMORY = 1500 << 20  # bytes of a process from which compiled programs are forgotten between tests
_enough = MEMORY


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("shared"):
            if not (SHARED / marker.args[0]).exists():
                item.add_marker(pytest.mark.skip(reason=f"needs ../shared/{marker.args[0]}"))
        if any(item.get_closest_marker(name) for name in MAINTAINED):
            item.add_marker("maintainers")


def pytest_runtest_teardown() -> None:
    """Compiled programs are most of what a process holds, and few of them serve another test."""
    global _enough
    if "jax" in sys.modules and _resident() > _enough:
        sys.modules["jax"].clear_caches()
        gc.collect()
        _enough = max(MEMORY, _resident() + (256 << 20))


@pytest.fixture
def compiled_anew() -> Iterator[None]:
    """No cache on disk, which an earlier test may have turned on: nobody compiles what comes from there, or warns.

    jax asks once in a process whether it has such a cache, so it is made to ask again.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    for enabled in (False, before):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
        if not enabled:
            yield


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
