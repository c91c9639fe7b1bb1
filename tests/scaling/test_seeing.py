"""The rule of experiments/vision.py: each of its words from runs that earn it, and none from one seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.__main__ import main
from phi3_jax.experiment import load_config
from phi3_jax.records import tables
from phi3_jax.reporting import arms
from phi3_jax.scaling import causal, seeing

FILE = str(Path(__file__).parents[2] / "experiments" / "vision.py")
EXACT, SEES = "seeing/sums/exact", "seeing/scenes/accuracy"
SIZES = {"mini": 110_592, "small": 212_992, "medium": 416_000}
# Whole sums, by arm and size: text and pictures grow alike, and pictures lag.
ALIKE = {
    **{("text", size): value for size, value in zip(SIZES, (0.60, 0.70, 0.80), strict=True)},
    **{("picture", size): value for size, value in zip(SIZES, (0.43, 0.54, 0.667), strict=True)},
    ("hidden", "mini"): 0.001,
}


def write(
    folder: Path,
    changes: dict[Any, float],
    seeds: int = 3,
    noise: float = 0.02,
    sees: float = 0.99,
    words: str = "standard",
) -> Path:
    """A folder as a repository keeps it, of all planned runs of the first seeds; noise is in log-odds."""
    config, rng, records = load_config(f"{FILE}:{words}").to_dict(), np.random.default_rng(0), []
    for arm, size, seed in seeing.planned(config):
        p = (ALIKE | changes).get((arm, size))
        if seed < config["seed"] + seeds and p is not None:
            value = 1 / (1 + math.exp(-math.log(p / (1 - p)) - noise * rng.normal()))
            one = dict(arm=arm, member=size, non_embedding=SIZES[size], seed=seed, status="finished")
            records.append(one | {EXACT: value, f"{EXACT}/n": 1024, SEES: sees if arm != "hidden" else 0.7})
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "runs.csv", list(dict.fromkeys(key for one in records for key in one)), records)
    (folder / "study.json").write_text(json.dumps({"design": {"config": config}}, default=list))
    return folder


def verdict(folder: Path) -> str:
    return next(line for line in seeing.lines_of(folder) if line.startswith("Verdict: "))


@pytest.mark.parametrize(
    ("how", "word"),
    [
        (dict(changes={}), "Verdict: alike."),
        (dict(changes={("picture", "medium"): 0.85}), "Verdict: more."),
        (dict(changes={("picture", "medium"): 0.45}), "Verdict: less."),
        (dict(changes={}, noise=0.6), "Verdict: undecided (the interval allows both)."),
        (dict(changes={}, seeds=1), "Verdict: undecided (1 seed; 3 are needed to decide)."),
        (
            dict(changes={("text", "medium"): 0.97}),
            "Verdict: undecided (text medium has 97.0 %, outside 5.0 to 95.0 %).",
        ),
        (
            dict(changes={("picture", "mini"): 0.1, ("hidden", "mini"): 0.2}),
            "Verdict: undecided (picture mini has 9.9 %, outside 20.0 to",
        ),
        (dict(changes={}, sees=0.8), "Verdict: undecided (mini sees 80.0 % of seeing/scenes/accuracy, less than 90 %"),
        (dict(changes={("hidden", "mini"): None}), "Verdict: undecided (the floor, hidden mini, was not measured)."),
        (dict(changes={("picture", "medium"): None}), "Verdict: undecided (not measured in all four cells)."),
        (dict(changes={}, words="standard,tokens=10k"), "Verdict: none, for a trial."),
    ],
)
def test_each_word_from_runs_that_earn_it(how: dict[str, Any], word: str, tmp_path: Path) -> None:
    assert verdict(write(tmp_path, **how)).startswith(word)


def test_planned_runs_are_named_as_run_or_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, {}, seeds=1)
    assert main(["verdict", FILE, str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("7 of 21 planned runs ran.\nNot run: hidden-mini-s11, ")
    assert "text-medium-s12" in said and "no difference above is a finding" in said
    assert "3 seeds find an interaction of 1.4 log-odds in 4 of 5 studies" in said


def test_what_is_detectable_is_found_in_four_of_five_studies() -> None:
    sd, trials, rng = 0.22, 4000, np.random.default_rng(0)
    for seeds in (3, 5, 9):
        effect = seeing.detectable(sd, seeds)
        draws = effect + sd * rng.normal(size=(trials, seeds, 4)) @ np.array([1.0, -1.0, -1.0, 1.0])
        found = np.mean([seeing.statistics.over_seeds(d).sign == 1 for d in draws])
        assert found == pytest.approx(seeing.POWER, abs=0.1 if seeds < 5 else 0.05)
    assert seeing.detectable(sd, 1) == math.inf


@pytest.mark.parametrize("study", [{"design": {"config": {}}}, {}])
def test_a_folder_of_another_study_is_refused(study: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, {})
    (folder / "study.json").write_text(json.dumps(study))
    with pytest.raises(UserError, match="has no such rule"):
        seeing.lines_of(folder)


def test_the_figure_is_drawn_from_what_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path, {})
    rows, config = causal.read(folder / "runs.csv"), load_config(FILE).to_dict()
    drawn = {one.name for one in arms.draw(tmp_path / "figures", rows, config, None, "pico proxies")}
    assert "seeing" in drawn and (tmp_path / "figures" / "seeing.png").stat().st_size > 5000
    few = [row for row in rows if row.arm == "hidden"]
    assert "seeing" not in {one.name for one in arms.draw(tmp_path / "few", few, config, None, "pico proxies")}


def test_the_study_and_further_training_are_told_apart_by_their_words() -> None:
    study = load_config(FILE)
    assert (study.name, study.seeds, set(study.arms)) == ("vision-study", 1, {"text", "picture", "hidden"})
    assert load_config(f"{FILE}:standard").seeds == 3 and load_config(f"{FILE}:seeds=5,seed=3").seed == 3
    assert load_config(f"{FILE}:standard,tokens=10k").name == "vision-trial"
    assert load_config(f"{FILE}:model=hf:m,data=a.json").data.source == "chats:a.json"
    for words, message in (("arms=texts", "'texts'"), ("quik", "'quik'"), ("quick,model=hf:m,data=a.json", "'quick'")):
        with pytest.raises(UserError, match=message):
            load_config(f"{FILE}:{words}")
