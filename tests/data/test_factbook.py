"""Facts of the World Factbook: what is kept is nested and of the bits it should be, and seen equally often in every arm."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.data import export, loader, meters, sources
from phi3_jax.data.corpora import factbook, reasoning
from phi3_jax.data.corpora.factbook import Book, Fact
from phi3_jax.data.meters.cloze import rows_of
from phi3_jax.data.meters.knowledge import per_item
from phi3_jax.data.sources.factbook import OF, VISITS
from phi3_jax.errors import UserError
from phi3_jax.training import train

PROFILE = (
    "Utopia\n\nGeography\nCoastline: {} km\nClimate: temperate\n\nPeople\ntotal: 3\ntotal: 4\nMotto: none (2023 est.)"
)
BOOK = factbook.shipped()
SHARED = Path(__file__).resolve().parents[3] / "shared"


def small() -> Book:
    """Two fields: all four values of the first differ, three of the second's are alike."""
    capital, sea = ("Aa", "Bb", "Cc", "Dddd"), ("no", "no", "no", "yes")
    facts = [Fact(f"land{i}", field, of[i]) for i in range(4) for field, of in (("capital", capital), ("sea", sea))]
    return Book(tuple(facts))


def test_short_values_of_fields_that_most_countries_have_once_are_facts() -> None:
    profiles = [PROFILE.replace("Utopia", f"Land {i:03}").format(i) for i in range(factbook.LEAST)]
    found = factbook.extract(["Introduction\nBackground: of an ocean", *profiles])
    assert {fact.field for fact in found} == {"Coastline", "Climate", "Motto"}  # `total` is there twice
    assert found[:2] == [Fact("Land 000", "Climate", "temperate"), Fact("Land 000", "Coastline", "0 km")]
    assert {fact.value for fact in found if fact.field == "Motto"} == {"none"}  # without the year
    assert not factbook.extract(profiles[1:])
    long = [profile.replace("temperate", "t" * (factbook.LONGEST + 1)) for profile in profiles]
    assert {fact.field for fact in factbook.extract(long)} == {"Coastline", "Motto"}


def test_the_shipped_file_is_what_its_docstring_says() -> None:
    assert len(BOOK.facts) == len({(f.country, f.field) for f in BOOK.facts}) == 16_396
    assert len(BOOK.fields) == 80 and len(BOOK.countries) == 249
    assert BOOK.bits.sum() == pytest.approx(103_266, abs=1)
    assert factbook.SHIPPED.stat().st_size < 150_000
    assert Fact("Albania", "Coastline", "362 km") in BOOK.facts


