"""Facts: unique persons, exact loads and frequencies, nested corpora, and prose whose values can be metered."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.data.corpora import facts
from phi3_jax.data.corpora.facts import Universe, compact_windows, eval_windows, prose
from phi3_jax.errors import UserError


@pytest.mark.parametrize("persons, pool", [(9000, 256), (65_536, 256), (100_000, 1024)])
def test_names_are_unique_pairs_of_the_pool(persons, pool):
    universe = Universe(persons, facts=10, pool=pool)
    assert len(np.unique(universe.names, axis=0)) == persons
    assert universe.names.min() >= 0 and universe.names.max() < pool


def test_values_are_uniform_and_independent():
    values = Universe(60_000).value_index
    for attribute in range(6):
        counts = np.bincount(values[:, attribute], minlength=256)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi2 < 255 + 5 * np.sqrt(2 * 255)
    correlation = np.corrcoef(values.T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(60_000)


def test_default_is_the_published_corpus():
    universe = Universe()
    assert (universe.persons, universe.facts, universe.vocab, universe.bits) == (9000, 4500, 320, 216_000)
    windows = compact_windows(universe, universe.order(0, 0, 1500 * facts.PER_WINDOW))
    assert windows.window == facts.WINDOW == 24
    assert (windows.tokens.reshape(-1, 8)[:, 0] == 256).all()
    np.testing.assert_array_equal(np.unique(windows.segments), [1, 2, 3])
    np.testing.assert_array_equal(windows.domains.reshape(-1, 8), np.tile([0, 0, 1, 1, 1, 1, 1, 1], (4500, 1)))
    assert windows.tokens.max() == 256 and windows.targets.max() < 256


def test_items_say_what_the_universe_says():
    universe = Universe(100, 100)
    windows = compact_windows(universe, np.arange(100))
    assert len(windows) == 34
    items = windows.tokens.reshape(-1, 8)
    np.testing.assert_array_equal(items[:100, 1:3], universe.names)
    np.testing.assert_array_equal(windows.targets.reshape(-1, 8)[:100, 2:], universe.values)
    np.testing.assert_array_equal(items[:100, 3:], universe.values[:, :5])  # inputs are the targets one step on
    for name in ("tokens", "targets", "segments", "domains"):
        assert not getattr(windows, name).reshape(-1, 8)[100:].any()  # padding


def test_smaller_corpora_lie_inside_larger_ones_and_universes_grow():
    small, large = Universe(facts=1000), Universe(facts=9000)
    np.testing.assert_array_equal(small.values, large.values)
    assert (small.in_corpus <= large.in_corpus).all() and small.in_corpus.sum() == 1000
    grown = Universe(12_000)
    np.testing.assert_array_equal(grown.names[:9000], small.names)
    np.testing.assert_array_equal(grown.values[:9000], small.values)
    assert (Universe(seed=1).names != small.names).any()


@pytest.mark.parametrize("bits", range(9))
def test_value_entropy_changes_the_values_alone(bits):
    universe, full = Universe(5000, value_bits=bits), Universe(5000)
    np.testing.assert_array_equal(universe.names, full.names)
    assert universe.vocab == full.vocab
    for attribute in range(6):
        assert len(np.unique(universe.values[:, attribute])) == 2**bits
    np.testing.assert_array_equal(universe.value_index, full.value_index >> (8 - bits))
    np.testing.assert_array_equal(universe.order(3, 0, 500), full.order(3, 0, 500))
    assert universe.bits == 6 * bits * universe.facts


def test_attributes_use_different_ids_when_values_are_few():
    universe = Universe(5000, value_bits=2)
    subsets = {tuple(np.unique(universe.values[:, attribute])) for attribute in range(6)}
    assert len(subsets) == 6


def test_uniform_epochs_visit_everyone_once_in_fresh_orders():
    universe = Universe(50, 20)
    order = universe.order(0, 0, 60).reshape(3, 20)
    for epoch in order:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert (order[0] != order[1]).any() and (order[1] != order[2]).any()
    assert (universe.order(1, 0, 20) != order[0]).any()


@pytest.mark.parametrize("frequencies", facts.FREQUENCIES)
def test_order_depends_on_the_index_alone(frequencies):
    universe = Universe(300, 200, frequencies=frequencies)
    whole = universe.order(4, 0, 1000)
    for start, count in [(0, 1), (199, 2), (150, 700), (999, 1), (400, 0)]:
        np.testing.assert_array_equal(universe.order(4, start, count), whole[start : start + count])


def test_power_law_visits_follow_the_exponent():
    universe = Universe(10_000, 10_000, frequencies="power_law")
    assert np.bincount(universe.group)[1:].tolist() == [100] * 100
    epochs = 20
    visits = np.bincount(universe.order(0, 0, epochs * 10_000), minlength=10_000)
    expected = universe.frequency * 10_000 * epochs
    assert np.abs(visits - expected).max() <= epochs  # rounded down or up in each epoch
    by_group = np.bincount(universe.group, weights=visits)[1:]
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(by_group), 1)[0]
    assert slope == pytest.approx(-1.5, abs=0.02)
    uniform = np.bincount(Universe(10_000, 10_000).order(0, 0, 20_000), minlength=10_000)
    assert set(uniform) == {2}  # positive control


def test_power_law_filter_keeps_the_frequent():
    universe = Universe(10_000, 3000, frequencies="power_law")
    assert universe.group[universe.in_corpus].max() == 30
    assert universe.frequency.sum() == pytest.approx(1)
    assert set(universe.order(0, 0, 30_000)) <= set(range(3000))


def test_eval_covers_the_universe_once():
    universe = Universe(1000, 300)
    windows, extra = eval_windows(universe)
    item = extra["item"]
    np.testing.assert_array_equal(item >= 0, windows.domains > 0)
    np.testing.assert_array_equal(item[item >= 0], np.arange(6000))
    np.testing.assert_array_equal(windows.targets[item >= 0], universe.values.ravel())
    assert extra["in_corpus"].sum() == 300 and int(extra["value_bits"]) == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"persons": 65_537}, r"persons=65537 is outside 1\.\.65536.*larger pool"),
        ({"persons": 100, "facts": 101}, r"facts=101 is outside 0\.\.persons=100"),
        ({"pool": 2000}, r"pool=2000 is outside 256\.\.1024"),
        ({"pool": 64}, r"pool=64 is outside 256\.\.1024: value_bits=8 needs 256 ids"),
        ({"value_bits": 9}, r"value_bits=9 is outside 0\.\.8"),
        ({"frequencies": "zipf"}, "'zipf' is none of uniform, power_law"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_universes_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Universe(**arguments)


def test_training_on_no_facts_is_an_error():
    with pytest.raises(UserError, match="facts=0"):
        Universe(facts=0).order(0, 0, 1)


def test_prose_pools_are_large_enough_and_without_doubles():
    values = facts.value_words()
    assert [len(set(pool)) for pool in values] == [256] * 6
    assert len({word for pool in values for word in pool}) == 6 * 256
    assert [len(set(pool)) for pool in facts.name_words()] == [1024, 1024]


def test_prose_tells_each_fact_once_after_the_name():
    universe = Universe(400, 400)
    first, last = facts.name_words()
    full_names, values = set(), set()
    for document in prose(universe, np.arange(400), seed=0):
        given, family = universe.names[document.person]
        name = f"{first[given]} {last[family]}"
        full_names.add(name)
        assert document.text.count(name) == 6 and document.text.count(".") == 6
        for attribute, (start, stop) in enumerate(document.spans):
            value = document.text[start:stop]
            assert value in facts.value_words()[attribute]
            sentence_start = document.text.rfind(".", 0, start) + 1
            assert name in document.text[sentence_start:start]  # a reader of the prefix knows who and what is asked
            values.add((attribute, value))
    assert len(full_names) == 400
    assert len(values) > 6 * 150


def test_every_template_has_name_before_value():
    for templates in facts._TEMPLATES:
        assert len(templates) >= 5 and len(set(templates)) == len(templates)
        for template in templates:
            assert 0 <= template.index("{name}") < template.index("{value}")


def test_prose_depends_on_the_index_alone_and_varies():
    universe = Universe(50, 50)
    whole = list(prose(universe, np.arange(50), seed=1))
    assert list(prose(universe, np.arange(20, 50), seed=1, start=20)) == whole[20:]
    again = list(prose(universe, np.arange(50), seed=1, start=50))
    assert all(a.text != b.text for a, b in zip(whole, again, strict=True))
    assert all(
        {a.text[slice(*span)] for span in a.spans} == {b.text[slice(*span)] for span in b.spans}
        for a, b in zip(whole, again, strict=True)
    )


def test_prose_values_follow_value_bits():
    universe = Universe(500, 500, value_bits=3)
    documents = list(prose(universe, np.arange(500), seed=0))
    for attribute in range(6):
        assert len({document.text[slice(*document.spans[attribute])] for document in documents}) == 8
