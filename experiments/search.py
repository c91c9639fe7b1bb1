"""Does search make up for size in knowledge? A small proxy that looks facts up, compared with a larger one that does not.

    python launch/run.py --config experiments/search.py            # mini and medium, 2 arms, 3 seeds
    python -m phi3_jax.evaluation.retrieval_probe runs/search --out analysis/results/search

Cost on 2 CPU cores: 13 to 15 minutes (29 on a machine that did much other work), and 2 for the tables.

Words after the colon, separated by commas:

    standard | quick         default standard; quick: 1 seed
    seed=30  seeds=1         first seed, number of seeds
    tokens=4M                of each run; other numbers scale all counts, for trying out
    reading=360k             tokens of reading in the arm `reading` of a 4M run

The report (arXiv:2404.14219, "Weakness") says of phi-3-mini: "The model simply does not have the capacity to store too
much 'factual knowledge' [...] we believe such weakness can be resolved by augmentation with a search engine." Here proxies
of mini's and of medium's shape train for the same 4M tokens on the same 9,000 persons, 432,000 bits, more than mini holds:

    closed     2M tokens of knowledge, 2M of reasoning
    reading    the same knowledge; 360k tokens of reasoning make way for reading (data/corpora/reading.py): a sentence of a
               person, then that person's item, of persons nobody asks about; a tenth of the sentences are another's

Everyone of the universe is then asked closed-book, after the sentence that BM25 finds for the name in an index of 90 % of
the persons, after one's own sentence (oracle), and after another's (distractor).

What it showed (3 seeds; analysis/results/search): mini with search passes medium without, by 11.3 points of recall
[7.2, 15.3]. All of these numbers are teacher-forced, each value being asked after the right earlier ones; the probe has
since asked from the name alone, which lowers what is closed-book most. Recall in per cent, closed-book, with search, after
one's own sentence:

    mini, closed       14.5     2.6     2.7        medium, closed      78.5     6.9     7.3
    mini, reading       3.2    89.8    99.7        medium, reading     57.2    88.0    97.7

What it did not show. The margin is the index's: mini reads all but perfectly, so that with search it has what the index
covers, here 90 % by design, and would fall behind medium's memory below 79 %. Learning to read costs memory: mini's falls
from 14.5 to 3.2 %, medium's from 78.5 to 57.2 % [31.0, 83.4]; reasoning shows no difference. And neither looks at the name:
after another's sentence 96 % and more of the answers are copied from it, known or not, so that where search misses
recall is 0.3 %. A proxy that was not taught to read cannot use a sentence; it only disturbs what it knows.

How it was tuned (mini, seed 20, before these seeds): in the domain of knowledge 600k tokens of reading are not learned
(oracle 2 %); as a third domain of the loss they are, but then the proxy keeps no fact (0.5 %); as reasoning they are
learned at step 1,000 to 1,500, and 360k leave more memory than 600k (3.3 and 1.3 %). More distractors do not teach to look
at the name: with a quarter or half of them (of 600k) 72 % are still copied, with a tenth 87 %.
"""

from __future__ import annotations

from dataclasses import replace

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import Arm, apply, arms_config, base_config, parse_arguments
from phi3_jax.keys import parse_count

TARGETS = ("standard", "quick")
WORDS = {"seed": int, "seeds": int, "tokens": str, "reading": str}
CLOSED = Arm(facts=9000, knowledge=2_000_000, reasoning=2_000_000)


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    tokens, read = (parse_count(words.pop(word, default)) for word, default in (("tokens", "4M"), ("reading", "360k")))
    if read > CLOSED.reasoning:
        raise UserError(f"reading={read} is more than the {CLOSED.reasoning:,} tokens of reasoning; use fewer")
    config = base_config()
    config.update(
        name="search" if target == "standard" else f"search-{target}", scale="pico", sizes=("mini", "medium"), seed=30,
        seeds={"quick": 1, "standard": 3}[target], universe=9000, size_factor=tokens / 4_000_000,
    )  # fmt: skip
    reading = replace(CLOSED, reasoning=CLOSED.reasoning - read, reading=read)
    config.arms = arms_config(dict(closed=CLOSED, reading=reading))
    config.train.update(eval_points=1, log_every=100, checkpoint_every=1000, weighting="domain")
    return apply(config, words, {})
