"""The CPU benchmark of a step: it measures the product that it prints, and no other; it says what it does."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("train_step", ROOT / "benchmarks" / "train_step.py")
train_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_product_in_the_asked_dtype_is_measured(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(train_step, "SIDE", 8)
    monkeypatch.setattr(train_step, "fastest", lambda product: measured.append(str(product().dtype)) or 1.0)
    _, ceiling = train_step.ours("pico", dtype)
    assert measured == [] and ceiling() == 1.0 and measured == [dtype]


def test_it_says_what_it_does_and_prints_one_product(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    calls = []
    monkeypatch.setattr(
        train_step, "ours", lambda *_: (lambda: calls.append("step") or 0.5, lambda: calls.append("product") or 7.0)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n"))
    train_step.serve("phi3_jax", "pico", "float32")
    out, err = capsys.readouterr()
    assert calls == ["product", *["step"] * 5]
    assert json.loads(out.splitlines()[0])["product"] == 7.0 and "products" not in out
    assert "# pico phi3_jax: a matrix product in float32" in err and "the first step, which compiles" in err


def test_a_product_that_takes_long_is_not_repeated_seven_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 15))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: float(next(clock)))
    counted = []
    assert train_step.fastest(lambda: counted.append(1)) == 2 * train_step.SIDE**3 / 15 / 1e9
    assert len(counted) == 2, "15 s each: 30 s are enough"
