"""The causal study's analysis on tables whose truth is known."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from phi3_jax.errors import UserError
from phi3_jax.scaling import causal
from phi3_jax.scaling.causal import EXACT, OWN, UNIVERSE

SIZES = {"mini": 100_000, "small": 200_000, "medium": 400_000}
EXPERIMENT = Path(__file__).parents[2] / "experiments" / "data_optimal.py"


def experiment() -> Any:
    spec = importlib.util.spec_from_file_location("data_optimal", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RULE, ARMS = experiment().RULE, {name: arm.given for name, arm in experiment().ARMS.items()}
FLOORS = {UNIVERSE: 1 / 256, OWN: 1 / 256, EXACT: 0.0}
# Own-fact recall and exact rows of each size (shares), as a pilot found them: filtered saturates, loose does not.
PILOT = {
    "filtered": {OWN: (0.54, 0.89, 0.999), EXACT: (0.49, 0.56, 0.68)},
    "loose": {OWN: (0.15, 0.44, 0.76), EXACT: (0.50, 0.52, 0.61)},
}


def rows(truth: dict[str, dict[str, tuple[float, ...]]], seeds: int = 4, noise: float = 0.005) -> list[causal.Row]:
    rng, out = np.random.default_rng(0), []
    for arm, ends in truth.items():
        share = ARMS[arm]["facts"] / 9000
        for i, (member, size) in enumerate(SIZES.items()):
            for seed in range(seeds):
                own, exact = (float(np.clip(ends[e][i] + noise * rng.normal(), 0, 1)) for e in (OWN, EXACT))
                scores = {OWN: own, UNIVERSE: share * own, EXACT: exact, f"{OWN}/n": 27000, f"{UNIVERSE}/n": 54000}
                out.append(causal.Row(arm, member, size, seed, scores | {f"{EXACT}/n": 4096}, {}))
    return out


def decide(table: list[causal.Row]) -> causal.Verdict:
    return causal.decide(table, RULE, ARMS, FLOORS)


def test_gains_and_interaction_are_those_that_were_put_in() -> None:
    table = rows(PILOT, noise=0.0)
    found = causal.steps(table, "loose", OWN)
    assert (found.first[0], found.second[0]) == pytest.approx((29, 32))
    # (second - first) of loose minus that of filtered, in points of the universe: 3 - (10.9 / 2 - 35 / 2)
    assert causal.interaction(table, ("filtered", "loose"), UNIVERSE).value == pytest.approx(3 + (35 - 10.9) / 2)


def test_an_interval_covers_its_truth_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(300):
        rng = np.random.default_rng(trial)
        table = [
            causal.Row(arm, m, n, s, {OWN: 0.5 + 0.02 * rng.normal()}, {})
            for arm in ("filtered", "loose")
            for m, n in SIZES.items()
            for s in range(3)
        ]
        e = causal.interaction(table, ("filtered", "loose"), OWN)
        hits += e.low <= 0 <= e.high
    assert 0.92 <= hits / 300 <= 0.98


def test_the_verdict_takes_each_of_its_words() -> None:
    assert decide(rows(PILOT)).word == "supported through the ceiling only"
    # More than a ceiling: among its own facts, too, the filtered corpus has the weaker second step in log-odds.
    deep = PILOT | {"filtered": {OWN: (0.45, 0.80, 0.85), EXACT: (0.49, 0.56, 0.60)}}
    deep["loose"] = {OWN: (0.15, 0.44, 0.90), EXACT: (0.45, 0.52, 0.61)}
    assert decide(rows(deep)).word == "supported"
    same = PILOT | {"loose": {OWN: (0.27, 0.445, 0.4995), EXACT: (0.49, 0.56, 0.68)}}
    assert decide(rows(same)).word == "not supported"
    assert decide(rows(PILOT, seeds=1)).word == "no answer"
    unfit = PILOT | {"loose": {OWN: (0.05, 0.1, 0.76), EXACT: (0.5, 0.52, 0.61)}}
    verdict = decide(rows(unfit))
    assert verdict.word == "no answer" and any("not admitted" in f for f in verdict.findings)


DEEP = {
    "filtered": {OWN: (0.45, 0.80, 0.85), EXACT: (0.49, 0.56, 0.60)},
    "loose": {OWN: (0.15, 0.44, 0.90), EXACT: (0.45, 0.52, 0.61)},
}


def with_exact(arm: str, *exact: float) -> dict[str, dict[str, tuple[float, ...]]]:
    return DEEP | {arm: DEEP[arm] | {EXACT: exact}}


@pytest.mark.parametrize(
    ("truth", "word"),
    [
        (DEEP, "supported"),
        (with_exact("loose", 0.45, 0.90, 0.61), "supported in part"),  # reasoning above what admits it, in one arm
        (with_exact("filtered", 0.49, 0.10, 0.60), "supported in part"),  # below, in the other
        (with_exact("loose", 0.2, 0.52, 0.05), "supported in part"),  # the best share stays that of the filter
        (with_exact("loose", 0.85, 0.52, 0.85), "supported in part"),  # it is the loose corpus's at both ends
    ],
)
def test_support_is_whole_only_with_admitted_reasoning_and_a_rising_share(truth: Any, word: str) -> None:
    verdict = decide(rows(truth))
    assert verdict.word == word
    admitted = {a.endpoint: a.admitted for a in verdict.admissions}
    assert admitted[UNIVERSE] and admitted[EXACT] == (
        0.2 <= truth["loose"][EXACT][1] <= 0.8 >= 0.2 <= truth["filtered"][EXACT][1]
    )


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-4.9, 4.9, "absent within the margin of 5"),
        (1.0, 4.9, "absent within the margin of 5"),  # it excludes 0 and is still too small to matter
        (-4.9, 5.1, "neither shown nor excluded"),
        (-5.1, 4.9, "neither shown nor excluded"),
        (-5.1, 5.1, "neither shown nor excluded"),
        (1.0, 5.1, "the interval excludes 0"),
        (-5.1, -1.0, "the interval excludes 0"),
        (-9.0, -6.0, "the interval excludes 0"),
        (math.nan, math.nan, "neither shown nor excluded"),
    ],
)
def test_reasoning_is_absent_only_where_the_whole_interval_lies_in_the_margin(
    low: float, high: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = causal.Estimate((low + high) / 2, 1.0, low, high, 4)
    real = causal.interaction
    monkeypatch.setattr(causal, "interaction", lambda t, a, end, s: found if end == EXACT else real(t, a, end, s))
    (line,) = (f for f in decide(rows(PILOT)).findings if f.startswith("Reasoning"))
    assert RULE["equivalence"] == 5.0 and says in line


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 3.0, "supported"), (0.0, 3.0, "no"), (-3.0, -0.1, "no")])
def test_a_condition_holds_where_its_interval_lies_above_0(
    low: float, high: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either condition alone, the other being as it was put in."""
    real = causal.interaction
    for scale, otherwise in (("points", "not supported"), ("logit", "supported through the ceiling only")):
        end = UNIVERSE if scale == "points" else OWN
        value = causal.Estimate((low + high) / 2, 1.0, low, high, 4)
        monkeypatch.setattr(
            causal, "interaction", lambda t, a, e, s, m=(end, scale), v=value: v if (e, s) == m else real(t, a, e, s)
        )
        assert decide(rows(DEEP)).word == (word if word == "supported" else otherwise)


