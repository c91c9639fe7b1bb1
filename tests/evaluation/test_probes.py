"""Meters: what an oracle, a guesser and half-knowing models must score, on compact and prose facts, items and text."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from phi3_jax.data.corpora import facts, reasoning
from phi3_jax.data.windows import Windows, concatenate, pack_documents
from phi3_jax.evaluation import probes
from phi3_jax.evaluation.statistics import wilson

LN2 = math.log(2)
KEYS = {"suite", "task", "metric", "value", "n", "low", "high", "chance", "stderr"}


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
    rows = by_name(probes.knowledge(*oracle(windows), extra, non_embedding=1000))
    assert rows["universe/recall"]["value"] == rows["corpus/recall"]["value"] == 1.0
    assert (rows["universe/recall"]["n"], rows["corpus/recall"]["n"]) == (5400, 2700)
    assert rows["corpus/bits_per_person"]["value"] == 48.0
    assert rows["corpus/bits_total"]["value"] == universe.bits == 21_600
    assert rows["corpus/bits_per_parameter"]["value"] == pytest.approx(21.6)
    assert rows["corpus/nll"]["value"] == 0


def test_a_guesser_stores_nothing_and_recalls_at_chance(known):
    _, windows, extra = known
    rows = by_name(probes.knowledge(*uniform(windows, 256), extra, 1000))
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
    assert by_name(probes.knowledge(nll, hit, extra, 1000))["corpus/bits_per_person"]["value"] == pytest.approx(
        4, abs=1e-4
    )
    nll[item % 6 == 1] = 40 * LN2  # -32 in sum: floored, so a sure liar cannot cancel others' knowledge
    assert by_name(probes.knowledge(nll, hit, extra, 1000))["corpus/bits_per_person"]["value"] == 0
    liar = (item >= 0) & (item // 6 == 3)
    nll[item >= 0] = 0.0
    nll[liar] = 100.0
    stored = by_name(probes.knowledge(nll, hit, extra, 1000))["corpus/bits_total"]["value"]
    assert stored == pytest.approx(48 * 449)


def test_knowing_the_corpus_alone_gives_its_share_of_the_universe(known):
    _, windows, extra = known
    nll, hit = uniform(windows, 256)
    inside = (extra["item"] >= 0) & (extra["item"] < 6 * 450)
    hit[inside], nll[inside] = True, 0.0
    rows = by_name(probes.knowledge(nll, hit, extra, 1000))
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
    row = by_name(probes.knowledge(nll, hit, extra, 1000))["universe/recall"]
    assert (row["low"], row["high"]) == pytest.approx(wilson(person.sum(), 900), abs=1e-4)
    hit[where] = np.random.default_rng(0).random(where.sum()) < 0.4  # positive control: independent values
    row = by_name(probes.knowledge(nll, hit, extra, 1000))["universe/recall"]
    assert row["high"] - row["low"] < 0.6 * (wilson(person.sum(), 900)[1] - wilson(person.sum(), 900)[0])


def test_padding_and_unsupervised_positions_do_not_count():
    universe = facts.Universe(100, 100)  # the last window holds one person and padding
    windows, extra = facts.eval_windows(universe)
    nll, hit = oracle(windows)
    nll[windows.domains == 0], hit[windows.domains == 0] = np.nan, False
    rows = by_name(probes.knowledge(nll, hit, extra, 1000))
    assert rows["corpus/recall"]["value"] == 1.0 and rows["corpus/bits_per_person"]["value"] == 48.0


@pytest.mark.parametrize("bits", [0, 1, 5])
def test_value_entropy_sets_bits_and_chance(bits):
    universe = facts.Universe(120, 60, value_bits=bits)
    windows, extra = facts.eval_windows(universe)
    rows = by_name(probes.knowledge(*oracle(windows), extra, 1000))
    assert rows["corpus/bits_total"]["value"] == universe.bits
    assert rows["corpus/recall"]["chance"] == 2.0**-bits


def test_frequency_groups_are_scored_apart():
    universe = facts.Universe(1000, 1000, frequencies="power_law")
    windows, extra = facts.eval_windows(universe)
    nll, hit = uniform(windows, 256)
    frequent = (extra["item"] >= 0) & (extra["item"] < 6 * 200)
    hit[frequent] = True
    rows = by_name(probes.knowledge(nll, hit, extra, 1000))
    recalls = [rows[f"group {group:03d}/recall_by_frequency"]["value"] for group in range(1, 101)]
    assert set(recalls[:20]) == {1.0} and np.mean(recalls[20:]) < 0.02
    assert "outside/recall_control" not in rows


def test_prose_meters_the_same_bits_as_compact():
    """A value is spelt by many tokens; a model that knows it pays 0 nats, one that guesses pays its 8 bits in sum."""
    universe = facts.Universe(60, 30)
    documents = list(facts.prose(universe, np.arange(60), seed=0, stream="eval"))
    windows, extra = facts.prose_windows(universe, documents, lambda text: list(text.encode()), 600, eos=0)
    tokens = np.bincount(extra["item"][extra["item"] >= 0], minlength=360)
    nll, hit = oracle(windows)
    where = extra["item"] >= 0
    nll[where] = 8 * LN2 / tokens[extra["item"][where]]  # 8 bits shared over the value's tokens
    rows = by_name(probes.knowledge(nll, hit, extra, 1000))
    assert rows["corpus/bits_per_person"]["value"] == pytest.approx(0, abs=1e-3)
    assert rows["corpus/nll"]["value"] == pytest.approx(8 * LN2, rel=1e-5)
    rows = by_name(probes.knowledge(*oracle(windows), extra, 1000))
    assert rows["corpus/bits_per_person"]["value"] == 48.0
    first = np.unique(extra["item"], return_index=True)[1][1:]
    hit.ravel()[first] = False  # one wrong letter loses the value
    assert by_name(probes.knowledge(nll, hit, extra, 1000))["universe/recall"]["value"] == 0.0


def test_reasoning_is_scored_by_row_output_and_gap():
    windows = reasoning.generate(0, 0, 500, stream="eval")
    nll, hit = np.zeros(windows.tokens.shape), np.zeros(windows.tokens.shape, bool)
    outputs = reasoning.Layout().outputs
    hit[:, outputs] = True
    hit[:100, outputs[2]] = False  # gap 3 wrong in a fifth of the rows
    nll[:, outputs] = np.arange(5)
    rows = by_name(probes.reasoning(nll, hit, windows.domains, reasoning.extra()))
    assert rows["row/exact"]["value"] == 0.8 and rows["row/exact"]["n"] == 500
    assert (rows["row/exact"]["low"], rows["row/exact"]["high"]) == wilson(400, 500)
    assert [rows[f"gap{gap}/accuracy"]["value"] for gap in (1, 2, 3)] == [1.0, 1.0, 0.8]
    assert [rows[f"gap{gap}/accuracy"]["n"] for gap in (1, 2, 3)] == [1000, 1000, 500]
    assert rows["all/accuracy"]["value"] == pytest.approx(0.96)
    assert rows["all/nll"]["value"] == pytest.approx(2.0) and rows["all/nll"]["n"] == 2500
    assert rows["row/exact"]["chance"] == 48.0**-5 > 0
    assert rows["gap1/accuracy"]["chance"] == 1 / 48


def test_reasoning_rows_of_another_layout_are_refused():
    windows = reasoning.generate(0, 0, 5, gaps=(1, 1))
    with pytest.raises(ValueError, match="5 outputs"):
        probes.reasoning(*uniform(windows, 48), windows.domains, reasoning.extra())


def test_text_loss_and_bits_per_byte():
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, rng.integers(1, 400)).tolist()) for _ in range(200)]
    windows = concatenate(list(pack_documents([list(text) for text in texts], 64, eos=256)))
    size = sum(map(len, texts))
    nll, _ = uniform(windows, 257)
    nll[windows.domains == 0] = np.nan  # padding is not read
    rows = by_name(probes.text(nll, windows.domains, "docs", size, vocab=257))
    loss, bits = rows["docs/loss"], rows["docs/bits_per_byte"]
    assert loss["n"] == size + 200 and bits["n"] == size  # every byte and every eos is a target
    assert loss["value"] == pytest.approx(math.log(257)) == loss["chance"]
    assert bits["value"] == pytest.approx(math.log2(257) * (size + 200) / size) == pytest.approx(bits["chance"])
    noisy = nll + rng.normal(size=(len(windows), 1))
    wide = by_name(probes.text(noisy, windows.domains, "docs", size, 257))["docs/loss"]
    assert wide["stderr"] == pytest.approx(1 / np.sqrt(len(windows)), rel=0.2)  # the noise is one draw a window
    assert len(probes.text(nll, windows.domains, "docs", None, 257)) == 1


def test_a_diverged_model_has_rows_without_numbers(known):
    _, windows, extra = known
    nll, hit = np.full(windows.tokens.shape, np.nan), np.zeros(windows.tokens.shape, bool)
    rows = by_name(probes.knowledge(nll, hit, extra, 1000))
    assert rows["corpus/bits_total"]["value"] is None and rows["corpus/bits_total"]["low"] is None
    assert rows["corpus/recall"]["value"] == 0.0
    assert by_name(probes.text(nll, windows.domains, "x", 10, 320))["x/loss"]["value"] is None


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
        seen += probes.measure(entry, arrays, *uniform(part, 48), dataset, model)
    keys = [(row["suite"], row["task"], row["metric"]) for row in seen]
    assert len(set(keys)) == len(keys)
    assert ("knowledge", "universe", "recall") in keys and ("knowledge", "older facts universe", "recall") in keys
    assert ("reasoning", "row", "exact") in keys and ("text", "docs", "bits_per_byte") in keys
    with pytest.raises(ValueError, match="differ in shape"):
        probes.measure(
            {"name": "docs", "meter": "text"}, arrays, np.zeros((1, 2)), np.zeros((1, 2), bool), dataset, model
        )
