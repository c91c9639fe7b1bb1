"""Continues a prompt: `python launch/generate.py --model runs/phi3-mini --prompt "Explain RoPE in one sentence."`.

--model RUN|hf:FOLDER    a run, one of its checkpoints, a quantised run, or a Hugging Face folder
--prompt TEXT            may be repeated: the prompts then run together; one prompt streams its reply
--file FILE              one prompt a line
--chat                   the member's chat template; without --prompt, a dialogue line by line
--system TEXT            system message of the dialogue
--max_new_tokens N       at most (default 256, in a dialogue 512, or what the context leaves)
--temperature T          0 (default) takes the most likely token
--top_k N --top_p P --min_p P --repetition_penalty R --seed N
--stop TEXT              ends the reply before TEXT; may be repeated
--logprobs               log-probability of each token, in nats
--rope_regime REGIME     LongRoPE list: auto (default; by prompt and max_new_tokens), short, long
"""

from __future__ import annotations

import sys

from phi3_jax.commands import run
from phi3_jax.inference.command import command
from phi3_jax.training.compile_cache import kept

if __name__ == "__main__":
    with kept():
        sys.exit(run(sys.argv[1:], __doc__, command))
