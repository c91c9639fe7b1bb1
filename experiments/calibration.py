"""At which filter of facts is each size best, does that filter move with size, and does it survive over-training?

    python launch/run.py --config experiments/calibration.py:A        # the runs of data_optimal.py again
    python launch/run.py --config experiments/calibration.py:pilot    # the outer widths, two seeds
    python launch/run.py --config experiments/calibration.py:B        # five widths, nine filters from 1/128 to 1/8
    python launch/run.py --config experiments/calibration.py:C        # three horizons
    python launch/run.py --config experiments/calibration.py:D        # three learning rates

Words after the colon, separated by commas:

    A | pilot | B | C | D    default A
    arms=f8+f11              only these arms
    seed=10  seeds=1         first seed, number of seeds
    tokens=4M                of an arm of 4M; other numbers scale all counts, for trying out
    weighting=token|domain   of the loss; the arms called _domain are by domain in any case

The same command continues a stopped block. Each finished run is a row of analysis/results/calibration/BLOCK.csv, and of the
study's own runs.csv; a command with another word than arms= is a trial and adds no row to the former. Runs that stand there
of the same code, from whatever machine, are not trained again. What of the plan ran, and what the rule below says of it:

    python -m phi3_jax.study.verdict experiments/calibration.py analysis/results/calibration

What differs from data_optimal.py, whose conclusion did not stand. Recall is said from the name alone: the model goes
on from its own answers, where it was given the right earlier ones. The loss weighs by token, so that a kept fact weighs
the same in the loss of every arm; Adam divides by the size of the gradient, in which facts have another share in each,
so that the step that a visit makes is not held equal. The mean over domains, which doubled a fact's weight under the
filter, is an arm of its own in block A. And from the pilot on the universe of facts is four times what the largest size can
hold at 2 bits a parameter, its persons as frequent as 1 / rank in 100 groups, and recall is weighted by that frequency.
The universe has no ceiling that a size reaches, but each filter has one: what it keeps (15 % at 1/128, 61 % at 1/8).

A filter keeps the most frequent persons, each seen as often as in the whole; those below 1/100 lie inside the first group,
where all are equally frequent. Every size sees the same number of tokens, so that the larger differs in capacity and not in
exposure: in B 60 visits of a person of the first group, and 60 / g of the g-th. Where a person needs 10 visits or more, the
filters above 1/8 only add persons that nobody learns; they are controls (f4, f2, f1), outside the rule. Block C is B's
design at a quarter of everything, with 1, 4 and 16 times the visits, each horizon with a warm-up and a decay of its own.
"""

from __future__ import annotations

from dataclasses import replace

from ml_collections import ConfigDict

from phi3_jax.data.corpora.facts import ATTRIBUTES, MAX_POOL, MAX_VALUE_BITS, Universe
from phi3_jax.experiment import Arm, apply, arms_config, base_config, parse_arguments, take_arms
from phi3_jax.family import TRIO, WIDTHS, proxy
from phi3_jax.keys import parse_count

TARGETS = ("A", "pilot", "B", "C", "D")
WORDS = {"arms": str, "seed": int, "seeds": int, "tokens": str, "weighting": ("token", "domain")}
FIVE = WIDTHS[:5]
OUTER = FIVE[0], FIVE[-1]
BITS = 2  # a parameter: what a size can hold at most (Allen-Zhu and Li, arXiv:2404.05405)


def universe_of(size: str) -> int:
    """Persons that are four times what a size of the width ladder can hold, at pico scale."""
    return round(4 * BITS * proxy(size, "pico", "width").matrix_params / (ATTRIBUTES * MAX_VALUE_BITS))


def filtered(persons: int, share: float) -> Arm:
    """The most frequent `share` of a universe, each seen as often as in the whole: reasoning takes the others' tokens."""
    kept = Universe(persons, round(share * persons), MAX_POOL, frequencies="inverse_rank").kept
    return Arm(
        facts=share * persons,
        knowledge=2_000_000 * kept,
        reasoning=4_000_000 - 2_000_000 * kept,
        frequency="inverse_rank",
    )


FILTERED = Arm(facts=4500, knowledge=1_000_000, reasoning=3_000_000)
LOOSE = Arm(facts=9000, knowledge=2_000_000, reasoning=2_000_000)
WIDEST = universe_of(FIVE[-1])
# f128, f91 .. f8: half octaves.
GRID = {f"f{round(2 ** (half / 2))}": filtered(WIDEST, 2 ** (-half / 2)) for half in range(14, 5, -1)}
BEYOND = {f"f{n}": filtered(WIDEST, 1 / n) for n in (4, 2, 1)}
# The tightest filter with the reasoning tokens of the loosest; the tokens that it frees are dropped.
HELD = replace(GRID["f128"], reasoning=GRID["f8"].reasoning, sizes=OUTER)
# Fixed after the pilot and before any run of A to D of this build. Margins are points of regret that are too few to matter;
# seeds are those of a cell of B, and of C at its longest horizon. By the pilot's noise (`phi3_jax.scaling.regime.seen`) 6
# seeds see 1.9 points of recall and 3.9 of recall and reasoning at a power of 80 %, and 8 see 1.5 and 3.2.
AFTER_PILOT: dict[str, float | None] = {
    "margin of recall": 2.0,
    "margin of recall and reasoning": 4.0,
    "seeds of B": 8,
    "seeds of C": 6,
}
SEEDS_B, SEEDS_C = (int(AFTER_PILOT[f"seeds of {block}"] or guess) for block, guess in (("B", 6), ("C", 4)))


