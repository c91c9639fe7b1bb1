"""A study that grows keeps what is there; new budgets leave the trunks on the disk."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import experiment
from phi3_jax.configs import RunConfig, decay_start, fingerprint
from phi3_jax.study.runs import plan_study
from phi3_jax.training.schedule import learning_rate

MANIFEST: Any = {
    "window": 24,
    "vocab": 320,
    "kind": "facts",
    "fingerprint": "0" * 64,
    "sources": [{"weight": 1, "windows": 100}],
}


def planned(folder: Path, words: str, fingerprint: str = "0" * 64) -> dict[str, RunConfig]:
    config = experiment.load_config(f"experiments/scaling.py:mini,scale=pico,{words}")
    manifest = MANIFEST | {"fingerprint": fingerprint}
    return {
        run.name[len("mini-pico-family-") :]: run
        for run in plan_study(config, "pico", {Path("data"): manifest}, folder, 1)
    }


def has_trained(folder: Path, run: RunConfig, steps: list[int]) -> None:
    """What a run leaves on the disk that says so."""
    for step in steps:
        (folder / run.name / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / run.name).mkdir(parents=True, exist_ok=True)
    (folder / run.name / "config.json").write_text(json.dumps({"config": dataclasses.asdict(run)}))


def finished(folder: Path, words: str) -> dict[str, RunConfig]:
    runs = planned(folder, words)
    for run in runs.values():
        has_trained(folder, run, [*run.keep_steps, run.steps])
    return runs


def test_what_has_begun_stays_the_run_that_it_is(tmp_path: Path) -> None:
    old = finished(tmp_path, "budgets=1M,2M")
    new = planned(tmp_path, "budgets=1M,2M,4M,8M,seeds=2")
    assert len(new) == 8 and all(new[name] == run for name, run in old.items())
    assert new["s1-8M"].parent is None and new["s1-4M"].parent == new["s1-8M"].name, "of a new seed all is new"


def test_larger_budgets_go_on_from_the_state_before_the_decay(tmp_path: Path) -> None:
    old = finished(tmp_path, "budgets=1M,2M")
    trunk, start = old["s0-2M"], decay_start(old["s0-2M"].steps, 0.3)
    assert trunk.keep_steps == (old["s0-1M"].start_step, start)
    grown = planned(tmp_path, "budgets=1M,2M,4M,8M")
    for name in ("s0-4M", "s0-8M"):
        assert (grown[name].parent, grown[name].start_step) == (trunk.name, start)
        # A fork leaves a trunk whose rates so far are its own.
        assert all(learning_rate(grown[name], s) == learning_rate(trunk, s) for s in range(start))
        assert learning_rate(grown[name], start) == learning_rate(grown[name], start - 1)


def test_budgets_in_between_leave_where_a_state_was_kept(tmp_path: Path) -> None:
    old = finished(tmp_path, "budgets=1M,4M")
    grown = planned(tmp_path, "budgets=500k,1M,2M,4M")
    assert (grown["s0-2M"].parent, grown["s0-2M"].start_step) == (old["s0-4M"].name, old["s0-1M"].start_step)
    alone = grown["s0-500k"]
    assert (alone.parent, alone.start_step, alone.trunk_steps) == (None, 0, old["s0-4M"].steps), "the warm-up is theirs"


def test_several_that_cannot_be_forks_share_a_trunk_of_their_own(tmp_path: Path) -> None:
    finished(tmp_path, "budgets=4M")
    for path in tmp_path.glob("*/checkpoints/*"):  # as older versions left it: nothing from before the decay
        if int(path.name) < 3000:
            path.rmdir()
    grown = planned(tmp_path, "budgets=500k,1M,4M,8M")
    assert grown["s0-8M"].parent is None and grown["s0-8M"].trunk_steps == grown["s0-4M"].steps
    assert {grown[name].parent for name in ("s0-500k", "s0-1M")} == {grown["s0-8M"].name}
    assert {grown["s0-500k"].start_step, grown["s0-1M"].start_step} <= {*grown["s0-8M"].keep_steps}
    assert grown["s0-4M"].parent is None


def test_an_unfinished_trunk_keeps_the_state_that_a_new_fork_leaves(tmp_path: Path) -> None:
    old = planned(tmp_path, "budgets=1M,4M")
    has_trained(tmp_path, old["s0-4M"], [old["s0-1M"].start_step, 1000])
    grown = planned(tmp_path, "budgets=1M,2M,4M")
    start = decay_start(grown["s0-2M"].steps, 0.3)
    assert grown["s0-2M"].start_step == start > 1000 and start in grown["s0-4M"].keep_steps
    has_trained(tmp_path / "other", old["s0-4M"], [old["s0-1M"].start_step, start + 5])
    late = planned(tmp_path / "other", "budgets=1M,2M,4M")
    assert late["s0-2M"].start_step == old["s0-1M"].start_step, "the state of a step that is past was not kept"


def test_the_same_command_plans_the_same_runs_whatever_has_ended(tmp_path: Path) -> None:
    finished(tmp_path, "budgets=1M,2M")
    before = planned(tmp_path, "budgets=1M,2M,8M")
    has_trained(tmp_path, before["s0-8M"], [before["s0-8M"].steps])
    assert planned(tmp_path, "budgets=1M,2M,8M") == before


@pytest.mark.parametrize("words", ["budgets=1M,2M,8M,seed=1", "budgets=1M,2M,8M"])
def test_other_data_or_seeds_are_other_runs(tmp_path: Path, words: str) -> None:
    finished(tmp_path, "budgets=1M,2M")
    fresh = planned(tmp_path / "elsewhere", words, "1" * 64)
    assert {fingerprint(run) for run in planned(tmp_path, words, "1" * 64).values()} == {
        fingerprint(run) for run in fresh.values()
    }, "and a folder that holds others is refused, as before"


@pytest.mark.slow
def test_a_study_grows_by_the_same_command_with_more_budgets(tmp_path: Path) -> None:
    def run(budgets: str, status: int = 0, source: str = "pydocs") -> str:
        config = f"experiments/scaling.py:mini,scale=femto,data={source},budgets={budgets}"
        words = [sys.executable, "launch/run.py", "--config", config, "--workdir", str(tmp_path / source)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
        assert done.returncode == status, done.stderr
        return done.stderr

    run("100k,200k")
    kept = {path: path.read_bytes() for path in tmp_path.glob("pydocs/*/metrics.jsonl")}
    run("100k,150k,200k,400k")
    assert len(kept) == 2 and all(path.read_bytes() == was for path, was in kept.items())
    table = (tmp_path / "pydocs" / "runs.csv").read_text()
    assert all(f"-{budget}," in table for budget in ("100k", "150k", "200k", "400k"))
    run("20k,40k", source="facts")
    assert "holds another data set (tokens: 40000 -> 80000)" in run("20k,80k", 2, "facts"), (
        "facts are made for a budget"
    )
