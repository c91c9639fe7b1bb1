"""Quantises a model: `python launch/quantize.py --model runs/phi3-mini --format q4_0 --out runs/phi3-mini-q4`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax quantize` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("quantize"))
