"""Converts released weights to a run and back: `python launch/convert.py --from hf:FOLDER --to runs/NAME`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax convert` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("convert"))
