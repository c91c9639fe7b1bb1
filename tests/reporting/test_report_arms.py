"""Studies with arms: paired differences, and a best learning rate at the edge of the grid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fake_study
import numpy as np
import pytest

from phi3_jax.reporting import arms, laws
from phi3_jax.reporting.page import write_report
from phi3_jax.scaling.causal import Row

RATES = {"lr1": 1e-3, "lr2": 2e-3, "lr4": 4e-3, "lr8": 8e-3}


def rows_of(best: dict[str, float]) -> list[Row]:
    """Runs whose loss is least at the given rate of each size."""
    out = []
    for k, (member, peak) in enumerate(best.items()):
        for arm, rate in RATES.items():
            loss = 1 + abs(np.log2(rate / peak))
            scores = {"knowledge/corpus/nll": loss, "reasoning/all/nll": loss}
            out.append(Row(arm, member, 1e5 * 2**k, 0, scores, {}))
    return out


CONFIG = {arm: {"peak_lr": rate} for arm, rate in RATES.items()}


def test_a_best_rate_at_the_edge_of_the_grid_is_called_that() -> None:
    (sentence,) = arms.rate_sentences(rows_of({"mini": 1e-3, "small": 2e-3, "medium": 8e-3}), CONFIG)
    assert "mini 0.001 (the lowest tried), small 0.002, medium 0.008 (the highest tried)." in sentence
    assert sentence.endswith("At the edge of the grid for mini, medium: a better rate may lie beyond it.")
    (inside,) = arms.rate_sentences(rows_of({"mini": 2e-3, "small": 4e-3}), CONFIG)
    assert inside == "Best learning rate tried under muP: mini 0.002, small 0.004."
    assert arms.rate_sentences(rows_of({"mini": 2e-3}), {"lr1": {"peak_lr": 1e-3}}) == []


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_arms_are_answered_by_their_paired_difference(tmp_path: Path, seeds: int) -> None:
    folder = fake_study.write_study(tmp_path / "s", budgets=(4_000_000,), seeds=seeds)
    for run in [p for p in folder.iterdir() if p.is_dir()]:
        other = run.with_name(run.name + "-loose")
        shutil.copytree(run, other)
        for path, arm in ((run, "filtered"), (other, "loose")):
            record = json.loads((path / "config.json").read_text())
            record["config"]["arm"], record["name"] = arm, path.name
            (path / "config.json").write_text(json.dumps(record))
        rows = [json.loads(line) for line in (other / "evals.jsonl").read_text().splitlines()]
        moved = [r | {"value": r["value"] - 0.05 * (r["metric"] in ("exact", "recall"))} for r in rows]
        (other / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in moved))
    page = write_report(folder).read_text()
    first = page.partition("<h3>")[0]
    assert "do runs of “loose” score better than “filtered”?" in first
    answer = first.partition("Exact rows (all outputs right) at 4M tokens, loose minus filtered, in points: ")[2]
    assert answer.startswith("mini −5.0 [")
    assert ("a description, not a test" in first) == ("from other runs" in first) == (seeds == 1)
    assert "Each arm minus “filtered”" in page


def test_residuals_are_per_cent_of_the_prediction() -> None:
    assert laws.percent(np.log([0.5, 1.0, 2.0])) == pytest.approx([-50, 0, 100])
    assert laws.percent(np.array([-9.0])) > -100  # 100 times the logarithm would be -900


def test_arms_of_text_are_drawn_as_loss_against_compute() -> None:
    def row(arm: str, member: str, seed: int, flops: str, loss: float) -> Row:
        return Row(arm, member, 1e5, seed, {"text/code/loss": loss, "text/prose/loss": 2.0}, {"flops": flops})

    rows = [row("1-0", "mini", s, f, x) for s, f, x in ((0, "1e10", 3.0), (1, "1e10", 3.2), (0, "2e10", 2.5))]
    rows += [row("0-1", "mini", 0, "1e10", 3.5), row("0-1", "mini", 0, "2e10", 3.4)]
    figure = arms.compute(rows, "footer")
    code, prose = figure.axes
    assert (code.get_title(loc="left"), prose.get_title(loc="left")) == ("code", "prose")
    assert [list(line.get_ydata()) for line in code.lines] == [[pytest.approx(3.1), 2.5], [3.5, 3.4]]
    assert arms.compute([r for r in rows if r.arm == "1-0"], "footer") is None
    assert arms.controls([*rows, row("1-1", "mini", 0, "1e10", 3.0)], "footer") is None, "no facts, no reasoning"
