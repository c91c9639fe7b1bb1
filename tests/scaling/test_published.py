"""The published table, its contradictions, and what is left of "much less from 7B to 14B"."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.errors import UserError
from phi3_jax.scaling import gains, published

ROWS = published.benchmarks()
WITHOUT = [b for b in ROWS if b.name not in ("MATH", "TriviaQA")]
FAMILIES = Path(__file__).parents[3] / "shared/scaling_data/obs_scaling/base_llm_benchmark_eval.csv"


def test_the_report_s_contradictions_are_found_by_recomputing_it() -> None:
    found = {i.what: (i.printed, i.expected) for i in published.inconsistencies()}
    assert found["average of phi3_medium over the 20 rows"] == pytest.approx((76.7, 77.19), abs=0.005)
    assert found["average of gpt35_1106 over the 20 rows"] == pytest.approx((72.8, 73.78), abs=0.005)
    assert found["TruthfulQA of gpt35_1106 equals its TriviaQA"] == (85.8, 67.7)
    swapped = {k.split(" of ")[0]: v for k, v in found.items() if "swapped" in k}
    assert swapped == {"MedQA": (70.0, 53.8), "MBPP": (53.8, 70.0), "PIQA": (83.2, 84.2), "OpenBookQA": (84.2, 83.2)}
    assert len(found) == 7  # every other printed average is the truncated mean of its rows


def test_scores_are_those_of_the_report_and_unknown_ones_are_named() -> None:
    assert published.benchmark("MMLU").scores == (0.688, 0.757, 0.780) and len(ROWS) == 20
    assert np.mean([b.scores for b in ROWS], axis=0) == pytest.approx([0.6972, 0.7369, 0.7719], abs=5e-5)
    assert published.benchmark("MedQA", "azure").scores[0] == pytest.approx(0.538)  # put right
    with pytest.raises(UserError, match="MMLUU.*MMLU"):
        published.benchmark("MMLUU")
    with pytest.raises(UserError, match="unknown version 'v5'"):
        published.benchmarks("v5")
    with pytest.raises(UserError, match="no published table"):
        published.table("phi3_akademic")


@pytest.mark.parametrize(
    ("name", "first", "second", "z", "kappa", "z_compute"),
    [
        ("MMLU", 7.25, 2.51, -5.0, (0.379, 0.156), -2.7),
        ("BigBench-Hard", 7.77, 2.51, -3.9, (0.459, 0.183), -2.2),
        ("WinoGrande", 11.24, 0.00, -3.8, (0.692, 0.000), -3.0),
        ("BoolQ", 7.98, 1.85, -3.7, (0.614, 0.186), -2.4),
        ("ANLI", 5.57, -2.51, -3.5, (0.181, -0.084), -3.2),
        ("GSM-8K", 7.46, 1.53, -2.6, (0.789, 0.227), -1.8),
        ("MedQA", 12.18, 4.90, -2.1, (0.438, 0.219), -1.0),
        ("HellaSwag", 0.32, 5.88, 5.1, (0.020, 0.421), 6.4),
        ("MATH", -7.04, 20.16, 15.2, (-0.164, 0.523), 16.6),
        ("TriviaQA", -6.20, 17.22, 19.7, (-0.230, 0.744), 21.6),
    ],
)
def test_the_worked_example(
    name: str, first: float, second: float, z: float, kappa: tuple[float, float], z_compute: float
) -> None:
    def of(scale: str, per: str) -> gains.Contrast:
        return next(c for c in gains.contrasts(ROWS, scale, per) if c.benchmark == name)

    points = of("points", "N")
    assert (points.first, points.second) == pytest.approx((first, second), abs=0.01)
    assert points.z == pytest.approx(z, abs=0.06)
    exponent = of("exponent", "N")
    assert (exponent.first, exponent.second) == pytest.approx(kappa, abs=0.001)
    assert of("points", "C").z == pytest.approx(z_compute, abs=0.06)


def test_which_benchmarks_keep_a_weaker_second_step() -> None:
    found = gains.answer(ROWS)
    assert set(found["points", "N"].weaker) == {"MMLU", "BigBench-Hard", "WinoGrande", "BoolQ", "ANLI"}
    assert set(found["points", "N"].stronger) == {"HellaSwag", "MATH", "TriviaQA"}
    assert set(found["points", "C"].weaker) == {"ANLI", "WinoGrande"}
    # On the other scales at most the same ones: what is lost is a ceiling effect.
    assert set(found["logit", "C"].weaker) == set(found["exponent", "C"].weaker) == {"ANLI"}


def test_all_benchmarks_together() -> None:
    whole, some = gains.summary(gains.contrasts(ROWS)), gains.summary(gains.contrasts(WITHOUT))
    assert (whole.negative, whole.count) == (15, 20)
    assert (whole.mean, whole.stderr, whole.median) == pytest.approx((-0.35, 2.16, -2.09), abs=0.005)
    assert (some.mean, some.stderr) == pytest.approx((-3.20, 1.00), abs=0.005)
    compute = gains.summary(gains.contrasts(WITHOUT, per="C"))
    assert (compute.mean, compute.stderr) == pytest.approx((-1.26, 0.76), abs=0.005)
    # 15 of 20 is not unusual for model families (one-sided about .13, two-sided .25); against a coin it would be.
    assert whole.sign_p == pytest.approx(0.253, abs=0.005)
    assert abs(some.pooled - some.mean) < 0.3 and some.between_sd > 1


def test_a_law_without_mixtures_expects_a_weaker_second_step() -> None:
    assert gains.null_ratio() == pytest.approx(0.66, abs=0.01)
    assert gains.null_ratio(gains.HOFFMANN) == pytest.approx(0.60, abs=0.005)
    matched = (4.8e12,) * 3
    assert gains.null_ratio(tokens=matched) == pytest.approx(0.76, abs=0.01)
    assert gains.null_ratio(per_doubling=True) == pytest.approx(0.69, abs=0.005)
    assert gains.null_ratio(tokens=matched, per_doubling=True) == pytest.approx(0.79, abs=0.01)


def test_other_families() -> None:
    rows = published.families()
    assert len(rows) == 303 and len({(r["family"], r["small"], r["middle"]) for r in rows}) == 39
    assert len({r["family"] for r in rows}) == 22
    assert gains.base_rate() == pytest.approx(0.604, abs=0.001)


@pytest.mark.shared("scaling_data/obs_scaling")
def test_the_table_of_families_is_what_its_source_gives(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "analysis/families.py"
    subprocess.run([sys.executable, script, FAMILIES, tmp_path / "families.csv"], check=True)
    assert (tmp_path / "families.csv").read_text() == (published.FOLDER / "families.csv").read_text()


def test_the_parts_of_a_contrast_sum_to_it() -> None:
    for part, contrast in zip(gains.decompose(ROWS), gains.contrasts(ROWS), strict=True):
        assert part.compute + part.ceiling + part.recipe + part.remainder == pytest.approx(contrast.value, abs=1e-9)
        assert part.stderr == contrast.stderr


def test_the_decomposition_names_the_cause_that_was_put_in() -> None:
    """Scores made by compute alone, on the logit scale, have no recipe and no remainder; a shifted middle has a recipe."""
    c = np.log2(published.FLOPS)

    def made(start: float, off: float) -> published.Benchmark:
        logit = start + 0.4 * (c - c[0]) + np.array([0, off, 0])
        return published.Benchmark(f"b{start}", tuple(1 / (1 + np.exp(-logit))), 1000, 0.0, "one")

    for part in gains.decompose([made(0.0, 0.0), made(1.0, 0.0)]):
        assert part.recipe == pytest.approx(0, abs=1e-9) and part.remainder == pytest.approx(0, abs=1e-9)
        assert part.compute < 0
    one, other = gains.decompose([made(0.0, -0.3), made(0.1, -0.3)])
    assert one.recipe > 5 and abs(one.remainder) < 0.5 and abs(other.remainder) < 0.5
    near, far = gains.decompose([made(2.5, 0.0), made(-1.0, 0.0)])
    assert near.ceiling < -0.5 < far.ceiling


def test_the_pooled_mean_is_der_simonian_and_laird_s() -> None:
    """Three contrasts by hand: weights 1, 1, 1/4, fixed mean 4/3, Q = 8, C = 2.25 - 2.0625 / 2.25, tau^2 = (Q - 2) / C."""
    made = [
        gains.Contrast("a", "points", "N", 0, 0, 0.0, 1.0, 1, 1), gains.Contrast("b", "points", "N", 0, 0, 3.0, 1.0, 1, 1),
        gains.Contrast("c", "points", "N", 0, 0, 0.0, 2.0, 1, 1),
    ]  # fmt: skip
    weights = np.array([1, 1, 0.25])
    fixed = 3 / 2.25
    q = float(np.sum(weights * (np.array([0, 3, 0]) - fixed) ** 2))
    tau2 = (q - 2) / (2.25 - 2.0625 / 2.25)
    random = 1 / (np.array([1, 1, 4]) + tau2)
    found = gains.summary(made)
    assert found.between_sd == pytest.approx(math.sqrt(tau2)) and tau2 > 0
    assert found.pooled == pytest.approx(3 * random[1] / random.sum())
    assert found.pooled_stderr == pytest.approx(1 / math.sqrt(random.sum()))


def test_one_outlier_does_not_give_its_group_a_recipe() -> None:
    parts = {d.benchmark: d for d in gains.decompose(ROWS)}
    assert abs(parts["GSM-8K"].recipe) < 4 and parts["MATH"].remainder > 20
    assert parts["MedQA"].recipe < 4  # TriviaQA alone would make it 8.5


def test_holm_and_equivalence() -> None:
    assert gains.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    c = gains.Contrast("x", "points", "N", 1, 1, 0.5, 1.0, 0.6, 1.0)
    assert gains.equivalent(c, 2.2) and not gains.equivalent(c, 2.1)  # 0.5 + 1.645 = 2.145
    assert gains.normal_p(1.959964) == pytest.approx(0.05, abs=1e-6) and math.isclose(gains.normal_p(0), 1)


def test_the_safety_table_by_size() -> None:
    rows = {row.name: row for row in published.safety()}
    assert len(rows) == 5 and [row.share for row in rows.values()].count(False) == 1
    first, second = rows["Ungroundedness"].steps
    assert first == pytest.approx(-0.319, abs=5e-4) and second == pytest.approx(-0.094, abs=5e-4)
    assert second / first == pytest.approx(0.29, abs=5e-3)
    jailbreak, summaries = rows["Jailbreak"], rows["Harmful Content Summarization"]
    assert jailbreak.conversations(0, 2) == pytest.approx(11_200, rel=0.01)
    assert summaries.conversations(0, 2) == pytest.approx(10_300, rel=0.01)
    shares = [row for row in rows.values() if row.share]
    assert min(row.conversations(a, b) for row in shares for a, b in ((0, 1), (1, 2), (0, 2))) > 1000
    # By simulation: so many conversations find the difference four times in five.
    rng, n = np.random.default_rng(0), round(jailbreak.conversations(0, 2))
    p, q = (rng.binomial(n, jailbreak.values[i], 4000) / n for i in (0, 2))
    z = (p - q) / np.sqrt((p * (1 - p) + q * (1 - q)) / n)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.02)
