"""Meters: what an oracle, a guesser and half-knowing models must score, on compact facts, items and text."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from phi3_jax.data import meters
from phi3_jax.data.corpora import facts, reasoning
from phi3_jax.data.meters import knowledge as knowledge_meter
from phi3_jax.data.meters import reasoning as reasoning_meter
from phi3_jax.data.meters import text as text_meter
from phi3_jax.data.windows import Windows, concatenate, pack_documents
from phi3_jax.statistics import wilson

LN2 = math.log(2)
KEYS = {"suite", "task", "metric", "value", "n", "low", "high", "chance", "stderr"}


def knowledge(nll: np.ndarray, hit: np.ndarray, extra: dict, non_embedding: int) -> list[dict]:
    """Rows of a model whose answers do not depend on its earlier ones: free-running is teacher-forced."""
    return knowledge_meter.rows_of(nll, hit, extra, non_embedding, free=hit)


def by_name(rows: list[dict]) -> dict[str, dict]:
    for row in rows:
        assert set(row) == KEYS
        json.dumps(row, allow_nan=False)
        if row["value"] is not None and row["low"] is not None:
            assert row["low"] <= row["value"] <= row["high"]
    named = {f"{row['task']}/{row['metric']}": row for row in rows}
    assert len(named) == len(rows)
    return named


def uniform(windows: Windows, answers: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A model that spreads its probability over the answers: nll ln(answers), right once in that many."""
    hit = np.random.default_rng(seed).random(windows.tokens.shape) < 1 / answers
    return np.full(hit.shape, math.log(answers), np.float32), hit


