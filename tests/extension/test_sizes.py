"""The size study: which extensions it plans, how they are made, and that the rule says what the numbers say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import commands, verbs
from phi3_jax.experiment import load_config
from phi3_jax.extension import sizes
from phi3_jax.extension.sizes import Cell, Gap
from phi3_jax.family import proxy
from phi3_jax.study.asked import asked_runs

EXPERIMENT = "experiments/longcontext.py"
SHIFT = {0: 0.10, 1: 0.13, 2: 0.12}  # by which medium's gap exceeds mini's, by seed


def study(folder: Path) -> list[Cell]:
    """A study's folder without any run, and its planned extensions."""
    runs = [
        {"name": run.name, "seed": run.seed, "model": dataclasses.asdict(proxy(run.size, "pico", "clean"))}
        for run in asked_runs(load_config(EXPERIMENT), "pico")
    ]
    (folder / "study.json").write_text(json.dumps({"title": "bases", "runs": runs}))
    return sizes._planned(folder)


def write(folder: Path, cell: Cell, untrained: float, trained: float | None) -> None:
    def unseen(gap: float) -> dict[str, Any]:
        return {"unseen": {"text": {"0-128": 1.7, "128-256": 1.9, "512-1024": 1.7 + gap}}}

    names = ["none", "pi", "ntk", "yarn"] + ["longrope2"] * (cell.form == "searched")
    made = {"lists": {name: unseen(untrained if name != "none" else 0) for name in names}}
    made["lists"]["none"]["unseen"]["text"]["512-1024"] = 1.7 + untrained
    place = folder / sizes.FOLDER / cell.name
    place.mkdir(parents=True)
    (place / "factors.json").write_text(
        json.dumps({"made_by": made | ({"trained": unseen(trained)} if trained else {})})
    )


def test_the_rule_says_what_the_numbers_say(tmp_path: Path) -> None:
    by = {(cell.size, cell.seed, cell.form): cell for cell in study(tmp_path)}
    for seed, more in SHIFT.items():
        write(tmp_path, by["mini", seed, "searched"], 0.5 + seed, None)
        write(tmp_path, by["medium", seed, "searched"], 0.5 + seed + more, None)
        write(tmp_path, by["mini", seed, "yarn"], 0.2, 0.1)
        write(tmp_path, by["medium", seed, "yarn"], 0.2, 0.1 - more / 2)
    write(tmp_path, by["mini", 0, "ntk"], 0.2, 0.3)  # without its other half
    told = "\n".join(sizes.lines_of(tmp_path))
    assert told.startswith("7 of 45 planned extensions ran")
    for form in ("none, untrained", "searched, as searched"):
        assert f"{form}: the gap of medium less that of mini is +0.117 nats [+0.079, +0.155], 3 seeds: worse" in told
    assert "yarn, trained: the gap of medium less that of mini is -0.058 nats [-0.077, -0.039], 3 seeds: better" in told
    assert "ntk, trained" not in told and "not run: mini-s0-none, mini-s0-pi, mini-s0-yarn" not in told
    assert "not run: mini-s0-none, mini-s0-pi, mini-s0-searched, " in told
    (drawn,) = sizes.figures(tmp_path)
    assert drawn.png.stat().st_size > 10_000


def test_two_seeds_determine_nothing() -> None:
    gaps = {Gap(size, seed, "yarn", True): gap for seed in (0, 1) for size, gap in (("mini", 0.1), ("medium", 0.4))}
    (line,) = sizes.decide(gaps)
    assert "2 seeds: not determined" in line


def test_an_extension_is_asked_for_as_it_is_typed(tmp_path: Path) -> None:
    config = load_config(EXPERIMENT)
    planned = study(tmp_path)
    assert len(planned) == len({cell.name for cell in planned}) == 45
    for cell in (planned[0], planned[4]):
        typed = commands.parse(verbs.EXTEND.complete(), cell.words(tmp_path, config.extension))
        for name, value in cell.flags(tmp_path, config.extension).items():
            assert str(typed[name]) == str(value), name


@pytest.mark.slow
def test_the_study_makes_its_extensions_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_jax.__main__ import main

    monkeypatch.setattr(sizes, "LISTS", ("none", "searched"))
    words = ["run", "--config", f"{EXPERIMENT}:quick,steps=30", "--config.extension.evaluations=6"]
    words += ["--config.extension.train=8192", "--config.sizes=mini", "--workdir", str(tmp_path / "s")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "2 of 2 extensions to make" in told and told.count("extended: ") == 2
    page = (tmp_path / "s" / "report.html").read_text()
    assert "2 of 2 planned extensions ran" in page
    made = tmp_path / "s" / sizes.FOLDER / "mini-s0-searched"
    before = json.loads((made / "factors.json").read_text())["long_factor"]
    (made / "extension.html").unlink()
    assert main(words) == 0
    assert "1 of 2 extensions to make" in capsys.readouterr().out
    assert json.loads((made / "factors.json").read_text())["long_factor"] == before
