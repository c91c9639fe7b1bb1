"""The suite: rows of every task, items that pair models, what is effective, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.configs import LongRope
from phi3_jax.evaluation import long_context
from phi3_jax.models.spec import init_params
from phi3_jax.records import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads bytes, extended from 128 to 512."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    cfg = dataclasses.replace(phi3_jax.proxy("mini", "femto", "clean", vocab=259, context=512), layers=1)
    cfg = dataclasses.replace(cfg, longrope=LongRope(128, (1.0,) * 4, (1.0, 2.0, 3.0, 4.0)))
    params = init_params(cfg, 0)
    params["unembedding"] = jax.random.normal(jax.random.key(1), params["unembedding"].shape)
    keeper = checkpoint.Checkpointer(folder / "checkpoints")
    keeper.save(3, {"params": params}, {})
    keeper.wait()
    record = {"name": "long", "config": {"model": dataclasses.asdict(cfg), "steps": 3}, "tokenizer": {"kind": "bytes"}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("text")
    lines = [{"text": f"{i} " + " ".join(rng.choice(["some", "long", "text", "here."], 300))} for i in range(60)]
    (folder / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluate(run: Path, data: Path, out: Path, *more: object) -> int:
    words = ["--model", run, "--suite", "longcontext", "--data_dir", data, "--out", out, "--limit", 4, *more]
    return main(["evaluate", *map(str, words)])


def rows_in(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / "evals.jsonl").open()]
    return {f"{row['task']} {row['metric']}": row for row in rows}


def test_every_kind_of_task_has_rows(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--tasks", "needles,positions,passkey,niah_single_1", "--lengths", "256,512", "--depths", 2)
    assert evaluate(run, data, tmp_path / "one", *words) == 0
    told = capsys.readouterr().out
    rows = rows_in(tmp_path / "one")
    for task in ("needles 256 digits", "needles 512 exact", "passkey 512 match", "effective_length tokens"):
        assert task in rows and rows[task]["suite"] == "longcontext"
    assert "needles 512/depth 0.25 digits" in rows and "needles 512/depth 0.75 digits" in rows
    assert rows["positions 256-512 loss"]["n"] == long_context.ROWS and "positions 0-16" in told
    assert "/depth" not in told
    items = [json.loads(line) for line in (tmp_path / "one/items/longcontext-passkey.jsonl").open()]
    assert len(items) == 8 and {item["length"] for item in items} == {256, 512}
    # items depend on task and length alone
    assert evaluate(run, data, tmp_path / "two", "--tasks", "passkey", "--lengths", "512", "--depths", 2) == 0
    again = [json.loads(line) for line in (tmp_path / "two/items/longcontext-passkey.jsonl").open()]
    assert again == [item for item in items if item["length"] == 512]


def test_the_effective_length_is_where_all_shorter_ones_reach_it_too() -> None:
    scores = {task: {64: 1.0, 128: 0.9, 256: 0.7, 512: 0.95} for task in ("vt", "cwe")}
    (row,) = long_context.effective(scores, 64)
    assert row["value"] == 128 and row["threshold"] == 85.6
    assert long_context.effective({"vt": {64: 0.5, 128: 1.0}}, 64)[0]["value"] == 0
    (row,) = long_context.effective({"needles": {64: 0.8, 128: 0.73, 256: 0.71}}, 64)
    assert row["value"] == 128 and row["threshold"] == pytest.approx(0.72)
    assert long_context.effective({"needles": {64: 0.69, 128: 0.73}}, 64) == []  # the base does not know needles
    assert long_context.effective({"needles": {128: 0.9}}, 64) == []  # it was not asked at its own length


def test_an_oracle_has_all_digits_and_a_guesser_chance(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = dict(
        data_dir=str(data), tasks="needles", lengths="256", limit=300, depths=None, seed=0, batch=8, chat=False
    )  # fmt: skip
    suite = long_context.Suite(phi3_jax.load(run), long_context.asked(flags))

    def judged(shuffled: bool) -> float:
        def judge(rows):
            right = np.take_along_axis(rows.targets, rows.index, 1)
            said = np.random.default_rng(0).permutation(right) if shuffled else right
            return np.zeros(right.shape), said == right

        monkeypatch.setattr(suite, "_judge", lambda: judge)
        return next(suite.results())[1][0]["value"]

    assert judged(False) == 1
    assert judged(True) == pytest.approx(0.1, abs=0.03)


def test_what_cannot_be_measured_is_a_line(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for words, said in (
        (("--lengths", "4k"), "--lengths 4,096 exceeds the context of 512"),
        (("--lengths", "much"), "'much' is not a length (4k or 4096)"),
        (("--tasks", "nial"), "unknown task 'nial' of longcontext"),
        (("--tasks", "qa"), "qa needs --data_dir DIR with qa/test.jsonl"),
    ):
        assert evaluate(run, data, tmp_path / "none", *words) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0], error
    assert not (tmp_path / "none").exists()
    assert main(["evaluate", "--model", str(run), "--suite", "phi3_report", "--lengths", "1k"]) == 2
    assert "--lengths and --depths are of --suite longcontext" in capsys.readouterr().err
