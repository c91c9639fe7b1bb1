"""The rule of experiments/abstention.py: each of its words from runs that earn it, and none from one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.__main__ import main
from phi3_jax.experiment import load_config
from phi3_jax.family import proxy
from phi3_jax.records import tables
from phi3_jax.records.table import Study
from phi3_jax.reporting import sections
from phi3_jax.scaling import abstention

FILE = str(Path(__file__).parents[2] / "experiments" / "abstention.py")
FREE = "abstention/free/"
WRONG, INVENTED, STEP, ROWS = (
    f"{FREE}wrong_at_90",
    f"{FREE}invented_at_90",
    "reasoning/gap1/accuracy",
    "reasoning/row/exact",
)
UNKNOWN, RECALL, OWN = f"{FREE}unknown", "knowledge/universe/recall", "knowledge/corpus/recall"
# As the conjecture has it, by (arm, size); what is not named is the same everywhere.
MEDIUM: dict[str, float] = {WRONG: 0.1, INVENTED: 0.2, UNKNOWN: 0.2}
SUPPORTED: dict[tuple[str, str], dict[str, float]] = {
    ("facts9000", "mini"): {WRONG: 0.5, INVENTED: 0.6, UNKNOWN: 0.8},
    ("facts9000", "medium"): MEDIUM,
    ("load", "mini"): {INVENTED: 0.2},
}
PLAIN = {WRONG: 0.02, INVENTED: 0.05, STEP: 0.9, ROWS: 0.5, UNKNOWN: 0.8, RECALL: 0.3, OWN: 0.98}


def write(
    folder: Path, changes: dict[tuple[str, str], dict[str, float]], seeds: int = 5, target: str = "standard"
) -> Path:
    """A folder as a repository keeps it, of all planned runs of the first seeds."""
    config, rng, records = load_config(f"{FILE}:{target}").to_dict(), np.random.default_rng(0), []
    for arm, size, seed in abstention.planned(config):
        if seed < config["seed"] + seeds:
            scores = PLAIN | changes.get((arm, size), {})
            noisy = {key: round(value + 0.003 * rng.normal(), 5) for key, value in scores.items()}
            records.append(
                dict(
                    arm=arm, member=size, non_embedding=proxy(size, "pico").matrix_params, seed=seed, status="finished"
                )
                | noisy
            )
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "runs.csv", list(dict.fromkeys(key for one in records for key in one)), records)
    (folder / "study.json").write_text(json.dumps({"design": {"config": config}}, default=list))
    return folder


def said(folder: Path) -> dict[str, str]:
    """Lines by what stands before two blanks or a colon."""
    return {line.replace(":", "  ").split("  ")[0]: line for line in abstention.lines_of(folder)}


@pytest.mark.parametrize(
    ("changes", "whole", "word"),
    [
        ({}, "supported", "most of the fall is by acquired facts"),
        ({("facts9000", "mini"): PLAIN, ("facts9000", "medium"): PLAIN}, "not supported", "do not fall with size"),
        ({("facts1500", "mini"): {WRONG: 0.3}}, "not supported", "size itself helps"),
        ({("facts1500", "medium"): {WRONG: 0.3}}, "not supported", "and rise where every size holds all facts"),
        ({("facts9000", "medium"): MEDIUM | {STEP: 1.1}}, "not supported", "reasoning grows as well"),
        ({("facts9000", "medium"): MEDIUM | {STEP: 0.7}}, "not supported", "medium reasons worse"),
        ({("facts9000", "medium"): MEDIUM | {UNKNOWN: 0.7}}, "supported in part", "by better discrimination"),
        ({("load", "mini"): {INVENTED: 0.5}}, "supported in part", "equal loads a parameter do not invent alike"),
        ({("load", "mini"): {INVENTED: 0.01}}, "undecided", "whether equal loads a parameter invent alike is undecided"),
        ({("facts1500", "mini"): {OWN: 0.5}}, "undecided", "whether they fall where every size holds all facts is"),
        ({("facts9000", "mini"): SUPPORTED["facts9000", "mini"] | {STEP: 0.7}}, "undecided", "whether reasoning grows"),
        ({("facts9000", "mini"): SUPPORTED["facts9000", "mini"] | {RECALL: 0.001}}, "undecided", "whether wrong answers"),
    ],
)  # fmt: skip
def test_each_verdict_from_runs_that_earn_it(changes: Any, whole: str, word: str, tmp_path: Path) -> None:
    found = said(write(tmp_path, SUPPORTED | changes))
    assert found["Verdict"].startswith(f"Verdict: {whole}. At 90 %") and word in found["Verdict"]
    assert found["51 of 51 planned runs ran."] and "Not run" not in found


def test_a_fall_that_is_smaller_than_the_margin_is_no_fall(tmp_path: Path) -> None:
    small = {("facts9000", "mini"): PLAIN | {WRONG: 0.05}, ("facts9000", "medium"): PLAIN | {WRONG: 0.02}}
    (line,) = [x for x in abstention.lines_of(write(tmp_path, small)) if x.startswith("b  ")]
    assert "-3" in line and "; does not. Predicted: holds." in line


def test_one_seed_decides_nothing_and_the_runs_that_are_missing_are_named(tmp_path: Path) -> None:
    found = said(write(tmp_path, SUPPORTED, seeds=1, target="quick"))
    assert found["12 of 51 planned runs ran."] and found["Verdict"].startswith("Verdict: undecided.")
    assert len(found["Not run"].split(", ")) == 39 and "heard-mini-s54" in found["Not run"]
    assert "no difference above is a finding" in found["1 seed"]
    conditions = load_config(FILE).abstention.conditions
    assert all("undecided" in found[name] for name in conditions)
    assert "-40" in found["b"] and "[" not in found["b"]


def test_the_fall_is_split_into_its_two_parts(tmp_path: Path) -> None:
    """Of .8 unknown values .625 are answered at mini, of .2 a half at medium: -.6 * .5625 by facts, -.125 * .5 else."""
    (line,) = (line for line in abstention.lines_of(write(tmp_path, SUPPORTED)) if "of b" in line)
    first, second = (float(part.split(" [")[0].split()[-1]) for part in line.split(" points ")[:2])
    assert first == pytest.approx(-33.75, abs=1) and second == pytest.approx(-6.25, abs=1)


def test_fewer_seeds_than_the_rule_wants_have_intervals_and_decide_nothing(tmp_path: Path) -> None:
    found = said(write(tmp_path, SUPPORTED, seeds=4))
    assert found["Verdict"].startswith("Verdict: undecided.") and "[" in found["b"]
    assert "4 seeds; 5 are needed" in found["b"]


def test_a_missing_arm_and_a_trial_are_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, SUPPORTED)
    lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(line for line in lines if not line.startswith("load")))
    assert main(["verdict", FILE, str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "46 of 51 planned runs ran" in out and "d  equal bits a parameter invent alike:; undecided (not measured" in out
    )
    study = json.loads((folder / "study.json").read_text())
    study["design"]["config"]["size_factor"] = 0.1
    (folder / "study.json").write_text(json.dumps(study))
    assert "Verdict: none, for a trial." in abstention.lines_of(folder)
    del study["design"]["config"]["abstention"]
    (folder / "study.json").write_text(json.dumps(study))
    with pytest.raises(UserError, match="no such rule"):
        abstention.lines_of(folder)


def test_the_report_has_the_rule_s_words_and_says_why_not(tmp_path: Path) -> None:
    folder = write(tmp_path, SUPPORTED, seeds=1)
    study = Study(folder, json.loads((folder / "study.json").read_text()), [], [])
    page = sections.rule(study)
    assert "12 of 51 planned runs ran." in page and "Predicted: holds." in page and not study.missing
    assert "What is known, got wrong and invented, by size" in page
    first = (folder / "invention.svg").read_bytes()
    sections.rule(study)
    assert (folder / "invention.svg").read_bytes() == first, "the same figure is the same file"
    (folder / "runs.csv").unlink()
    assert sections.rule(study) == "" and "the rule says nothing yet: no table" in study.missing[0]
    study.meta["design"]["config"]["verdict"] = "os:getcwd"  # a table of rules, not of anything
    assert sections.rule(study) == "" and len(study.missing) == 1


def test_the_design_holds_what_it_says() -> None:
    """Equal exposure in all arms, and equal bits a parameter in the pair."""
    from phi3_jax.experiment import arms_of

    arms = arms_of(load_config(FILE))
    assert {round(arm.knowledge / arm.facts, 6) for arm in arms.values()} == {round(2_000_000 / 9000, 6)}
    loads = [
        arms[arm].facts * 48 / proxy(size, "pico", vocab=320).matrix_params
        for arm, size in (("load", "mini"), ("facts9000", "medium"))
    ]
    assert loads[0] == pytest.approx(loads[1], rel=0.01)
    assert {arm.tokens for name, arm in arms.items() if name in ("facts9000", "search", "heard")} == {4_000_000}
    assert load_config(FILE).train.weighting == "token" and not any(arm.weighting for arm in arms.values())
