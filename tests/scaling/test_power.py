"""Power of a design: the worked numbers, and formula against simulation."""

from __future__ import annotations

import dataclasses
import json

import pytest

from phi3_jax.scaling import power
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
    assert power.main(["--json", "--arms", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["detectable"] > found["detectable_if_noise_were_known"] > 0 and not found["beyond_ceiling"]
    assert power.main(["--accuracy", "0.9"]) == 0
    assert "out of reach" in capsys.readouterr().out
    for words, said in (
        (["--sizes", "3,2,1"], "three rising numbers"),
        (["--sizes", "a,b,c"], "not three numbers"),
        (["--seeds", "1"], "needs 2 or more"),
        (["--accuracy", "1.5"], "accuracy=1.5"),
        (["--seed_sd", "nan"], "must be finite"),
        (["--sizes", "1,2,inf"], "must be finite"),
    ):
        assert power.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
