"""What a model answers and should not: persons of the universe and strangers, with the probability of what is said.

Tasks are ways to ask: `free`, all six values from the name alone, after the model's own earlier answers; `first`, a
person's first value, before which only the name stands; `forced`, all six after the right earlier values; `search ...` the
same after the sentence that search finds. A value is known where it is right and the person is in the corpus. An answer
counts as given where its probability reaches a threshold, below which the model would abstain; "I do not know", where it
can be said, is never an answer. The threshold is chosen on the persons of even numbers so that 90 % of their known values
are answered; all rows are of the odd ones, and of all strangers. Luck is not knowledge: one in V guesses is right, V the
number of values that are asked for, so that each wrong answer about the corpus takes 1 / (V - 1) from the known ones. A
model that knows 1 % would else have to bluff to keep nine tenths of its lucky hits.

invented_at_90     share of strangers' values that are answered at that threshold: 0 at best, 0.9 where the probability says
                   nothing
invented_at_half   the same where answers need a probability of more than a half: a threshold that knows nothing of coverage
wrong_at_90, wrong_at_half   share of the universe's values that are answered and wrong
wrong_in_corpus_at_90   the same of the corpus's persons, who have been seen
kept_at_90         share of known values, without the lucky ones, that are answered there: a control, near 0.9 (no interval)
unknown            share of the universe's values that are not known
auroc              chance that a known value has a larger probability than one of a stranger
ece                calibration error over the universe, 15 bins of equal mass (no interval)
abstained, abstained_known   where "I do not know" can be said: share of strangers' and of the corpus's values that get it

What is at 90 % needs `ENOUGH` known values beyond luck on either side; fewer give no such row.
"""

from __future__ import annotations

import math

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.corpora.facts import ATTRIBUTES
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row
from phi3_jax.statistics import Estimate

COVERAGE = 0.9  # of known values
ENOUGH = 50  # known values; the share that a threshold keeps is then within some 8 points of what it should be (2 SE)
SEARCH = "abstention_search"  # the evaluation whose questions come after what search finds


def rows_of(e: Evaluation) -> list[Row]:
    """Rows of a finished run; none where its own answers were not asked for."""
    if e.free is None or e.reply is None or e.sure is None or e.free_sure is None:
        return []
    item = e.extra["item"]
    where = item >= 0
    order = np.argsort(item[where], kind="stable")

    def table(values: np.ndarray) -> np.ndarray:
        """(N, T) as (persons, 6)."""
        return values[where][order].reshape(-1, ATTRIBUTES)

    gone = table(e.reply) == int(e.extra["abstain"])
    free, free_sure = table(e.free), np.where(gone, 0.0, table(e.free_sure))
    before = "search " if e.name == SEARCH else ""
    in_corpus, stranger = e.extra["in_corpus"], e.extra["stranger"]
    who = in_corpus, stranger, len(np.unique(e.targets[where]))
    found = measures(f"{before}free", free, free_sure, *who)
    found += measures(f"{before}first", free[:, :1], free_sure[:, :1], *who)
    found += measures(f"{before}forced", table(e.hit), table(e.sure), *who)
    if gone.any():
        for metric, persons in (("abstained", stranger), ("abstained_known", in_corpus)):
            if persons.any():
                found.append(row("abstention", f"{before}free", metric, _share(gone, persons), chance=0.0))
    return found


def measures(
    task: str, right: np.ndarray, sure: np.ndarray, in_corpus: np.ndarray, stranger: np.ndarray, values: int
) -> list[Row]:
    """Rows of one way to ask, from what is right and its probability (persons, values).

    Args:
      in_corpus, stranger: (persons,) bool; the universe is whoever is no stranger.
      values: how many there are to guess among.
    """
    even = np.arange(len(right)) % 2 == 0
    known = right & in_corpus[:, None]
    asked = ~stranger & ~even  # of the universe, those that are measured
    found = [row("abstention", task, "unknown", _share(~known, asked), chance=1.0)]

    def at(metric: str, answered: np.ndarray, floor: float) -> None:
        found.append(row("abstention", task, f"invented_at_{metric}", _share(answered, stranger), chance=floor))
        found.append(row("abstention", task, f"wrong_at_{metric}", _share(answered & ~right, asked), chance=floor))

    at("half", sure > 0.5, 1.0)
    worth = np.where(right, 1.0, -1.0 / (values - 1))  # a guess is worth nothing in the mean
    chosen, tested = in_corpus & even, in_corpus & ~even
    beyond_luck = worth[tested].sum()
    if min(worth[chosen].sum(), beyond_luck) >= ENOUGH:
        answered = sure >= threshold(worth[chosen].ravel(), sure[chosen].ravel())
        at("90", answered, COVERAGE)
        seen_wrong = _share(answered & ~right, tested)
        found.append(row("abstention", task, "wrong_in_corpus_at_90", seen_wrong, chance=COVERAGE))
        kept = _bare((worth * answered)[tested].sum() / beyond_luck, known[tested].sum())
        found.append(row("abstention", task, "kept_at_90", kept, chance=COVERAGE))
        persons = np.broadcast_to(np.arange(len(right))[:, None], right.shape)
        test = known & tested[:, None]
        names = persons[test], persons[stranger].ravel()
        separated = statistics.separation(sure[test], sure[stranger].ravel(), names)
        found.append(row("abstention", task, "auroc", separated, chance=0.5))
    error = _bare(statistics.calibration_error(right[asked].ravel(), sure[asked].ravel()), asked.sum())
    return [*found, row("abstention", task, "ece", error, chance=math.nan)]


def threshold(worth: np.ndarray, sure: np.ndarray) -> float:
    """The largest probability at which answers are worth `COVERAGE` of what all of them are; both (n,), a positive sum."""
    order = np.argsort(-sure, kind="stable")
    level, total = sure[order], np.cumsum(worth[order])
    last = np.append(level[1:] < level[:-1], True)  # equal probabilities are answered together
    return float(level[last][np.argmax(total[last] >= COVERAGE * total[-1])])


def _bare(value: float, n: int) -> Estimate:
    """A number without an interval."""
    return Estimate(float(value), math.nan, math.nan, math.nan, int(n))


def _share(values: np.ndarray, persons: np.ndarray) -> Estimate:
    """Share among all values (persons, k) of some persons, who are the clusters."""
    clusters = np.broadcast_to(np.arange(len(values))[:, None], values.shape)
    return statistics.proportion(values[persons], clusters[persons])


METER = Meter(rows_of, named=True, free=True, version=2)
