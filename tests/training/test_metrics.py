"""Rows survive crashes, stay valid JSON whatever the numbers, and are cut back exactly on resume."""

from __future__ import annotations

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.errors import UserError
from phi3_jax.records.rows import JsonLines, read_rows
from phi3_jax.training import metrics
from phi3_jax.training.metrics import OneStepLate, RunLog
from phi3_jax.training.progress import Bars, of_run


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps, after=10**9) -> JsonLines:
    file = JsonLines(path, after)
    for step in steps:
        file.write({"step": step, "x": step / 3})
    return file


@pytest.mark.parametrize("after", [-1, 0, 3, 6, 100])
def test_resuming_after_any_step_gives_the_file_of_an_unbroken_run(tmp_path, after):
    write(tmp_path / "whole.jsonl", range(7))
    write(tmp_path / "m.jsonl", range(7))
    write(tmp_path / "m.jsonl", range(max(0, after + 1), 7), after=after)
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_line_torn_at_any_byte_is_dropped_and_the_others_stay(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    whole = path.read_bytes()
    last = whole.index(b"\n") + 1
    for end in range(last + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [row["step"] for row in read_rows(path)] == [1]
        file = JsonLines(path, after=9)
        assert file.dropped == 1
        file.write({"step": 2, "x": 2 / 3})
        file.close()
        assert path.read_bytes() == whole


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}')
    write(path, [2]).close()
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_nonfinite_values_become_null_and_are_named(tmp_path):
    file = JsonLines(tmp_path / "m.jsonl", 0)
    file.write({"step": 1, "loss": math.nan, "norm": np.float32(np.inf), "ok": np.float32(0.1), "n": np.int32(4)})
    line = (tmp_path / "m.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row == {"step": 1, "loss": None, "norm": None, "ok": 0.1, "n": 4, "nonfinite": ["loss", "norm"]}
    with pytest.raises(ValueError):  # positive control: the encoder itself refuses such values
        json.dumps({"loss": math.nan}, allow_nan=False)


def test_float32_keeps_every_bit_on_its_way_through_the_file(tmp_path):
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    file = JsonLines(tmp_path / "m.jsonl", 0)
    for step, value in enumerate(values):
        file.write({"step": step, "x": value})
    assert np.array_equal(np.float32([row["x"] for row in rows(tmp_path / "m.jsonl")]), values)


def test_a_full_disk_is_one_clear_line():
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    file = JsonLines.__new__(JsonLines)
    file.path, file._file = "m.jsonl", Full()
    with pytest.raises(UserError, match=r"cannot write m.jsonl: No space left on device; free some space"):
        file.write({"step": 1})


def test_device_metrics_come_out_one_step_late_and_in_order():
    late, seen = OneStepLate(), []
    for step in range(1, 5):
        seen.append(late.push(step, {"loss": jnp.float32(step)}))
    assert seen == [None, (1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})]
    assert late.flush() == (4, {"loss": 4.0}) and late.flush() is None


def test_both_files_and_tensorboard_get_the_rows(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=True)
    log.metrics({"step": 1, "loss": 2.5, "mfu": None})
    log.evals([{"step": 1, "suite": "loss", "task": "web", "metric": "nll", "value": 1.5}])
    log.sync()
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5
    assert read_rows(tmp_path / "evals.jsonl")[0]["task"] == "web"
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss" in events and b"loss/web/nll" in events and b"train/mfu" not in events


PROGRESS = {"step": 50, "steps": 200, "loss": 2.3456, "tokens_per_s": 12_345.0, "eta_s": 3_725.0}


def test_a_bar_says_it_all():
    bar = of_run(PROGRESS)
    assert (bar.done, bar.total) == (50, 200)
    for word in ("25%", "2.3456", "12.3k tokens/s", "1:02:05 left"):
        assert word in bar.text
    starting = of_run({"step": 0, "steps": 200, "loss": None, "tokens_per_s": None, "eta_s": None})
    assert "0%" in starting.text and "None" not in starting.text


def test_bars_redraw_in_place_on_a_terminal_and_are_rare_plain_lines_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "140")
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        with pytest.raises(KeyboardInterrupt), Bars(stream) as bars:
            for step in (50, 51, 52, 200, 200):
                bars.show({name: of_run(PROGRESS | {"step": step}) for name in ("a [red]", "bb")})
            raise KeyboardInterrupt
    drawn = terminal.getvalue()
    assert drawn.count("\x1b[1A") >= 4, "it goes up to redraw"
    assert drawn.endswith("\x1b[?25h") and "100%" in drawn.split("\x1b[1A")[-1], "the cursor is there again"
    assert "a [red]" in drawn, "a name is no markup"
    lines = plain.getvalue().splitlines()
    assert "\x1b" not in plain.getvalue()
    assert [line[0] for line in lines] == ["a", "b", "a", "b"], "the first and the finished"


def test_timing_fields_are_the_only_ones_that_may_differ():
    assert set(metrics.TIMING_FIELDS) == {"tokens_per_s", "mfu", "compile_s", "first_step_s"}
