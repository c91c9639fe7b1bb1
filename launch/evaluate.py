"""Scores a model on benchmarks: `python launch/evaluate.py --model runs/phi3-mini --suite phi3_report`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax evaluate` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("evaluate"))
