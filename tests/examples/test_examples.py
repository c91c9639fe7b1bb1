"""The examples run as they are typed, and use what CONTRIBUTING calls public, nothing else."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import experiment, family
from phi3_jax.data.meters import METERS
from phi3_jax.errors import UserError
from phi3_jax.records.rows import read_rows
from phi3_jax.sharding.rules import layout_of
from phi3_jax.strategies import STRATEGIES, strategy

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = dict(re.findall(r"^\| `(phi3_jax[\w.]*)` \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are afterwards as they were: an experiment file that is executed here may add to them."""
    for table in (METERS, STRATEGIES, family.MEMBERS, family.SIZES):
        for name, value in [*table.items()]:
            monkeypatch.setitem(table, name, value)
    before = [(table, {*table}) for table in (METERS, STRATEGIES, family.MEMBERS, family.SIZES)]
    yield
    for table, names in before:
        for name in {*table} - names:
            del table[name]


def run(folder: Path, *words: str, devices: int = 1) -> str:
    """What a command prints, typed in `folder` with phi3-jax on the path."""
    (folder / "bin").mkdir(exist_ok=True)
    entry = folder / "bin" / "phi3-jax"
    entry.write_text(f'#!/bin/sh\nexec {sys.executable} -m phi3_jax "$@"\n')
    entry.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{entry.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:] + done.stdout[-1000:]
    return done.stdout


def trained(folder: Path, example: str, study: str, devices: int = 1) -> list[dict[str, str]]:
    """The table of the study that an example makes."""
    words = ("phi3-jax", "run", "--config", f"{ROOT}/examples/{example}", "--workdir", study)
    run(folder, *words, devices=devices)
    with (folder / study / "runs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_uses_public_names_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60 and len(EXAMPLES) == 6
    tree = ast.parse(text)
    used, modules = [], {"phi3_jax": "phi3_jax"}  # modules by the names that the example gives them
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("phi3_jax"):
            for alias in node.names:
                if (name := f"{node.module}.{alias.name}") in PUBLIC:
                    modules[alias.name] = name
                else:
                    used.append((node.module, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            used.append((modules[node.value.id], node.attr))
    private = [f"{module}.{name}" for module, name in used if f"`{name}`" not in PUBLIC.get(module or "", "")]
    assert not private, f"{path.name} uses {private}, which CONTRIBUTING does not call public"


def test_experiment_files_add_to_the_tables(kept: None) -> None:
    made = {name: experiment.load_config(f"{ROOT}/examples/{name}.py") for name in ("new_strategy", "new_member")}
    assert made["new_strategy"].train.strategy == "copies_cp" and layout_of("copies_cp").time == ("context",)
    assert made["new_member"].sizes == ("mini", "grouped")
    assert family.published("grouped").kv_heads == 8 and family.proxy("grouped", ladder="family").kv_heads == 1
    with pytest.raises(UserError, match="is unknown; did you mean 'grouped'"):
        experiment.override(made["new_member"], "sizes", "gruped")
    before = METERS["text"]
    experiment.load_config(f"{ROOT}/examples/add_a_probe.py")
    assert METERS["text"] is not before


def test_a_strategy_that_the_forward_pass_cannot_serve_is_one_line(kept: None) -> None:
    STRATEGIES["heads_alone"] = strategy(kv_heads=("tensor",), mlp=("tensor",))
    with pytest.raises(UserError, match="kv_heads, mlp and time must be split over the same axes"):
        layout_of("heads_alone")


def test_a_study_is_read(tmp_path: Path) -> None:
    out = run(tmp_path, sys.executable, f"{ROOT}/examples/read_a_study.py")
    assert (
        out.startswith("24 finished runs") and "the constants of the law are not determined: 24 runs of 6 sizes" in out
    )
    low, high = map(float, re.findall(r"\d\.\d{3}", out.splitlines()[-1]))
    assert low < high < 1.52, "twice the size and the tokens do better than any run"


@pytest.mark.slow
def test_a_model_is_asked(tmp_path: Path) -> None:
    out = run(tmp_path, sys.executable, f"{ROOT}/examples/load_and_ask.py")
    assert "phi-3-mini proxy" in out and out.count("reply: '") == 2 and out.count("ended by length") == 2


@pytest.mark.slow
def test_weights_of_a_run_help_the_next(tmp_path: Path) -> None:
    out = run(tmp_path, sys.executable, f"{ROOT}/examples/fine_tune.py")
    scratch, tuned = map(float, re.findall(r"\d\.\d{3}", out.splitlines()[-1]))
    assert tuned < scratch - 0.1


@pytest.mark.slow
def test_a_probe_is_in_the_rows_and_in_the_report(tmp_path: Path) -> None:
    rows = trained(tmp_path, "add_a_probe.py", "probe")
    assert len(rows) == 2 and all(0 < float(row["text/text/accuracy"]) < 1 for row in rows)
    (trunk,) = (tmp_path / "probe").glob("*-100k/evals.jsonl")
    assert {row["metric"] for row in read_rows(trunk)} == {"loss", "bits_per_byte", "accuracy"}
    assert "accuracy" in (tmp_path / "probe/report.html").read_text()


@pytest.mark.slow
def test_a_strategy_gives_the_losses_of_one_device(tmp_path: Path) -> None:
    many, one = trained(tmp_path, "new_strategy.py", "many", 4), trained(tmp_path, "new_strategy.py:dp", "one")
    assert float(many[0]["train_loss"]) == pytest.approx(float(one[0]["train_loss"]), rel=1e-5)
    (config,) = (tmp_path / "many").glob("*/config.json")
    made = json.loads(config.read_text())["config"]
    assert (made["strategy"], made["context_parallel"]) == ("copies_cp", 2)


@pytest.mark.slow
def test_a_member_is_trained_and_reported_beside_another(tmp_path: Path) -> None:
    rows = trained(tmp_path, "new_member.py:budgets=50k", "member")
    assert [row["member"] for row in rows] == ["grouped", "mini"] and rows[0]["name"] == "grouped-pico-family-s0-50k"
    assert "phi-3-grouped proxy" in (tmp_path / "member/report.html").read_text()
