"""Items of benchmarks in a corpus: all that are planted are met, none whose words are permuted; three ways to act on it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import verbs
from phi3_jax.commands import call
from phi3_jax.curation import decontaminate, pipeline, shingles
from phi3_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT.parent / "shared" / "goldens" / "curation"


def benchmark(folder: Path, count: int, seed: int = 0) -> Path:
    """Items of 9 to 30 words."""
    draw = random.Random(seed)
    (folder / "toy").mkdir(parents=True)
    rows = [
        {
            "id": f"toy/{i}",
            "question": " ".join(f"q{draw.randrange(10**6)}" for _ in range(draw.randrange(9, 30))),
            "target": str(i),
        }
        for i in range(count)
    ]
    (folder / "toy" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def found_in(index: decontaminate.Index, text: str) -> set[str]:
    return {index.items[i].id for *_, owners in index.hits(shingles.plain(text)) for i in owners}


def test_planted_items_are_found_and_permuted_ones_are_not(tmp_path: Path) -> None:
    index = decontaminate.Index(decontaminate.items(str(benchmark(tmp_path, 300))))
    assert decontaminate.control(index, 0) == {"planted": 200, "found": 200, "permuted_found": 0}
    broken = decontaminate.Index(decontaminate.items(str(tmp_path)))
    broken._tables = {13: broken._tables[13]}
    assert decontaminate.control(broken, 0)["found"] < 200, "the control sees a search that misses short items"


def test_forms_of_an_item(tmp_path: Path) -> None:
    row = {"id": "a", "question": "Which of the two boats came home first that evening?", "target": "The green one"}
    (tmp_path / "b.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"id": "tiny", "question": "2+2?", "target": "4"})
    )
    index = decontaminate.Index(decontaminate.items(str(tmp_path)))
    filler = "Once upon a time there was rain. " * 5
    for text in (
        row["question"],
        "WHICH of the two boats -- came home first, that evening",
        f"{row['question']} {row['target']}",
        f"{row['question']}\n\nAnswer: {row['target']}",
    ):
        assert found_in(index, f"{filler}{text} {filler}") == {"a"}
    assert found_in(index, f"{filler}the green one{filler}") == set()
    assert index.short == 1


def test_what_several_benchmarks_share_is_no_evidence(tmp_path: Path) -> None:
    shared = "choose the best answer from the four options that are given below now please"
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"id": name, "question": f"{shared} {name} " + f"{name} " * 13, "target": "x"})
        )
    index = decontaminate.Index(decontaminate.items(str(tmp_path)))
    assert index.shared > 0 and found_in(index, shared) == set()
    assert found_in(index, "one " * 13) == {"one"}


def curated(tmp_path: Path, mode: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    pytest.importorskip("daft")
    config = f"experiments/curation.py:benchmarks={ROOT / 'examples/pages_benchmark'}"
    more = ["--config.order=decontaminate", f"--config.rules.decontaminate.mode={mode}", "--workers", "1"]
    given = [
        "--config",
        config,
        "--input",
        str(ROOT / "examples/pages/made.jsonl"),
        "--output",
        str(tmp_path / mode),
        *more,
    ]
    assert call(verbs.CURATE, given) == 0
    return list(pipeline.documents_of(tmp_path / mode)), json.loads((tmp_path / mode / "manifest.json").read_text())


@pytest.mark.parametrize("mode", ["drop", "cut", "tag"])
def test_three_ways_to_act(tmp_path: Path, mode: str) -> None:
    rows, manifest = curated(tmp_path, mode)
    assert manifest["contaminated"] == {"made": [f"made/{i}" for i in range(4)]}
    assert manifest["notes"]["decontaminate"]["control"] == {"planted": 6, "found": 6, "permuted_found": 0}
    questions = [
        json.loads(line)["question"]
        for line in (ROOT / "examples/pages_benchmark/made/test.jsonl").read_text().splitlines()
    ]
    texts = " ".join(row["text"] for row in rows)
    assert any(row["planted"] == "permuted:made/4" for row in rows)
    if mode == "tag":
        assert len(rows) == 101 and sorted(row["contaminated"] for row in rows)[-4:] == [f"made/{i}" for i in range(4)]
    else:
        assert not any(question in texts for question in questions)
        assert len(rows) == 97 or mode == "cut"
    if mode == "cut":
        cut = [row for row in rows if (row["planted"] or "").startswith("contaminated")]
        assert cut and all(len(row["text"]) >= decontaminate.PIECE for row in cut)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"id": 1, "frage": "x"}', "has no text in question and answer or target; its fields are 'id', 'frage'"),
        ("[1]", "is no object; an item has the fields question and answer or target"),
        ("{broken", "cannot be read as JSON"),
        ("", "holds no items"),
    ],
)
def test_a_folder_of_another_form_is_named(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(UserError, match=line):
        decontaminate.items(str(tmp_path))
    with pytest.raises(UserError, match="holds no items; give a folder of NAME/test.jsonl"):
        decontaminate.listed(str(tmp_path / "nothing"))


@pytest.mark.shared("benchmarks")
def test_the_items_of_the_suite_are_found() -> None:
    index = decontaminate.Index(decontaminate.items(str(ROOT.parent / "shared" / "benchmarks")))
    assert len(index.items) > 5000 and index.short < 10
    assert decontaminate.control(index, 1) == {"planted": 200, "found": 200, "permuted_found": 0}
