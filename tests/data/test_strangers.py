"""Strangers are in no corpus but as strangers, and what is taught of them is one id."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.data import export, loader
from phi3_jax.data.corpora import facts, reading, strangers
from phi3_jax.data.corpora.facts import Universe
from phi3_jax.errors import UserError

SMALL = dict(tokens=24_000, facts=90, universe=180)


def names_in(tokens: np.ndarray) -> set[tuple[int, int]]:
    """The pairs after each <K>."""
    rows, columns = np.nonzero(tokens == 256)
    return {(int(tokens[r, c + 1]), int(tokens[r, c + 2])) for r, c in zip(rows, columns, strict=True)}


def test_nobody_of_the_test_is_in_the_training_data(tmp_path):
    shares = dict(share=0.4, reading=0.2, unheard=0.1, strangers=60)
    manifest = export.export(tmp_path / "d", "facts", **SMALL, **shares)
    ds = loader.open_dataset(tmp_path / "d")
    universe = Universe(180, 90)
    everyone = reading.everyone(universe)
    tested = {tuple(map(int, everyone.names[p])) for p in strangers.asked(universe, 60)}
    trained = {}
    for number, source in enumerate(manifest["sources"]):
        parts = [batch["tokens"][:valid] for batch, valid in loader.source_batches(ds, number, 256)]
        trained[source["name"]] = names_in(np.concatenate(parts))
    assert len(tested) == 60 and trained["unheard"] and trained["reading"]
    assert not any(tested & names for names in trained.values())
    assert not trained["unheard"] & (trained["reading"] | trained["knowledge"])
    (batch, valid), *_ = loader.eval_batches(ds, "abstention", 400)
    assert names_in(batch["tokens"][:valid]) == tested | {tuple(map(int, pair)) for pair in universe.names}
    assert {entry["name"] for entry in manifest["evals"]} >= {"abstention", "abstention_search", "oracle"}


def test_what_is_taught_of_a_stranger_is_the_id_of_not_knowing():
    universe = Universe(180, 90)
    persons = strangers.taught(universe, 7, spared=60)
    windows = strangers.taught_windows(universe, persons)
    items = windows.tokens.reshape(-1, 8)[:7]
    assert strangers.abstain(256) == 308 < universe.vocab
    np.testing.assert_array_equal(items[:, 1:3], reading.everyone(universe).names[persons])
    assert (items[:, 3:] == 308).all() and (windows.targets[windows.domains > 0] == 308).all()
    assert (windows.domains > 0).sum() == 7 * 6 and not windows.tokens.reshape(-1, 8)[7:].any()
    plain = facts.compact_windows(universe, np.arange(7))
    np.testing.assert_array_equal(plain.domains, windows.domains)
    assert len(strangers.taught(universe, 10**6, 60)) == 256**2 - 180 - 60  # each once, as many as there are


def test_search_finds_a_namesake_for_a_stranger_and_never_the_stranger():
    universe = Universe(400, 200)
    windows, extra = strangers.eval_windows(universe, 50, searched=True)
    passages = windows.tokens[extra["stranger"], :9]
    given = passages[passages[:, 0] == 256]
    known = {tuple(row) for row in np.column_stack([universe.names, universe.values])}
    assert len(given) > 25 and {tuple(row[1:]) for row in given} <= known
    asked = windows.tokens[extra["stranger"]][:, 10:12][passages[:, 0] == 256]
    same = (given[:, 1:3] == asked).sum(1)
    assert same.max() == 1 and same.min() == 1  # half a name
    assert extra["in_corpus"].sum() == 200 and (extra["item"] >= 0).sum() == 450 * 6


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(strangers=65_400), "strangers=65400 is more than the 65,356 names that universe=180 leaves of pool=256"),
        (dict(strangers=5, frequency="inverse_rank"), "inverse_rank asks for draws"),
        (dict(share=0.5, unheard=0.6), "unheard=0.6 need 0 <= share <= 1"),
        (dict(strangers=65_355, unheard=0.1, reading=0.1), "strangers leaves 0 of 65536 names for reading"),
    ],
)
def test_what_cannot_be_is_one_line(more, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export.export(tmp_path / "d", "facts", **SMALL | more)
