"""Questions about pictures: each rule on hand-made replies, and the suite from a folder to its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.evaluation import picture_scores as scores
from phi3_jax.evaluation import vision_report

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
from hf_folders import vision_folder

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(
    ("reply", "gold", "worth"),
    [
        ("105", "100", 1), ("95.0", "100", 1), ("106", "100", 0), ("The answer is 3.1.", "3", 1), ("5%", "5", 0),
        ("5%", "0.05", 1), ("Blue", "blue", 1), ("blues", "blue", 0), ("0.0", "0", 0), ("0", "0", 1), ("1,020", "1000", 1),
        ("-10", "10", 0), ("nan", "10", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(reply: str, gold: str, worth: float) -> None:
    assert scores.relaxed(reply, [gold]) == worth
    assert scores.relaxed(reply, ["nothing", gold]) == worth


@pytest.mark.parametrize(
    ("reply", "golds", "worth"),
    [
        ("ITC Limited", ["itc limited"], 1.0), ("itc limit", ["itc limited"], 1 - 2 / 11), ("abcd", ["abxy"], 0.0),
        ("abcde", ["abcxy", "zzz"], 1 - 2 / 5), ("", ["a"], 0.0), ("a", ["b", "a"], 1.0),
    ],
)  # fmt: skip
def test_anls(reply: str, golds: list[str], worth: float) -> None:
    assert scores.anls(reply, golds) == pytest.approx(worth)


def test_anls_counts_edits() -> None:
    assert [scores._distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"))] == [3, 3, 2]


@pytest.mark.parametrize(
    ("reply", "golds", "worth"),
    [
        ("stop", ["stop"] * 10, 1.0), ("stop", ["stop"] * 3 + ["go"] * 7, (7 * 1 + 3 * 2 / 3) / 10),
        ("stop", ["stop"] + ["go"] * 9, 9 * (1 / 3) / 10), ("The Stop.", ["stop"] * 4 + ["x"] * 6, 1.0),
        ("two", ["2"] * 10, 1.0), ("no", ["yes"] * 10, 0.0), ("1,000", ["1000"] * 10, 1.0), ("a", ["a"], 1.0),
    ],
)  # fmt: skip
def test_vqa_accuracy_leaves_one_person_out(reply: str, golds: list[str], worth: float) -> None:
    assert scores.vqa(reply, golds) == pytest.approx(worth)


def test_yes_and_no_are_pope_s() -> None:
    said = ["Yes", "No, there is none.", "There is not.", "It is. No doubt.", "yes"]
    assert [scores.says_yes(reply) for reply in said] == [True, False, False, True, True]
    assert scores.f1([True, True, False, False], [True, False, True, False]) == pytest.approx(0.5)
    assert scores.f1([False] * 2, [True] * 2) == 0.0 and scores.f1([True] * 2, [True] * 2) == 1.0


def test_letters_and_numbers() -> None:
    options = ["a cat", "a dog", "a bird"]
    assert [scores.choice(reply, options, 1) for reply in ("B", "(B)", "The answer is B.", "A", "Z", "")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert scores.number_or_words("so it is 12.", ["12"]) == 1 and scores.number_or_words("21", ["12"]) == 0
    assert scores.number_or_words("The Moon", ["moon"]) == 1


# ------------------------------------------------------------------------------------------------ the suite


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    vision_folder(root / "hf")
    main(["convert", "--from", f"hf:{root / 'hf'}", "--to", str(root / "run")])
    return root / "run"


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for row in rows:
        for file in row.get("images", []):
            if "missing" not in file:
                Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name / file)
    (folder / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_gives_a_row_for_each_benchmark(model: Path, tmp_path: Path, capsys) -> None:
    write(tmp_path / "data", "ai2d", [
        {"id": "one", "question": "Which?", "images": ["a.png"], "choices": ["x", "y"], "answer": 0},
        {"question": "<image 2> or <image 1>?", "images": ["b.png", "c.png"], "choices": ["x", "y", "z", "w"], "answer": 3},
    ])  # fmt: skip
    write(tmp_path / "data", "pope", [
        {"question": f"A dog ({i})?", "images": ["d.png"], "answers": [gold]} for i, gold in enumerate(["yes", "no", "yes"])
    ])  # fmt: skip
    flags = ["--model", str(model), "--suite", "phi3_vision_report", "--data_dir", str(tmp_path / "data")]
    assert not main(["evaluate", *flags, "--out", str(tmp_path / "out"), "--batch", "2"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "evals.jsonl").read_text().splitlines()]
    found = {(row["task"], row["metric"]): row for row in rows}
    assert set(found) == {("pope", "accuracy"), ("pope", "f1"), ("ai2d", "accuracy")}
    assert found["ai2d", "accuracy"]["chance"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    items = [json.loads(x) for x in (tmp_path / "out/items/phi3_vision_report-ai2d.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == ["one", "2"]
    assert items[0]["prompt"] == f"<|image_1|>\nWhich?\nA. x\nB. y\n{vision_report.LETTER}"
    assert items[1]["prompt"].startswith("<|image_2|> or <|image_1|>?\nA. x\nB. y\nC. z\nD. w\n")
    for item in items:
        assert item["score"] == scores.choice(item["reply"], item["choices"], item["answer"])
    asked = [json.loads(x) for x in (tmp_path / "out/items/phi3_vision_report-pope.jsonl").read_text().splitlines()]
    right = [scores.says_yes(item["reply"]) == (item["answers"] == ["yes"]) for item in asked]
    assert found["pope", "accuracy"]["value"] == pytest.approx(np.mean(right)) and found["pope", "accuracy"]["n"] == 3
    assert "pope" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "q", "images": ["missing.png"], "answers": ["a"]},
            "test.jsonl:1, cannot be opened: No such file",
        ),
        (
            {"question": "q", "choices": ["a"], "answer": 1},
            "test.jsonl:1: answer=1 must be the gold choice's number, 0 to 0",
        ),
        ({"question": "q"}, "test.jsonl:1 has neither choices nor answers"),
        ({"images": []}, "test.jsonl:1 has no question"),
        ({"question": "<image 2>", "images": ["a.png"], "answers": ["a"]}, "item 1: <|image_2|> is in the prompt"),
        ({"question": "q", "images": "a.png", "answers": ["a"]}, "images must be a list of texts"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: dict, said: str, model: Path, tmp_path: Path, capsys) -> None:
    if isinstance(row.get("images"), str):
        (tmp_path / "chartqa").mkdir()
        (tmp_path / "chartqa" / "test.jsonl").write_text(json.dumps(row))
    else:
        write(tmp_path, "chartqa", [row])
    flags = ["--model", str(model), "--suite", "phi3_vision_report", "--data_dir", str(tmp_path)]
    assert main(["evaluate", *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_not_there_is_named(model: Path, tmp_path: Path, capsys) -> None:
    flags = ["evaluate", "--model", str(model), "--suite", "phi3_vision_report"]
    for more, said in (
        ([], "needs --data_dir"),
        (["--data_dir", str(tmp_path)], "holds no <benchmark>/test.jsonl"),
        (["--data_dir", str(tmp_path), "--tasks", "pop"], "unknown benchmark 'pop'"),
        (["--data_dir", str(tmp_path), "--tasks", "pope"], "pope/test.jsonl is not there"),
    ):
        assert main([*flags, *more]) == 2
        assert said in capsys.readouterr().err
