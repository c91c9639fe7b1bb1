"""Exports a model for on-device use: `python launch/export.py --model runs/phi3-mini --to gguf:phi3-mini.Q4_0.gguf`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax export` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("export"))