def test_an_endpoint_is_admitted_from_one_fifth_to_four_fifths_of_its_range() -> None:
    for exact, admitted in ((0.21, True), (0.79, True), (0.19, False), (0.81, False)):
        table = rows(with_exact("loose", 0.4, exact, 0.6), noise=0.0)
        assert causal.admit(table, RULE, EXACT, 0.0).admitted == admitted
    half = causal.admit(
        rows(with_exact("loose", 0.4, 0.6, 0.6), noise=0.0), RULE, EXACT, 0.2
    )  # (0.6 - 0.2) / (1 - 0.2)
    assert half.positions == pytest.approx({"filtered": 0.45, "loose": 0.5})


def test_rare_groups_are_smoothed_as_isotonic_regression_does() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.random(40), np.linspace(0.9, 0.1, 9) + 0.2 * rng.normal(size=9), np.array([0.1, 0.1, 0.9])):
        np.testing.assert_allclose(causal._falling(values), isotonic_regression(values, increasing=False).x, atol=1e-12)


def test_findings_say_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    for low, high, says in ((1, 3, "the filter weakens"), (-3, -1, "the filter strengthens"), (-1, 1, "includes 0")):
        found = causal.Estimate((low + high) / 2, 1.0, low, high, 4)
        monkeypatch.setattr(causal, "interaction", lambda *_, found=found: found)
        assert says in decide(rows(PILOT)).findings[0]
    assert causal.interval(causal.Estimate(-1.26, 1.0, -3.0, 0.5, 3)) == "−1.3 [−3.0, +0.5] (3 seeds)"
    assert causal.interval(causal.Estimate(1.26, math.nan, math.nan, math.nan, 1), 2) == "+1.26 (1 seed)"


def test_log_odds_are_clipped_where_half_an_item_is_right_or_wrong() -> None:
    table = [
        causal.Row("a", m, n, 0, {OWN: p, f"{OWN}/n": 99}, {}) for (m, n), p in zip(SIZES.items(), (0.0, 0.5, 1.0))
    ]
    found = causal.scores(table, "a", OWN, "logit")
    assert [found[m][0] for m in SIZES] == pytest.approx([-math.log(199), 0.0, math.log(199)])
    assert causal.scores(table, "a", OWN)["small"][0] == 50.0


