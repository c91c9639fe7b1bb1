"""Reading windows: one segment of a sentence and an item, loss on the item alone, nobody who is asked about later."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.data import export, loader, sources
from phi3_jax.data.corpora import facts, reading
from phi3_jax.data.corpora.facts import Universe
from phi3_jax.data.windows import positions
from phi3_jax.errors import UserError

SMALL = dict(tokens=24_000, facts=90, universe=180)
# Written before there was a `reading`: data sets without it must stay what they were.
BEFORE = "7c470173e24e90fe9779a994729656db147011cfab5121ccb90304f09c636e6d"
BEFORE_POWER_LAW = "93f00a710ebac62c7dd92987911d76aa25e4ad6383a2e42ca99a8ab584742158"


def test_a_window_is_a_sentence_and_an_item_in_one_segment():
    universe = Universe(300, 300)
    passage, asked = np.array([7, 8, -1, 400]), np.array([7, 9, 10, 400])  # own, another's, none, outside the universe
    windows = reading.windows_of(universe, passage, asked)
    people = reading.everyone(universe)
    np.testing.assert_array_equal(people.names[:300], universe.names)
    np.testing.assert_array_equal(people.values[:300], universe.values)
    for row, (given, person) in enumerate(zip(passage, asked, strict=True)):
        item = [256, *people.names[person], *people.values[person]]
        before = [256, *people.names[given], *people.values[given]] if given >= 0 else [0] * 9
        assert windows.tokens[row].tolist() == before + item[:-1] + [0] * 7
        assert windows.targets[row].tolist() == [0] * 11 + item[3:] + [0] * 7
        assert windows.segments[row].tolist() == [int(given >= 0)] * 9 + [1] * 8 + [0] * 7
    assert (windows.domains > 0).sum(0).tolist() == [0] * 11 + [4] * 6 + [0] * 7
    at = positions(windows.segments)
    assert at[0, :17].tolist() == list(range(17))  # one document: positions go on, attention sees the sentence
    assert at[2, 9:17].tolist() == list(range(8))  # without a sentence the item is what training shows
    np.testing.assert_array_equal(facts.compact_windows(universe, asked[2:3], 1).tokens[0], windows.tokens[2, 9:17])


def test_readers_are_outside_the_universe_and_distractors_share_half_a_name():
    universe = Universe(4000, 1000)
    names = reading.everyone(universe).names
    passage, asked = reading.train_pairs(universe, 0, 20_000)
    assert passage.min() >= 4000  # no sentence of anybody who is asked about in the evaluations
    own = passage == asked
    assert 1 - own.mean() == pytest.approx(reading.DISTRACTORS, abs=0.02)
    assert asked[own].min() >= 4000 and len(np.unique(asked[own])) == own.sum()
    assert asked[~own].max() < 1000  # items of the corpus, which memory can answer
    visits = np.bincount(asked[~own], minlength=1000)
    assert visits[:1000].min() >= visits[:1000].max() - 1
    same = names[passage[~own]] == names[asked[~own]]
    assert (same.sum(1) == 1).all() and same.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    again = reading.train_pairs(universe, 0, 20_000)
    np.testing.assert_array_equal(again, [passage, asked])
    assert (reading.train_pairs(universe, 1, 20_000) != again).any()


def test_a_universe_of_all_names_leaves_nothing_to_read():
    with pytest.raises(UserError, match="leaves 0 of 65536 names"):
        reading.train_pairs(Universe(65_536, 100), 0, 10)


def test_search_finds_the_indexed_by_name_and_gives_the_others_a_namesake():
    universe = Universe(2000, 1000, seed=3)
    found = reading.retrieved(universe)
    persons = np.arange(2000)
    assert (found == persons).sum() == 1800  # SEEN, and a name is one person's
    missed = found != persons
    shared = universe.names[found[missed]] == universe.names[missed]
    assert (shared.sum(1) == 1).all() and set(found[missed]) <= set(persons[~missed])
    assert (reading.retrieved(universe, seen=1.0) == persons).all()
    assert (reading.retrieved(Universe(2, 2), seen=0.5) < 0).sum() == 1  # nobody shares a half: no passage


def test_names_must_not_be_spelled_like_values(monkeypatch):
    """With one word for an id in every role, and its order lost, BM25 takes others' values for names."""
    universe = Universe(2000, 1000)
    monkeypatch.setattr(reading, "name", lambda u, person: " ".join(f"w{i}" for i in u.names[person]))
    assert (reading.retrieved(universe, seen=1.0) == np.arange(2000)).mean() < 0.9


def test_distractors_of_the_evaluation_are_others():
    universe = Universe(500, 500)
    sets = reading.passages(universe)
    assert list(sets) == ["retrieved", "oracle", "distractor"]
    np.testing.assert_array_equal(sets["oracle"], np.arange(500))
    assert (sets["distractor"] != np.arange(500)).all() and len(set(sets["distractor"])) == 500


@pytest.mark.parametrize("share", [0.1, 0.15])
def test_an_export_with_reading_serves_it_and_asks_with_search(tmp_path, share):
    made = export.export(tmp_path / "r", "facts", **SMALL, reading=share)
    assert [s["name"] for s in made["sources"]] == ["knowledge", "reasoning", "reading"]
    assert [e["name"] for e in made["evals"]] == ["knowledge", "reasoning", "retrieved", "oracle", "distractor"]
    assert made["domains"] == ["knowledge", "reasoning"] and made["generator"]["reading"] == share
    ds = loader.open_dataset(tmp_path / "r")
    steps = 20
    assert loader.windows_needed(ds, 44, steps)["reading"] == pytest.approx(44 * steps * share, abs=1)
    assert loader.windows_needed(ds, 44, steps)["knowledge"] == 11 * steps
    names = {tuple(name) for name in Universe(180, 90).names}
    for step in range(steps):
        batch = loader.train_batches(ds, 44)[step]
        rows = (batch["segments"][:, 16] == 1) & (batch["domains"][:, 11] == 2) & (batch["segments"][:, 17] == 0)
        assert rows.any() or step
        assert not names & {tuple(pair) for pair in batch["tokens"][rows, 1:3]}
    extra = ds.extra("retrieved")
    assert (extra["passage"] == np.arange(180)).sum() == 162
    assert (extra["item"] >= 0).sum() == 180 * 6 and set(extra) > set(ds.extra("knowledge"))


def test_without_reading_data_sets_are_what_they_were(tmp_path):
    assert export.export(tmp_path / "a", "facts", **SMALL)["fingerprint"] == BEFORE
    assert export.export(tmp_path / "b", "facts", **SMALL, reading=0.0)["fingerprint"] == BEFORE
    power_law = export.export(tmp_path / "c", "facts", **SMALL, frequency="power_law", seed=3)
    assert power_law["fingerprint"] == BEFORE_POWER_LAW
    with pytest.raises(UserError, match="the shares at most 1 together"):
        sources.recipe("facts", share=0.5, reading=0.6)
