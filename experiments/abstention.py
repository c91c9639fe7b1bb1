"""Does reasoning come at a moderate size, and does growth beyond it reduce invention by acquiring facts? With proxies.

    python launch/run.py --config experiments/abstention.py            # quick: every cell, one seed
    python launch/run.py --config experiments/abstention.py:standard   # 5 seeds, in the same folder: for the verdict
    phi3-jax verdict experiments/abstention.py runs/abstention         # what ran, and what the rule below says

Words after the colon, separated by commas:

    quick | standard         default quick; both are of seeds from 50 on, so that the second goes on from the first
    seed=50  seeds=1         first seed, number of seeds
    tokens=4M                of the largest arm; other numbers scale all counts, for trying out
    arms=facts1500+facts9000     only these arms

Cost on 2 CPU cores with nothing else on them: quick trains 12 runs, some 10 minutes; standard 51, some 45.

The conjecture of the report's author: reasoning comes at a moderate size; growth beyond it reduces hallucination by
acquiring facts; search makes up for it (arXiv:2404.14219, "Weakness": mini "simply does not have the capacity to store too
much factual knowledge", which "can be resolved by augmentation with a search engine"). Here sizes and loads of facts are
crossed, so that "larger" and "knows more" come apart:

    facts1500, facts4500, facts9000    mini, small and medium on so many persons of a universe of 9,000, each seen 27.8
                     times, beside 2M tokens of reasoning. 1,500 fit every size: there growth has no facts to acquire.
                     4,500 have two seeds and no condition: they are there to be seen
    load             mini on 2,394 persons: 1.04 bits a parameter, as medium has with 9,000
    search           mini on 9,000 persons; 360k of the tokens of reasoning teach it to answer from a sentence in context
                     (as in search.py). It is asked alone and after the sentence that BM25 finds for the name
    heard            mini, as facts9000; 2.5 % of the tokens say of strangers, each once, that nobody knows them

The loss weighs by token: a fact weighs the same in all arms. Steps differ, as a larger load is more tokens.

Everyone of the universe is asked, and 3,000 strangers, whom nothing was ever said about. An answer counts as given where
its probability reaches the threshold at which 90 % of the known values are answered, lucky hits not counted among them
(data/meters/abstention.py), chosen on half of the persons: sizes are compared at equal coverage of what each knows. Answers
are free-running: a person's six values from the name alone. `first` (the first value) and `forced` (after the right earlier
values) stand beside, and so does the fixed threshold of a half, at which the answer may be the opposite one.

What a score can be, without any knowledge or thought:

    recall           floor 0.4 %, a guess among 256; ceiling facts / 9,000 closed-book (17, 50, 100 %), 90 % with search,
                     whose index holds 90 % of the persons
    one step         reasoning outputs one step after a written number; floor 40 % (the likeliest answer after the last
                     operator and its operand), ceiling 100 %. It is nearly a table to look up; `rows` composes
    rows             five outputs, steps of up to three unwritten ones; floor 1 %; who composes no two steps reaches 8 %
    wrong@90         floor 0; 90 % of `unknown` where the probability says nothing
    invented@90      floor 0, who answers nobody, which 90 % coverage of the known forbids; 90 % where it says nothing
    shortcuts        a stranger's name is a new pair of known halves: a model can tell strangers by the name alone, without
                     knowing what it knows. wrong@90 holds persons of the corpus whose values it lacks, whose names are not
                     new; of 1,500 facts, though, most of the universe is new. wrong_in_corpus_at_90 stands beside. With
                     search, the sentence that is found names somebody else: a rule outside of the model could abstain
                     wherever the names differ, and would invent nothing

A pilot of seeds 0 to 2, mini and medium alone, of facts1500, facts9000 and load came first, for floors, ceilings and how
much seeds differ; margins did not move by it. Of 15 runs one broke off: its gradients stayed large, and the spike test kept
skipping them (mended since). Free-running, per cent: mini with 9,000 persons recalls 1.5 to 2.1, medium 26 to 40, and mini
holds 99.7 to 100 of 1,500. wrong@90 fell by 57 points (SD between seeds 17), most of it by better discrimination; at 1,500
by 2.4 (two seeds), about the margin: c was expected to hold before the pilot, and to stay undecided after it. Confident
invention rose by 39. One step of reasoning rose by 4.1 (SD 2.1), about the margin too. Half widths with five seeds are 1.24
times the SD. The pilot's seeds, and those of data_optimal.py and calibration.py, are not used again.

The rule, written before any run of the design, and with it what was expected, is `RULE` below.

What is not here: abstention learned in SFT or DPO, which alignment_tax.py measures on prose: how many strangers and known
persons a chat refuses, by size (docs/posttraining.md). `heard` puts "I do not know" into pre-training alone.
"""

from __future__ import annotations

from dataclasses import replace

from ml_collections import ConfigDict

from phi3_jax.experiment import Arm, apply, arms_config, base_config, parse_arguments, take_arms
from phi3_jax.family import TRIO
from phi3_jax.keys import parse_count

TARGETS = ("quick", "standard")
WORDS = {"arms": str, "seed": int, "seeds": int, "tokens": str}
UNIVERSE, STRANGERS, SEEDS = 9000, 3000, 5
EXPOSED = 2_000_000 / 9000  # tokens of knowledge a person: 27.8 times the 8 of an item
READING, UNHEARD = 360_000, 100_000


