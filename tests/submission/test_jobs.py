"""A study as jobs: one a run, named without data, and the same runs once the data are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phi3_jax import UserError
from phi3_jax.experiment import Command, load_config
from phi3_jax.study.asked import resolve_runs, select_runs
from phi3_jax.study.runs import plan_runs
from phi3_jax.submission import hardware
from phi3_jax.submission.jobs import job_name, make_jobs, make_study, run_command

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = {"window": 24, "vocab": 300, "kind": "facts", "fingerprint": "f"}


def study_of(words: str, folder: str = "runs/x"):
    text = f"{ROOT}/experiments/scaling.py:{words}"
    return make_study(Command(load_config(text), text, Path(folder), "auto"))


def test_one_job_a_run_and_forks_after_their_trunk() -> None:
    made = study_of("sweep,scale=pico,seeds=2,budgets=1M,2M,4M")
    jobs = make_jobs(made, "/place", together=False)
    names = {job.runs: job.name for job in jobs}
    assert len(jobs) == len({job.name for job in jobs}) == 2 * 3 * 3
    for job in jobs:
        (run,) = job.runs
        trunk = re.sub("-[0-9]M$", "-4M", run)
        assert job.after == (None if run == trunk else names[(trunk,)])
        assert run == trunk or [j.runs for j in jobs].index((trunk,)) < jobs.index(job)

    together = make_jobs(made, "/place", together=True)
    assert [job.runs for job in together][0] == ("mini-s0-4M", "mini-s0-2M", "mini-s0-1M") and len(together) == 6
    assert all(job.after is None for job in together)


def test_without_wsd_there_are_no_forks() -> None:
    made = study_of("mini,scale=pico,budgets=1M,2M")
    made.config.optim.schedule = "cosine"
    assert [job.after for job in make_jobs(made, "/place", together=False)] == [None, None]


def test_names_are_safe_for_every_scheduler_and_tell_studies_apart() -> None:
    hostile = ["a b", "$(touch x)", "-rf", "'\"", "naïve/ünï", "new\nline", "", "x" * 300, "%j", "A"]
    names = [job_name(name, "mini-small-s12-123456789", f"/place/{name}") for name in hostile]
    assert len(set(names)) == len(hostile)
    # JobSet: <name>-slice-job-<2 digits>-<4 digits>-<5 letters> must fit 63 letters
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 38 for name in names)
    assert job_name("x", "r", "/a") != job_name("x", "r", "/b")
    assert job_name("x", "r", "/a") == job_name("x", "r", "/a")


def test_asked_runs_are_the_planned_runs() -> None:
    made = study_of("sweep,scale=pico,seeds=2,budgets=1M,2M,4M")
    runs = plan_runs(made.config, "pico", MANIFEST, Path("data"), 1)
    found = resolve_runs(made.asked, runs)
    assert [found[ask.name] for ask in made.asked] == runs
    for ask in made.asked:
        run = found[ask.name]
        assert (run.parent is None) == (ask.trunk is None) and 0 <= ask.budget - run.budget < run.tokens_per_step
        if ask.trunk:
            assert found[ask.trunk].name == run.parent


def test_budgets_of_one_batch_are_one_run_that_one_name_trains() -> None:
    made = study_of("mini,scale=pico,budgets=1M,2M,2000001")
    runs = plan_runs(made.config, "pico", MANIFEST, Path("data"), 1)
    assert len(runs) == 2 and [ask.name for ask in made.asked] == ["mini-s0-2000001", "mini-s0-2M", "mini-s0-1M"]
    select = lambda name: select_runs([name], made.asked, runs)  # noqa: E731
    assert select("mini-s0-2000001") == [runs[0]] and select("mini-s0-2M") == [] and select("mini-s0-1M") == [runs[1]]
    assert select(runs[1].name) == [runs[1]]
    with pytest.raises(UserError, match="'mini-s0-3M' is no run of this study; did you mean .*mini-s0-1M"):
        select("mini-s0-3M")


def test_the_command_keeps_the_config_and_not_the_cluster() -> None:
    made = study_of("mini,scale=pico")
    command = Command(made.config, "e.py:mini", None, "auto", ("optim.peak_lr=1e-3", "cluster.image=x"))
    words = run_command(type(made)(command, "pico", Path("s")), ("a", "b"), "/at", "python")
    assert words == [
        "python", "launch/run.py", "--config=e.py:mini", "--config.optim.peak_lr=1e-3", "--workdir=/at", "--run=a,b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text,slices,hosts,chips",
    [
        ("v5p:4x4x8", 1, 32, 4), ("2xv5p:4x4x4", 2, 16, 4), ("v5e:16x16", 1, 64, 4), ("v6e:1x1", 1, 1, 1),
        ("h200:8", 1, 1, 8), ("h100:4x8", 1, 4, 8), ("cpu:2x1", 1, 2, 1),
    ],
)  # fmt: skip
def test_topologies(text: str, slices: int, hosts: int, chips: int) -> None:
    found = hardware.parse(text)
    assert (found.slices, found.hosts, found.chips) == (slices, hosts, chips)


@pytest.mark.parametrize(
    "text,message",
    [
        ("v5p:4x4", "nearest: 2x2x4"), ("v5e:1x3", "unknown topology 'v5e:1x3'; nearest"), ("v9:4x4", "unknown chip 'v9'"),
        ("v5p", "is not CHIP:SIZES"), ("v5p:0x4x4", "is not CHIP:SIZES"), ("h200:16", "nearest: h200:2x8"),
        ("2xh200:8", "write NODESxDEVICES"), ("v5p:4x4x8; rm -r x", "is not CHIP:SIZES"),
    ],
)  # fmt: skip
def test_wrong_topologies(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hardware.parse(text)
