"""The size study: which extensions it plans, how they are made, and that the rule says what the numbers say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phi3_jax import commands, verbs
from phi3_jax.errors import UserError
from phi3_jax.experiment import load_config
from phi3_jax.extension import sizes
from phi3_jax.extension.sizes import Cell
from phi3_jax.family import proxy
from phi3_jax.statistics import Estimate
from phi3_jax.study.asked import asked_runs

EXPERIMENT = "experiments/longcontext.py"
EVERY = [(form, trained) for trained in (False, True) for form in sizes.LISTS]


def study(folder: Path) -> list[Cell]:
    """A study's folder without any run, and its planned extensions."""
    config = load_config(EXPERIMENT)
    runs = [
        {"name": run.name, "seed": run.seed, "model": dataclasses.asdict(proxy(run.size, "pico", "clean"))}
        for run in asked_runs(config, "pico")
    ]
    design = {"config": json.loads(config.to_json_best_effort())}
    (folder / "study.json").write_text(json.dumps({"title": "bases", "runs": runs, "design": design}))
    return sizes._planned(folder)


def unseen(end: float, alone: float, needles: float = 0.1, digits: float = 0.9) -> dict[str, Any]:
    return {
        "text": {"0-128": 1.7, "512-1024": end}, "alone": alone, "needle_nll": {"128": 0.2, "1024": 0.2 + needles},
        "digits": {"128": digits, "1024": 0.8},
    }  # fmt: skip


def write(folder: Path, cell: Cell, untrained: dict[str, Any], base: dict[str, Any], trained: dict[str, Any]) -> None:
    names = ["none", "pi", "ntk", "yarn", "longrope2"] if cell.form == "searched" else ["none", cell.form]
    made = {"lists": {name: {"unseen": untrained} for name in names} | {"none": {"unseen": base}}}
    place = folder / sizes.FOLDER / cell.name
    place.mkdir(parents=True)
    (place / "factors.json").write_text(json.dumps({"made_by": made | {"trained": {"unseen": trained}}}))


def filled(folder: Path, more: float, lead: float, after: float, **base: float) -> None:
    """Every cell: before training medium's gap is `more` above mini's and its loss `lead` below; after training `after`."""
    noise = iter(np.random.default_rng(0).normal(0, 0.003, 100))
    doublings = {"mini": 0.0, "small": np.log2(1.93) / np.log2(3.76), "medium": 1.0}
    for cell in study(folder):
        x, e = doublings[cell.size], next(noise)
        start = unseen(2.7 - (lead + more) * x + e, 1.7 - (lead + more) * x, 0.1 + e, **base)
        before = unseen(2.0 - lead * x + e, 1.7 - (lead + more) * x, 0.1 + e)
        write(folder, cell, before, start, unseen(1.6 - lead * x + e + after * x, 1.5 - lead * x, 0.1 + e))


def test_the_rule_says_what_the_numbers_say(tmp_path: Path) -> None:
    for name, more, lead, after, said in (
        ("worse", 0.2, -0.1, 0.2, (sizes.WORSE, sizes.WORSE, "training or not")),
        ("part", 0.2, 0.1, 0.0, (sizes.PART, sizes.ALIKE, "until it is trained there")),
        ("keeps", -0.2, 0.1, -0.2, (sizes.KEEPS, sizes.KEEPS, "does not lose more")),
    ):
        (tmp_path / name).mkdir()
        filled(tmp_path / name, more, lead, after)
        lines = sizes.lines_of(tmp_path / name)
        assert lines[0] == "45 of 45 planned extensions ran" and len(lines) == 2 + len(EVERY) + 4
        assert lines[-4].startswith(f"primary, searched, trained: {said[1]} (predicted: ")
        assert lines[-3].startswith(f"second, yarn, untrained: {said[0]} (predicted: ")
        assert lines[-2].startswith("verdict: ") and said[2] in lines[-2]
        (drawn,) = sizes.figures(tmp_path / name)
        assert drawn.png.stat().st_size > 10_000
        sizes.keep(str(tmp_path / name), str(tmp_path / f"kept-{name}"))
        assert sizes.lines_of(tmp_path / f"kept-{name}") == lines
        assert len((tmp_path / f"kept-{name}" / sizes.TABLE).read_text().splitlines()) == 1 + 9 * 10


def test_the_order_at_the_end_and_what_lies_between_is_said() -> None:
    estimate = lambda low, high: Estimate((low + high) / 2, 0.1, low, high, 9)  # noqa: E731
    gap = estimate(0.01, 0.2)
    assert sizes.word_of(gap, estimate(-0.1, 0.1), 0.05) == sizes.MORE
    assert sizes.word_of(estimate(-0.01, 0.2), gap, 0.05) == sizes.OPEN
    assert sizes.word_of(estimate(-0.01, 0.04), gap, 0.05) == sizes.ALIKE
    assert sizes.word_of(estimate(math.nan, math.nan), gap, 0.05) == sizes.OPEN
    assert sizes.together(sizes.OPEN, sizes.ALIKE) == sizes.together(sizes.PART, sizes.OPEN) == "open"


def test_no_word_before_all_ran_or_of_bases_without_needles_or_of_a_trial(tmp_path: Path) -> None:
    filled(tmp_path, 0.2, -0.1, 0.2)
    gone = tmp_path / sizes.FOLDER / "mini-s21-ntk" / "factors.json"
    kept = gone.read_text()
    gone.unlink()
    lines = sizes.lines_of(tmp_path)
    assert lines[:2] == ["44 of 45 planned extensions ran", "not run: mini-s21-ntk"] and "silent" in lines[-1]
    gone.write_text(kept)
    described = json.loads((tmp_path / "study.json").read_text())
    described["design"]["config"]["extension"]["evaluations"] = 10
    (tmp_path / "study.json").write_text(json.dumps(described))
    assert sizes.lines_of(tmp_path)[-1].startswith("a trial")
    (tmp_path / "blind").mkdir()
    filled(tmp_path / "blind", 0.2, -0.1, 0.2, digits=0.6)
    lines = sizes.lines_of(tmp_path / "blind")
    assert lines[1].startswith("bases that do not find needles") and "silent" in lines[-1]


def test_what_was_made_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    (cell, *_) = study(tmp_path)
    place = tmp_path / sizes.FOLDER / cell.name / "search"
    place.mkdir(parents=True)
    (place.parent / "extension.html").touch()
    (place / "search.json").write_text(json.dumps({"train": 8192, "mix": 0.0}))
    config = load_config(EXPERIMENT)
    runs = [run for run in asked_runs(config, "pico")][:1]
    with pytest.raises(UserError, match="made with train=8192, and 409600 is asked for"):
        sizes.make(tmp_path, config, [SimpleNamespace(name=cell.base, model=proxy("mini"), seed=runs[0].seed)])


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
