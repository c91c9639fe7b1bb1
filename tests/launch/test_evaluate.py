"""The command `launch/evaluate.py` from end to end: a tiny model on bytes, benchmarks written here, a judge of our own."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "reporting"))
pytest.importorskip("lm_eval")
import fake_study
import test_harness
import test_mt_bench

import phi3_jax
from phi3_jax import verbs
from phi3_jax.__main__ import main
from phi3_jax.evaluation import command, stock
from phi3_jax.interop import convert
from phi3_jax.interop.templates import JINJA
from phi3_jax.models.spec import init_params
from phi3_jax.records import checkpoint, files, table
from phi3_jax.reporting.page import write_report

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 256


def row(benchmark: str, number: int, **rest) -> dict:
    empty = {"context": "", "choices": [], "answer": -1, "target": "", "aliases": [], "rationale": "", "subset": ""}
    return {"id": f"{benchmark}/{number}", "benchmark": benchmark} | empty | rest


def boolq(number: int) -> dict:
    about = {"context": f"Fact {number}.", "question": f"is {number} even?", "choices": ["no", "yes"]}
    return row("boolq", number, type="multiple_choice", answer=number % 2, target=["no", "yes"][number % 2], **about)


def trivia(number: int) -> dict:
    return row("triviaqa", number, type="generate", question=f"What is {number}?", target=str(number), aliases=["x"])


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, make in (("boolq", boolq), ("triviaqa", trivia)):
        write_lines(folder / name / "test.jsonl", [make(i) for i in range(9)])
        write_lines(folder / name / "fewshot.jsonl", [make(i) for i in range(20, 26)])
    return test_mt_bench.write_data(folder)


def make_run(folder: Path, tokenizer: str | None = "bytes", step: int = 40, steps: int = 40) -> Path:
    """A run folder with one checkpoint of a random model."""
    cfg = phi3_jax.proxy("mini", "pico", "clean", vocab=320, context=CONTEXT)
    params = init_params(cfg, 0)
    params["unembedding"] = jax.random.normal(jax.random.key(1), params["unembedding"].shape) * 0.3
    keeper = checkpoint.Checkpointer(folder / "checkpoints")
    keeper.save(step, {"params": params}, {})
    keeper.wait()
    write_lines(folder / "data" / "manifest.json", [{"tokenizer": {"kind": tokenizer}}])
    tree = {"model": dataclasses.asdict(cfg), "data": {"folder": str(folder / "data")}, "steps": steps}
    (folder / "config.json").write_text(json.dumps({"name": folder.name, "config": tree}))
    base = {"step": step, "tokens": 1056 * step, "flops": 1e9}
    write_lines(folder / "metrics.jsonl", [base | {"loss": 3.0}])
    write_lines(folder / "evals.jsonl", [base | {"suite": "text", "task": "docs", "metric": "loss", "value": 3.0}])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def evaluate(*words: object) -> int:
    return main(["evaluate", *[str(w) for w in words]])


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_suite_from_end_to_end(run: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    first = (run / "evals.jsonl").read_bytes()
    words = ["--model", run, "--suite", "phi3_report", "--data_dir", data, "--limit", 6, "--tasks", "boolq,triviaqa"]
    assert evaluate(*words, "--batch", 4) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].split() == ["task", "scoring", "n", "score", "95%", "interval", "chance"]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["boolq", "letter"],
        ["boolq", "harness"],
        ["triviaqa", "generate"],
    ]
    assert "6 (subset of 3270)" in lines[1] and lines[1].rstrip().endswith("50.0%")
    written = (run / "evals.jsonl").read_bytes()
    assert written.startswith(first)
    rows = rows_in(run / "evals.jsonl")[1:]
    assert [r["task"] for r in rows] == ["boolq/letter", "boolq/harness", "triviaqa"]
    for r in rows:
        assert (r["suite"], r["step"], r["tokens"], r["n"], r["limit"]) == ("phi3_report", 40, 42240, 6, 6)
        assert r["scorer"] == 2
        assert 0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["stderr"] is not None and r["chat"] is False
    items = rows_in(run / "items" / "phi3_report-boolq-harness.jsonl")
    assert len(items) == 6 and all(len(i["logprobs"]) == 2 and i["logprobs"][0] < 0 for i in items)
    best = [max((0, 1), key=lambda k: i["logprobs"][k]) for i in items]
    assert rows[1]["value"] == sum(b == i % 2 for i, b in enumerate(best)) / 6
    assert len(rows_in(run / "items" / "phi3_report-triviaqa.jsonl")) == 6

    # Again: the same rows, not twice as many; a part of the tasks leaves the others' rows alone.
    assert evaluate(*words, "--batch", 2) == 0
    again = rows_in(run / "evals.jsonl")
    assert [r["task"] for r in again] == ["docs", "boolq/letter", "boolq/harness", "triviaqa"]
    assert [r["value"] for r in again[1:]] == [r["value"] for r in rows]
    assert evaluate(*words[:-2], "--tasks", "boolq", "--scoring", "harness") == 0
    assert sorted(r["task"] for r in rows_in(run / "evals.jsonl")) == sorted(r["task"] for r in again)
    assert not list(run.glob("*.new")) and not list(run.glob(".probe*"))


def test_a_quantised_run_is_evaluated_as_any(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    words = ["--model", str(run), "--format", "q8_0", "--out", str(tmp_path / "q"), "--tokens", "0"]
    assert main(["quantize", *words]) == 0
    assert evaluate("--model", tmp_path / "q", "--data_dir", data, "--tasks", "boolq", "--limit", 4) == 0
    rows = rows_in(tmp_path / "q" / "evals.jsonl")
    assert [(r["task"], r["n"], r["model"]) for r in rows] == [
        (f"boolq/{scoring}", 4, f"{tmp_path / 'q'} q8_0") for scoring in ("letter", "harness")
    ]


def test_replies_without_a_judge_are_no_score(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    before = (run / "evals.jsonl").read_bytes()
    words = ["--model", run, "--data_dir", data, "--tasks", "mt_bench", "--limit", 2, "--out", tmp_path / "out"]
    assert evaluate(*words) == 0
    text = capsys.readouterr().out
    assert "no score without a judge" in text and "2 replies" in text
    assert len(rows_in(tmp_path / "out" / "mt_bench_replies.jsonl")) == 2
    assert not (tmp_path / "out" / "evals.jsonl").exists() and (run / "evals.jsonl").read_bytes() == before


def test_a_judge_gives_rows_with_its_name_and_one_that_is_down_loses_nothing(run: Path, data: Path, capsys) -> None:
    server = test_mt_bench.Server([test_mt_bench.says("Rating: [[4]]"), test_mt_bench.says("[[6]]")])
    words = ["--model", run, "--data_dir", data, "--tasks", "mt_bench", "--limit", 1, "--judge_model", "judge-1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi3_jax.inference.endpoint.time.sleep", lambda _: None)
        assert evaluate(*words, "--judge", "http://127.0.0.1:9/v1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the judge judge-1 at http://127.0.0.1:9/v1") and len(error.splitlines()) == 1
    replies = (run / "mt_bench_replies.jsonl").read_bytes()
    try:
        assert evaluate(*words, "--judge", server.url) == 0
    finally:
        server.close()
    assert (run / "mt_bench_replies.jsonl").read_bytes() == replies
    rows = {r["task"]: r for r in rows_in(run / "evals.jsonl") if r["suite"] == "phi3_report"}
    assert rows["mt_bench"]["value"] == 5 and rows["mt_bench"]["metric"] == "rating by judge-1"
    assert rows["mt_bench"]["subset_of"] == 10 and rows["mt_bench/turn2"]["value"] == 6
    assert "mt_bench" in capsys.readouterr().out
    # A model of the same name and other weights gets replies of its own.
    source = command.locate(str(run))
    assert json.loads(replies.splitlines()[0])["model"] == source.identity


def test_a_bad_judge_scores_nothing(run: Path, data: Path, capsys) -> None:
    server = test_mt_bench.Server([test_mt_bench.says("lovely")])
    words = ["--model", run, "--data_dir", data, "--tasks", "mt_bench", "--limit", 1, "--judge_model", "j"]
    try:
        assert evaluate(*words, "--judge", server.url) == 2
    finally:
        server.close()
    assert "no judgement by j holds a rating" in capsys.readouterr().err
    assert len(rows_in(run / "evals.jsonl")) == 1


def test_a_folder_from_elsewhere_in_its_chat_template(
    run: Path, data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data_dir", data, "--tasks", "boolq,mt_bench", "--limit", 2, "--chat"]
    assert evaluate("--model", run, *words) == 2
    assert "bytes tokenizer has no <|" in capsys.readouterr().err
    assert not (run / "items").exists()
    convert.export_run(run, tmp_path / "phi-3-tiny")
    for name in ("tokenizer_config.json", "generation_config.json"):  # of the byte tokenizer
        (tmp_path / "phi-3-tiny" / name).unlink(missing_ok=True)
    test_harness.write_tokenizer(tmp_path / "phi-3-tiny")
    monkeypatch.chdir(tmp_path)
    assert evaluate("--model", "hf:phi-3-tiny", *words) == 2
    assert "phi-3-tiny brings no chat template" in capsys.readouterr().err
    config = json.dumps({"chat_template": JINJA["mini"]})
    (tmp_path / "phi-3-tiny" / "tokenizer_config.json").write_text(config)
    assert evaluate("--model", "hf:phi-3-tiny", *words) == 0
    said = capsys.readouterr()
    assert "chat template mini, as phi-3-tiny/tokenizer_config.json says" in said.err and said.out.count("boolq") == 2
    out = tmp_path / "runs" / "evals" / "phi-3-tiny"
    rows = rows_in(out / "evals.jsonl")
    assert [r["task"] for r in rows] == ["boolq/letter", "boolq/harness"]
    assert all(r["chat"] is True and r["step"] == 0 and r["model"] == "hf:phi-3-tiny" for r in rows)
    assert len(rows_in(out / "items" / "phi3_report-boolq-letter.jsonl")) == 2
    assert [r["settings"]["template"] for r in rows_in(out / "mt_bench_replies.jsonl")] == ["mini"] * 2


# ------------------------------------------------------------------------------------------------ what a user gets wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "phi3_reprot"], ["unknown suite 'phi3_reprot'", "did you mean 'phi3_report'"]),
        (["--tasks", "arc_chalenge"], ["unknown benchmark 'arc_chalenge'", "did you mean 'arc_challenge'"]),
        (["--tasks", "boolq,"], ["empty name"]),
        (["--limit", "0"], ["--limit 0 must be an integer, 1 or more"]),
        (["--limit", "many"], ["--limit many must be an integer"]),
        (["--limit", "-5"], ["--limit -5 must be"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--scoring", "leter"], ["--scoring leter is unknown", "'letter'"]),
        (["--data_dir", "nowhere"], ["--data_dir nowhere is no folder"]),
        (["--tasks", "mt_bench"], ["mt_bench needs --data_dir"]),
        (["--judge", "http://x"], ["--judge_model missing"]),
        (["--judge_model", "x"], ["--judge missing"]),
        (["--judge", "localhost", "--judge_model", "x", "--tasks", "boolq"], ["--judge localhost"]),
        (["--judge", "http://x", "--judge_model", "x", "--tasks", "boolq"], ["rates MT-Bench only"]),
        (["--sute", "x"], ["unknown argument '--sute'", "'--suite'"]),
        (["--out"], ["--out needs a value"]),
        (["--out", ""], ["--out is empty"]),
        (["--chat=yes"], ["--chat takes no value"]),
        (["--suite", "lm-eval:"], ["empty name"]),
        (["--suite", "lm-eval:arc_easy", "--tasks", "x"], ["named in --suite"]),
    ],
)
def test_wrong_words_end_in_one_line(words: list[str], said: list[str], tmp_path: Path, capsys) -> None:
    assert evaluate("--model", tmp_path / "never-read", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert all(word in error for word in said), error
    assert not list(tmp_path.iterdir())


def test_no_model_no_tokenizer_no_code(data: Path, tmp_path: Path, capsys) -> None:
    assert evaluate("--suite", "phi3_report") == 2
    assert "--model missing" in capsys.readouterr().err
    assert evaluate("--model", tmp_path / "nowhere", "--data_dir", data, "--tasks", "boolq") == 2
    assert "nowhere" in capsys.readouterr().err
    bare = make_run(tmp_path / "bare", tokenizer="sentencepiece")
    files = sorted(p.name for p in bare.iterdir())
    assert evaluate("--model", bare, "--data_dir", data, "--tasks", "boolq") == 2
    error = capsys.readouterr().err
    assert "came without a tokenizer" in error and len(error.splitlines()) == 1
    assert evaluate("--model", bare, "--data_dir", data, "--tasks", "humaneval") == 2
    assert "--allow_code_execution" in capsys.readouterr().err
    assert sorted(p.name for p in bare.iterdir()) == files


def test_a_wrong_data_file_is_named_before_the_model_is_read(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    rows = [boolq(i) for i in range(3)]
    write_lines(tmp_path / "d" / "boolq" / "test.jsonl", [*rows, rows[0] | {"choices": "no"}])
    write_lines(tmp_path / "d" / "boolq" / "fewshot.jsonl", rows)
    assert evaluate("--model", run, "--data_dir", tmp_path / "d", "--tasks", "boolq") == 2
    error = capsys.readouterr().err
    assert "choices" in error and "4" in error and len(error.splitlines()) == 1
    assert len(rows_in(run / "evals.jsonl")) == 1 and not (run / "items").exists()


def test_a_run_that_still_trains_needs_a_folder_of_its_own(data: Path, tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "half", step=20)
    words = ["--model", run, "--data_dir", data, "--tasks", "boolq", "--scoring", "harness", "--limit", 2]
    assert evaluate(*words) == 2
    assert "at step 20 of 40" in capsys.readouterr().err
    assert evaluate(*words, "--out", tmp_path / "out") == 0
    assert rows_in(tmp_path / "out" / "evals.jsonl")[0]["step"] == 20


def test_a_place_that_cannot_be_written_is_said_first(run: Path, data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    words = ["--model", run, "--data_dir", data, "--tasks", "boolq", "--limit", 1, "--out", tmp_path / "file"]
    assert evaluate(*words) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "evals.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(phi3_jax.errors.UserError, match="No space left"):
        command.write_rows(run / "evals.jsonl", [{"step": 40, "suite": "s", "task": "t", "metric": "m", "value": 1.0}])
    assert (run / "evals.jsonl").read_bytes() == before and not list(run.glob("*.new"))


def test_rows_of_others_are_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    key = {"suite": "s", "task": "t", "metric": "m"}
    path.write_bytes(
        b'{"step":  40, "suite": "s", "task": "other"}\n{"torn\n' + json.dumps({"step": 20, **key}).encode()
    )
    before = path.read_bytes().splitlines()
    for value in (0.25, float("nan")):
        command.write_rows(path, [{"step": 40, **key, "value": value}])
    lines = path.read_bytes().splitlines()
    assert lines[:3] == before and len(lines) == 4
    assert json.loads(lines[3])["value"] is None


# ------------------------------------------------------------------------------------------------ around it


def test_a_report_of_a_study_with_such_rows(tmp_path: Path) -> None:
    study = fake_study.write_study(tmp_path / "study", budgets=(4_000_000,))
    for i, folder in enumerate(sorted(p for p in study.iterdir() if (p / "evals.jsonl").exists())):
        last = rows_in(folder / "evals.jsonl")[-1]
        base = {k: last[k] for k in ("step", "tokens", "flops", "budget")}
        rows = [
            base | {"suite": "phi3_report", "task": task, "metric": metric, "value": 0.25 + i / 10, "n": 40}
            | {"low": 0.1, "high": 0.6, "chance": 0.25, "stderr": 0.07, "shots": 5, "subset_of": 1000}
            for task, metric in (("boolq/letter", "accuracy"), ("boolq/harness", "acc"), ("mmlu/letter/law", "accuracy"))
        ]  # fmt: skip
        rows.append(base | {"suite": "phi3_report", "task": "mt_bench", "metric": "rating by j", "value": 3.0 + i})
        command.write_rows(folder / "evals.jsonl", rows)
    page = write_report(study)
    html = (page if isinstance(page, Path) and page.is_file() else next(study.glob("*.html"))).read_text()
    assert "Phi3 report boolq/letter accuracy" in html and "rating by j" in html
    with next(study.rglob("runs.csv")).open(newline="") as file:
        table_rows = list(csv.DictReader(file))
    scores = {float(r["phi3_report/boolq/harness/acc"]) for r in table_rows}
    assert scores == {0.25, 0.35, 0.45}
    assert all(run.finals for run in table.read_study(study).runs)


def test_stock_tasks_are_looked_up_by_name(run: Path, capsys) -> None:
    assert evaluate("--model", run, "--suite", "lm-eval:arc_chalenge") == 2
    error = capsys.readouterr().err
    assert "lm-eval has no task 'arc_chalenge'" in error and "'arc_challenge'" in error and len(error) < 400


def test_rows_of_stock_results() -> None:
    samples = [{"filter": "none", "acc": float(i % 4 == 0), "doc_id": i} for i in range(8)]
    results = {
        "results": {"t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": "N/A", "ppl,none": 12.5}},
        "samples": {"t": samples}, "n-samples": {"t": {"original": 100, "effective": 8}}, "n-shot": {"t": 5},
    }  # fmt: skip
    acc, ppl = stock.stock_rows(results, None)
    assert (acc["value"], acc["n"], acc["subset_of"], acc["shots"]) == (0.25, 8, 100, 5)
    assert acc["low"] < 0.25 < acc["high"] and acc["stderr"] == pytest.approx((0.25 * 0.75 / 8) ** 0.5)
    assert (ppl["value"], ppl["low"], ppl["stderr"]) == (12.5, None, None)
    assert [i["task"] for i in stock.stock_items(results, None)] == ["t"] * 8
    text = command.table([acc, ppl])
    assert "25.0%" in text and "12.5" in text and "1250" not in text


def test_the_script_prints_its_usage() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--help"], capture_output=True, text=True, check=True
    )
    for flag in verbs.EVALUATE.flags:
        assert f"--{flag}" in done.stdout
