"""Trains a study and writes its report: `python launch/run.py --config experiments/scaling.py:medium`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax run` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("run"))
