"""Forecasts: written before, scored after, and never changed unseen."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.records.table import read_study
from phi3_jax.reporting.page import write_report
from phi3_jax.scaling import forecast, laws
from phi3_jax.scaling.endpoints import endpoints

sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))
from fake_study import SIZES, write_run, write_study

from phi3_jax import experiment
from phi3_jax.study.runs import before_forecast, plan_runs

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
    assert main(["report", str(folder)]) == 2
    assert "edited after its hash" in capsys.readouterr().err
    content["sha256"] = forecast._hash(content)  # a forger who mends the hash
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="started under forecast"):
        forecast.score(read_study(folder))


def test_a_damaged_forecast_is_one_line_and_there_is_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "s", SMALL[:1], BUDGETS[:1], kind="text")
    path, kept = forecast.path(folder), tmp_path / "kept"
    for content in (b"\0" * 99, b'{"forecasts": [{"na', b"[]", b"3", b"\xff\xfe{}", b""):
        path.write_bytes(content)
        with pytest.raises(forecast.Unreadable, match=r"forecast\.json"):
            forecast.score(read_study(folder))
    assert main(["report", str(folder), "--keep", str(kept)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: no forecast is scored") and str(path) in err and err.count("\n") == 1
    assert "No forecast is scored" in (folder / "report.html").read_text()
    assert {p.name for p in kept.iterdir()} == {"study.json", "runs.csv"}
    path.unlink()
    path.mkdir()
    with pytest.raises(forecast.Unreadable, match="cannot be read"):
        forecast.score(read_study(folder))
    path.rmdir()
    for rows in (None, [3], [{"name": "x"}], [{"name": "x", "endpoint": "a/b/c", "n": "x"}]):
        content = {"forecasts": rows}
        path.write_text(json.dumps(content | {"sha256": forecast._hash(content)}))
        with pytest.raises(forecast.Unreadable, match=r"forecast\.json holds no forecasts"):
            forecast.score(read_study(folder))


def test_too_little_for_a_law_writes_no_forecast(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", ("mini", "small"), BUDGETS, kind="text")
    assert forecast.write(made, HELD) == ["no forecast: the finished runs determine no loss law"]
    assert not forecast.path(made).exists() and forecast.sha(made) is None


def test_what_comes_before_a_forecast_leaves_out_the_largest_size_and_budget() -> None:
    config = experiment.load_config(str(Path(__file__).parents[2] / "experiments" / "laws.py"))
    manifest = {"window": 256, "vocab": 259, "kind": "text", "fingerprint": "0" * 64}
    runs = plan_runs(config, "pico", manifest, Path("data"), 1)
    first, pauses = before_forecast(runs)
    trunks = {run.name for run in runs if run.parent is None}
    done = [run for run in first if run.name not in pauses]
    assert len(done) == 15 and not {run.name for run in done} & trunks
    assert max(r.model.matrix_params for r in first) < max(r.model.matrix_params for r in runs)
    for run in first:
        if run.name in pauses:  # a trunk pauses at its last fork; later it keeps the state before its own rate falls
            assert pauses[run.name] == sorted(run.keep_steps)[-2] < 0.7 * run.steps
    assert before_forecast([r for r in runs if r.model.member in ("mini", "small", "medium")]) is None


def test_the_report_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--keep", str(tmp_path / "kept")]) == 0
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"study.json", "runs.csv", "forecast.json"}
    assert str(tmp_path) not in (tmp_path / "kept" / "study.json").read_text()
    table = str(tmp_path / "kept" / "runs.csv")
    capsys.readouterr()
    words = ["--loss", "text/docs/loss", "--json"]
    assert main(["fit", table, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 19 and found["diagnostics"]["leave_one_size_out"]
    assert found["intervals"]["alpha"][0] < found["alpha"] < found["intervals"]["alpha"][1] and "bootstrap" not in found
    # Forks go with their trunk, asked for or not: four trunks with their forks, and three forks of a fifth.
    assert main(["fit", table, *words, "--bootstrap", "50"]) == 2
    assert "5 clusters are too few" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, said in (([str(empty)], "no finished run"), ([str(tmp_path / "none")], "does not exist")):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def table(path: Path, noise: float = 0.003, floor: float = 1.8, **columns: list[str]) -> str:
    """A table of 30 runs, six sizes at five budgets."""
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 5)))
    loss = laws.Law(floor, 400.0, 1500.0, 0.33, 0.37)(n, d) * np.exp(noise * np.random.default_rng(0).normal(size=30))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("n", "d", "loss", *columns), *zip(n, d, loss, *columns.values(), strict=True)])
    return str(path)


WORDS = ["--n", "n", "--d", "d"]


def test_the_command_forecasts_the_runs_of_most_compute_and_scores_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.csv")
    assert main(["forecast", path, *WORDS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows, score = found["forecasts"], found["score"]
    with open(path, newline="") as file:
        runs = sorted(csv.DictReader(file), key=lambda r: float(r["n"]) * float(r["d"]))
    held = {(float(r["n"]), float(r["d"])): float(r["loss"]) for r in runs[21:]}
    assert {(r["n"], r["d"]): r["measured"] for r in rows} == held and found["runs"] == 21
    assert score["held"] == 9 and score["inside"] == sum(r["low"] <= r["measured"] <= r["high"] for r in rows) >= 8
    errors = [np.log(r["value"] / r["measured"]) for r in rows]
    assert score["rms_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert score["width"] == pytest.approx(np.median([(r["high"] - r["low"]) / r["value"] for r in rows]))
    assert main(["forecast", path, *WORDS, "--held", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "of 14 held-out losses lie in their interval" in text and "by Gadre's form" in text


def test_the_command_forecasts_runs_that_have_not_been_from_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.csv")
    assert main(["forecast", path, *WORDS, "--at", "1e10,1e12", "--at", "1e8,1e10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 30 and "score" not in found
    far, near = found["forecasts"]
    truth = laws.Law(1.8, 400.0, 1500.0, 0.33, 0.37)
    for row in (far, near):
        assert row["low"] < truth(row["n"], row["d"]) < row["high"]
    assert far["distance"] == pytest.approx(np.log(100)) and near["distance"] == 0
    assert far["high"] - far["low"] > 2 * (near["high"] - near["low"])


def test_forks_of_a_table_go_with_their_trunk_and_two_builds_follow_no_one_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, forked = table(tmp_path / "a.csv"), table(tmp_path / "b.csv", parent=[f"t{i % 6}" for i in range(30)])
    widths = []
    for path in (plain, forked):
        assert main(["forecast", path, *WORDS, "--at", "1e9,1e10", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["forecasts"]
        widths.append(row["law_high"] - row["law_low"])
    assert widths[0] != widths[1]
    for column in ("build", "scorer"):
        mixed = table(tmp_path / "c.csv", **{column: ["1"] * 29 + ["2"]})
        for verb in ("forecast", "fit"):
            assert main([verb, mixed, *WORDS]) == 2
            error = capsys.readouterr().err
            assert f"mixes runs of {column} '1', '2'" in error and error.count("\n") == 1
        assert main(["forecast", mixed, *WORDS, "--only", f"{column}=1"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--held", "0"], "--held 0 of 30 runs holds out none"),
        (["--held", "2"], "--held 2"),
        (["--at", "1e9,1e10,3"], "--at 1e+09,1e+10,3 is not N,D"),
        (["--at", "1e9,x"], "--at"),
        (["--n", "m"], "no column 'm'"),
        (["--held", "0.9"], "3 runs of"),
    ],
)
def test_what_cannot_be_forecast_is_a_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--n" in words else WORDS
    assert main(["forecast", table(tmp_path / "t.csv"), *given, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_law_at_a_bound_is_not_determined_and_has_no_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "t.csv", noise=0.0, floor=0.0)
    assert main(["forecast", path, *WORDS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("not determined: 21 runs") and "at a bound" in text and text.count("\n") == 1
    assert main(["forecast", path, *WORDS, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"determined", "reason", "runs"}


def test_runs_of_two_builds_have_no_law_in_a_report(folder: Path) -> None:
    runs = read_study(folder).runs
    end = next(e for e in endpoints(runs) if e.column == "text/docs/loss")
    forecast.fit_runs(runs, end)
    for run, build in zip(runs, "ab" * len(runs), strict=False):
        run.record["build"] = build
    with pytest.raises(UserError, match="runs of the builds a and b follow no one law"):
        forecast.fit_runs(runs, end)
