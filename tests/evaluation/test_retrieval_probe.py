"""The probe of search: a perfect reader, a closed book and a careless copier score what they must; a study end to end."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.data.corpora.facts import ITEM, Universe
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError
from phi3_jax.evaluation import retrieval_probe
from phi3_jax.evaluation.retrieval_probe import Answered, ask, difference_rows, markdown, questions, recall_rows

ROOT = Path(__file__).resolve().parents[2]
UNIVERSE = Universe(1000, 600, seed=1)


def closed_book(windows: Windows, knows: int = 600) -> np.ndarray:
    """Knows the first persons' values, reads nothing; says 0 of the others."""
    out = np.zeros_like(windows.tokens)
    table = {tuple(name): values for name, values in zip(UNIVERSE.names[:knows], UNIVERSE.values, strict=False)}
    starts = (windows.domains > 0) & (np.roll(windows.domains, 1, axis=1) == 0)
    for row, column in zip(*np.nonzero(starts), strict=True):
        name = tuple(windows.tokens[row, column - 1 : column + 1])
        out[row, column : column + 6] = table.get(name, np.zeros(6, int))
    return out


def copier(windows: Windows, looks: bool) -> np.ndarray:
    """Copies the sentence before the item, and if it looks, only where the name is the same; else answers from memory."""
    out = closed_book(windows)
    ends = windows.segments[:, [0, ITEM + 7]]
    given = (ends == 1).all(1)  # sentence and item in one segment: no packed closed-book items
    same = (windows.tokens[:, 1:3] == windows.tokens[:, 10:12]).all(1)
    rows = given & same if looks else given
    out[rows, 11:17] = windows.tokens[rows, 3:9]
    return out


def shares(predict) -> dict[str, float]:
    return {way: right.mean() for way, right in ask(predict, UNIVERSE).items()}


def test_fake_models_score_what_they_must():
    found = questions(UNIVERSE)[1]
    assert found.mean() == 0.9
    closed, looking, careless = map(shares, (closed_book, lambda w: copier(w, True), lambda w: copier(w, False)))
    chance = pytest.approx(0.6, abs=0.01)  # of the rest, 0 is right by luck
    assert (
        set(closed)
        == set(looking)
        == {"closed", "closed, teacher-forced", "retrieved", "oracle", "distractor", "copied"}
    )
    assert all(closed[way] == chance for way in closed if way != "copied")
    assert max(closed["copied"], looking["copied"]) < 0.02 and careless["copied"] == 1
    assert looking["oracle"] == 1 and looking["closed"] == chance and looking["distractor"] == chance
    in_corpus = np.arange(1000) < 600
    assert looking["retrieved"] == pytest.approx((found | in_corpus).mean(), abs=0.005)
    assert careless["oracle"] == 1 and careless["distractor"] < 0.02
    assert careless["retrieved"] == pytest.approx(0.9, abs=0.005)


def test_a_model_that_needs_the_value_before_knows_nothing_from_the_name_alone():
    """It knows every value but the first, each from the right one before it; its own first answer is wrong."""
    few = Universe(30, 30, seed=1)
    after = {(k, int(a)): b for v in few.values for k, (a, b) in enumerate(itertools.pairwise(v))}

    def chained(windows: Windows) -> np.ndarray:
        out = np.zeros_like(windows.tokens)
        starts = (windows.domains > 0) & (np.roll(windows.domains, 1, axis=1) == 0)
        for row, column in zip(*np.nonzero(starts), strict=True):
            for k in range(5):
                out[row, column + k + 1] = after.get((k, windows.tokens[row, column + k + 1]), 0)
        return out

    found = ask(chained, few)
    assert found["closed, teacher-forced"].mean() > 0.7 and found["closed"].mean() < 0.1


def fakes(seeds=(0, 1)) -> list[Answered]:
    found = questions(UNIVERSE)[1]
    small, large = ask(lambda w: copier(w, True), UNIVERSE), ask(closed_book, UNIVERSE)
    return [Answered(arm, size, seed, right, found) for seed in seeds
            for arm, size, right in (("reading", "mini", small), ("closed", "medium", large))]  # fmt: skip


def test_cells_and_differences_add_up():
    runs = fakes()
    rows = recall_rows(runs)
    cell = {(r["arm"], r["seed"], r["questions"], r["search"]): r for r in rows}
    for arm in ("reading", "closed"):
        known, unknown, whole = (cell[arm, 0, kind, "retrieved"] for kind in ("known", "unknown", "all"))
        assert known["n"] + unknown["n"] == whole["n"] == 6000 and known["right"] + unknown["right"] == whole["right"]
        assert cell[arm, 0, "known", "closed"]["value"] == 1 and cell[arm, 0, "unknown", "closed"]["value"] == 0
        assert cell[arm, 0, "found", "closed"]["n"] == 5400
    assert cell["reading", 0, "found", "retrieved"]["value"] == 1
    assert cell["reading", 0, "unknown", "retrieved"]["low"] < cell["reading", 0, "unknown", "retrieved"]["value"]
    differences = difference_rows(runs, *retrieval_probe.HEADLINE)
    gain = cell["reading", 0, "all", "retrieved"]["value"] - cell["closed", 0, "all", "closed"]["value"]
    row = next(r for r in differences if r["search"] == "retrieved")
    assert row["value"] == pytest.approx(gain) and row["low"] < gain < row["high"]
    text = markdown(runs, rows, differences)
    assert "| reading-mini | 60.3 [60.3, 60.3] |" in text
    assert f"{100 * gain:+.1f} [" in text and "90.0 % of the persons" in text
    with pytest.raises(UserError, match="share no seed"):
        difference_rows(runs, "reading-mini", "loose-medium")


def test_one_seed_has_no_interval_over_seeds_and_empty_cells_a_dash():
    runs = fakes(seeds=(0,))
    runs = [
        Answered(r.arm, r.member, r.seed, r.right | {"closed": np.ones_like(r.right["closed"])}, r.found) for r in runs
    ]
    text = markdown(runs, recall_rows(runs), difference_rows(runs, *retrieval_probe.HEADLINE))
    assert "–" in text and "[" not in text.split("\n|", 1)[1]


@pytest.mark.slow
def test_a_study_from_training_to_tables(tmp_path):
    study, out = tmp_path / "study", tmp_path / "out"
    environment = os.environ | {"XLA_FLAGS": ""}
    config = "experiments/search.py:quick,tokens=40k"
    command = [
        sys.executable,
        "launch/run.py",
        "--config",
        config,
        "--workdir",
        str(study),
        "--run=reading-mini-s30-40k",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = [str(study), "--out", str(out), "--headline", "reading-mini,reading-mini"]
    assert main(["probe", *arguments]) == 0
    with (out / "recall.csv").open() as file:
        rows = {(r["questions"], r["search"]): r for r in csv.DictReader(file)}
    (run,) = study.glob("reading-mini-*/evals.jsonl")
    evals = [json.loads(line) for line in run.open()]
    for way, task in (("closed", "universe"), ("retrieved", "retrieved universe"), ("oracle", "oracle universe")):
        (metered,) = [r["value"] for r in evals if r["task"] == task and r["metric"] == "recall"]
        assert float(rows["all", way]["value"]) == pytest.approx(metered, abs=1e-6)
    assert "| reading-mini | closed | reading-mini | +0.0 |" in (out / "recall.md").read_text()
    assert (out / "differences.csv").exists()


def test_errors_are_one_line(tmp_path, capsys):
    assert main(["probe", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no finished run" in error and error.count("\n") == 1
