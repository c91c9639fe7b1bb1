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
# As the conjecture has it, by (arm, size); what is not named is the same everywhere.
SUPPORTED = {
    ("facts9000", "mini"): {WRONG: 0.5, INVENTED: 0.6, f"{FREE}unknown": 0.8},
    ("facts9000", "medium"): {WRONG: 0.1, INVENTED: 0.2, f"{FREE}unknown": 0.2},
}
PLAIN = {WRONG: 0.02, INVENTED: 0.05, STEP: 0.97, ROWS: 0.5, f"{FREE}unknown": 0.8}


def write(
    folder: Path, changes: dict[tuple[str, str], dict[str, float]], seeds: int = 5, target: str = "standard"
) -> Path:
    """A folder as a repository keeps it, of all planned runs of the first seeds."""
    config, rng, records = load_config(f"{FILE}:{target}").to_dict(), np.random.default_rng(0), []
    for arm, size, seed in abstention.planned(config):
        if seed < config["seed"] + seeds:
            scores = PLAIN | changes.get((arm, size), {})
            noisy = {key: round(value + 0.005 * rng.normal(), 5) for key, value in scores.items()}
            records.append(dict(arm=arm, member=size, non_embedding=1e5, seed=seed, status="finished") | noisy)
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(folder / "runs.csv", list(dict.fromkeys(key for one in records for key in one)), records)
    (folder / "study.json").write_text(json.dumps({"design": {"config": config}}, default=list))
    return folder


def said(folder: Path) -> dict[str, str]:
    """Lines by what stands before two blanks or a colon."""
    return {line.replace(":", "  ").split("  ")[0]: line for line in abstention.lines_of(folder)}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (SUPPORTED, "supported."),
        ({}, "not supported: what is invented does not fall with size."),
        (SUPPORTED | {("facts1500", "mini"): {WRONG: 0.3}}, "size itself helps"),
        (
            SUPPORTED | {("facts9000", "medium"): SUPPORTED["facts9000", "medium"] | {STEP: 1.1}},
            "reasoning grows as well",
        ),
        (SUPPORTED | {("pair_mini", "mini"): {INVENTED: 0.4}}, "by better discrimination"),
        (SUPPORTED | {("facts9000", "mini"): SUPPORTED["facts9000", "mini"] | {STEP: 0.8}}, "undecided."),
    ],
)
def test_each_verdict_from_runs_that_earn_it(changes: Any, word: str, tmp_path: Path) -> None:
    found = said(write(tmp_path, changes))
    assert word in found["Verdict"]
    assert found["75 of 75 planned runs ran."] and "Not run" not in found


def test_one_seed_decides_nothing_and_the_runs_that_are_missing_are_named(tmp_path: Path) -> None:
    found = said(write(tmp_path, SUPPORTED, seeds=1, target="quick"))
    assert found["15 of 75 planned runs ran."] and found["Verdict"] == "Verdict: undecided."
    assert len(found["Not run"].split(", ")) == 60 and "pair_medium-medium-s14" in found["Not run"]
    assert "no difference above is a finding" in found["1 seed"]
    conditions = load_config(FILE).abstention.conditions
    assert all("undecided" in found[name] for name in conditions)
    assert "-40" in found["b"] and "[" not in found["b"]


def test_the_fall_is_split_into_its_two_parts(tmp_path: Path) -> None:
    """Unknown values fall from .8 to .2 of them .5/.8 are answered wrongly at mini: -.375 of -.4."""
    (line,) = (line for line in abstention.lines_of(write(tmp_path, SUPPORTED)) if "of b" in line)
    first, second = (float(part.split(" [")[0].split()[-1]) for part in line.split(" points ")[:2])
    assert first == pytest.approx(-37.5, abs=1) and second == pytest.approx(-2.5, abs=1)


def test_two_seeds_have_intervals_and_decide_nothing(tmp_path: Path) -> None:
    found = said(write(tmp_path, SUPPORTED, seeds=2))
    assert found["Verdict"] == "Verdict: undecided." and "[" in found["b"] and "2 seeds; 3 are needed" in found["b"]


def test_a_missing_arm_and_a_trial_are_undecided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, SUPPORTED)
    lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(line for line in lines if not line.startswith("pair_mini")))
    assert main(["verdict", FILE, str(folder)]) == 0
    out = capsys.readouterr().out
    assert (
        "70 of 75 planned runs ran" in out and "d  equal bits a parameter invent alike:; undecided (not measured" in out
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
    assert "15 of 75 planned runs ran." in page and "Predicted: holds." in page and not study.missing
    (folder / "runs.csv").unlink()
    assert sections.rule(study) == "" and "the rule says nothing yet: no table" in study.missing[0]
    study.meta["design"]["config"]["verdict"] = "os:getcwd"  # a table of rules, not of anything
    assert sections.rule(study) == "" and len(study.missing) == 1


def test_the_design_holds_what_it_says() -> None:
    """Equal exposure in all arms, and equal bits a parameter in the pair."""
    from phi3_jax.experiment import arms_of
    from phi3_jax.family import proxy

    arms = arms_of(load_config(FILE))
    assert {round(arm.knowledge / arm.facts, 6) for arm in arms.values()} == {round(2_000_000 / 9000, 6)}
    loads = [
        arms[f"pair_{size}"].facts * 48 / proxy(size, "pico", vocab=320).matrix_params for size in ("mini", "medium")
    ]
    assert loads[0] == pytest.approx(loads[1], rel=0.01)
    assert {arm.tokens for name, arm in arms.items() if name in ("facts9000", "search", "heard")} == {4_000_000}
    weights = [arms[f"pair_{size}"].fact_weight("token") for size in ("mini", "medium")]
    assert weights[0] == weights[1] and arms["pair_mini"].weighting == "token"
