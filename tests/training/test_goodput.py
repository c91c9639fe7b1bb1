"""Where the time went: every second is booked once, and what a crash threw away is called lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import test_loop

from phi3_jax.records import goodput
from phi3_jax.records.goodput import ACCOUNT, PHASES, Clock, account, read


def write(folder: Path, *rows: tuple) -> None:
    """Rows (attempt, event, from, step, seconds of PHASES...)."""
    with open(folder / goodput.FILE, "a") as file:
        for attempt, event, begin, step, *seconds in rows:
            seconds = dict(zip(PHASES, seconds, strict=True))
            file.write(
                json.dumps(dict(attempt=attempt, event=event, step=step, seconds=seconds) | {"from": begin}) + "\n"
            )


def test_work_after_the_checkpoint_that_the_next_attempt_starts_from_is_lost(tmp_path):
    write(
        tmp_path,
        (1, "open", None, 0, 2, 0, 0, 0, 0, 0),
        (1, "save", 0, 10, 3, 4, 1, 10, 1, 5),
        (1, "pulse", 0, 17, 3, 4, 2, 17, 1, 9),
        (2, "end", 10, 20, 2, 1, 0, 10, 2, 0),
    )  # fmt: skip
    found = account(tmp_path)
    expected = dict(start=3, compile=4, data=1, step=20, checkpoint=3, evaluation=5, lost=1 + 7 + 4, restarted=3)
    assert found["seconds"] == expected and tuple(found["seconds"]) == ACCOUNT
    assert (found["wall_s"], found["attempts"], found["lost_steps"]) == (3 + 4 + 2 + 17 + 1 + 9 + 15, 2, 7)


def test_an_attempt_that_reached_no_checkpoint_and_one_that_never_began_lose_all_but_their_start(tmp_path):
    write(
        tmp_path,
        (1, "save", 0, 10, 1, 1, 0, 10, 0, 0),
        (2, "pulse", 10, 15, 1, 1, 0, 5, 0, 0),
        (3, "pulse", None, 0, 2, 0, 0, 0, 0, 0),
        (4, "end", 10, 20, 1, 1, 0, 10, 0, 0),
    )  # fmt: skip
    found = account(tmp_path)
    assert found["seconds"] | dict(step=20, lost=5, restarted=6) == found["seconds"] and found["lost_steps"] == 5


def test_a_checkpoint_damaged_later_costs_the_attempts_before_it_too(tmp_path):
    write(
        tmp_path,
        (1, "save", 0, 4, 1, 1, 0, 4, 0, 0),
        (1, "save", 0, 8, 1, 1, 0, 8, 0, 0),
        (2, "pulse", 8, 9, 1, 1, 0, 1, 0, 0),
        (3, "end", 4, 20, 1, 1, 0, 16, 0, 0),
    )  # fmt: skip
    found = account(tmp_path)
    assert found["seconds"] | dict(step=20, lost=5) == found["seconds"] and found["lost_steps"] == 5


def test_every_moment_is_booked_once_whatever_is_nested_or_moved(tmp_path):
    with Clock(tmp_path, time.monotonic() - 5) as clock:
        clock.begins(0)
        with clock.phase("evaluation"), clock.phase("compile"):
            time.sleep(0.02)
        clock.enter("step")
        time.sleep(0.02)
        clock.move(0.01, "data")
        wall = clock.wall()
    found = account(tmp_path)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"], abs=0.005)
    assert wall <= found["wall_s"] + 0.005 and found["wall_s"] < wall + 5
    assert found["seconds"]["start"] >= 5 and found["seconds"]["compile"] >= 0.02 and found["seconds"]["data"] == 0.01


def test_what_the_compiler_takes_inside_another_phase_is_compile(tmp_path):
    with Clock(tmp_path) as clock, clock.phase("evaluation"):
        jax.jit(lambda x: jnp.sin(x @ x.T) * 1.25)(jnp.ones((7, 5)))
    with Clock(tmp_path / "none"):
        pass
    assert account(tmp_path)["seconds"]["compile"] > 0 and account(tmp_path)["seconds"]["evaluation"] >= 0
    assert account(tmp_path / "none") is None, "a folder that is not there is not made"


def test_a_wall_clock_that_jumps_while_something_is_compiled_moves_no_more_than_has_passed(tmp_path):
    with Clock(tmp_path) as clock:
        time.sleep(0.02)
        for seconds in (3600, -3600, 3600):
            jax.monitoring.record_event_duration_secs(goodput._COMPILED, seconds)
        clock.enter("step")
    found = account(tmp_path)["seconds"]
    assert found["compile"] >= 0.02 and min(found.values()) >= -0.001 and max(found.values()) < 60


def test_the_account_of_a_killed_process_is_there_and_a_torn_row_is_left_out(tmp_path):
    code = (
        "import os, sys, time; from phi3_jax.records.goodput import Clock\n"
        "with Clock(sys.argv[1], time.monotonic() - 50) as clock:\n"
        "    clock.begins(0), clock.enter('step'), time.sleep(1.2), os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[2]
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root).returncode == -9
        with open(tmp_path / goodput.FILE, "ab") as file:
            file.write(b'{"attempt": 1, "st')
    found = account(tmp_path)
    assert found["attempts"] == 2 and found["seconds"]["start"] >= 50 and found["seconds"]["restarted"] >= 50
    assert found["seconds"]["step"] + found["seconds"]["lost"] > 0.5


def test_rows_are_few_in_a_long_attempt(tmp_path, monkeypatch):
    """A row a hundredth of the time so far: about a thousand in a week."""
    waited = []

    class Days(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            clock.started -= timeout
            return sum(waited) > 7 * 86400

    clock = Clock(tmp_path)
    clock._closed = Days()
    clock._beat()
    assert len(read(tmp_path)) == len(waited) - 1 < 1500 and min(waited) == goodput.PULSE_SECONDS


def test_a_run_books_its_phases_and_a_finished_one_is_left_alone(tmp_path):
    fresh = jax.jit(lambda *args: test_loop._step(*args), donate_argnums=0)  # test_loop's is compiled once a process
    test_loop.run(tmp_path, replace(test_loop.LOOP, steps=8, eval_steps=(4,)), step_fn=fresh)
    found = account(tmp_path)
    assert all(found["seconds"][name] > 0 for name in ("start", "compile", "step", "checkpoint", "evaluation"))
    assert found["seconds"]["lost"] == found["seconds"]["restarted"] == found["lost_steps"] == 0
    before = (tmp_path / goodput.FILE).read_bytes()
    test_loop.run(tmp_path, replace(test_loop.LOOP, steps=8, eval_steps=(4,)))
    assert (tmp_path / goodput.FILE).read_bytes() == before


def test_a_step_compiled_before_in_this_process_still_has_its_call_booked(tmp_path):
    for folder in (tmp_path / "first", tmp_path / "again"):
        test_loop.run(folder, replace(test_loop.LOOP, steps=8, eval_steps=(4,)))
        found = account(folder)["seconds"]
        assert all(found[name] > 0 for name in ("start", "compile", "step", "checkpoint", "evaluation")), found


@pytest.mark.parametrize("slow", [False, True])
def test_a_wait_for_data_is_booked_where_the_device_waits(tmp_path, slow):
    def batch_fn(step):
        time.sleep(0.1 * slow)
        return test_loop.batch_fn(step)

    test_loop.run(tmp_path, replace(test_loop.LOOP, steps=8), eval_fn=None, batch_fn=batch_fn)
    seconds = account(tmp_path)["seconds"]
    assert (seconds["data"] > 0.5) == slow
