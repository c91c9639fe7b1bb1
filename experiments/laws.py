"""A loss law of one's own, and a forecast that is written down before the runs it is about.

    python launch/run.py --config experiments/laws.py                     # six widths x four budgets on real text
    python launch/run.py --config experiments/laws.py:seeds=2,data=my.jsonl

Words after the colon, separated by commas:

    data=pydocs|<path>|tfds:<name>|...     default pydocs, the documentation of this Python installation, as bytes
    budgets=350k,700k,1.4M,2.8M            tokens; all of a size from one trunk (WSD forks)
    seed=0  seeds=1                        first seed, number of seeds
    scale=pico|nano|...                    of the ladder of widths, as in scaling.py

Cost on 2 CPU cores: 13 minutes (on a machine that did other work too).

Sizes differ in width alone (53k to 652k non-embedding parameters at one depth), so that the law is one of size. Budgets
keep below one pass over the text, so that no token repeats. The runs of the largest size and of the largest budget come
last: before they start, L(N, D) is fitted to the others and its forecasts of them go to forecast.json, whose hash is
written into their config.json. The report then shows what was predicted and what was measured.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.experiment import apply, base_config, parse_arguments
from phi3_jax.family import SCALES, WIDTHS

TARGETS = ("widths",)
WORDS = {"data": str, "budgets": list, "seed": int, "seeds": int, "scale": SCALES}


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    _, words = parse_arguments(argument, TARGETS, WORDS)
    config = base_config()
    config.update(
        name="laws", scale="pico", ladder="width", sizes=WIDTHS,
        budgets=(350_000, 700_000, 1_400_000, 2_800_000),
    )  # fmt: skip
    config.data.source = "pydocs"
    config.train.update(eval_points=1, log_every=50)
    return apply(config, words, {"data": "data.source"})
