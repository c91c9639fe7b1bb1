"""Axes of a study that give each size its own tokens: a ratio to its parameters, or equal compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_jax import UserError, experiment, family
from phi3_jax.configs import RunConfig
from phi3_jax.study.asked import asked_runs
from phi3_jax.study.runs import plan_study

SCALING = "experiments/scaling.py"


def planned(
    folder: Path, words: str, kind: str = "facts", windows: int = 10**9, repeat: bool = False
) -> list[RunConfig]:
    config = experiment.load_config(f"{SCALING}:sweep,scale=pico,{words}")
    config.data.repeat = repeat
    source = {"name": "text", "weight": 1, "windows": windows}
    manifest: Any = {"window": 24, "vocab": 320, "kind": kind, "fingerprint": "0" * 64, "sources": [source]}
    return plan_study(config, "pico", {Path("data"): manifest}, folder, 1)


def test_ratios_are_tokens_per_non_embedding_parameter_of_each_size(tmp_path: Path) -> None:
    runs = planned(tmp_path, "ratio=20,160,640,seeds=2")
    assert len(runs) == 3 * 3 * 2
    found = {(run.model.member, run.seed): [] for run in runs}
    for run in runs:
        found[run.model.member, run.seed].append(run.asked / run.model.matrix_params)
    assert all(sorted(ratios) == [20, 160, 640] for ratios in found.values())
    assert sum(run.parent is None for run in runs) == 6, "the smaller ratios leave the trunk of the largest"


def test_sizes_of_equal_compute_train_on_c_by_6n_tokens(tmp_path: Path) -> None:
    runs = planned(tmp_path, "isoflop=1e12,4e12")
    assert len(runs) == 6
    for run in runs:
        compute = 6 * run.model.matrix_params * run.asked
        assert min(abs(compute / c - 1) for c in (1e12, 4e12)) < 1e-5


def test_runs_can_be_named_before_there_are_data(tmp_path: Path) -> None:
    config = experiment.load_config(f"{SCALING}:sweep,scale=pico,ratio=20,40")
    trunk, fork, *_ = asked_runs(config, "pico")
    assert (trunk.name, fork.trunk) == ("mini-s0-4423680", trunk.name) and fork.budget == 20 * 110_592


@pytest.mark.parametrize(
    "words,message",
    [
        ("ratio=20,budgets=1M", "budgets and ratios are both given"),
        ("ratio=20,isoflop=1e12", "ratios and flops are both given"),
        ("ratio=20,20", "names 20.0 twice"),
        ("ratio=0", "must be a number, 0.001 to 1000000"),
        ("ratio=20,x", "ratio=x: 'x' must be a number"),
        ("isoflop=nan", "must be a number"),
        ("ratio=0.001", "smaller than one batch"),
    ],
)
def test_wrong_axes_are_one_line(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(tmp_path, words)


def test_text_is_not_passed_over_twice_unless_that_is_said(tmp_path: Path) -> None:
    enough = -(-640 * 416_000 // 24)
    assert planned(tmp_path, "ratio=640", "text", enough)
    with pytest.raises(
        UserError, match=r"medium needs 266,240,000 tokens of text, which has 266,239,\d+; .*repeat=true"
    ):
        planned(tmp_path, "ratio=640", "text", enough - 1)
    assert planned(tmp_path, "ratio=640", "text", enough - 1, repeat=True)
    assert planned(tmp_path, "ratio=640", "facts", 100), "a fact is seen again by design"


@pytest.mark.parametrize("ladder", ["clean", "family"])
@pytest.mark.parametrize("scale", ["milli", "centi", "deci"])
def test_the_scales_between_micro_and_the_released_models(scale: str, ladder: str) -> None:
    sizes = [family.proxy(size, scale, ladder) for size in family.TRIO]
    released = [family.published(size).head_dim for size in family.TRIO]
    assert all(size.head_dim in (32, 64, *released) and size.embed == size.heads * size.head_dim for size in sizes)
    if ladder == "family":
        assert [size.queries_per_kv for size in sizes] == [1, 4, 4]
