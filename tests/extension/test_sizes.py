"""The size study: which cells are there, and that the rule says what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_jax.__main__ import main
from phi3_jax.experiment import load_config
from phi3_jax.extension import sizes
from phi3_jax.extension.sizes import Cell

SHIFT = {0: 0.10, 1: 0.13, 2: 0.12}  # by which medium's gap exceeds mini's, by seed


def write(folder: Path, cell: Cell, gap: float) -> None:
    text = {"0-128": 1.7, "128-256": 1.9, "512-1024": 1.7 + gap}
    tried = {name: {"unseen": {"text": text}} for name in ("none", "pi", "ntk", "yarn", "longrope2")}
    made = {"lists": tried} | ({"trained": {"unseen": {"text": text}}} if cell.trained else {})
    (folder / cell.name).mkdir(parents=True)
    (folder / cell.name / "factors.json").write_text(json.dumps({"made_by": made}))


def test_the_rule_says_what_the_numbers_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed, more in SHIFT.items():
        for size, gap in (("mini", 0.5 + seed), ("medium", 0.5 + seed + more)):
            write(tmp_path, Cell(size, seed, "searched", False), gap)
        for size, gap in (("mini", 0.1), ("medium", 0.1 - more)):
            write(tmp_path, Cell(size, seed, "yarn", True), gap)
    write(tmp_path, Cell("mini", 0, "ntk", True), 0.3)  # without its other half
    assert main(["sizes", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "13 of 54 planned extensions ran" in told
    for form in ("none, untrained", "searched, as searched"):
        assert f"{form}: the gap of medium is +0.117 nats [+0.079, +0.155] that of mini, 3 seeds: worse" in told
    assert "yarn, trained: the gap of medium is -0.117 nats [-0.155, -0.079] that of mini, 3 seeds: better" in told
    assert "ntk, trained" not in told and "not run: mini-s0-none-trained" in told
    assert (
        "next: python launch/extend.py --model runs/longcontext-sizes/mini-pico-clean-s0-5.12M --to 8x --method none"
        in told
    )


def test_two_seeds_determine_nothing() -> None:
    gaps = {Cell(size, seed, "yarn", True): gap for seed in (0, 1) for size, gap in (("mini", 0.1), ("medium", 0.4))}
    (line,) = sizes.decide(gaps)
    assert "2 seeds: not determined" in line


def test_every_base_of_a_command_is_a_run_of_the_study() -> None:
    from phi3_jax.study.asked import asked_runs

    runs = {run.name for run in asked_runs(load_config("experiments/longcontext.py:sizes"), "pico")}
    planned = list(sizes.cells())
    assert len(planned) == len({cell.name for cell in planned}) == 54
    assert {cell.command("B", "F").split()[3].removeprefix("B/").replace("-pico-clean", "") for cell in planned} == runs
