"""What a full-size run takes: `python launch/plan.py --config experiments/scaling.py:medium,topology=v5p:4x4x8`.

`--help` lists the flags, which `phi3_jax/verbs.py` declares; `phi3-jax plan` is the same command.
"""

from __future__ import annotations

import sys

from phi3_jax.entry import start

if __name__ == "__main__":
    sys.exit(start("plan"))
