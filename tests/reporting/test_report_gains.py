"""Properties of scores over seeds and of gains per doubling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fake_study
import numpy as np
import pytest

from phi3_jax.reporting.gains import cells, corpus_bits, endpoints, gains, recall_ceiling
from phi3_jax.reporting.table import read_study

MEMBERS = ("mini", "small", "medium")


def _study(folder: Path, values: dict[str, list[float]], metric: str, stderr: float | None) -> list:
    """Runs at 4M tokens whose only score is given for each member and seed."""
    for member, per_seed in values.items():
        for seed, value in enumerate(per_seed):
            run = fake_study.write_run(folder, member, 4_000_000, seed)
            step = json.loads((run / "config.json").read_text())["config"]["steps"]
            row = {
                "step": step,
                "suite": "reasoning",
                "task": "row",
                "metric": metric,
                "value": value,
                "n": 4096,
            }
            (run / "evals.jsonl").write_text(json.dumps(row | {"stderr": stderr}) + "\n")
    return read_study(folder).runs


def _power_law(exponent: float) -> dict[str, list[float]]:
    return {m: [2.0 - exponent * math.log2(fake_study.SIZES[m][0])] for m in MEMBERS}


def test_a_loss_linear_in_log_size_gains_the_same_at_both_steps(tmp_path: Path) -> None:
    runs = _study(tmp_path, _power_law(0.05), "loss", 0.001)
    (gain,) = gains(runs, endpoints(runs)[0], "unit")
    assert gain.first.value == pytest.approx(0.05) and gain.second.value == pytest.approx(0.05)
    assert gain.contrast.value == pytest.approx(0, abs=1e-9) and gain.contrast.sign == 0
    assert gain.first.sign == gain.second.sign == 1


def test_without_errors_and_with_one_seed_there_is_no_interval(tmp_path: Path) -> None:
    runs = _study(tmp_path, _power_law(0.05), "loss", None)
    (gain,) = gains(runs, endpoints(runs)[0], "unit")
    assert gain.first.low is None and gain.contrast.high is None and gain.contrast.sign == 0


def test_intervals_over_seeds_cover_the_truth_as_often_as_they_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, covered, trials = (0.4, 0.5, 0.7), 0, 60
    runs = _study(tmp_path, {m: [0.5] * 3 for m in MEMBERS}, "exact", None)
    endpoint = endpoints(runs)[0]
    d1, d2 = (math.log2(fake_study.SIZES[b][0] / fake_study.SIZES[a][0]) for a, b in (MEMBERS[:2], MEMBERS[1:]))
    contrast = 100 * ((truth[2] - truth[1]) / d2 - (truth[1] - truth[0]) / d1)
    for _ in range(trials):
        for run in runs:
            value = truth[MEMBERS.index(run.member)] + rng.normal(0, 0.02)
            run.finals[endpoint.key]["value"] = value
        (gain,) = gains(runs, endpoint, "points")
        covered += gain.contrast.low <= contrast <= gain.contrast.high
    assert 52 <= covered <= 60  # 95% of 60 is 57, five standard errors below is 48.6


def test_more_seeds_never_hide_the_error_over_items(tmp_path: Path) -> None:
    same = {m: [v] * 3 for m, v in zip(MEMBERS, (0.4, 0.5, 0.6), strict=True)}
    runs = _study(tmp_path, same, "exact", 0.01)
    cell = cells(runs, endpoints(runs)[0])["small", "4M"]
    assert (cell.high - cell.low) / 2 == pytest.approx(1.96 * 0.01, rel=1e-3)


def test_a_perfect_score_has_finite_log_odds_and_an_interval(tmp_path: Path) -> None:
    runs = _study(tmp_path, {"mini": [0.5], "small": [0.9], "medium": [1.0]}, "exact", 0.005)
    (gain,) = gains(runs, endpoints(runs)[0], "logit")
    assert math.isfinite(gain.second.value) and gain.second.low < gain.second.value < gain.second.high


def test_a_size_without_a_seed_in_common_gives_no_gain(tmp_path: Path) -> None:
    runs = _study(tmp_path, {"mini": [0.4, 0.4], "small": [0.5, 0.5], "medium": [0.6, 0.6]}, "exact", 0.01)
    others = [r for r in runs if not (r.member == "medium" and r.seed == 0) and not (r.member == "mini" and r.seed)]
    assert gains(runs, endpoints(runs)[0], "points") and not gains(others, endpoints(runs)[0], "points")


def test_ceiling_and_bits_follow_from_the_rows(studies: dict[str, Path]) -> None:
    runs = read_study(studies["whole"]).runs
    assert recall_ceiling(runs) == pytest.approx(0.5 + 0.5 / 256)
    assert corpus_bits(runs) == pytest.approx(48 * 4500)
    assert recall_ceiling(read_study(studies["text"]).runs) is None
