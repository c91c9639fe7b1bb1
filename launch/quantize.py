"""Quantises a model: `python launch/quantize.py --model runs/phi3-mini --format q4_0 --out runs/phi3-mini-q4`.

--model RUN              a run or one of its checkpoints
--format FORMAT          q4_0 (4 bits, a scale for 32 weights), q8_0 (8 bits, 32), int4_g128 (4 bits, 128)
--out RUN                the quantised run; must not exist yet, and appears only when whole
--calibrate              round so that the products with real inputs stay (GPTQ); minutes for a phi-3-mini
--text FILE              text to calibrate on and to measure with; default: the run's own data set, or the Python docs
--tokens N               how many tokens of it (default 8192, of which models of 1B and more are measured on 2048; 0: none)
"""

from __future__ import annotations

import sys

from phi3_jax.commands import run
from phi3_jax.inference.quantize import command
from phi3_jax.training.compile_cache import kept

if __name__ == "__main__":
    with kept():
        sys.exit(run(sys.argv[1:], __doc__, command))
