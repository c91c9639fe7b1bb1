"""Noise between seeds: pooled by hand, and the table that ships against the runs that ship."""

from __future__ import annotations

import collections
import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from phi3_jax.records import tables
from phi3_jax.scaling import noise

RESULTS = Path(__file__).parents[2] / "analysis" / "results"


def test_variances_of_arms_are_pooled_by_degrees_of_freedom(tmp_path: Path) -> None:
    values = {"a": [0.1, 0.2, 0.6], "b": [0.3, 0.35], "c": [0.9]}
    lines = [[arm, "1000", "5", v, "finished"] for arm, found in values.items() for v in found]
    lines.append(["a", "1000", "5", "", "failed"])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("arm", "non_embedding", "budget", "x/y/acc", "status"), *lines])
    (found,) = noise.measure([tables.read(tmp_path / "t.csv")])
    squares = 2 * np.var(values["a"], ddof=1) + np.var(values["b"], ddof=1)
    assert found == noise.Noise("x/y/acc", 1000, 5, pytest.approx(math.sqrt(squares / 3)), 3, 5)
    assert found.most == pytest.approx(found.sd * math.sqrt(3 / stats.chi2.ppf(0.05, 3)))


def test_the_table_that_ships_is_that_of_the_runs_that_ship(tmp_path: Path) -> None:
    noise.write(tmp_path / "fresh.csv")
    assert (tmp_path / "fresh.csv").read_text() == (RESULTS / "seed_sd.csv").read_text()
    # One cell by hand: the middle size, over the arms of each study that have two seeds or more.
    squares, free = 0.0, 0
    for name in noise.SOURCES:
        arms = collections.defaultdict(list)
        for r in tables.read(RESULTS / name):
            if (float(r["non_embedding"]), r["budget"]) == (212_992, "3999072") and r.get("reasoning/row/exact"):
                arms[r["arm"]].append(float(r["reasoning/row/exact"]))
        several = [values for values in arms.values() if len(values) > 1]
        squares += sum((len(values) - 1) * np.var(values, ddof=1) for values in several)
        free += sum(len(values) - 1 for values in several)
    assert free >= 8
    found = noise.of("reasoning/row/exact", 212_992, 4e6)
    assert (found.sd, found.free) == (pytest.approx(math.sqrt(squares / free), rel=1e-3), free)
