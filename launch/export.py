"""Exports a model for on-device use: `python launch/export.py --model runs/phi3-mini --to gguf:phi3-mini.Q4_0.gguf`.

--model RUN|hf:FOLDER    a run, one of its checkpoints, or a Hugging Face folder
--to gguf:FILE           one GGUF file for llama.cpp (mini and medium); must not exist yet, and appears only when whole
--to hf:FOLDER           safetensors instead (every member), as `launch/convert.py` writes them
--format FORMAT          f16, q8_0 or q4_0; default: what FILE's name says (.F16., .Q8_0., .Q4_0.)
--name NAME              general.name in the GGUF file; default: the model's
"""

from __future__ import annotations

import sys

from phi3_jax.commands import run
from phi3_jax.interop.gguf import command

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], __doc__, command))
