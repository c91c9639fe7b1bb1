"""How much knowledge suits each size? The runs that the knowledge filter of curation.py is fitted on and judged by.

    python launch/run.py --config experiments/knowledge.py          # 3 sizes x 5 loads, and 4 random drops, 3 seeds
    python analysis/knowledge_regret.py runs/knowledge-all          # fits c on one size, tests it on the other two

Words after the colon, separated by commas:

    all | filtered             default all; filtered: without the random drops
    arms=facts3000+facts9000   only these arms
    seed=500  seeds=3          first seed, number of seeds
    tokens=4M                  of an arm of 4M; other numbers scale all counts, for trying out

The same command continues a stopped one. 81 runs of 4M tokens at pico scale: about 3 hours on two idle cores.

A universe of 13,500 persons of 48 bits is asked for whole. A filter keeps 3,000 to 13,500 of them, each seen equally often
in every arm (27.8 times), and gives the freed tokens to arithmetic. A random drop of documents has the filter's tokens, but
all persons, each seen less often. Recall is from the name alone and the loss weighs by token, as in block A of
calibration.py.

The rule, written before any run. The composite of a run is the mean of the recall of the universe and of exact arithmetic
rows; a size's best load is that of the highest mean composite over seeds. The filter gives a size the largest load whose
bits, as the filter counts them in unlabelled prose, are at most c * N. c is fitted on one size, so that it gets its best
load (the middle, in logarithms, of the c's that do), and tested on the other two. In all three ways the regret, best minus
chosen, must be at most the larger of its standard error over seeds and .01. Beside it stand the regrets of keeping all and
of a random drop to the chosen load.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.experiment import Arm, apply, arms_config, base_config, parse_arguments, take_arms
from phi3_jax.family import TRIO
from phi3_jax.keys import parse_count

TARGETS = ("all", "filtered")
WORDS = {"arms": str, "seed": int, "seeds": int, "tokens": str}
LOADS = (3000, 4500, 6000, 9000, 13500)
TOKENS, OF_A_FACT = 4_000_000, 2_000_000 / 9000


def arm(load: int, persons: int) -> Arm:
    """So many persons in the tokens that a load of facts takes."""
    return Arm(facts=persons, knowledge=load * OF_A_FACT, reasoning=TOKENS - load * OF_A_FACT)


FILTERED = {f"facts{load}": arm(load, load) for load in LOADS}
ARMS = FILTERED | {f"random{load}": arm(load, LOADS[-1]) for load in LOADS[:-1]}


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    arms = ARMS if target == "all" else FILTERED
    chosen = take_arms(words, arms)
    tokens = parse_count(words.pop("tokens", "4M"))
    config = base_config()
    config.update(
        name=f"knowledge-{target}", scale="pico", sizes=TRIO, seed=500, seeds=3, universe=LOADS[-1],
        size_factor=tokens / TOKENS,
    )  # fmt: skip
    config.arms = arms_config(chosen)
    config.train.update(eval_points=1, log_every=200, checkpoint_every=2000, weighting="token")
    return apply(config, words, {})
