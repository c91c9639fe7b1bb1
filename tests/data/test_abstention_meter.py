"""Scores of knowing and inventing: those who know what they know, who bluff, and who say that they do not know."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.data.corpora import strangers
from phi3_jax.data.corpora.facts import ATTRIBUTES, Universe
from phi3_jax.data.meters import abstention
from phi3_jax.data.meters.meter import Evaluation

UNIVERSE, COUNT = Universe(900, 450, seed=2), 300
KNOWS = np.arange(900 + COUNT) < 300  # of the 450 persons of the corpus


def scored(sure: np.ndarray, said_nothing: np.ndarray | None = None) -> dict[tuple[str, str], dict]:
    """Rows of a model that knows `KNOWS`, from the probabilities of what it says (persons, 6)."""
    windows, extra = strangers.eval_windows(UNIVERSE, COUNT)
    where, shape = extra["item"] >= 0, windows.tokens.shape
    right = np.repeat(KNOWS[:, None], ATTRIBUTES, 1)
    reply = np.zeros(right.shape, int) if said_nothing is None else np.where(said_nothing, 308, 0)

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros(shape, values.dtype)
        out[where] = values.ravel()[extra["item"][where]]
        return out

    e = Evaluation(
        "abstention", np.zeros(shape), spread(right), spread(right), spread(reply), windows.targets, windows.domains,
        extra, None, UNIVERSE.vocab, 1, spread(sure), spread(sure),
    )  # fmt: skip
    return {(row["task"], row["metric"]): row for row in abstention.rows_of(e)}


def test_who_knows_what_it_knows_invents_nothing():
    rng = np.random.default_rng(0)
    low, high = rng.uniform(0, 0.4, (1200, 6)), rng.uniform(0.6, 1, (1200, 6))
    found = scored(np.where(KNOWS[:, None], high, low))
    for way in ("free", "first", "forced"):
        assert found[way, "invented_at_90"]["value"] == found[way, "wrong_at_90"]["value"] == 0
        assert found[way, "auroc"]["value"] == 1 and found[way, "invented_at_half"]["value"] == 0
        assert found[way, "kept_at_90"]["value"] == pytest.approx(0.9, abs=0.06)
    assert found["free", "unknown"]["value"] == pytest.approx(2 / 3)
    assert found["free", "invented_at_90"]["n"] == COUNT * 6 and found["free", "unknown"]["n"] == 450 * 6


def test_who_is_as_sure_of_all_invents_at_the_coverage():
    found = scored(np.random.default_rng(1).uniform(0.2, 1, (1200, 6)))
    assert found["free", "invented_at_90"]["value"] == pytest.approx(0.9, abs=0.03)
    assert found["free", "wrong_at_90"]["value"] == pytest.approx(0.9 * 2 / 3, abs=0.03)
    assert found["free", "auroc"]["low"] < 0.5 < found["free", "auroc"]["high"]
    assert found["free", "invented_at_half"]["value"] == pytest.approx(0.5 / 0.8, abs=0.03)


def test_the_threshold_is_of_other_persons_than_the_rows():
    """Even persons are surer: rows of the odd ones must not keep 90 %."""
    sure = np.where(np.arange(1200)[:, None] % 2 == 0, 0.9, 0.3) * np.ones((1, 6))
    found = scored(sure)
    assert found["free", "kept_at_90"]["value"] == 0 and found["free", "wrong_at_90"]["value"] == 0


def test_not_knowing_said_aloud_is_no_answer():
    bluffs = np.full((1200, 6), 0.99)
    honest = np.repeat(~KNOWS[:, None], 6, 1)
    found = scored(bluffs, honest)
    assert found["free", "abstained"]["value"] == 1
    assert found["free", "abstained_known"]["value"] == pytest.approx(1 / 3)  # of the corpus, those it lacks
    assert found["free", "invented_at_90"]["value"] == 0 and found["forced", "invented_at_90"]["value"] == 1
    assert ("free", "abstained") not in scored(bluffs)


def test_too_few_known_values_have_no_threshold():
    right = np.zeros((1200, 6), bool)
    right[:18] = True  # 54 values on either side, of which 5 are luck
    extra = (np.arange(1200) < 450, np.arange(1200) >= 900, 256)
    few = {row["metric"] for row in abstention.measures("free", right, np.full(right.shape, 0.5), *extra)}
    right[:20] = True
    enough = {row["metric"] for row in abstention.measures("free", right, np.full(right.shape, 0.5), *extra)}
    assert few == {"unknown", "invented_at_half", "wrong_at_half", "ece"}
    assert enough - few == {"invented_at_90", "wrong_at_90", "wrong_in_corpus_at_90", "kept_at_90", "auroc"}


def test_lucky_hits_need_not_be_kept() -> None:
    """Who knows 2 % and tells it from its guesses perfectly answers no guess, however many of those are right."""
    rng, persons = np.random.default_rng(3), 9000
    known = np.repeat(rng.random(persons) < 0.02, 6).reshape(persons, 6)
    lucky = rng.random(known.shape) < 1 / 256
    sure = np.where(known, rng.uniform(0.6, 1, known.shape), rng.uniform(0, 0.4, known.shape))
    everyone = np.ones(persons, bool), np.zeros(persons, bool)
    everyone[1][-1000:], everyone[0][-1000:] = True, False
    found = {row["metric"]: row for row in abstention.measures("free", known | lucky, sure, *everyone, 256)}
    assert found["invented_at_90"]["value"] == pytest.approx(0.02, abs=0.01)  # strangers that it takes for known
    assert found["wrong_at_90"]["value"] == found["wrong_in_corpus_at_90"]["value"] == 0
    assert found["kept_at_90"]["value"] == pytest.approx(0.9, abs=0.05)


def test_the_threshold_takes_equal_probabilities_together() -> None:
    worth, sure = np.array([1.0, -0.25, 1, -0.25, 1]), np.array([0.9, 0.5, 0.5, 0.4, 0.2])
    assert abstention.threshold(worth, sure) == 0.2  # 1, 1.75, 1.5, 2.5 of 2.5
    assert abstention.threshold(worth[:3], sure[:3]) == 0.5
