"""The command that fits any table: its numbers, its card, and its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.scaling import fit, laws

LAW = laws.Law(1.8, 400.0, 1500.0, 0.33, 0.37)


def write(path: Path, change: dict[int, dict[str, object]] | None = None, **more: object) -> str:
    rows = []
    for n in np.geomspace(1e7, 1e9, 5):
        for d in np.geomspace(1e9, 1e11, 5):
            rows.append({"params": n, "tokens": d, "loss": float(LAW(n, d)), "C": 6 * n * d} | more)
    for i, values in (change or {}).items():
        rows[i] |= values
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


WORDS = ["--n", "params", "--d", "tokens", "--loss", "loss", "--bootstrap", "40"]


def test_json_has_the_law_its_intervals_and_its_diagnostics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {3: {"loss": 2.9}})
    card = tmp_path / "fit_card.json"
    assert fit.main([table, *WORDS, "--json", "--card", str(card)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alpha"], found["beta"]) == pytest.approx((0.33, 0.37), abs=0.01)
    assert found["intervals"]["alpha"][0] <= found["alpha"] <= found["intervals"]["alpha"][1]
    assert found["runs"] == 25 and found["objective"] > 0
    assert set(found["diagnostics"]["residual_correlation"]) == {"ln N", "ln D", "ln D/N"}
    written = json.loads(card.read_text())
    assert written["form"].startswith("L(N, D)") and written["result"]["A"] == found["A"]
    assert {"variables", "data", "fit", "uncertainty"} <= set(written)


def test_flops_instead_of_tokens_and_dropped_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {0: {"loss": 99.0}})
    words = ["--n", "params", "--flops", "C", "--loss", "loss", "--bootstrap", "0", "--drop_highest", "1", "--json"]
    assert fit.main([table, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 24 and found["alpha"] == pytest.approx(0.33, abs=2e-3) and "intervals" not in found
    assert fit.main([table, *words[:-1]]) == 0
    assert "starts end there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "more", "words", "said"),
    [
        ({2: {"loss": "nan"}}, {}, [], "line 4: loss is 'nan'"),
        ({2: {"tokens": "-5"}}, {}, [], "line 4: tokens is '-5'"),
        ({}, {}, ["--n", "parms"], "no column 'parms'"),
        ({3: {"recipe": "b"}}, {"recipe": "a"}, [], "mixes runs of recipe 'a', 'b'"),
        ({3: {"tokenizer": "t2"}}, {"tokenizer": "t1"}, [], "mixes runs of tokenizer"),
        ({i: {"params": 1e7 if i % 2 else 1e8} for i in range(25)}, {}, [], "2 sizes"),
        ({}, {"status": "failed"}, [], "no finished run"),
        ({}, {}, ["--only", "loss=3"], "--only loss=3: no such run"),
    ],
)
def test_what_cannot_be_fitted_is_one_line_and_exit_2(
    change: dict, more: dict, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"
    assert fit.main([write(tmp_path / "runs.csv", change, **more), *WORDS, "--card", str(card), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1 and not card.exists()


def test_a_missing_or_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.csv").write_text("params,tokens,loss\n")
    for name, said in (("none.csv", "cannot read"), ("empty.csv", "has no rows")):
        assert fit.main([str(tmp_path / name), *WORDS]) == 2
        assert said in capsys.readouterr().err


def test_runs_of_one_recipe_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {24: {"recipe": "other"}}, recipe="mine")
    assert fit.main([table, *WORDS, "--only", "recipe=mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 24