@pytest.mark.shared("corpus")
def test_the_shipped_file_is_made_of_the_profiles(tmp_path: Path) -> None:
    with gzip.open(SHARED / "corpus" / "encyclopedia.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    facts = factbook.extract(row["text"] for row in rows if row["source"] == "cia-world-factbook")
    factbook.write(facts, tmp_path / "again.tsv.gz")
    assert (tmp_path / "again.tsv.gz").read_bytes() == factbook.SHIPPED.read_bytes()


def test_bits_are_the_surprise_of_a_value_in_its_field() -> None:
    book, third = small(), np.log2(4 / 3)
    assert book.bits.tolist() == pytest.approx([2, third, 2, third, 2, third, 2, 2])
    assert book.usual.tolist() == [True, True, False, True, False, True, False, False]  # Aa is the first of equals
    assert book.tokens.tolist() == [4, 4, 4, 4, 4, 4, 6, 5]


def test_what_is_kept_is_nested_and_has_the_bits_that_it_should() -> None:
    for seed in (None, 3):
        shares = (0, 0.25, 0.5, 0.75, 1)
        kept = [BOOK.kept(share, seed) for share in shares]
        for share, one, larger in zip(shares, kept, [*kept[1:], np.ones(len(BOOK.facts), bool)], strict=True):
            assert not (one & ~larger).any()
            assert BOOK.bits[one].sum() / BOOK.bits.sum() == pytest.approx(share, abs=0.003)  # half of a country
            assert not set(BOOK.country[one]) & set(BOOK.country[~one])  # countries stay or go whole
        assert not kept[0].any() and kept[-1].all()
    assert (BOOK.kept(0.5, 3) != BOOK.kept(0.5, 4)).any()
    inside = BOOK.kept(0.5)
    dear = [BOOK.bits[k & (BOOK.country == c)].sum() / BOOK.tokens[k & (BOOK.country == c)].sum()
            for k in (inside, ~inside) for c in set(BOOK.country[k])]  # fmt: skip
    assert max(dear[: len(set(BOOK.country[inside]))]) <= min(dear[len(set(BOOK.country[inside])) :])


def test_windows_hold_every_fact_once_and_say_which() -> None:
    chosen = np.flatnonzero(BOOK.kept(0.25))
    windows, item = BOOK.windows(chosen)
    assert sorted(set(item[item >= 0])) == chosen.tolist() and ((item >= 0) == (windows.domains == 1)).all()
    for i in chosen[:: len(chosen) // 40]:
        row = np.flatnonzero((item == i).any(1)).item()
        *value, end = windows.targets[row][item[row] == i].tolist()
        assert bytes(value).decode() == BOOK.facts[i].value and end == BOOK.end
        inputs = windows.tokens[row][windows.segments[row] == windows.segments[row][item[row] == i][0]].tolist()
        country, field = inputs[0] - 256, inputs[1] - 256 - len(BOOK.countries)
        assert (BOOK.countries[country], BOOK.fields[field]) == BOOK.facts[i][:2] and inputs[2:] == value
    assert (windows.segments > 0).mean() > 0.99  # little room is left


def test_shuffled_values_keep_the_format_and_no_fact() -> None:
    one, two = BOOK.shuffled(0, 0), BOOK.shuffled(0, 1)
    values = lambda book: sorted((f.field, f.value) for f in book.facts)  # noqa: E731
    assert values(one) == values(two) == values(BOOK)
    same = np.array([a == b for a, b in zip(one.facts, two.facts, strict=True)])
    assert BOOK.bits[same].sum() / BOOK.bits.sum() < 0.03  # what is alike by chance is worth few bits
    assert one.facts == BOOK.shuffled(0, 0).facts != BOOK.shuffled(1, 0).facts


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, loader.Dataset]:
    root = tmp_path_factory.mktemp("factbook")
    for kept in ("0", "25", "100", "random25", "shuffled"):
        export.export(root / kept, f"factbook:{kept}", tokens=500_000, seed=1)
    return {path.name: loader.open_dataset(path) for path in root.iterdir()}


def test_kept_facts_are_seen_equally_often_in_every_arm(written: dict[str, loader.Dataset]) -> None:
    whole = OF // factbook.WINDOW
    for name, ds in written.items():
        given = loader.windows_needed(ds, 1, whole)
        counts = {entry["name"]: entry["windows"] for entry in ds.manifest["sources"]}
        if name == "0":
            assert given == {"reasoning": whole}
            continue
        epochs = 2 if name == "shuffled" else 1  # written of 500k tokens: 1.6 visits
        visits = given["knowledge"] * epochs / counts["knowledge"]
        assert visits == pytest.approx(VISITS, rel=2e-3), name
        assert sum(given.values()) == whole
    assert len({ds.manifest["tokenizer"]["fingerprint"] for ds in written.values()}) == 1
    asked = {
        entry["content"] for ds in written.values() for entry in ds.manifest["evals"] if entry["name"] == "knowledge"
    }
    assert len(asked) == 1  # every arm is asked for all facts


def test_reasoning_items_are_those_of_other_studies(written: dict[str, loader.Dataset]) -> None:
    batch, _ = next(loader.eval_batches(written["25"], "reasoning", 64))
    items = reasoning.generate(0, 0, 64, stream="eval")
    assert (batch["targets"][items.domains > 0] - BOOK.pool == items.targets[items.domains > 0] - 256).all()
    known = written["25"].extra("knowledge")["in_corpus"]
    assert (known == BOOK.kept(0.25)).all() and not written["shuffled"].extra("knowledge")["in_corpus"].any()
    assert (written["random25"].extra("knowledge")["in_corpus"] == BOOK.kept(0.25, 1)).all()


def scored(said: list[bool], kept: list[bool], broken: int | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of hand-made hits: `said` a fact of `small` right, all its tokens; one of them wrong at its end."""
    book = small()
    windows, item = book.windows(np.arange(8))
    hit = np.isin(item, np.flatnonzero(said))
    if broken is not None:
        hit[np.unravel_index(np.flatnonzero(item == broken)[-1], item.shape)] = False
    extra = dict(item=item, in_corpus=np.array(kept), bits=book.bits, usual=book.usual, subject=book.country)
    rows = rows_of(np.full(windows.tokens.shape, 0.5), hit, extra)
    return {(row["task"], row["metric"]): row for row in rows}


def test_recall_weighs_values_by_their_bits() -> None:
    third = np.log2(4 / 3)
    whole, kept = 10 + 3 * third, [True] * 4 + [False] * 4  # two countries
    rows = scored([True, True, False, True, False, False, False, True], kept)
    assert rows["universe", "recall"]["value"] == pytest.approx((4 + 2 * third) / whole)
    assert rows["universe", "recall"]["chance"] == pytest.approx((2 + 3 * third) / whole)
    assert rows["corpus", "recall"]["value"] == pytest.approx((2 + 2 * third) / (4 + 2 * third))
    assert rows["outside", "recall_control"]["value"] == pytest.approx(2 / (6 + third))
    assert rows["universe", "recall_unweighted"]["value"] == pytest.approx(0.5)
    assert rows["universe", "recall"]["n"] == 8 and rows["corpus", "recall"]["n"] == 4
    assert rows["corpus", "nll"]["value"] == pytest.approx(1.5)  # three tokens of half a nat


def test_a_value_that_does_not_end_is_not_right() -> None:
    whole = scored([True] * 8, [True] * 8)
    assert whole["universe", "recall"]["value"] == 1 and ("outside", "recall_control") not in whole
    broken = scored([True] * 8, [True] * 8, broken=7)
    assert broken["universe", "recall"]["value"] == pytest.approx(1 - 2 / (10 + 3 * np.log2(4 / 3)))
    assert broken["universe", "recall_bytes"]["value"] == pytest.approx(26 / 27)
    nothing = scored([False] * 8, [False] * 8)
    assert nothing["universe", "recall"]["value"] == 0 and ("corpus", "recall") not in nothing


def test_right_after_the_right_tokens_is_what_is_said_alone() -> None:
    """Nothing comes before a value, so that its exact match is free-running: a model that is right nine times in ten."""
    book = Book(BOOK.facts[:300])
    windows, item = book.windows(np.arange(300))
    slips = np.random.default_rng(0).random(windows.tokens.shape) > 0.9

    def forward(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Right until it slips, and wrong wherever a token before in the segment is."""
        lost = batch["tokens"] != windows.tokens
        for t in range(1, lost.shape[1]):
            lost[:, t] |= lost[:, t - 1] & (windows.segments[:, t] == windows.segments[:, t - 1])
        said = np.where(slips | lost, 0, windows.targets)
        return {"said": said, "hit": said == windows.targets, "sure": np.ones(said.shape)}

    batch = dict(tokens=windows.tokens, segments=windows.segments, domains=windows.domains)
    out = forward(batch)
    free = train.free_running(forward, batch, out, np.arange(len(windows)))
    assert (free["hit"] < out["hit"])[windows.domains > 0].any()  # tokens are lost
    forced, alone = (per_item(np.zeros(item.shape), hit, item, 300)[1] for hit in (out["hit"], free["hit"]))
    assert (forced == alone).all() and 0 < alone.sum() < 300  # values are not


def test_text_takes_half_of_what_is_no_fact(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(200):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Chapter {i}. {'A force is a push or a pull. ' * 20}")
    spec = f"factbook:25:{tmp_path / 'texts'}"
    export.export(tmp_path / "data", spec, tokens=100_000)
    ds = loader.open_dataset(tmp_path / "data")
    given, counts = (
        loader.windows_needed(ds, 1, OF // factbook.WINDOW),
        BOOK.windows(np.flatnonzero(BOOK.kept(0.25)))[0],
    )
    assert given["knowledge"] / len(counts) == pytest.approx(VISITS, rel=2e-3)
    assert given["text"] == pytest.approx(given["reasoning"], rel=1e-4)
    assert [entry["meter"] for entry in ds.manifest["evals"]] == ["cloze", "reasoning", "text"]
    assert sources.find(spec).closed is not None
    with pytest.raises(UserError, match="nowhere.*does not exist"):
        sources.recipe("factbook:25:nowhere")


@pytest.mark.parametrize("kept", ["", "rondom50", "101", "2.5", "random", "50%"])
def test_wrong_words_are_one_line(kept: str) -> None:
    with pytest.raises(UserError, match="write the per cent of the bits") as error:
        sources.recipe(f"factbook:{kept}")
    assert "\n" not in str(error.value) and repr(kept) in str(error.value)


def test_the_meter_is_found_by_name() -> None:
    assert meters.find("cloze").version == 2 and meters.find("cloze").named
