"""Properties of scores over seeds and of gains per doubling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fake_study
import numpy as np
import pytest
from scipy import stats

from phi3_jax.records.table import read_study
from phi3_jax.reporting.gains import (
    FREE,
    _over_seeds,
    between_arms,
    between_sizes,
    cells,
    corpus_bits,
    gains,
    lags,
    recall_ceiling,
)
from phi3_jax.reporting.sentences import headlines
from phi3_jax.scaling import noise
from phi3_jax.scaling.endpoints import endpoints

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


def _power_law(exponent: float, seeds: int = 1) -> dict[str, list[float]]:
    return {m: [2.0 - exponent * math.log2(fake_study.SIZES[m][0])] * seeds for m in MEMBERS}


def test_a_loss_linear_in_log_size_gains_the_same_at_both_steps(tmp_path: Path) -> None:
    runs = _study(tmp_path, _power_law(0.05, 2), "loss", 0.001)
    (gain,) = gains(runs, endpoints(runs)[0], "unit")
    assert gain.first.value == pytest.approx(0.05) and gain.second.value == pytest.approx(0.05)
    assert gain.contrast.value == pytest.approx(0, abs=1e-9) and gain.contrast.sign == 0
    assert gain.first.sign == gain.second.sign == 1


@pytest.mark.parametrize("stderr", [None, 0.0001])
def test_with_one_seed_there_is_no_interval_and_no_test(tmp_path: Path, stderr: float | None) -> None:
    runs = _study(tmp_path, _power_law(0.05), "loss", stderr)
    (gain,) = gains(runs, endpoints(runs)[0], "unit")
    assert not gain.first.known and not gain.contrast.known and gain.contrast.sign == 0


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
    runs = _study(tmp_path, {"mini": [0.5] * 2, "small": [0.9] * 2, "medium": [1.0] * 2}, "exact", 0.005)
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


def test_two_sizes_and_two_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Seeds that move both alike cancel: the paired interval is narrow where those of the scores are wide."""
    shared = [-0.2, 0.0, 0.2]
    values = {"mini": [0.4 + s for s in shared], "small": [0.45 + s for s in shared]}
    runs = _study(tmp_path, values, "exact", None)
    endpoint = endpoints(runs)[0]
    (step,) = between_sizes(runs, endpoint)
    assert (step.member, step.seeds) == ("small", 3) and step.value.value == pytest.approx(5)
    assert step.value.low == pytest.approx(5, abs=1e-6) and step.value.sign == 1
    table = cells(runs, endpoint)
    assert table["mini", "4M"].high > table["small", "4M"].value  # what unpaired intervals would say
    one, two = ([r for r in runs if r.member == m] for m in ("mini", "small"))
    for run in two:
        run.member = "mini"
    (arm,) = between_arms(one, two, endpoint)
    assert arm.value == step.value
    (alone,) = between_arms(one[:1], two, endpoint)
    assert alone.seeds == 1 and not between_arms(one[:1], two[1:], endpoint)
    # One seed takes the noise of other runs of its size and tokens, of each side; where none was measured it has none.
    sides = [noise.of("reasoning/row/exact", run.size, run.budget) for run in (one[0], two[0])]
    free, apart = min(n.free for n in sides), 100 * math.hypot(*(n.sd for n in sides))
    assert free >= FREE and alone.value.value == pytest.approx(5)
    assert alone.value.high - 5 == pytest.approx(stats.t.ppf(0.975, free) * apart)
    assert not _over_seeds([5.0], 0.1).known


def test_a_fork_is_compared_with_its_trunk_at_equal_tokens(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "s", budgets=(2_000_000, 4_000_000))
    assert "lags" not in " ".join(headlines(read_study(folder)))  # the fake scores know no learning rate
    for member in MEMBERS:
        fork, trunk = (folder / f"{member}-clean-pico-s0-{b}M" for b in (2, 4))
        last = json.loads((fork / "config.json").read_text())["config"]["steps"]
        rows = [json.loads(line) for line in (fork / "evals.jsonl").read_text().splitlines()]
        moved = [r | {"value": r["value"] - 0.25} for r in rows if r["step"] == last and r["task"] == "all"]
        with (trunk / "evals.jsonl").open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in moved)
    equal, lag = lags(read_study(folder).runs)
    assert (lag.endpoint.column, lag.budget, lag.forks) == ("reasoning/all/nll", "2M", 3)
    assert lag.value == pytest.approx(0.25) and equal.value == pytest.approx(0)
    assert "0.250 higher at 2M (mean of 3). At 2M tokens the fork lags" in " ".join(headlines(read_study(folder)))
