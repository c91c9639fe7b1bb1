"""Eight fake CPU devices for every test, so that sharding is tested on any machine; quick compilation."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags = f"--xla_backend_optimization_level=1 {flags} --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = flags