def oracle(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(windows.tokens.shape, np.float32), np.ones(windows.tokens.shape, bool)


@pytest.fixture(scope="module")
def known() -> tuple[facts.Universe, Windows, dict]:
    universe = facts.Universe(900, 450)
    return universe, *facts.eval_windows(universe)


def test_an_oracle_stores_every_bit(known):
    universe, windows, extra = known
    rows = by_name(knowledge(*oracle(windows), extra, non_embedding=1000))
    assert rows["universe/recall"]["value"] == rows["corpus/recall"]["value"] == 1.0
    assert (rows["universe/recall"]["n"], rows["corpus/recall"]["n"]) == (5400, 2700)
    assert rows["corpus/bits_per_person"]["value"] == 48.0
    assert rows["corpus/bits_total"]["value"] == universe.bits == 21_600
    assert rows["corpus/bits_per_parameter"]["value"] == pytest.approx(21.6)
    assert rows["corpus/nll"]["value"] == 0


def test_a_guesser_stores_nothing_and_recalls_at_chance(known):
    _, windows, extra = known
    rows = by_name(knowledge(*uniform(windows, 256), extra, 1000))
    assert rows["universe/recall"]["low"] < 1 / 256 < rows["universe/recall"]["high"]
    assert rows["universe/recall"]["chance"] == 1 / 256  # unrounded
    assert rows["outside/recall_control"]["n"] == 2700
    assert rows["corpus/bits_per_person"]["value"] == pytest.approx(0, abs=1e-4)
    assert rows["corpus/nll"]["value"] == pytest.approx(rows["corpus/nll"]["chance"])


def test_negative_totals_are_floored_after_the_persons_sum(known):
    _, windows, extra = known
    nll, hit = uniform(windows, 256)
    item = extra["item"]
    nll[item % 6 == 0] = 0.0  # one value known ...
    nll[item % 6 == 1] = 12 * LN2  # ... one wrong with 12 bits: its -4 counts against the same person's +8
    assert by_name(knowledge(nll, hit, extra, 1000))["corpus/bits_per_person"]["value"] == pytest.approx(4, abs=1e-4)
    nll[item % 6 == 1] = 40 * LN2  # -32 in sum: floored, so a sure liar cannot cancel others' knowledge
    assert by_name(knowledge(nll, hit, extra, 1000))["corpus/bits_per_person"]["value"] == 0
    liar = (item >= 0) & (item // 6 == 3)
    nll[item >= 0] = 0.0
    nll[liar] = 100.0
    stored = by_name(knowledge(nll, hit, extra, 1000))["corpus/bits_total"]["value"]
    assert stored == pytest.approx(48 * 449)


def test_knowing_the_corpus_alone_gives_its_share_of_the_universe(known):
    _, windows, extra = known
    nll, hit = uniform(windows, 256)
    inside = (extra["item"] >= 0) & (extra["item"] < 6 * 450)
    hit[inside], nll[inside] = True, 0.0
    rows = by_name(knowledge(nll, hit, extra, 1000))
    assert rows["corpus/recall"]["value"] == 1.0
    assert rows["outside/recall_control"]["value"] < 0.02
    expected = 0.5 + 0.5 * rows["outside/recall_control"]["value"]
    assert rows["universe/recall"]["value"] == pytest.approx(expected)


def test_recall_intervals_know_that_values_come_by_person(known):
    """Who knows a person knows all six values: the interval must be that of persons, not of values."""
    _, windows, extra = known
    nll, hit = uniform(windows, 256)
    person = np.random.default_rng(0).random(900) < 0.4
    where = extra["item"] >= 0
    hit[where] = person[extra["item"][where] // 6]
    row = by_name(knowledge(nll, hit, extra, 1000))["universe/recall"]
    assert (row["low"], row["high"]) == pytest.approx(wilson(person.sum(), 900), abs=1e-4)
    hit[where] = np.random.default_rng(0).random(where.sum()) < 0.4  # positive control: independent values
    row = by_name(knowledge(nll, hit, extra, 1000))["universe/recall"]
    assert row["high"] - row["low"] < 0.6 * (wilson(person.sum(), 900)[1] - wilson(person.sum(), 900)[0])


def test_stored_bits_have_the_interval_of_persons_and_no_negative_bound(known):
    """One of 450 persons is known by heart: 48 bits, so a mean of 48 / 450 with as large an error."""
    _, windows, extra = known
    nll, hit = uniform(windows, 256)
    nll[extra["item"] // 6 == 7] = 0.0
    rows = by_name(knowledge(nll, hit, extra, 1000))
    for metric, factor in (("bits_per_person", 1 / 450), ("bits_total", 1), ("bits_per_parameter", 1 / 1000)):
        row = rows[f"corpus/{metric}"]
        assert row["value"] == pytest.approx(48 * factor, rel=1e-3) == pytest.approx(row["stderr"], rel=1e-3)
        assert row["high"] == pytest.approx(48 * factor * (1 + 1.959964), rel=1e-3)
        assert (row["low"], row["chance"], row["n"]) == (0.0, 0.0, 450)


def test_a_person_asked_in_part_does_not_count(known):
    """Six values a person or none: of one whose last value is not in the windows nothing is said."""
    _, windows, extra = known
    item = extra["item"].copy()
    item[np.isin(item, (6 * 3 + 5, 6 * 500))] = -1  # the last value of one in the corpus, the first of one outside
    nll, hit = oracle(windows)
    rows = by_name(knowledge(nll, hit, extra | {"item": item}, 1000))
    counts = {name: rows[name]["n"] for name in ("universe/recall", "corpus/recall", "outside/recall_control")}
    assert counts == {"universe/recall": 5388, "corpus/recall": 2694, "outside/recall_control": 2694}
    assert all(rows[name]["value"] == 1.0 for name in counts)
    assert rows["corpus/bits_total"]["value"] == 48 * 449 and rows["corpus/nll"]["n"] == 2694


def test_padding_and_unsupervised_positions_do_not_count():
    universe = facts.Universe(100, 100)  # the last window holds one person and padding
    windows, extra = facts.eval_windows(universe)
    nll, hit = oracle(windows)
    nll[windows.domains == 0], hit[windows.domains == 0] = np.nan, False
    rows = by_name(knowledge(nll, hit, extra, 1000))
    assert rows["corpus/recall"]["value"] == 1.0 and rows["corpus/bits_per_person"]["value"] == 48.0


@pytest.mark.parametrize("bits", [0, 1, 5])
def test_value_entropy_sets_bits_and_chance(bits):
    universe = facts.Universe(120, 60, value_bits=bits)
    windows, extra = facts.eval_windows(universe)
    rows = by_name(knowledge(*oracle(windows), extra, 1000))
    assert rows["corpus/bits_total"]["value"] == universe.bits
    assert rows["corpus/recall"]["chance"] == 2.0**-bits


def test_frequency_groups_are_scored_apart():
    universe = facts.Universe(1000, 1000, frequencies="power_law")
    windows, extra = facts.eval_windows(universe)
    nll, hit = uniform(windows, 256)
    frequent = (extra["item"] >= 0) & (extra["item"] < 6 * 200)
    hit[frequent] = True
    rows = by_name(knowledge(nll, hit, extra, 1000))
    recalls = [rows[f"group {group:03d}/recall_by_frequency"]["value"] for group in range(1, 101)]
    assert set(recalls[:20]) == {1.0} and np.mean(recalls[20:]) < 0.02
    assert "outside/recall_control" not in rows


def test_a_value_of_several_tokens_is_right_where_all_are():
    """A model that knows a value pays 0 nats for all of its tokens, one that guesses its 8 bits in sum."""
    windows, extra = facts.eval_windows(facts.Universe(60, 30))
    nll, hit, item = (np.repeat(x, 2, axis=1) for x in (*oracle(windows), extra["item"]))
    extra |= {"item": item}  # each value is spelt by two tokens
    assert by_name(knowledge(nll, hit, extra, 1000))["corpus/bits_per_person"]["value"] == 48.0
    nll[item >= 0] = 8 * LN2 / 2
    rows = by_name(knowledge(nll, hit, extra, 1000))
    assert rows["corpus/bits_per_person"]["value"] == pytest.approx(0, abs=1e-3)
    assert rows["corpus/nll"]["value"] == pytest.approx(8 * LN2, rel=1e-5)
    assert rows["universe/recall"]["value"] == 1.0
    hit[:, ::2] = False  # one wrong token loses the value
    assert by_name(knowledge(nll, hit, extra, 1000))["universe/recall"]["value"] == 0.0


def test_three_recalls_differ_in_what_the_model_was_given(known):
    """It knows every first value, and the others of a person where it sees the right ones before them."""
    extra = known[2]
    item = extra["item"]
    nll, hit = np.zeros(item.shape), item >= 0
    hit[item % 6 == 5] = False  # the last value is not known in any way
    free = hit & (item % 6 == 0)
    rows = by_name(knowledge_meter.rows_of(nll, hit, extra, 1000, free))
    for task in ("universe", "corpus"):
        assert rows[f"{task}/recall"]["value"] == pytest.approx(1 / 6)
        assert rows[f"{task}/recall_name_only"]["value"] == 1.0
        assert rows[f"{task}/recall_teacher_forced"]["value"] == pytest.approx(5 / 6)
    assert rows["universe/recall_name_only"]["n"] == 900 and rows["universe/recall"]["n"] == 5400
    assert rows["outside/recall_control"]["value"] == pytest.approx(1 / 6)
    without = by_name(knowledge_meter.rows_of(nll, hit, extra, 1000))
    assert set(without) == set(rows) - {"universe/recall", "corpus/recall", "outside/recall_control"}


def test_a_test_that_draws_persons_weighs_recall_by_frequency():
    universe = facts.Universe(70_000, 35_000, pool=512, frequencies="inverse_rank")
    windows, extra = facts.eval_windows(universe)
    item = extra["item"]
    assert len(extra["group"]) == facts.DRAWN and item.max() == 6 * facts.DRAWN - 1
    np.testing.assert_array_equal(windows.targets[item >= 0], universe.values[universe.asked].ravel())
    hit = (item >= 0) & (extra["group"][item // 6] <= 10)  # the 10 most frequent of 100 groups
    rows = by_name(knowledge(np.zeros(item.shape), hit, extra, 1000))
    harmonic = np.cumsum(1 / np.arange(1, 101))
    assert rows["universe/recall"]["value"] == pytest.approx(harmonic[9] / harmonic[99], abs=2e-3)
    assert universe.kept == pytest.approx(harmonic[49] / harmonic[99])
    assert rows["corpus/recall"]["n"] / rows["universe/recall"]["n"] == pytest.approx(universe.kept, abs=2e-3)
    # Stored bits are of the corpus, not of the draws, of which the frequent are many.
    assert rows["corpus/bits_total"]["n"] == pytest.approx(35_000, rel=0.02)
    assert rows["corpus/bits_total"]["value"] == pytest.approx(universe.bits, rel=0.02)
    nll = np.where(hit, 0.0, 8 * LN2)
    rows = by_name(knowledge(nll, hit, extra, 1000))
    assert rows["corpus/bits_total"]["value"] == pytest.approx(48 * 7000, rel=0.02)


def test_reasoning_is_scored_by_row_output_and_gap():
    windows = reasoning.generate(0, 0, 500, stream="eval")
    nll, hit = np.zeros(windows.tokens.shape), np.zeros(windows.tokens.shape, bool)
    outputs = reasoning.Layout().outputs
    hit[:, outputs] = True
    hit[:100, outputs[2]] = False  # gap 3 wrong in a fifth of the rows
    nll[:, outputs] = np.arange(5)
    rows = by_name(reasoning_meter.rows_of(nll, hit, windows.domains, reasoning.extra()))
    assert rows["row/exact"]["value"] == 0.8 and rows["row/exact"]["n"] == 500
    assert (rows["row/exact"]["low"], rows["row/exact"]["high"]) == wilson(400, 500)
    assert [rows[f"gap{gap}/accuracy"]["value"] for gap in (1, 2, 3)] == [1.0, 1.0, 0.8]
    assert [rows[f"gap{gap}/accuracy"]["n"] for gap in (1, 2, 3)] == [1000, 1000, 500]
    assert rows["all/accuracy"]["value"] == pytest.approx(0.96)
    assert rows["all/nll"]["value"] == pytest.approx(2.0) and rows["all/nll"]["n"] == 2500
    assert rows["row/exact"]["chance"] == 48.0**-5 > 0
    assert rows["gap1/accuracy"]["chance"] == rows["all/accuracy"]["chance"] == 1 / 48
    assert rows["all/nll"]["chance"] == math.log(48)


def test_reasoning_rows_of_another_layout_are_refused():
    windows = reasoning.generate(0, 0, 5, gaps=(1, 1))
    with pytest.raises(ValueError, match="5 outputs"):
        reasoning_meter.rows_of(*uniform(windows, 48), windows.domains, reasoning.extra())


def test_text_loss_and_bits_per_byte():
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, rng.integers(1, 400)).tolist()) for _ in range(200)]
    windows = concatenate(list(pack_documents([list(text) for text in texts], 64, eos=256)))
    size = sum(map(len, texts))
    nll, _ = uniform(windows, 257)
    nll[windows.domains == 0] = np.nan  # padding is not read
    rows = by_name(text_meter.rows_of(nll, windows.domains, "docs", size, vocab=257))
    loss, bits = rows["docs/loss"], rows["docs/bits_per_byte"]
    assert loss["n"] == size + 200 and bits["n"] == size  # every byte and every eos is a target
    assert loss["value"] == pytest.approx(math.log(257)) == loss["chance"]
    assert bits["value"] == pytest.approx(math.log2(257) * (size + 200) / size) == pytest.approx(bits["chance"])
    noisy = nll + rng.normal(size=(len(windows), 1))
    wide = by_name(text_meter.rows_of(noisy, windows.domains, "docs", size, 257))["docs/loss"]
    assert wide["stderr"] == pytest.approx(1 / np.sqrt(len(windows)), rel=0.2)  # the noise is one draw a window
    assert len(text_meter.rows_of(nll, windows.domains, "docs", None, 257)) == 1


def test_a_diverged_model_has_rows_without_numbers(known):
    _, windows, extra = known
    nll, hit = np.full(windows.tokens.shape, np.nan), np.zeros(windows.tokens.shape, bool)
    rows = by_name(knowledge(nll, hit, extra, 1000))
    assert rows["corpus/bits_total"]["value"] is None and rows["corpus/bits_total"]["low"] is None
    assert rows["corpus/recall"]["value"] == 0.0
    assert by_name(text_meter.rows_of(nll, windows.domains, "x", 10, 320))["x/loss"]["value"] is None


def test_measure_follows_the_manifest(known):
    universe, windows, extra = known
    items = reasoning.generate(0, 0, 20, stream="eval")
    extras = {"knowledge": extra, "older facts": extra, "reasoning": reasoning.extra(), "docs": {}}
    dataset = SimpleNamespace(vocab=universe.vocab, extra=extras.__getitem__)
    model = SimpleNamespace(matrix_params=110_592)
    seen = []
    for name, meter, part in [
        ("knowledge", "knowledge", windows),
        ("older facts", "knowledge", windows),
        ("reasoning", "reasoning", items),
        ("docs", "text", items),
    ]:
        entry = {"name": name, "meter": meter, "bytes": 100 if meter == "text" else None}
        arrays = {"targets": part.targets, "domains": part.domains}
        nll, hit = uniform(part, 48)
        seen += meters.measure(entry, arrays, nll, hit, dataset, model, free=hit)
    keys = [(row["suite"], row["task"], row["metric"]) for row in seen]
    assert len(set(keys)) == len(keys)
    assert ("knowledge", "universe", "recall") in keys and ("knowledge", "older facts universe", "recall") in keys
    assert {(row["suite"], row.get("scorer")) for row in seen} == {
        ("knowledge", 2),
        ("reasoning", None),
        ("text", None),
    }
    assert ("reasoning", "row", "exact") in keys and ("text", "docs", "bits_per_byte") in keys
    with pytest.raises(ValueError, match="differ in shape"):
        meters.measure(
            {"name": "docs", "meter": "text"}, arrays, np.zeros((1, 2)), np.zeros((1, 2), bool), dataset, model
        )
