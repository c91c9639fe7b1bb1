"""What an extension trains on and how: the normal loop, from the searched model, on mixed windows."""

from __future__ import annotations

import shlex
from pathlib import Path

from phi3_jax.configs import ModelConfig
from phi3_jax.experiment import Command, base_config
from phi3_jax.extension.asked import Asked
from phi3_jax.family import GIVEN
from phi3_jax.shipped import script

# Proxies: the pilot's (100 steps of 4 rows). Released models: LongRoPE2's (arXiv:2502.20082, its nnscaler recipe).
EXPERIMENT = "experiments/longcontext.py"  # which every process of a study executes
PROXY = (4, dict(peak_lr=5e-4, b1=0.9, b2=0.98, eps=1e-12, schedule="linear", warmup=0.02, final_lr=0.0))
FULL = (
    32,
    dict(
        peak_lr=2e-5, b1=0.9, b2=0.95, eps=1e-8, schedule="cosine", warmup=0.02, final_lr=0.0, weight_decay=0.0, clip=1.0,
    ),
)  # fmt: skip


def study(found: Asked, cfg: ModelConfig, start: Path, out: Path) -> Command:
    """The study of one run that trains the model at `start` in the folder `out`."""
    rows, optim = PROXY if cfg.is_proxy else FULL
    flags, config = found.flags, base_config()
    config.update(sizes=(GIVEN,), scale=GIVEN, budgets=(flags["train"],), seed=flags["seed"])
    tokenizer = "bytes" if found.tokenizer.kind == "bytes" else str(found.weights.kept)
    config.data.update(
        source=f"long:{found.data}", tokenizer=tokenizer, window=found.target, original=found.task.original,
        mix=flags["mix"], needles=0.5 if found.knows_needles else 0.0, held_out=found.held_out,
        text_field=flags["text_field"], seed=flags["seed"],
    )  # fmt: skip
    config.optim.update(**optim)
    config.train.update(init=str(start), batch_tokens=rows * found.target, eval_points=1)
    return Command(config, EXPERIMENT, out, "auto")


def line(words: tuple[str, ...]) -> str:
    """The command as it is typed, for the study's page."""
    return shlex.join(["python", *script("extend"), *words])
