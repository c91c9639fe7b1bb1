"""Eight fake CPU devices for every test, so that sharding is tested on any machine; quick compilation."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags = f"--xla_backend_optimization_level=1 {flags} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what takes long, by name, unless -m asks for it."""
    for item in items:
        if "multiprocess_slow" in item.keywords and "multiprocess_slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m multiprocess_slow"))
