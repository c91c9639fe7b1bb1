"""A study trained here through its jobs: the table, skipping by fingerprint, and another experiment's folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_jax.__main__ import main
from phi3_jax.errors import STOPPED

ROOT = Path(__file__).resolve().parents[2]
WORDS = "mini,scale=pico,budgets=20k,40k"
SMALL = ["--config.data.facts=100", "--config.data.universe=200", "--config.train.eval_points=1"]


def run(study: Path, *arguments: str, expect: int = 0) -> str:
    options = [f"--config=experiments/scaling.py:{WORDS}", f"--workdir={study}", *SMALL, *arguments]
    command, environment = [sys.executable, "launch/run.py", *options], os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose trunk is trained and whose fork is not."""
    folder = tmp_path_factory.mktemp("local") / "it's a study"
    assert "report" not in run(folder, "--run=mini-s0-40k")
    return folder


def states(out: str) -> list[list[str]]:
    """[run, state] of the table's lines."""
    return [line.split()[:2] for line in out.splitlines()[1:]]


def test_one_run_is_trained_and_no_other(study: Path) -> None:
    assert len(list(study.glob("*/done.json"))) == 1 and not (study / "report.html").exists()


def test_finished_runs_are_skipped_by_fingerprint(study: Path, submit: Callable) -> None:
    status, out, err = submit(WORDS, "--backend=local", *SMALL, "--dry_run", workdir=study)
    assert status == 0 and "mini-s0-40k: finished" in out and out.rstrip().endswith("--run=mini-s0-20k"), err
    assert states(submit(WORDS, "--status", *SMALL, workdir=study)[1]) == [
        ["mini-s0-40k", "done"],
        ["mini-s0-20k", "waiting"],
    ]
    # Of another experiment's folder it says what changed, before anything is queued.
    status, _, err = submit(WORDS, "--backend=local", *SMALL, "--dry_run", "--config.optim.peak_lr=0.01", workdir=study)
    assert status == 2 and "optim.peak_lr: 0.003 -> 0.01" in err


@pytest.mark.slow
def test_a_failed_run_says_why_until_it_is_started_again(
    study: Path, submit: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    (trunk,) = (path.parent for path in study.glob("*/done.json"))
    (trunk / "checkpoints").rename(tmp_path / "away")
    assert "checkpoint is missing" in run(study, "--run=mini-s0-20k", expect=2)
    out = submit(WORDS, "--status", *SMALL, workdir=study)[1]
    assert states(out)[1] == ["mini-s0-20k", "failed"] and "checkpoint is missing" in out.splitlines()[-1]
    (tmp_path / "away").rename(trunk / "checkpoints")

    status, out, err = submit(WORDS, "--backend=local", *SMALL, workdir=study)
    assert status == 0, err
    assert "mini-s0-20k: done" in out and (study / "report.html").exists()
    out = submit(WORDS, "--status", *SMALL, workdir=study)[1]
    assert states(out) == [["mini-s0-40k", "done"], ["mini-s0-20k", "done"]]
    last = json.loads(next(study.glob("*-s0-40k/metrics.jsonl")).read_text().splitlines()[-1])
    assert f"{last['step']} / {last['step']}" in out and f"{last['loss']:.4f}" in out
    assert submit(WORDS, "--backend=local", *SMALL, workdir=study)[1].rstrip().endswith("finished")


def test_a_saved_stop_has_a_status_of_its_own(submit: Callable, tmp_path: Path) -> None:
    """Schedulers start a job again by it; 0 would say that the run is finished, 2 that it is no use."""
    study, words = tmp_path / "study", "mini,scale=pico,budgets=2M"
    options = [*SMALL, "--config.train.log_every=1"]
    command = [
        sys.executable,
        "launch/run.py",
        f"--config=experiments/scaling.py:{words}",
        f"--workdir={study}",
        *options,
    ]
    child = subprocess.Popen([*command, "--run=mini-s0-2M"], cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""})
    while child.poll() is None and not any(path.stat().st_size for path in study.glob("*/metrics.jsonl")):
        time.sleep(0.1)
    child.terminate()
    assert child.wait() == STOPPED
    out = submit(words, "--status", *options)[1]
    assert states(out) == [["mini-s0-2M", "stopped"]]
    step, checkpoint = re.match(r"\S+ +stopped +([\d,]+) / [\d,]+ +\S+ +([\d,]+)", out.splitlines()[1]).groups()
    assert step == checkpoint and "--run=mini-s0-2M" in submit(words, "--backend=local", "--dry_run", *options)[1]


def test_status_of_a_folder_needs_no_command_and_names_runs_as_their_folders(
    study: Path, submit: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def status(*words: str) -> tuple[int, str, str]:
        code = main(["submit", "--status", *words])
        return code, *capsys.readouterr()

    code, out, _ = status(str(study))
    done = {path.parent.name for path in study.glob("*/done.json")}
    assert (
        code == 0 and done and done == {run for run, state in states(out) if state == "done"} and len(states(out)) == 2
    )
    (tmp_path / "study.json").write_text("{}")
    for where, said in (
        (tmp_path / "no", "holds no study"),
        (tmp_path, "lists no runs"),
        ("gs://b/x", "gs:// is no place"),
    ):
        code, out, err = status(str(where))
        assert code == 2 and said in err and not out and err.count("\n") == 1
    assert status(str(study), "--backend=local")[0] == 2
    code, out, err = submit("mini,scale=pico,budgets=60k", "--status", *SMALL, workdir=study)
    assert code == 2 and "holds another study" in err and not out
