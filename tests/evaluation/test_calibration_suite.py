"""The suite `calibration`: known confidences give known numbers; the command, stopped and gone on with."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
pytest.importorskip("lm_eval")
from test_evaluate import boolq, evaluate, make_run, rows_in, trivia, write_lines

from phi3_jax.evaluation import calibration
from phi3_jax.inference.engine import Engine


def items(right: np.ndarray, sure: np.ndarray) -> list[dict]:
    return [{"correct": bool(r), "confidence": float(s)} for r, s in zip(right, sure, strict=True)]


def values(right: np.ndarray, sure: np.ndarray) -> dict[str, dict]:
    return {row["metric"]: row for row in calibration.of_items("t", items(right, sure))}


def test_a_model_that_knows_what_it_knows_and_one_that_boasts() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.2, 1, 4000)
    right = rng.random(4000) < sure
    honest, boasts = values(right, sure), values(right, np.full(4000, 0.99))
    assert honest["ece"]["value"] < 0.03 < 0.3 < boasts["ece"]["value"] == pytest.approx(0.99 - right.mean())
    assert honest["brier"]["value"] < boasts["brier"]["value"] == pytest.approx(np.mean((0.99 - right) ** 2))
    assert honest["accuracy_at_50"]["value"] > honest["accuracy_at_80"]["value"] > honest["accuracy"]["value"]
    assert boasts["auroc"]["value"] == 0.5 and honest["auroc"]["low"] > 0.6
    assert honest["accuracy_at_90"]["n"] == 3600


def test_errors_of_a_few_answers_by_hand() -> None:
    right, sure = np.array([True, False, True]), np.array([0.9, 0.8, 0.3])
    found = values(right, sure)
    assert found["ece"]["value"] == pytest.approx((0.1 + 0.8 + 0.7) / 3)
    assert found["brier"]["value"] == pytest.approx((0.01 + 0.64 + 0.49) / 3)
    assert found["auroc"]["value"] == 0.5 and found["accuracy_at_50"]["value"] == 0.5
    assert "auroc" not in values(np.ones(3, bool), sure), "nothing to tell apart"


@pytest.mark.parametrize(
    ("text", "unknown"), [("I don't know.", True), ("I'm not sure", True), ("Known as Paris", False)]
)
def test_what_counts_as_not_knowing(text: str, unknown: bool) -> None:
    assert bool(calibration._UNKNOWN.search(text)) == unknown


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch, capsys) -> None:
    for name, make in (("boolq", boolq), ("triviaqa", trivia)):
        write_lines(tmp_path / "data" / name / "test.jsonl", [make(i) for i in range(5)])
        write_lines(tmp_path / "data" / name / "fewshot.jsonl", [make(i) for i in range(20, 26)])
    long = [{"id": i, "prompt": f"Who is {i}?", "reference": ["Nobody.", "A word."]} for i in range(3)]
    del long[0]["reference"]
    (tmp_path / "data" / "longform" / "documents").mkdir(parents=True)
    (tmp_path / "data" / "longform" / "documents" / "zero.txt").write_text("0 is nobody.")
    write_lines(tmp_path / "data" / "longform" / "test.jsonl", long)
    run = make_run(tmp_path / "run")
    words = ["--model", run, "--suite", "calibration", "--data_dir", tmp_path / "data", "--batch", 2]
    assert evaluate(*words, "--out", tmp_path / "whole") == 0
    score, calls = Engine.score, []

    def stop_at_second(self, pairs):
        calls.append(len(pairs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "score", stop_at_second)
        assert evaluate(*words, "--out", tmp_path / "b") == 130
        assert evaluate(*words, "--out", tmp_path / "b") == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*.jsonl")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").rglob("*.jsonl")} == files and len(files) == 4
    assert "are those of an earlier start" in capsys.readouterr().err
    rows = {(r["task"], r["metric"]): r for r in rows_in(tmp_path / "whole" / "evals.jsonl")}
    assert ("triviaqa", "p_true_ece") in rows and ("triviaqa", "abstained") in rows and ("boolq", "ece") in rows
    found = rows_in(tmp_path / "whole" / "items" / "calibration-boolq.jsonl")
    assert all(0.5 <= item["confidence"] <= 1 and len(item["logprobs"]) == 2 for item in found)
    assert evaluate(*words, "--devices", 3, "--out", tmp_path / "many") == 0
    many = {(r["task"], r["metric"]): r["value"] for r in rows_in(tmp_path / "many" / "evals.jsonl")}
    assert many == pytest.approx({key: row["value"] for key, row in rows.items()}, abs=1e-5)
    for path in (tmp_path / "whole" / "items").iterdir():
        texts = [
            [(i["id"], i["prompt_hash"], i.get("reply")) for i in rows_in(p)]
            for p in (path, tmp_path / "many" / "items" / path.name)
        ]
        assert texts[0] == texts[1], "the same prompts and replies on three devices as on one"
    assert evaluate(*words, "--devices", 99) == 2
    assert "99 copies of the model are more than the 8 devices here" in capsys.readouterr().err
    words[3] = "longcontext"
    assert evaluate(*words, "--devices", 2) == 2 and "--suite longcontext runs on one device" in capsys.readouterr().err
    words[3] = "calibration"
    assert ("longform", "claims") in rows and ("longform", "silent") in rows
    free = rows_in(tmp_path / "whole" / "items" / "calibration-longform.jsonl")
    assert len(free) == 3 and all(len(item["claims"]) == len(item["supported"]) and "reply" in item for item in free)
    (tmp_path / "data" / "longform" / "test.jsonl").unlink()
    assert (
        evaluate(*words, "--tasks", "longform") == 2 and "longform/test.jsonl does not exist" in capsys.readouterr().err
    )
    for more, said in ((["--tasks", "boolk"], "did you mean 'boolq'"), (["--tasks", "mmlu"], "mmlu")):
        assert evaluate(*words, *more) == 2 and said in capsys.readouterr().err
