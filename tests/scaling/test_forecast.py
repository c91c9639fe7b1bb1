"""Forecasts: written before, scored after, and never changed unseen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from phi3_jax import launcher, study
from phi3_jax.errors import UserError
from phi3_jax.reporting.page import write_report
from phi3_jax.reporting.table import read_study
from phi3_jax.scaling import fit, forecast, report

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
from fake_study import SIZES, write_run, write_study

BUDGETS = (500_000, 1_000_000, 2_000_000, 4_000_000)
SMALL = ("mini", "mini-small", "small", "small-medium")
HELD = [
    forecast.Held(f"medium-clean-pico-s0-{b // 1_000_000}M", SIZES["medium"][0], b // 1056 * 1056) for b in BUDGETS[1:]
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished study of four sizes, with a forecast of a fifth, whose runs come after."""
    made = write_study(tmp_path / "s", SMALL, BUDGETS, kind="text")
    (line,) = forecast.write(made, HELD)
    assert "forecast of 3 runs from 16" in line
    for budget in BUDGETS[1:]:
        run = write_run(made, "medium", budget, 0, "text")
        record = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(record | {"forecast": forecast.sha(made)}))
    return made


def test_a_law_that_holds_is_forecast_within_a_percent_and_scored(folder: Path) -> None:
    scores = forecast.score(read_study(folder))
    assert len(scores) == 2 * len(HELD)  # docs and code
    # The fake losses are exact power laws of N and D.
    assert all(abs(s.error) < 0.01 for s in scores) and sum(bool(s.inside) for s in scores) >= 5
    page = write_report(folder).read_text()
    assert "Forecasts, written down before these runs started" in page and "starred runs were forecast" in page
    cards = json.loads((folder / "fit_card.json").read_text())
    assert set(cards) == {"text/docs/loss", "text/code/loss"} and cards["text/docs/loss"]["data"]["points"] == 16


def test_before_the_runs_nothing_is_scored(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", SMALL, BUDGETS, kind="text")
    forecast.write(made, HELD)
    assert all(s.measured is s.error is s.inside is None for s in forecast.score(read_study(made)))


def test_an_edited_forecast_is_refused_by_hash_and_by_the_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forecast.path(folder)
    content = json.loads(path.read_text())
    content["forecasts"][0]["value"] += 0.01
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="edited after its hash was taken"):
        forecast.score(read_study(folder))
    assert report.main([str(folder)]) == 2
    assert "edited after its hash" in capsys.readouterr().err
    content["sha256"] = forecast._hash(content)  # a forger who mends the hash
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="started under forecast"):
        forecast.score(read_study(folder))


def test_too_little_for_a_law_writes_no_forecast(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", ("mini", "small"), BUDGETS, kind="text")
    assert forecast.write(made, HELD) == ["no forecast: the finished runs determine no loss law"]
    assert not forecast.path(made).exists() and forecast.sha(made) is None


def test_what_comes_before_a_forecast_leaves_out_the_largest_size_and_budget() -> None:
    config = launcher.load_config(str(Path(__file__).parents[2] / "experiments" / "laws.py"))
    manifest = {"window": 256, "vocab": 259, "kind": "text", "fingerprint": "0" * 64}
    runs = study.plan_runs(config, "pico", manifest, Path("data"), 1)
    first, pauses = study.before_forecast(runs)
    trunks = {run.name for run in runs if run.parent is None}
    done = [run for run in first if run.name not in pauses]
    assert len(done) == 15 and not {run.name for run in done} & trunks
    assert max(r.model.matrix_params for r in first) < max(r.model.matrix_params for r in runs)
    for run in first:
        if run.name in pauses:  # a trunk pauses at its last fork, before its own learning rate falls
            assert pauses[run.name] == max(run.keep_steps) < 0.7 * run.steps
    assert study.before_forecast([r for r in runs if r.model.member in ("mini", "small", "medium")]) is None


def test_the_report_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(folder), "--keep", str(tmp_path / "kept")]) == 0
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"study.json", "runs.csv", "forecast.json"}
    assert str(tmp_path) not in (tmp_path / "kept" / "study.json").read_text()
    table = str(tmp_path / "kept" / "runs.csv")
    capsys.readouterr()
    assert fit.main([table, "--loss", "text/docs/loss", "--group", "parent", "--json", "--bootstrap", "50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 19 and found["diagnostics"]["leave_one_size_out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, said in (([str(empty)], "no finished run"), ([str(tmp_path / "none")], "does not exist")):
        assert report.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
