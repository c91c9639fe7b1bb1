"""What SFT and DPO cost and give the three proxies at pico: knowledge, reasoning and format before and after, 3 seeds.

    python launch/run.py --config experiments/alignment_tax.py          # 27 runs: 3 sizes x 3 seeds x base, SFT, DPO
    phi3-jax verdict experiments/alignment_tax.py runs/alignment-tax    # what the rule says of them

Each size and seed is a chain of `experiments/posttrain.py:all`: its own world of persons, a base, SFT with half of its
windows from the pre-training, DPO. Measures, on persons that no question of SFT or DPO was about: knowledge is the share of
sentences of the prose that are gone on with rightly, free-running; reasoning the share of sums; format the share of
replies that end.

The rule, written down before any of these runs (seeds start at 10; the recipe was tried on seed 0 of mini alone). A change
is after minus before within one seed, paired. Of a measure and a size:

    tax        the 95 % t interval over seeds of the change lies below 0
    gain       it lies above 0
    undecided  otherwise; the effect that three seeds find with a power of 80 % stands beside it

Tax depends on size where the interval of the slope of the change, in points a doubling of non-embedding parameters,
excludes 0.
Nine comparisons are made (three measures, three sizes) for each of SFT and DPO; the table shows all of them.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import base_config, load_config
from phi3_jax.family import TRIO

SEEDS = (10, 11, 12)
WORDS: dict[str, type] = {}


def get_config(argument: str = "") -> ConfigDict:
    """All chains, one after the other."""
    if argument:
        raise UserError(
            f"this study takes no words, not {argument}; one chain is experiments/posttrain.py:all,size=mini"
        )
    config = base_config()
    config.name = "alignment-tax"
    config.verdict = "phi3_jax.scaling.tax:lines_of"
    config.stages = ConfigDict()
    for size in TRIO:
        for seed in SEEDS:
            chain = load_config(f"experiments/posttrain.py:all,size={size},seed={seed}").stages
            for name in sorted(chain):
                stage = chain[name]
                if stage.train.init:
                    stage.train.init = f"@{size}-s{seed}-{stage.train.init[1:]}"
                config.stages[f"{size}-s{seed}-{name}"] = stage
    return config
