"""Extends a model's window: `python launch/extend.py --model runs/NAME --to 8x --data PATH --out runs/NAME-8x`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax extend` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("extend"))
