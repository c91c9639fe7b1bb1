"""Converts released weights to a run and back: `python launch/convert.py --from hf:FOLDER --to runs/NAME`.

--from hf:FOLDER|RUN     a Hugging Face folder (config.json, *.safetensors), or a run or one of its checkpoints
--to RUN|hf:FOLDER       the other kind; must not exist yet, and appears only when whole
--window_rule RULE       transformers (default): sliding_window = w means w keys; released (the 2024 code): w + 1
"""

from __future__ import annotations

import sys

from phi3_jax.commands import run
from phi3_jax.interop.convert import command

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], __doc__, command))
