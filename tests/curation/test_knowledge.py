"""The knowledge filter on a universe whose facts are known: what is a fact, its bits, and what stays for a size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.curation import facts, knowledge, pipeline
from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.engine import Engine
from phi3_jax.data.corpora.facts import Universe, name_words, prose
from phi3_jax.data.sources.mixture import reasoning_texts
from phi3_jax.errors import UserError

PERSONS, VISITS = 300, 3


def universe() -> Universe:
    return Universe(persons=PERSONS, facts=PERSONS, seed=3)


def rows() -> Iterator[dict[str, Any]]:
    world = universe()
    for document in prose(world, world.order(0, 0, VISITS * PERSONS), 5):
        yield {"text": document.text, "source": "persons", "person": document.person}
    for text in reasoning_texts(0, 100):
        yield {"text": text, "source": "reasoning", "person": -1}


def values() -> Iterator[tuple[str, set[tuple[str, str]]]]:
    """(text, {(name, value)}) of each document on a person: the truth that no rule sees."""
    world, (first, last) = universe(), name_words()
    for document in prose(world, world.order(0, 0, VISITS * PERSONS), 5):
        given, family = world.names[document.person]
        yield document.text, {(f"{first[given]} {last[family]}", document.text[a:b]) for a, b in document.spans}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("daft")
    folder = tmp_path_factory.mktemp("knowledge")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    curate(folder, "small", universe().bits // 3)
    curate(folder, "large", 2 * universe().bits // 3, folder / "small")
    return folder


def curate(folder: Path, name: str, parameters: int, other: Path | None = None, **more: Any) -> dict[str, Any]:
    config = with_steps(base(), "exact", "knowledge", knowledge={"parameters": parameters, **more})
    return pipeline.curate(config.to_dict(), [str(folder / "in.jsonl")], folder / name, Engine("native", 1), other)


def note(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["notes"]["knowledge"]


def test_facts_and_their_bits_are_found_without_labels(curated: Path) -> None:
    found = note(curated / "small")
    assert found["bits"] == pytest.approx(universe().bits, rel=0.2)
    assert found["facts"] == pytest.approx(6 * PERSONS, rel=0.02)
    assert found["exposures"] == [VISITS] * 3
    assert found["documents_with_facts"] == VISITS * PERSONS


def test_values_are_those_that_the_universe_drew(curated: Path) -> None:
    """Which words of a sentence are its value, against the universe's own spans."""
    names = knowledge._names(str(curated / "small/stages/01-knowledge/names.parquet"))
    slots = knowledge._slots(str(curated / "small/stages/01-knowledge/frames.parquet"))
    right = wrong = missing = 0
    for text, truth in values():
        said = {
            (fact.subject, fact.value)
            for sentence in facts.subjects(text, names.__contains__)
            for fact in facts.stated(sentence, lambda prefix: facts.key(prefix) in slots)
        }
        right, wrong, missing = right + len(said & truth), wrong + len(said - truth), missing + len(truth - said)
    assert right >= 0.95 * (right + wrong) and right >= 0.95 * (right + missing) > 4000


def test_reasoning_states_no_facts_and_stays(curated: Path) -> None:
    for name in ("small", "large"):
        sources = json.loads((curated / name / "manifest.json").read_text())["sources"]
        assert sources["reasoning"]["kept"] == sources["reasoning"]["read"] == 100
        assert 0 < sources["persons"]["kept"] < sources["persons"]["read"]


def test_what_stays_fills_the_budget_with_whole_persons(curated: Path) -> None:
    for name in ("small", "large"):
        budget = note(curated / name)["budget"]
        kept = Counter(row["person"] for row in pipeline.documents_of(curated / name) if row["person"] >= 0)
        assert set(kept.values()) == {VISITS}, "a person's documents stay or go together"
        assert budget * 0.9 <= 48 * len(kept) * note(curated / name)["bits"] / universe().bits <= budget * 1.1


def test_a_smaller_size_lies_within_a_larger_one(curated: Path) -> None:
    small, large = ({row["id"] for row in pipeline.documents_of(curated / name)} for name in ("small", "large"))
    assert small < large


