"""The committed matrix of compiled steps: what it claims, and that its first rows come out again (marker `libtpu`)."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import UserError
from phi3_jax.chips import parse_topology
from phi3_jax.planning import aot

ROOT = Path(__file__).resolve().parents[2]
with (ROOT / "analysis" / "results" / "aot_matrix.csv").open() as file:
    MATRIX = list(csv.DictReader(file))


def name(row: dict[str, str]) -> str:
    return f"{row['model']} {row['topology']}"


def test_the_matrix_is_whole() -> None:
    models = ("phi-3-mini-4k", "phi-3-small-8k", "phi-3-medium-4k", "phi-3-mini-128k")
    chips = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "2xv5p:4x4x4")
    pictures = [f"phi-3-vision-128k {c}" for c in chips[1:3]]
    assert [name(row) for row in MATRIX] == [f"{m} {c}" for m in models for c in chips] + pictures


@pytest.mark.parametrize("row", MATRIX, ids=name)
def test_every_step_fits_at_four_million_tokens_and_nothing_is_gathered_whole(row: dict[str, str]) -> None:
    assert int(row["batch_tokens"]) >= 4 * 2**20
    assert int(row["peak_bytes"]) <= int(row["limit_bytes"]) and row["fits"] == "True"
    assert row["rematerialised"] == "0"
    assert float(row["argument_plan"]) == pytest.approx(1, abs=0.1)


def test_mediums_bound() -> None:
    bounds = {row["topology"]: float(row["mfu_bound"]) for row in MATRIX if row["model"] == "phi-3-medium-4k"}
    assert bounds["v5p:4x4x8"] >= 0.6 and bounds["2xv5p:4x4x4"] >= 0.6 and bounds["v6e:16x16"] >= 0.5


def test_only_tpus_are_compiled_for() -> None:
    with pytest.raises(UserError, match="TPU topologies, not h200:8"):
        aot.devices(parse_topology("h200:8"))


@pytest.mark.libtpu
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (extra [tpu])")
@pytest.mark.parametrize("row", MATRIX[:2], ids=name)
def test_a_row_comes_out_again(row: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "aot_matrix.py"), "--one", row["row"]]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    again = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("argument_bytes", "temp_bytes", "peak_bytes", "fast_bytes"):
        assert again[key] == pytest.approx(int(row[key]), rel=0.02), key
    assert again["temp_plan"] == pytest.approx(1, abs=0.25) and again["fits"]
