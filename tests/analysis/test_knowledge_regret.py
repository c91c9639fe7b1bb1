"""The rule of experiments/knowledge.py on tables whose answer is known."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import experiment
from phi3_jax.scaling.causal import Row

REPO = Path(__file__).resolve().parents[2]
SIZES = {"mini": 110_592.0, "small": 212_992.0, "medium": 416_000.0}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("knowledge_regret", REPO / "analysis" / "knowledge_regret.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


regret = script()


def rows(best: dict[str, int], noise: float = 0.0) -> list[Row]:
    """Runs whose composite falls with the distance from a size's best load, in octaves."""
    found = []
    for size, n in SIZES.items():
        for load in (3000, 4500, 6000, 9000, 13500):
            for kind, loss in (("facts", 0.0), ("random", 0.2)):
                for seed in range(3):
                    value = 0.6 - 0.1 * abs(math.log2(load / best[size])) - loss + noise * (seed - 1) * math.log2(load)
                    scores = {regret.RECALL: value, regret.EXACT: value}
                    if kind == "facts" or load < 13500:
                        found.append(Row(f"{kind}{load}", size, n, seed, scores, {}))
    return found


def test_one_constant_is_found_where_there_is_one() -> None:
    found = regret.judged(rows({"mini": 3000, "small": 6000, "medium": 13500}), 48.0)
    assert len(found) == 6 and all(row["holds"] for row in found)
    assert all(row["regret"] == pytest.approx(0) for row in found if row["chosen"] == row["best"])
    assert [row["chosen"] for row in found if row["tested on"] == "medium"] == [13500, 13500]
    drops = [row["random drop"] for row in found if row["random drop"] is not None]
    assert drops and all(drop == pytest.approx(0.2, abs=0.1) for drop in drops)


def test_it_does_not_hold_where_the_best_load_does_not_move() -> None:
    found = regret.judged(rows({"mini": 3000, "small": 3000, "medium": 3000}), 48.0)
    wrong = [row for row in found if row["fitted on"] == "mini"]
    assert not any(row["holds"] for row in wrong) and all(row["chosen"] > row["best"] for row in wrong)
    assert all(row["keep all"] >= row["regret"] for row in found)


def test_a_regret_within_its_error_is_none() -> None:
    best = {"mini": 3000, "small": 4500, "medium": 9000}
    assert not all(row["holds"] for row in regret.judged(rows(best), 48.0))
    assert all(row["holds"] for row in regret.judged(rows(best, noise=0.5), 48.0))


def test_the_constant_gives_the_size_it_was_fitted_on_its_best_load() -> None:
    loads = (3000, 4500, 6000, 9000, 13500)
    for load in loads:
        c = regret.fitted(loads, load, 2e5, 47.0)
        assert regret.chosen(loads, c * 2e5, 47.0) == load
    assert regret.chosen(loads, 1.0, 47.0) == 3000


def test_the_study_offers_the_loads_and_every_arm_has_the_same_tokens() -> None:
    config = experiment.load_config("experiments/knowledge.py")
    assert {name for name in config.arms if name.startswith("facts")} == {
        f"facts{n}" for n in (3000, 4500, 6000, 9000, 13500)
    }
    for arm in config.arms.values():
        assert arm.knowledge + arm.reasoning == pytest.approx(4_000_000)
    for load in (3000, 4500, 6000, 9000):
        assert config.arms[f"random{load}"].knowledge == pytest.approx(config.arms[f"facts{load}"].knowledge)
        assert config.arms[f"random{load}"].facts == 13500
    assert 47 < regret.counted() < 49