def longer(arm: Arm, times: int) -> Arm:
    """An arm with so many times the visits of every fact and the tokens."""
    return replace(arm, knowledge=times * arm.knowledge, reasoning=times * arm.reasoning)


ARMS: dict[str, dict[str, Arm]] = {
    "A": {"filtered": FILTERED, "loose": LOOSE}
    | {f"{name}_domain": replace(arm, weighting="domain") for name, arm in (("filtered", FILTERED), ("loose", LOOSE))},
    "pilot": {name: GRID[name] for name in ("f128", "f64", "f32", "f16", "f8")} | BEYOND,
    "B": GRID | {name: replace(arm, sizes=OUTER, seeds=2) for name, arm in BEYOND.items()} | {"f128_held": HELD},
    # 1M, 4M and 16M tokens at femto scale: 75 to 1,200 a parameter of the smallest size, 8 to 134 of the largest.
    "C": {
        f"f{n}_x{times}": replace(longer(filtered(WIDEST, 1 / n), times), seeds=SEEDS_C if times == 16 else None)
        for times in (1, 4, 16)
        for n in (64, 16, 4, 1)
    },
    "D": {
        f"{name}_{rate}": replace(GRID[name], peak_lr=lr)
        for rate, lr in (("half", 1.5e-3), ("same", 3e-3), ("double", 6e-3))
        for name in ("f64", "f16")
    },
}
STUDY = {
    "A": dict(scale="pico", sizes=TRIO, seed=10, seeds=5, universe=9000),
    "pilot": dict(scale="pico", ladder="width", sizes=OUTER, seed=100, seeds=2, universe=WIDEST),
    "B": dict(scale="pico", ladder="width", sizes=FIVE, seed=200, seeds=SEEDS_B, universe=WIDEST),
    # Widths 16, 32 and 48, so that all heads are of 16 and the sizes are of one recipe.
    "C": dict(
        scale="femto", ladder="width", sizes=("below", "small", "medium"), seed=300, seeds=max(6, SEEDS_C), universe=WIDEST
    ),
    "D": dict(scale="pico", ladder="width", sizes=OUTER, seed=400, seeds=1, universe=WIDEST),
}  # fmt: skip
# Read by phi3_jax.scaling.regime, which decides by it; written before the runs of B and C.
RULE = dict(
    blocks=TARGETS,
    after_pilot=AFTER_PILOT,
    # Utilities, each decided in a line of its own: recall, from the name alone and weighted by frequency; and its mean with
    # the arithmetic loss (reasoning outputs; 0 at what two steps without depth reach, 100 at no loss).
    utilities={
        "recall": ("knowledge/universe/recall",),
        "recall and reasoning": ("knowledge/universe/recall", "reasoning/all/nll"),
    },
    # An endpoint may decide where, of the middle size's best filter and its two neighbours, a neighbour lies below the
    # upper and any lies above the lower share of the way from the endpoint's floor to the ceiling of that filter.
    admitted=(0.05, 0.95),
    # E1 rises where its interval is above 0 and its estimate above this slope, in octaves of the filter an octave of the
    # size; it does not where the interval lies below this slope; it is not determined otherwise, nor where so many sizes
    # have their best filter at an end of the grid. Fewer such sizes are left out of the slope.
    smallest_slope=0.25,
    at_edge=2,
    # E4: loosening the filter raises the largest size's loss by so large a share more than the smallest's.
    reasoning_margin=0.05,
    # Arms of B that take no part in E1 and E2; E4 compares the last one with the loosest filter.
    controls=(*BEYOND, "f128_held"),
    # Capacity alone makes E1 rise: with slope 1 where visits suffice, and some .4 at the visits of 4M tokens.
    predictions={
        "E1, recall": "rises",
        "E1, recall and reasoning": "rises",
        "E2, recall": "rises",
        "E2, recall and reasoning": "rises",
        "E3, recall": "rises",
        "E3, recall and reasoning": "rises",
        "E4": "does not",
        "E4, reasoning tokens held": "does not",
    },
)


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    block, words = parse_arguments(argument, TARGETS, WORDS)
    arms = ARMS[block]
    chosen = take_arms(words, arms)
    trial = bool(words)
    tokens = parse_count(words.pop("tokens", "4M"))
    config = base_config()
    rows = "" if trial else f"analysis/results/calibration/{block}.csv"
    config.update(name=f"calibration-{block}", rows=rows, size_factor=tokens / 4_000_000, **STUDY[block])
    config.arms = arms_config(chosen)
    config.regime = ConfigDict(RULE)
    config.train.update(eval_points=1, log_every=200, checkpoint_every=2000, weighting="token")
    return apply(config, words, {"weighting": "train.weighting"})
