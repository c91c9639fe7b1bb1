"""Lines of several documents: what is taken out is still in the corpus, and no other line goes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.curation import lines, pipeline, store
from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.engine import Engine

pytest.importorskip("daft")
WORDS = [f"w{i}" for i in range(400)]


def run(rows: list[dict[str, Any]], folder: Path, **more: Any) -> dict[str, str]:
    """{id: text} of the documents that stay."""
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = with_steps(base(), "lines", lines=more)
    pipeline.curate(config.to_dict(), [str(folder / "in.jsonl")], folder / "out", Engine("native", 1))
    return {row["given_id"]: row["text"] for row in pipeline.documents_of(folder / "out")}


def made(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of lines that some of them share, in other capitals and with other blanks."""
    draw = random.Random(seed)
    common = [" ".join(draw.choices(WORDS, k=draw.randrange(2, 9))) for _ in range(40)]
    found = []
    for i in range(count):
        own = [" ".join([f"only{i}", *draw.choices(WORDS, k=6)]) for _ in range(draw.randrange(1, 9))]
        shared = [draw.choice((str.upper, str.title, lambda s: f"  {s} "))(s) for s in draw.sample(common, 5)]
        text = own + shared
        draw.shuffle(text)
        found.append({"id": str(i), "source": draw.choice("ab"), "text": "\n".join(text)})
    return found


def keys(text: str) -> list[int]:
    return [key for key, words in map(lines.key, text.split("\n")) if words >= 3]


def test_a_line_stays_in_one_document_and_is_lost_in_none(tmp_path: Path) -> None:
    rows = made()
    kept = run(rows, tmp_path)
    assert 10 < len(kept) < len(rows)
    left = [key for text in kept.values() for key in set(keys(text))]
    assert len(left) == len(set(left)), "no line is in two documents"
    read = {row["id"]: row["text"] for row in rows}
    assert set(left) == {key for name in kept for key in keys(read[name])}, "what was taken out is still there"
    for name, text in kept.items():
        gone = set(keys(read[name])) - set(keys(text))
        assert text.split("\n") == [line for line in read[name].split("\n") if lines.key(line)[0] not in gone]
        assert len(text.split()) >= 0.5 * len(read[name].split())
    assert any(kept[name] != read[name] for name in kept)
    note = json.loads((tmp_path / "out/manifest.json").read_text())["notes"]["lines"]
    assert note["lines"] == sum(len(read[n].split("\n")) - len(kept[n].split("\n")) for n in kept) > 0


def test_a_document_that_would_lose_too_much_goes_and_anchors_nothing(tmp_path: Path) -> None:
    first, second, third = "the very first line here", "a second line of words", "a third line of words"
    rows = [
        {"id": "a", "text": f"{first}\n{' '.join(WORDS[:30])}"},
        {"id": "b", "text": f"{first}\n{first}\n{first}\n{second}"},
        {"id": "c", "text": f"{second}\n{third} and more"},
    ]
    kept = run(rows, tmp_path)
    assert kept.keys() == {"a", "c"}
    assert second in kept["c"], "the line of a document that went is not held by it"
    (tmp_path / "other").mkdir()
    assert run(rows, tmp_path / "other", most_removed=0.9)["b"] == second


def test_short_lines_and_exempt_genres_stay(tmp_path: Path) -> None:
    long, own = "return the value of it", " ".join(WORDS[:20])
    rows = [
        {"id": f"{g}{i}", "genre": g, "text": f"{long}\nI am\n{own} {g}{i}"} for g in ("code", "text") for i in "01"
    ]
    kept = run(rows, tmp_path, exempt=("code",))
    assert len(kept) == 4 and all("I am" in text for text in kept.values())
    assert sorted(name for name in kept if long in kept[name])[:2] == ["code0", "code1"]
    assert sum(long in text for text in kept.values()) == 3


def test_the_source_that_is_named_first_keeps_its_lines(tmp_path: Path) -> None:
    rows = made(20, 1)
    for at, first in enumerate("ab"):
        (folder := tmp_path / str(at)).mkdir()
        kept = run(rows, folder, keep=(first,), most_removed=1.0)
        mine = {key for row in rows if row["source"] == first for key in keys(row["text"])}
        others = [kept[row["id"]] for row in rows if row["source"] != first and row["id"] in kept]
        assert others and not mine & {key for text in others for key in keys(text)}


def test_several_passes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(made(), tmp_path)
    paths = sorted((tmp_path / "out/stages/00-lines").glob("part-*"))
    whole = lines._shared(paths)
    monkeypatch.setattr(lines, "_PASS", max(1, sum(store.count(p) for p in paths) // 7))
    assert all((lines._shared(paths)[name] == whole[name]).all() for name in whole) and len(whole["doc"]) > 100
    page = (tmp_path / "out/report.html").read_text()
    assert kept and "lines were taken out of" in page
