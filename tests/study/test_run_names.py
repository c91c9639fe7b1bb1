"""Runs are named by the tokens that were asked for; a study that an older version began keeps its folders' names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import experiment
from phi3_jax.configs import fingerprint
from phi3_jax.study.runs import budget_name, plan_study

MANIFEST = {
    "window": 24,
    "vocab": 320,
    "kind": "facts",
    "fingerprint": "0" * 64,
    "sources": [{"weight": 1, "windows": 100}],
}
STEM = "mini-pico-family-s0"


def planned(folder: Path, words: str = "budgets=1M,2M", **keys: Any) -> dict[str, Any]:
    config = experiment.load_config(f"experiments/scaling.py:mini,scale=pico,{words}")
    for name, value in keys.items():
        config.train[name] = value
    return {run.name: run for run in plan_study(config, "pico", {Path("data"): MANIFEST}, folder, 1)}


def test_a_run_asked_for_at_1m_is_named_1m_and_trains_whole_batches(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert list(runs) == [f"{STEM}-2M", f"{STEM}-1M"] and runs[f"{STEM}-1M"].parent == f"{STEM}-2M"
    for run in runs.values():
        assert run.asked in (1_000_000, 2_000_000) and 0 < run.asked - run.budget < run.tokens_per_step
    assert fingerprint(runs[f"{STEM}-1M"]) == fingerprint(dataclasses.replace(runs[f"{STEM}-1M"], name="x", asked=0))


@pytest.mark.parametrize("tokens,name", [(10**6, "1M"), (999_424, "999424"), (1_375_000, "1375000"), (8000, "8k")])
def test_a_budget_that_its_short_form_would_round_is_written_in_full(tokens: int, name: str) -> None:
    assert budget_name(tokens) == name


def test_budgets_of_as_many_steps_are_the_run_of_the_largest(tmp_path: Path) -> None:
    assert list(planned(tmp_path, "budgets=1M,1000001")) == [f"{STEM}-1000001"]


def test_runs_of_some_passes_over_the_data_are_named_by_what_they_train_on(tmp_path: Path) -> None:
    ((name, run),) = planned(tmp_path, epochs=30.0).items()
    assert run.asked == 0 and run.budget == 68 * 44 * 24 and name == f"{STEM}-71.8k"


def test_a_folder_of_an_older_version_is_found_by_its_name(tmp_path: Path) -> None:
    new, old = planned(tmp_path), {"2M": f"{STEM}-2M", "1M": f"{STEM}-999k"}
    (tmp_path / old["1M"]).mkdir()
    runs = planned(tmp_path)
    assert list(runs) == [old["2M"], old["1M"]] and runs[old["1M"]].parent == old["2M"]
    assert fingerprint(runs[old["1M"]]) == fingerprint(new[f"{STEM}-1M"])
    trunk = planned(tmp_path, "budgets=500k,1M")
    assert [(run.name, run.parent) for run in trunk.values()] == [(old["1M"], None), (f"{STEM}-500k", old["1M"])]
    (tmp_path / f"{STEM}-1M").mkdir()  # a run of its own is nearer
    assert list(planned(tmp_path)) == list(new)
    assert list(planned(tmp_path, "budgets=999k,1M")) == [f"{STEM}-1M"]


def test_a_former_name_that_is_another_runs_name_is_that_runs(tmp_path: Path) -> None:
    names = [f"{STEM}-999400", f"{STEM}-999k"]
    (tmp_path / names[1]).mkdir()
    assert list(planned(tmp_path, "budgets=999k,999400", batch_tokens=96)) == names
