"""Scores of clean subsets: the items that a corpus held are left out, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.errors import UserError
from phi3_jax.evaluation import clean
from phi3_jax.statistics import wilson

ROW = {"task": "toy", "metric": "accuracy", "value": 0.5, "n": 4, "low": 0.1, "high": 0.9, "chance": 0.25}
ITEMS: list[dict[str, Any]] = [{"task": "toy", "id": f"toy/{i}", "correct": i < 2} for i in range(4)]


def test_contaminated_items_are_left_out() -> None:
    [row] = clean.rows([ROW], ITEMS, {"toy/0", "other/1"})
    assert (row["metric"], row["n"], row["met"], row["value"]) == ("accuracy_clean", 3, 1, pytest.approx(1 / 3))
    assert (row["low"], row["high"]) == wilson(1, 3) and row["chance"] == 0.25
    [same] = clean.rows([ROW], ITEMS, set())
    assert same["value"] == 0.5 and same["met"] == 0


def test_what_is_no_share_of_items_has_no_clean_score() -> None:
    assert clean.rows([ROW | {"n": 3}], ITEMS, set()) == [], "a row of a subset"
    assert clean.rows([ROW], [item | {"correct": 0.3} for item in ITEMS], set()) == [], "a mean of probabilities"
    assert clean.rows([ROW], ITEMS, {item["id"] for item in ITEMS}) == [], "nothing is left"


def test_the_ids_come_from_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"contaminated": {"toy": ["toy/1"], "other": []}}))
    assert clean.contaminated(str(tmp_path)) == {"toy/1"}
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"it looked for no benchmarks; curate it with the word benchmarks=FOLDER"):
        clean.contaminated(str(tmp_path))
