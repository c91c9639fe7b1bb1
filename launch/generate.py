"""Continues a prompt: `python launch/generate.py --model runs/phi3-mini --prompt "Explain RoPE in one sentence."`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax generate` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("generate"))