def loaded(facts: int, **more: object) -> Arm:
    """So many facts, each as often as in any other arm, beside 2M tokens of reasoning."""
    return Arm(facts=facts, knowledge=EXPOSED * facts, reasoning=2_000_000, **more)


ARMS = {
    "facts1500": loaded(1500),
    "facts4500": loaded(4500, seeds=2),
    "facts9000": loaded(9000),
    "load": loaded(2394, sizes=("mini",)),
    "search": replace(loaded(9000, sizes=("mini",)), reasoning=2_000_000 - READING, reading=READING),
    "heard": replace(loaded(9000, sizes=("mini",)), reasoning=2_000_000 - UNHEARD, unheard=UNHEARD),
}
STEP, ROWS = "reasoning/gap1/accuracy", "reasoning/row/exact"
WRONG, INVENTED = "abstention/free/wrong_at_90", "abstention/free/invented_at_90"
MINI, MEDIUM = ("facts9000", "mini"), ("facts9000", "medium")
# Read by phi3_jax.scaling.abstention, which says what holds, fails and stays undecided. Cells are (arm, size, endpoint); a
# difference is second minus first. Margins are the smallest differences that matter. `needs` are cells with the least and
# the most that they may have, in the mean over seeds, for the comparison to mean something.
RULE = dict(
    seeds=SEEDS,
    conditions={
        "a": dict(
            says="reasoning, one step: medium is no better than mini", word="equal", margin=0.05, predicted="undecided",
            first=(*MINI, STEP), second=(*MEDIUM, STEP), needs=((*MINI, STEP, 0.8, 1),),
        ),
        "b": dict(
            says="wrong answers fall from mini to medium at 9,000 facts", word="falls", margin=0.05, predicted="holds",
            first=(*MINI, WRONG), second=(*MEDIUM, WRONG), needs=((*MINI, "knowledge/universe/recall", 0.01, 1),),
        ),
        "c": dict(
            says="and not at 1,500, which every size holds", word="equal", margin=0.02, predicted="undecided",
            first=("facts1500", "mini", WRONG), second=("facts1500", "medium", WRONG),
            needs=(("facts1500", "mini", "knowledge/corpus/recall", 0.95, 1),),
        ),
        "d": dict(
            says="equal bits a parameter invent alike", word="equal", margin=0.10, predicted="undecided",
            first=("load", "mini", INVENTED), second=(*MEDIUM, INVENTED),
            needs=(("load", "mini", INVENTED, 0.1, 0.8), (*MEDIUM, INVENTED, 0.1, 0.8)),
        ),
        "e": dict(
            says="of the fall in b, fewer unknown values are more than better discrimination", word="falls", margin=0.0,
            predicted="does not", parts="b",
        ),
        # Beside the verdict.
        "a, rows": dict(
            says="reasoning, whole rows: medium is no better", word="equal", margin=0.05, predicted="does not",
            first=(*MINI, ROWS), second=(*MEDIUM, ROWS),
        ),
        "b, first": dict(
            says="b of the first value alone", word="falls", margin=0.05, predicted="holds",
            first=(*MINI, "abstention/first/wrong_at_90"), second=(*MEDIUM, "abstention/first/wrong_at_90"),
        ),
        "b, forced": dict(
            says="b after the right earlier values", word="falls", margin=0.05, predicted="holds",
            first=(*MINI, "abstention/forced/wrong_at_90"), second=(*MEDIUM, "abstention/forced/wrong_at_90"),
        ),
        "confident": dict(
            says="invention at p > 1/2 rises with size at 9,000 facts", word="rises", margin=0.05, predicted="holds",
            first=(*MINI, "abstention/free/invented_at_half"), second=(*MEDIUM, "abstention/free/invented_at_half"),
        ),
        "search, recall": dict(
            says="mini with search recalls more than medium without", word="rises", margin=0.05, predicted="holds",
            first=(*MEDIUM, "knowledge/universe/recall"), second=("search", "mini", "knowledge/retrieved universe/recall"),
        ),
        "search, invention": dict(
            says="mini with search invents less of strangers than medium without", word="falls", margin=0.05,
            predicted="does not", first=(*MEDIUM, INVENTED),
            second=("search", "mini", "abstention/search free/invented_at_90"),
        ),
        "heard": dict(
            says="at 9,000 facts mini invents less where it has heard of strangers", word="falls", margin=0.05,
            predicted="holds", first=(*MINI, INVENTED), second=("heard", "mini", INVENTED),
        ),
    },
)  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    chosen = take_arms(words, ARMS)
    factor = parse_count(words.pop("tokens", "4M")) / 4_000_000
    config = base_config()
    config.update(
        name="abstention" if factor == 1 else "abstention-trial", scale="pico", sizes=TRIO, seed=50,
        seeds={"quick": 1, "standard": SEEDS}[target], universe=UNIVERSE, size_factor=factor,
        verdict="phi3_jax.reporting.invention:lines_of",
    )  # fmt: skip
    config.arms = arms_config(chosen)
    config.abstention = ConfigDict(RULE)
    config.data.strangers = max(60, round(STRANGERS * factor))
    config.train.update(eval_points=1, log_every=100, checkpoint_every=1000, weighting="token")
    return apply(config, words, {})