def test_coverage_and_competition_sum_to_the_difference() -> None:
    table = rows(PILOT)
    split = causal.ceiling(table, ("filtered", "loose"), (0.5, 1.0))
    whole = causal.difference(table, ("filtered", "loose"), UNIVERSE)
    for member, part in split.items():
        assert part.coverage.value + part.competition.value == pytest.approx(part.total.value)
        assert part.total.value == pytest.approx(whole[member].value)
    assert split["mini"].competition.value < -30 < split["medium"].competition.value < 0
    assert split["medium"].coverage.value == pytest.approx(50, abs=1)


def test_the_best_share_rises_with_size_where_it_was_made_to() -> None:
    truth = {
        "facts3000": {OWN: (0.9, 0.95, 1.0), EXACT: (0.60, 0.6, 0.6)},
        "filtered": {OWN: (0.54, 0.89, 1.0), EXACT: (0.50, 0.6, 0.6)},
        "facts6000": {OWN: (0.3, 0.80, 1.0), EXACT: (0.50, 0.6, 0.6)},
        "loose": {OWN: (0.15, 0.44, 0.9), EXACT: (0.50, 0.5, 0.6)},
    }
    shares = causal.ladder_of_shares(ARMS, ("filtered", "loose"))
    assert shares == pytest.approx({"facts3000": 1 / 6, "filtered": 1 / 4, "facts6000": 1 / 3, "loose": 1 / 2})
    best = causal.best_shares(rows(truth), shares, (UNIVERSE, EXACT))
    assert [best[m].best for m in SIZES] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert best["medium"].at_edge and not best["small"].at_edge


def test_arms_that_still_run_are_left_out_and_do_not_stop_the_verdict() -> None:
    whole, part = rows(PILOT), rows({"facts3000": PILOT["filtered"]})
    half = [row for row in part if row.member == "medium"]
    verdict = decide(whole + half)
    assert verdict.best == decide(whole).best and set(verdict.best) == set(SIZES)
    assert len(decide(whole + part).best["mini"].shares) == 3
    other = [causal.Row(r.arm, r.member, r.size, r.seed + 50, r.scores, r.record) for r in part]
    assert decide(whole + other).best == {}  # no seed in common: nothing is said of the best share


def test_thresholds_in_frequency_are_where_half_is_recalled() -> None:
    table = []
    for i, (member, size) in enumerate(SIZES.items()):
        half = 10 * 2**i  # the group that is recalled half of the time
        scores = {f"knowledge/group {g:03d}/recall_by_frequency": 1 / (1 + (g / half) ** 4) for g in range(1, 101)}
        table.append(causal.Row("power_law", member, size, 0, scores, {}))
    found = causal.frequency_thresholds(table, "power_law")
    assert [e.value for e in found.values()] == pytest.approx([-1.5 * math.log2(10 * 2**i) for i in range(3)], abs=0.02)


def test_a_curvature_is_the_second_derivative_in_doublings() -> None:
    table = [causal.Row("w", f"size{i}", 2.0**i, 0, {OWN: (0.1 + 0.2 * i - 0.01 * i**2)}, {}) for i in range(6)]
    gain, bend = causal.slope(table, "w", OWN)
    assert bend.value == pytest.approx(-2.0) and gain.value == pytest.approx(15.0)
    with pytest.raises(UserError, match="needs 4"):
        causal.slope(table[:3], "w", OWN)


def test_degenerate_policies_are_measured() -> None:
    floors = causal.degenerate(9000, 10)
    assert 0.002 < floors[UNIVERSE] < 0.01 and 0 <= floors[EXACT] < 0.002


def write(path: Path, *records: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({k for r in records for k in r}), restval="")
        writer.writeheader()
        writer.writerows(records)
    return path


RUN = {"arm": "filtered", "member": "mini", "non_embedding": 1e5, "seed": 0, "status": "finished", UNIVERSE: 0.3}


def test_tables_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", RUN, RUN | {"seed": 1, "status": "unfinished: step 3 of 9"})
    (row,) = causal.read(path)
    assert (row.arm, row.size, row.scores) == ("filtered", 1e5, {UNIVERSE: 0.3})
    with pytest.raises(UserError, match="filtred.*filtered"):
        causal.scores([row], "filtred", UNIVERSE)
    with pytest.raises(UserError, match="no endpoint"):
        causal.scores([row], "filtered", EXACT)
    with pytest.raises(UserError, match="no seed with all"):
        causal.steps([row], "filtered", UNIVERSE)
    with pytest.raises(UserError, match="no table"):
        causal.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no column 'arm'"):
        causal.read(write(tmp_path / "other.csv", {"name": "x"}))
    with pytest.raises(UserError, match="no finished run"):
        causal.read(write(tmp_path / "stopped.csv", RUN | {"status": "not started"}))
    (tmp_path / "study.json").write_text(json.dumps({"design": {"config": {"rule": {}}}}))
    with pytest.raises(UserError, match="has no rule"):
        causal.of_study(tmp_path)
