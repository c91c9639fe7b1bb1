"""The command that lists what ran of a study in blocks, and decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.experiment import arms_of, load_config
from phi3_jax.family import proxy
from phi3_jax.records import tables
from phi3_jax.scaling.regime import LOSS, RECALL, floor
from phi3_jax.study.asked import asked_runs
from phi3_jax.study.verdict import blocks, lines_of

FILE = str(Path(__file__).parents[2] / "experiments" / "calibration.py")
STEP = 1056  # tokens
PLAN = {"A": 60, "pilot": 32, "B": 388, "C": 216, "D": 12}


def write(folder: Path, block: str, leave_out: int = 0) -> None:
    """A block's table, but for its last runs: width `below` is best at 1/64, every other at 1/16."""
    config, lines, draw = load_config(f"{FILE}:{block}"), [], np.random.default_rng(0)
    for run in asked_runs(config, config.scale)[: -leave_out or None]:
        size = proxy(run.size, config.scale, config.ladder).matrix_params
        share = arms_of(config)[run.arm].facts / config.universe
        points = 40 - 1.5 * (np.log2(share) + (6 if run.size == "below" else 4)) ** 2 + 0.1 * draw.normal()
        scores = {RECALL: max(points, 1) / 200, LOSS: floor() * (1 - max(points, 1) / 100)}
        steps = run.budget // STEP
        lines.append(
            dict(arm=run.arm, member=run.size, seed=run.seed, non_embedding=size, budget=steps * STEP, steps=steps)
            | dict(build="b1", dirty=False, scorer=2)
            | scores
        )
    folder.mkdir(exist_ok=True)
    tables.write(folder / f"{block}.csv", list(lines[0]), lines)


def test_every_planned_run_is_said_to_have_run_or_not(tmp_path: Path) -> None:
    write(tmp_path, "C", leave_out=1)
    write(tmp_path, "pilot")
    write(tmp_path, "B")
    found, rule, refused = blocks(FILE, tmp_path)
    said = lines_of(found, rule)
    assert not refused and "A: 0 of 60 planned runs ran" in said and "B: 388 of 388 planned runs ran" in said
    assert "C: 215 of 216 planned runs ran" in said and "C: not run: f64_x4-medium-s305-4M" in said
    (e1,) = (line for line in said if line.startswith("E1, recall:"))
    assert "best filters 0.015" in e1 and e1.count(", 0.06") == 4 and "whether others agree has not run" in e1
    (e2,) = (line for line in said if line.startswith("E2, recall:"))
    assert e2.startswith("E2, recall: rises (predicted: rises). The largest size loses +3.0")  # 1.5 * 2^2 / 2 points
    assert sum(line.startswith("E3, recall") for line in said) == 2 and "Not final: 1 runs miss." in said[-3]
    assert [line[:2] for line in said[-8:]] == ["E1", "E2", "E3"] * 2 + ["E4"] * 2


def test_the_rule_waits_for_what_the_pilot_fixes(tmp_path: Path) -> None:
    """Without rows, too; and what the pilot's noise lets seeds see is said once it ran."""
    found, rule, _ = blocks(FILE, tmp_path)
    waiting = rule | {"after_pilot": dict.fromkeys(rule["after_pilot"])}
    said = lines_of(found, waiting)
    assert said[:-1] == [f"{name}: 0 of {n} planned runs ran" for name, n in PLAN.items()]
    assert said[-1].startswith("E1 to E4: not decided. The rule waits")
    write(tmp_path, "pilot")
    assert "points of recall that seeds see: 0." in lines_of(blocks(FILE, tmp_path)[0], waiting)[-1]


def test_a_folder_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", FILE, str(tmp_path / "calibartion")]) == 2
    assert "calibartion is no folder; give the one" in capsys.readouterr().err


def test_one_line_of_a_block_takes_no_listing_away(tmp_path: Path) -> None:
    write(tmp_path, "B", leave_out=387)
    found, rule, _ = blocks(FILE, tmp_path)
    said = lines_of(found, rule)
    assert "B: 1 of 388 planned runs ran" in said and len(said) == 5 + 1 + 8
    assert all("not determined" in line for line in said[-8:])


def test_what_has_no_such_rule_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", FILE.replace("calibration", "scaling"), str(tmp_path)]) == 2
    assert "has no rule of blocks" in capsys.readouterr().err
    write(tmp_path, "B")
    write(tmp_path, "pilot")
    (tmp_path / "B.csv").write_text((tmp_path / "B.csv").read_text().replace("b1,False,2", "b2,False,2", 1))
    assert main(["verdict", FILE, str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "mixes runs of 2 builds (b1, b2)" in said.err
    assert "B: 0 of 388 planned runs ran" in said.out and "pilot: 32 of 32 planned runs ran" in said.out
