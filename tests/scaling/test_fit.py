"""The command that fits any table: its numbers, its card, and its refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.scaling import laws

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


def given(*words: str) -> list[str]:
    """`WORDS`, without the flags that `words` give, and `words`."""
    pairs = zip(WORDS[::2], WORDS[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in words for word in pair] + list(words)


def test_json_has_the_law_its_intervals_and_its_diagnostics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {3: {"loss": 2.9}})
    card = tmp_path / "fit_card.json"
    assert main(["fit", table, *WORDS, "--json", "--card", str(card)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alpha"], found["beta"]) == pytest.approx((0.33, 0.37), abs=0.01)
    assert all(low <= found[name] <= high for name, (low, high) in found["intervals"].items())
    assert set(found["intervals"]) == set(found["bootstrap"]["standard_errors"]) == {*laws.NAMES, "a"}
    assert found["runs"] == 25 and found["objective"] > 0
    assert set(found["diagnostics"]["residual_correlation"]) == {"ln N", "ln D", "ln D/N"}
    written = json.loads(card.read_text())
    assert written["form"].startswith("L(N, D)") and written["result"]["A"] == found["A"]
    assert {"variables", "data", "fit", "uncertainty"} <= set(written)


def test_flops_instead_of_tokens_and_dropped_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {0: {"loss": 99.0}})
    words = ["--n", "params", "--flops", "C", "--loss", "loss", "--bootstrap", "0", "--drop_highest", "1", "--json"]
    assert main(["fit", table, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 24 and found["alpha"] == pytest.approx(0.33, abs=2e-3) and "bootstrap" not in found
    assert main(["fit", table, *words[:-1]]) == 0
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
    assert main(["fit", write(tmp_path / "runs.csv", change, **more), *given(*words), "--card", str(card)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1 and not card.exists()


def test_a_missing_or_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.csv").write_text("params,tokens,loss\n")
    for name, said in (("none.csv", "cannot read"), ("empty.csv", "has no rows")):
        assert main(["fit", str(tmp_path / name), *WORDS]) == 2
        assert said in capsys.readouterr().err


def test_runs_of_one_recipe_of_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write(tmp_path / "runs.csv", {24: {"recipe": "other"}}, recipe="mine")
    assert main(["fit", table, *WORDS, "--only", "recipe=mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bootstrap", "-5"], "--bootstrap -5 must be an integer, 0 to 100,000"),
        (["--bootstrap", "1"], "--bootstrap 1: give 0"),
        (["--bootstrap", "1000000000"], "--bootstrap 1000000000 must be an integer, 0 to 100,000"),
        (["--drop_highest", "-1"], "--drop_highest -1"),
        (["--only", "kind"], "--only 'kind' is not COLUMN=VALUE"),
        (["--card", "{tmp}/no/card.json"], "no is no folder"),
        (["--card", "{tmp}"], "is a folder"),
        (["--card", "{tmp}/runs.csv/card.json"], "runs.csv is no folder"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_the_fit(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laws, "fit", lambda *_: pytest.fail("fitted first"))
    table = write(tmp_path / "runs.csv")
    assert main(["fit", table, *given(*(word.format(tmp=tmp_path) for word in words))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["runs.csv"]


def table_of(path: Path, loss: np.ndarray, n: np.ndarray, d: np.ndarray) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("params", "tokens", "loss"), *zip(n, d, loss, strict=True)])
    return str(path)


def grid(sizes: int = 5, budgets: int = 5) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 1e11, budgets))
    return n.ravel(), d.ravel()


# Why each is no law: losses that are noise; no floor at all; a floor hidden by noise; sizes and tokens that rise in step.
NO_LAWS = {
    "flat": (*grid(), lambda n, d, noise: 2 * np.exp(0.01 * noise)),
    "no floor": (*grid(), lambda n, d, noise: laws.Law(0, 400.0, 1500.0, 0.33, 0.37)(n, d)),
    "noise": (*grid(3, 3), lambda n, d, noise: LAW(n, d) * np.exp(0.05 * noise)),
    "in step": (np.geomspace(1e7, 1e9, 12), 20 * np.geomspace(1e7, 1e9, 12), lambda n, d, noise: LAW(n, d)),
}


@pytest.mark.parametrize("draws", ["0", "200"])
@pytest.mark.parametrize("name", NO_LAWS)
def test_a_law_that_its_runs_do_not_determine_is_a_line_without_constants(
    name: str, draws: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, d, loss = NO_LAWS[name]
    noise = np.random.default_rng(1).normal(size=len(n))
    table, card = table_of(tmp_path / "t.csv", loss(n, d, noise), n, d), tmp_path / "card.json"
    words = [table, *WORDS[:-1], draws, "--card", str(card)]
    assert main(["fit", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"not determined: {len(n)} runs of ") and text.count("\n") == 1 and "takes" in text
    assert main(["fit", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["determined"] is False and not {"E", "alpha", "intervals"} & set(found)
    assert json.loads(card.read_text())["result"] == {"determined": False, "reason": found["reason"], "runs": len(n)}


@pytest.mark.parametrize("sizes", [3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_law_that_they_determine_has_its_constants(
    noise: float, sizes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, d = grid(sizes)
    loss = LAW(n, d) * np.exp(noise * np.random.default_rng(0).normal(size=len(n)))
    for draws in ("0", "200"):
        assert main(["fit", table_of(tmp_path / "t.csv", loss, n, d), *WORDS[:-1], draws, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["determined"] is True and found["alpha"] == pytest.approx(0.33, abs=0.03)


@pytest.mark.parametrize(
    ("loss", "rises"),
    [
        (lambda n, d: 0.1 * np.log10(n) + 0.05 * np.log10(d), "size and tokens"),
        (lambda n, d: 9 / LAW(n, d), "size and tokens"),
        (lambda n, d: LAW(1e8, d) * n**0.05, "size"),
        (lambda n, d: LAW(n, 1e9) * d**0.05, "tokens"),
    ],
)
def test_a_score_that_rises_is_no_loss(
    loss: object, rises: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, d = grid()
    assert main(["fit", table_of(tmp_path / "t.csv", loss(n, d), n, d), *WORDS]) == 2  # type: ignore[operator]
    error = capsys.readouterr().err
    assert f"the loss rises with {rises}: a law is one of losses" in error and error.count("\n") == 1


def test_a_trunk_is_a_cluster_with_its_forks_and_never_with_other_trunks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n, d = grid(8)
    loss = LAW(n, d) * np.exp(0.002 * np.random.default_rng(0).normal(size=len(n)))
    names = [f"n{a:.0f}-d{b:.0f}" for a, b in zip(n, d, strict=True)]
    trunk = {a: name for a, b, name in zip(n, d, names, strict=True) if b == max(d)}
    parents = ["" if b == max(d) else trunk[a] for a, b in zip(n, d, strict=True)]

    def clusters(header: list[str], *columns: list[str]) -> int:
        with (tmp_path / "t.csv").open("w", newline="") as file:
            rows = zip(n, d, loss, *columns, strict=True)
            csv.writer(file).writerows([("params", "tokens", "loss", *header), *rows])
        assert main(["fit", str(tmp_path / "t.csv"), *WORDS, "--group", "parent", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["bootstrap"]["clusters"]

    assert clusters(["name", "parent"], names, parents) == 8
    assert clusters(["parent"], parents) == 8 + 8  # nothing says whose fork is whose trunk's
    assert clusters(["name", "parent"], names, [""] * len(n)) == len(n)
