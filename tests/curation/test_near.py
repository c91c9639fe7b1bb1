"""Verified duplicates: what goes is a copy of what stays, what stays is no copy; candidates miss nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.curation import pipeline, shingles
from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.engine import Engine

pytest.importorskip("daft")
GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "curation"
WORDS = [f"w{i}" for i in range(3000)]


def run(rows: list[dict[str, Any]], folder: Path, **near: Any) -> dict[str, tuple[str, str, float]]:
    """{id of a dropped document: (reason, id of the one that stays, similarity)}, ids as the rows give them."""
    from pyarrow import parquet

    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = with_steps(base(), "exact", "near", near=near)
    pipeline.curate(config.to_dict(), [str(folder / "in.jsonl")], folder / "out", Engine("native", 1))
    found = [
        row for path in (folder / "out").glob("rejected/*/*.parquet") for row in parquet.read_table(path).to_pylist()
    ]
    own = {row["id"]: row["given_id"] for row in pipeline.documents_of(folder / "out")}
    return {row["given"]: (row["reason"], own[row["stays"]], row["similarity"]) for row in found}


def similarity(a: str, b: str) -> float:
    sets = [np.unique(shingles.Hashes(shingles.plain(text)).of(5)) for text in (a, b)]
    return shingles.jaccard(*sets)


def within(part: str, whole: str) -> float:
    a, b = (np.unique(shingles.Hashes(shingles.plain(text)).of(3)) for text in (part, whole))
    return shingles.common(a, b) / len(a)


def text(draw: random.Random, words: int) -> list[str]:
    return draw.choices(WORDS, k=words)


def test_hashes_are_those_of_the_words_alone() -> None:
    a = shingles.Hashes(shingles.plain("Ünder the BRIDGE, it's cold: 42 men."))
    b = shingles.Hashes("under the bridge its cold 42 men")
    assert a.words == 7 and (a.of(5) == b.of(5)).all() and len(a.of(5)) == 3
    assert len(set(b.of(1).tolist())) == 7
    assert b.of(3)[1] == shingles.Hashes("the bridge its").of(3)[0], "wherever it stands"
    assert shingles.Hashes("").of(5).size == 0 and shingles.Hashes("a b").of(5).size == 1


def test_bands_meet_as_often_as_the_similarity_says() -> None:
    draw = np.random.default_rng(0)
    factors, met = shingles.multipliers(140), []
    for _ in range(300):
        values = draw.integers(0, 2**64, 240, np.uint64)
        a, b = values[:200], values[40:]  # 160 shared of 240
        met.append(np.mean(shingles.bands(a, factors, 7) == shingles.bands(b, factors, 7)))
    assert np.mean(met) == pytest.approx((2 / 3) ** 7, rel=0.25)


def test_a_shared_run_of_words_shares_a_fingerprint() -> None:
    draw = random.Random(1)
    for _ in range(50):
        run_of, window = text(draw, 40), 32
        a = " ".join(text(draw, draw.randrange(500)) + run_of + text(draw, draw.randrange(500)))
        b = " ".join(text(draw, draw.randrange(500)) + run_of + text(draw, draw.randrange(500)))
        prints = [np.unique(shingles.fingerprints(shingles.Hashes(each).of(5), window)) for each in (a, b)]
        assert shingles.common(*prints) >= 1


def test_planted_copies_go_and_their_likes_stay(tmp_path: Path) -> None:
    draw, rows, near, inside, alike = random.Random(2), [], [], [], []
    for i in range(60):
        words = text(draw, 300)
        rows.append({"id": f"base{i}", "text": " ".join(words)})
        few, many = list(words), list(words)
        for j in draw.sample(range(300), 4):
            few[j] = draw.choice(WORDS)
        for j in draw.sample(range(300), 30):
            many[j] = draw.choice(WORDS)
        rows += [{"id": f"near{i}", "text": " ".join(few)}, {"id": f"alike{i}", "text": " ".join(many)}]
        rows.append({"id": f"inside{i}", "text": " ".join(words[60:160])})
        near.append(f"near{i}")
        inside.append(f"inside{i}")
        alike.append(f"alike{i}")
    found = run(rows, tmp_path)
    texts = {row["id"]: row["text"] for row in rows}
    pairs = sum((f"near{i}" in found) != (f"base{i}" in found) for i in range(60))
    assert pairs == 60, "one of each two copies goes"
    assert not any(name in found for name in alike)
    for i, name in enumerate(inside):
        stays = texts[f"near{i}" if f"base{i}" in found else f"base{i}"]
        assert (found.get(name, ("",))[0] == "contained") == (within(texts[name], stays) >= 0.98)
    assert sum(name in found for name in inside) > 30
    for name, (reason, stays, value) in found.items():
        if reason == "near_duplicate":
            assert similarity(texts[name], texts[stays]) == pytest.approx(value) and value >= 0.8


def test_a_chain_keeps_what_is_unlike_all_that_stay(tmp_path: Path) -> None:
    draw = random.Random(3)
    words = text(draw, 400)
    chain = []
    for i in range(8):
        chain.append({"id": str(i), "text": " ".join(words)})
        words = words[20:] + text(draw, 20)
    found = run(chain, tmp_path)
    kept = [row["text"] for row in chain if row["id"] not in found]
    assert 2 <= len(kept) < 8
    assert all(similarity(a, b) < 0.8 for a in kept for b in kept if a != b)


def test_the_source_that_is_named_first_stays(tmp_path: Path) -> None:
    words = text(random.Random(4), 200)
    rows = [
        {"id": "long", "source": "b", "text": " ".join([*words, "more"])},
        {"id": "short", "source": "a", "text": " ".join(words)},
    ]
    for at, (keep, goes) in enumerate([((), "short"), (("a", "b"), "long"), (("b",), "short")]):
        (folder := tmp_path / str(at)).mkdir()
        assert run(rows, folder, keep=keep).keys() == {goes}


@pytest.mark.shared("goldens/curation")
def test_golden_pairs(tmp_path: Path) -> None:
    """Word problems with other numbers and templates stay, changes of form and passages in longer texts go."""
    rows = [json.loads(line) for line in (GOLDENS / "pairs_docs.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (GOLDENS / "pairs.jsonl").read_text().splitlines()]
    found = run([{"id": row["id"], "text": row["text"]} for row in rows], tmp_path)
    for kind in ("numbers", "template"):
        assert not [row["id"] for row in rows if row["kind"] == kind and row["id"] in found]
        assert any(row["kind"] == kind for row in rows)
    for kind in ("surface", "contain"):
        of = [pair for pair in pairs if pair["kind"] == kind]
        assert len(of) == 10 and all((p["a"] in found) or (p["b"] in found) for p in of)
    plain = {(p["a"], p["b"]): p["jaccard_plain"] if p["kind"] == "numbers" else p["jaccard"] for p in pairs}
    left = [pair for pair, value in plain.items() if value >= 0.81 and not {*pair} & found.keys()]
    assert not left, "two that stay are less alike than .8"
    theirs = [json.loads(line) for line in (GOLDENS / "minhash_decisions.jsonl").read_text().splitlines()]
    dropped = sum(row["default"]["decision"] == "drop" for row in theirs)
    print(f"of {len(rows)} documents {len(found)} go; datatrove's unverified clusters drop {dropped}")
