"""Load a model and ask it.

    python examples/load_and_ask.py                                      # trains a toy first, in half a minute
    python examples/load_and_ask.py hf:path/to/Phi-3-mini-4k-instruct    # or a folder of released weights

`phi3_jax.load` takes a run, one of its checkpoints, a study of one run, or `hf:FOLDER`. `Engine` decodes with it.
"""

import subprocess
import sys

import numpy as np

import phi3_jax
from phi3_jax.inference.engine import Engine
from phi3_jax.inference.sampling import Sampling

PROMPT = "import "


def toy() -> str:
    """A proxy of phi-3-mini, trained on the documentation that Python brings along; it learns to spell, and no more."""
    words = "experiments/scaling.py:mini,scale=pico,data=pydocs,budgets=100k"
    subprocess.run(["phi3-jax", "run", "--config", words, "--workdir", "runs/example-toy"], check=True)
    return "runs/example-toy"


def main() -> None:
    model = phi3_jax.load(sys.argv[1] if len(sys.argv) > 1 else toy())
    print(
        f"{model.config.label}: {model.config.layers} layers, width {model.config.embed}, {model.config.vocab} tokens"
    )

    # Logits: a string or token ids (batch, time) in, float32 (batch, time, vocab) out.
    logits = np.asarray(model.logits(PROMPT))[0, -1]
    likely = np.argsort(logits)[::-1][:5]
    print(f"after {PROMPT!r} the likeliest tokens are", [model.tokenizer.decode([int(token)]) for token in likely])

    # Text: prompts in, replies out, several at once. `score` gives the log-probability of a text that is there.
    engine = Engine(model)
    for reply in engine.generate([PROMPT, "The "], max_new_tokens=24, sampling=Sampling(temperature=0.8)):
        print(f"reply: {reply.text!r}, {np.mean(reply.logprobs):.2f} nats per token, ended by {reply.finish}")


if __name__ == "__main__":
    main()
