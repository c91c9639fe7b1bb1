"""Curates a corpus and writes its report: `python launch/curate.py --config experiments/curation.py --input FOLDER ...`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax curate` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("curate"))
