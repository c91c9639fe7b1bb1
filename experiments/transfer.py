"""Does the learning rate transfer across width? muP compared with the standard parametrisation, at proxy scale.

    python launch/run.py --config experiments/transfer.py

Words after the colon, separated by commas:

    seed=10  seeds=1         first seed, number of seeds
    tokens=1M                of each run

Cost on 2 CPU cores: 15 minutes (on a machine that did other work too).

Five learning rates, a factor of 2 apart, at widths 32, 64 and 112 of one depth, on the corpora of
`data_optimal.py`'s filtered arm. Under muP the best rate should be the same at each width (arXiv:2203.03466); under the
standard parametrisation it falls as the width grows.
"""

from __future__ import annotations

from dataclasses import replace

from ml_collections import ConfigDict

from phi3_jax.experiment import Arm, apply, arms_config, base_config, parse_arguments
from phi3_jax.keys import parse_count

TARGETS = ("widths",)
WORDS = {"seed": int, "seeds": int, "tokens": str}
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    _, words = parse_arguments(argument, TARGETS, WORDS)
    config = base_config()
    config.update(
        name="transfer", scale="pico", ladder="width", sizes=("below", "small", "above"), seed=10, universe=2250,
        size_factor=parse_count(words.pop("tokens", "1M")) / 1_000_000,
    )  # fmt: skip
    data = Arm(facts=1125, knowledge=250_000, reasoning=750_000)
    config.arms = arms_config(
        {
            f"{name}_{rate:g}".replace(".", "p"): replace(data, peak_lr=rate, mup=mup)
            for name, mup in (("mup", True), ("standard", False))
            for rate in RATES
        }
    )
    config.train.update(eval_points=1, log_every=100, checkpoint_every=1000)
    return apply(config, words, {})
