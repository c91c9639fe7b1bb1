"""Sends a study to a scheduler: `python launch/submit.py --config FILE:sweep,scale=full --backend slurm --dry_run`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax submit` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("submit"))
