"""Power of a design: the worked numbers, and formula against simulation."""

from __future__ import annotations

import dataclasses
import json

import pytest

from phi3_jax.__main__ import main
from phi3_jax.scaling import noise, power
from phi3_jax.scaling.power import Design

PHI3 = (3.82e9, 7.39e9, 13.96e9)


def test_the_worked_numbers() -> None:
    """30k items, 3 seeds and 1 point between seeds: SE 1.57, 4.4 detectable; 5 seeds: 1.24 and 3.5; 1k, 1 seed: 3.5."""
    design = Design(PHI3, 3, 30_000, 1.0)
    assert (design.weights**2).sum() == pytest.approx(6.8, abs=0.1)
    assert design.stderr == pytest.approx(1.57, abs=0.02)
    assert power.normal_effect(design) == pytest.approx(4.4, abs=0.05)
    five = dataclasses.replace(design, seeds=5)
    assert (five.stderr, power.normal_effect(five)) == pytest.approx((1.24, 3.5), abs=0.09)
    # A t test with three seeds must learn its own noise, and pays for it.
    assert power.detectable(design) > 1.5 * power.normal_effect(design)


@pytest.mark.parametrize("arms", [1, 2])
@pytest.mark.parametrize("seeds", [3, 5])
def test_simulated_power_is_that_of_the_formula(arms: int, seeds: int) -> None:
    design = Design((110_592, 212_992, 416_000), seeds, 20_000, 1.0, arms=arms)
    effect = power.detectable(design)
    assert power.power_at(design, effect) == pytest.approx(0.8, abs=1e-6)
    assert power.simulate(design, effect) == pytest.approx(0.8, abs=0.03)
    assert power.simulate(design, 0.0) == pytest.approx(0.05, abs=0.015)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", "--json", "--arms", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["detectable"] > found["detectable_if_noise_were_known"] > 0 and not found["beyond_ceiling"]
    assert main(["power", "--accuracy", "0.9"]) == 0
    assert "out of reach" in capsys.readouterr().out
    for words, said in (
        (["--sizes", "3,2,1"], "three rising numbers"),
        (["--sizes", "a,b,c"], "--sizes a,b,c: 'a' must be a number"),
        (["--sizes", "1,2"], "three rising numbers"),
        (["--seeds", "1"], "--seeds 1 must be an integer, 2 to"),
        (["--accuracy", "1.5"], "--accuracy 1.5 must be a number, 0 to 1"),
        (["--seed_sd", "nan"], "--seed_sd nan must be a number"),
        (["--sizes", "1,2,inf"], "'inf' must be at most"),
    ):
        assert main(["power", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", (["--items", "9" * 400], ["--seeds", "1000000000"], ["--items", "0"], ["--seeds", "1"])
)
def test_numbers_beyond_what_they_can_mean_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words[0].removeprefix("--") in err


def test_noise_is_that_of_the_endpoint_at_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    rows, recall = "reasoning/row/exact", "knowledge/universe/recall_teacher_forced"
    designs = {name: Design((110_592, 212_992, 416_000), 5, endpoint=name) for name in (rows, recall)}
    for name, design in designs.items():
        expected = [100 * noise.of(name, size).sd for size in design.sizes]
        assert design.seed_sds == pytest.approx(expected) and len(set(expected)) == 3
        item = 1e4 * 0.25 / design.items
        by_hand = sum(w * w * (s * s + item) for w, s in zip(design.weights, expected, strict=True)) ** 0.5
        assert design.per_seed_sd == pytest.approx(by_hand)
    effect = power.detectable(designs[rows])
    assert power.simulate(designs[rows], effect) == pytest.approx(0.8, abs=0.03)
    assert main(["power", "--endpoint", rows]) == 0
    found = [noise.of(rows, size) for size in designs[rows].sizes]
    sds, runs = (", ".join(parts) for parts in ([f"{100 * n.sd:.2f}" for n in found], [str(n.runs) for n in found]))
    assert f"{sds} points between seeds ({rows}, {runs} runs)" in capsys.readouterr().out
    for words, said in (
        (["--endpoint", "reasoning/rows/exact"], "did you mean 'reasoning/row/exact'"),
        (["--sizes", "1e6,2e6,4e6"], "was measured near 1,000,000 parameters"),
    ):
        assert main(["power", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and "give --seed_sd" in error and error.count("\n") == 1