def test_another_size_measures_nothing_again(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Iterator[Any]:
        raise AssertionError("a worker was asked")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "map", lambda self, function, tasks: never() if tasks else iter(()))
        curate(curated, "middle", universe().bits // 2, curated / "small")
    curate(curated, "alone", universe().bits // 2)
    for part in (curated / "alone" / "parts").iterdir():
        assert part.read_bytes() == (curated / "middle" / "parts" / part.name).read_bytes()
    assert json.loads((curated / "alone/manifest.json").read_text())["parts"]


def test_parts_and_what_is_missing_change_no_byte(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_jax.curation.reading.PART_BYTES", 60_000)
    parted, alone = curated / "parted", curated / "small"
    curate(curated, "parted", universe().bits // 3)
    assert len(list((parted / "stages/read").glob("*"))) > 3
    same = [path.relative_to(alone) for path in sorted((alone / "parts").iterdir())]
    assert all((parted / path).read_bytes() == (alone / path).read_bytes() for path in same) and same
    assert note(parted) == note(alone)
    for name in ("facts/part-00001.parquet", "names/part-00000.parquet", "frames.parquet"):
        (parted / "stages/01-knowledge" / name).unlink()
    for name in ("manifest.json", "stages/dropped-01.parquet", "stages/noted-01.json"):
        (parted / name).unlink()
    curate(curated, "parted", universe().bits // 3)
    assert all((parted / path).read_bytes() == (alone / path).read_bytes() for path in same)


def test_a_random_order_is_another_one_of_the_same_size(curated: Path) -> None:
    drawn = curate(curated, "random", universe().bits // 3, curated / "small", order="random", seed=1)
    kept, same = ({row["person"] for row in pipeline.documents_of(curated / name)} for name in ("random", "small"))
    assert kept != same and len(kept) == pytest.approx(len(same), rel=0.1)
    assert drawn["notes"]["knowledge"]["bits"] == note(curated / "small")["bits"]


def test_stages_of_another_plan_are_not_taken(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no finished curation; name the folder"):
        curate(curated, "other", 1000, tmp_path)
    config = with_steps(base(text_field="person"), "knowledge")
    with pytest.raises(UserError, match="was read with text_field=text, this one with person"):
        pipeline.curate(
            config.to_dict(), [str(curated / "in.jsonl")], tmp_path / "x", Engine("native", 1), curated / "small"
        )


def test_the_page_and_the_fate_say_why(curated: Path) -> None:
    from phi3_jax.curation.why import why

    page = (curated / "small/report.html").read_text()
    assert "<h2>Knowledge</h2>" in page and "each corpus lies within the next" in page
    kept = {row["id"] for row in pipeline.documents_of(curated / "small")}
    gone = next(row["id"] for row in pipeline.documents_of(curated / "large") if row["id"] not in kept)
    assert "dropped: beyond_budget" in why(curated / "small", gone)
    assert "bits of facts per word" in why(curated / "small", gone)


def test_the_surprise_of_few_values_of_many_is_the_entropy_they_were_drawn_from() -> None:
    draw = np.random.default_rng(0)
    for seen in (100, 1000):
        frame, value = np.zeros(seen, np.uint64), draw.integers(0, 256, seen).astype(np.uint64)
        assert knowledge.surprises(frame, value).mean() == pytest.approx(8, abs=0.4)
    assert knowledge.surprises(np.zeros(50, np.uint64), np.zeros(50, np.uint64)) == pytest.approx(0, abs=1e-9)


def test_a_sentence_on_nobody_states_nothing() -> None:
    names = frozenset(["Ada", "Lovelace", "London"])
    assert not facts.subjects("It rained in 1843, and 3 men left.", names.__contains__)
    sentence = facts.subjects("In 1843 Ada Lovelace lived in London. Ada Lovelace wrote.", names.__contains__)[0]
    found = {(fact.subject, fact.value, fact.frame) for fact in facts.stated(sentence, lambda _: False)}
    assert found == {("Ada Lovelace", "1843", "in"), ("Ada Lovelace", "London", "in")}


def test_a_size_is_a_name_or_a_number() -> None:
    from phi3_jax import experiment

    def of(words: str) -> int:
        return experiment.made(f"experiments/curation.py:{words}").rules["knowledge"]["parameters"]

    assert of("for=mini") == 110_592 < of("for=medium") < of("for=mini,scale=full")
    assert of("for=3.8B") == 3_800_000_000
    for words in ("for=mni", "scale=nano", "for=below,scale=full"):
        with pytest.raises(UserError):
            of(words)
