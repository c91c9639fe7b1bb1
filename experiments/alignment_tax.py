"""What SFT and DPO cost and give the three proxies at pico: knowledge, reasoning and format before and after, 3 seeds.

    python launch/run.py --config experiments/alignment_tax.py          # 27 runs: 3 sizes x 3 seeds x base, SFT, DPO
    phi3-jax verdict experiments/alignment_tax.py runs/alignment-tax    # what the rule says of them

Each size and seed is a chain of `experiments/posttrain.py:all`: its own world of persons, a base, SFT with half of its
windows from the pre-training, DPO. Measures, on persons that no question of SFT or DPO was about: knowledge is the share of
sentences of the prose that are gone on with rightly, free-running; reasoning the share of triples of numbers, of a kind
that no training has, that are put in order, outside of any chat; format the share of replies that end.

The rule, written down before any of these runs (seeds start at 10; the recipe was found on seed 0, of mini). A change is
after minus before within one seed, paired; "before" is the base, and for DPO also SFT. Of a measure and a size:

    tax         the 95 % t interval over seeds of the change lies below 0
    gain        it lies above 0
    undecided   otherwise; about the change that three seeds find with a power of 80 % stands beside it
    no spread   all seeds changed alike
    incomplete  fewer than three seeds have both

Tax depends on size where the interval of the slope of the change, in points a doubling of non-embedding parameters,
excludes 0. Where the base's mean is above 98 % at some size (no gain is possible there) or within 5 points of chance (no
tax is; a sixth for reasoning, 0 else), the table says so and the slope is not read.

Primary are the change of knowledge after SFT at mini, and its slope. The rest describes: of 27 changes and 9 slopes at 5 %,
two are expected by chance, so that no single one of them is claimed. Format is a check of the recipe: no base has ever seen
a reply.

What this cannot tell apart. The replayed prose holds the sentences of the tested persons, and triples: a change is
the net of forgetting and of further pre-training, "no tax" means none with this replay. Rates and rounds were chosen
for mini: a slope is one of size at these rates and 3M tokens of pre-training. Sentences are begun in a wording that
SFT also refuses in; refusals in their place count as forgotten, and their share stands in the second table. Three
seeds see large effects only: with 2 points between seeds, an interval is 5 points wide to each side.

Predictions: at mini SFT costs knowledge, less than 10 points, and DPO gives some of it back; the slope is not told from 0.
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
    config.verdict = "phi3_jax.reporting.tax:lines_of"
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
