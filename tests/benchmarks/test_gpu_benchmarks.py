"""The GPU benchmark, run on this machine's CPU at toy size: its numbers belong together; its times mean nothing."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path

import pytest

from phi3_jax import commands, family
from phi3_jax.chips import CHIPS
from phi3_jax.models.flops import all_params, train_flops_per_token

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("gpu_train", ROOT / "benchmarks" / "gpu_train.py")
gpu_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_train)


def test_the_full_size_is_the_released_model() -> None:
    assert gpu_train.model_of("full", 32) == family.published("mini")
    assert gpu_train.WINDOWS["full"] * gpu_train.model_of("full", 4).context >= 8 * 4096


def test_a_row_divides_the_work_by_the_median_and_the_chips_peak() -> None:
    model = gpu_train.model_of("full", 32)
    row = gpu_train.row_of(model, 8, "s", "w", {"kind": "NVIDIA H200", "seconds": [9.0, 2.0, 1.0], "peak_bytes": None})
    assert row["tokens_per_s"] == 8 * 4096 / 2.0 and row["flops_per_token"] == pytest.approx(24.75e9, rel=1e-3)
    assert row["mfu"] == pytest.approx(8 * 4096 / 2.0 * 24.75e9 / 989e12, rel=1e-3) and row["params"] == 3_821_079_552
    with pytest.raises(SystemExit, match="no peak is known of 'NVIDIA RTX'"):
        gpu_train.row_of(model, 8, "s", "w", {"kind": "NVIDIA RTX", "seconds": [1.0], "peak_bytes": None})


def test_it_runs_at_toy_size_and_its_numbers_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_train, "POLICIES", ("full", "fulll"))  # the last fails, which ends it alone
    monkeypatch.setattr(gpu_train, "peer_missing", lambda: "it is left out of this test")
    (row,) = gpu_train.report("toy", gpu_train.DEPTHS["toy"], 3, str(tmp_path / "out.md"))
    model = gpu_train.model_of("toy", 2)
    assert row["way"] == "full" and row["chip"] == "cpu" and (row["windows"], row["window"]) == (3, 64)
    assert row["params"] == all_params(model) and row["flops_per_token"] == train_flops_per_token(model, 64)
    assert len(row["seconds"]) == gpu_train.RUNS and row["step_s"] == statistics.median(row["seconds"]) > 0
    assert row["tokens_per_s"] * row["step_s"] == pytest.approx(3 * 64)
    assert row["mfu"] * CHIPS["cpu"].peak_flops == pytest.approx(row["tokens_per_s"] * row["flops_per_token"])
    assert 0 < row["loss"] < 1.5 * math.log(model.vocab)
    printed = capsys.readouterr().out
    assert (
        printed == (tmp_path / "out.md").read_text() and f"| {row['tokens_per_s']:,.0f} | {row['mfu']:.1%} |" in printed
    )
    assert "train.remat=fulll is unknown" in printed and "no peer in this run: it is left out" in printed


def test_where_nothing_fits_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_train, "measured", lambda *_: "RESOURCE_EXHAUSTED: Out of memory")
    assert commands.call(gpu_train.COMMAND, ["--layers", "32,16"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nothing fits") and said.count("Out of memory") == 2 * len(gpu_train.POLICIES)
