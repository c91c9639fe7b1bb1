"""Properties of reading a study: what counts as final, what is missing, what a thing is called."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import fake_study
import pytest

from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.records.table import COLUMNS, keep_finished, kept, read_study, what_was_trained
from phi3_jax.units import human_count


def test_counts_are_rounded_before_the_unit_is_chosen() -> None:
    counts = {999_936: "1M", 998_976: "1M", 4.8e12: "4.8T", 250_000: "250k", 37: "37"}
    assert {count: human_count(count, 2) for count in counts} == counts
    assert human_count(None) == human_count(float("nan")) == "–"


def test_every_run_becomes_one_line_of_the_csv_with_its_unrounded_scores(studies: dict[str, Path]) -> None:
    with (studies["whole"] / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and set(COLUMNS) <= set(rows[0])
    last = (studies["whole"] / rows[0]["name"] / "evals.jsonl").read_text().splitlines()
    for line in map(json.loads, last[len(last) // 2 :]):
        assert float(rows[0][f"{line['suite']}/{line['task']}/{line['metric']}"]) == line["value"]


def test_scores_of_runs_that_have_not_ended_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    fake_study.write_study(folder, ("mini",), (4_000_000,))
    fake_study.write_run(folder, "small", 4_000_000, 0, stop=0.6)
    mini, small = read_study(folder).runs
    assert small.evals and not small.finals and small.status.startswith("unfinished")
    assert mini.finals and mini.status == "finished"


def test_a_planned_run_that_never_started_is_named(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "study", ("mini",), (4_000_000,))
    meta = json.loads((folder / "study.json").read_text())
    there = read_study(folder).runs[0].name
    (folder / "study.json").write_text(json.dumps(meta | {"runs": [{"name": there}, {"name": "medium-x"}]}))
    assert read_study(folder).missing == ["run medium-x is planned and not started"]


def test_what_is_broken_is_said_and_the_rest_is_read(studies: dict[str, Path]) -> None:
    study = read_study(studies["broken"])
    assert len(study.runs) == 6
    text = "\n".join(study.missing)
    for words in ("unreadable line", "not finite", "no evals.jsonl", "unreadable plan.json"):
        assert words in text
    assert read_study(studies["whole"]).missing == []


def test_a_budget_is_named_as_it_was_asked_for_also_where_only_the_study_says_it(tmp_path: Path) -> None:
    folders = [fake_study.write_run(tmp_path, member, 1_250_000, 0, largest=1_250_000) for member in ("mini", "small")]
    assert {run.budget_group for run in read_study(tmp_path).runs} == {"1.2M"}
    record = json.loads((folders[0] / "config.json").read_text())
    record["config"]["asked"] = 1_250_000
    (folders[0] / "config.json").write_text(json.dumps(record))
    runs = [{"name": folder.name, "asked": 1_250_000} for folder in folders]
    (tmp_path / "study.json").write_text(json.dumps({"runs": runs}))
    assert {run.budget_group for run in read_study(tmp_path).runs} == {"1.25M"}


def test_a_missing_folder_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing-here does not exist"):
        read_study(tmp_path / "nothing-here")


def test_proxies_are_never_called_the_released_models(studies: dict[str, Path]) -> None:
    runs = read_study(studies["whole"]).runs
    assert "NOT the released models" in what_was_trained(runs) and "pico" in what_was_trained(runs)
    for run in runs:
        run.scale = "full"
    assert "NOT the released" not in what_was_trained(runs)
    assert "not Microsoft's released weights" in what_was_trained(runs)


def test_budgets_that_differ_between_sizes_are_joined_by_rank_and_named_so(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    for member, budget in (("mini", 2_750_000), ("small", 4_000_000), ("medium", 4_000_000)):
        fake_study.write_run(folder, member, budget, 0, largest=budget)
    study = read_study(folder)
    assert {r.budget_group for r in study.runs} == {"2.7M/4M/4M"} and study.unmatched
    matched = fake_study.write_study(tmp_path / "matched", budgets=(1_000_000, 4_000_000))
    assert {r.budget_group for r in read_study(matched).runs} == {"1M", "4M"}


def test_finished_runs_are_added_to_a_table_once(tmp_path: Path) -> None:
    study = fake_study.write_study(tmp_path / "s", seeds=2, budgets=(4_000_000,))
    names = sorted(path.name for path in study.iterdir() if (path / "config.json").is_file())
    table = tmp_path / "kept" / "A.csv"
    keep_finished(study, names[:1], table)
    first = tables.read(table)
    assert [row["name"] for row in first] == names[:1] and float(first[0]["knowledge/universe/recall"]) > 0
    (study / names[1] / "evals.jsonl").unlink()
    keep_finished(study, names[:3], table)
    keep_finished(study, names[:3], table)
    assert [row["name"] for row in tables.read(table)] == [names[0], names[2]]
    assert {"build", "dirty", "scorer", "git_commit"} <= set(first[0])


def test_what_a_table_holds_of_the_same_code_is_known(tmp_path: Path) -> None:
    study = fake_study.write_study(tmp_path / "s", seeds=2, budgets=(4_000_000,))
    names = sorted(path.name for path in study.iterdir() if (path / "config.json").is_file())[:3]
    for name, build, dirty in zip(names, ("a" * 12, "b" * 12, "a" * 12), (False, False, True), strict=True):
        record = json.loads((study / name / "config.json").read_text())
        (study / name / "config.json").write_text(json.dumps(record | {"build": build, "dirty": dirty}))
    table = tmp_path / "A.csv"
    keep_finished(study, names, table)
    prints = {row["name"]: row["fingerprint"] for row in tables.read(table)}
    assert kept(table, {"build": "a" * 12, "dirty": False}) == {(names[0], prints[names[0]])}
    for other in (
        {"build": "a" * 12, "dirty": True},
        {"build": None, "dirty": None},
        {"build": "c" * 12, "dirty": False},
    ):
        assert kept(table, other) == set()
    assert kept(tmp_path / "none.csv", {"build": "a" * 12, "dirty": False}) == set()
