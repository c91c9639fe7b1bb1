"""A run that is stopped, killed or starved anywhere goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import config_diff
from phi3_jax.errors import UserError
from phi3_jax.records import checkpoint
from phi3_jax.records.checkpoint import CheckpointWarning, list_steps, restore
from phi3_jax.records.rows import read_rows
from phi3_jax.training import loop as loop_module
from phi3_jax.training.loop import LoopConfig, fit
from phi3_jax.training.metrics import TIMING_FIELDS

REPO = Path(__file__).resolve().parents[2]
LOOP = LoopConfig(
    steps=24, tokens_per_step=64, flops_per_step=1e6, peak_flops=1e12, eval_steps=(0, 6, 12), checkpoint_every=4
)
IDENTITY = {"fingerprint": "f1", "config": {"model": {"d_model": 8}, "seed": 0}}


def init() -> dict:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (8, 16)) / 3, "v": jax.random.normal(keys[1], (16,)) / 4}
    return {"params": params, "mu": jax.tree.map(jnp.zeros_like, params), "streak": jnp.int32(0)}


def loss_of(params: dict, batch: dict) -> jax.Array:
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


def _step(state: dict, batch: dict, lr: jax.Array) -> tuple[dict, dict]:
    loss, grads = jax.value_and_grad(loss_of)(state["params"], batch)
    ok = jnp.isfinite(loss)
    mu = jax.tree.map(lambda m, g: 0.9 * m + g, state["mu"], grads)
    params = jax.tree.map(lambda p, m: p - lr * m, state["params"], mu)
    new = {"params": params, "mu": mu, "streak": jnp.int32(0)}
    new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state | {"streak": state["streak"] + 1})
    return new, {"loss": loss, "streak": new["streak"]}


step_fn = jax.jit(_step, donate_argnums=0)


def batch_fn(step: int) -> dict:
    x = np.random.default_rng([7, step]).standard_normal((32, 8)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(1))}


def eval_fn(state: dict, step: int) -> list[dict]:
    return [
        {"suite": "loss", "task": "held", "metric": "mse", "value": float(loss_of(state["params"], batch_fn(9999)))}
    ]


def run(folder, loop: LoopConfig = LOOP, **change):
    args = dict(
        state=init(), step_fn=step_fn, lr_fn=lambda step: 0.05 / (1 + step), batch_fn=batch_fn, eval_fn=eval_fn,
        loop=loop, folder=folder, identity=IDENTITY,
    )  # fmt: skip
    return fit(**(args | change))


def untimed(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_rows(path)]


def bits(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def assert_same_run(folder: Path, unbroken: Path) -> None:
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert untimed(folder / name) == untimed(unbroken / name), name
    states = [restore(f / "checkpoints", init()) for f in (folder, unbroken)]
    assert states[0].step == states[1].step == LOOP.steps
    assert bits(states[0].state) == bits(states[1].state)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def test_an_unbroken_run_has_every_row_once_and_learns(unbroken):
    rows = read_rows(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert [row["step"] for row in read_rows(unbroken / "evals.jsonl")] == [0, 6, 12, 24]
    assert rows[9] | {"tokens": 640, "flops": 1e7} == rows[9] and rows[9]["lr"] == pytest.approx(0.005)
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[0]["compile_s"] > 0 and rows[0]["first_step_s"] > 0 and rows[0]["tokens_per_s"] is None
    assert all(row["tokens_per_s"] > 0 and "compile_s" not in row for row in rows[1:])
    assert rows[5]["mfu"] == pytest.approx(rows[5]["tokens_per_s"] / 64 * 1e6 / 1e12)


def test_the_loop_computes_what_a_plain_loop_computes(unbroken):
    state = init()
    for step in range(LOOP.steps):
        state, metrics = step_fn(state, batch_fn(step), np.float32(0.05 / (1 + step)))
    assert bits(restore(unbroken / "checkpoints", init()).state) == bits(state)
    assert np.float32(read_rows(unbroken / "metrics.jsonl")[-1]["loss"]) == np.asarray(metrics["loss"])


def test_a_finished_run_is_recognised_and_not_repeated(unbroken):
    before = {p: p.read_bytes() for p in unbroken.rglob("*") if p.is_file()}

    def never(*_):
        raise AssertionError("a finished run was repeated")

    result = run(unbroken, step_fn=never, batch_fn=never, eval_fn=never)
    assert (result.status, result.step, result.last["step"]) == ("done", 24, 24)
    assert {p: p.read_bytes() for p in unbroken.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("at", [1, 4, 6, 23])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, unbroken, at, number):
    def signalling(step):
        if step == at:
            os.kill(os.getpid(), number)
        return batch_fn(step)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    first = run(tmp_path, batch_fn=signalling)
    assert (first.status, first.step) == ("stopped", at) and list_steps(tmp_path / "checkpoints")[-1] == at
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, at + 1))
    assert run(tmp_path).status == "done"
    assert_same_run(tmp_path, unbroken)


CHILD = """
    import os, signal, sys, threading, time
    sys.path[:0] = [{repo!r}, {tests!r}]
    import test_loop as t
    from phi3_jax.records import checkpoint
    mode, at = sys.argv[2], int(sys.argv[3])
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    batch_fn, real, eval_fn, seen = t.batch_fn, getattr(checkpoint, mode, None), t.eval_fn, []
    if mode == "step":        # at a random step; a save may be in flight
        t.batch_fn = lambda step: (die() if step == at else None) or batch_fn(step)
    elif mode == "eval":      # after some of the evaluations are done, before they are written
        t.eval_fn = lambda state, step: (die() if step >= at else None) or eval_fn(state, step)
    elif mode == "timer":     # at any instant, by another thread
        start = threading.Timer(1e-4 * at, die).start
        t.batch_fn = lambda step: (start() if step == 15 else time.sleep(1e-3)) or batch_fn(step)
    elif mode != "none":      # inside the nth call of a part of saving
        def dying(*args):
            seen.append(0)
            if len(seen) == at:
                die()
            return real(*args)
        setattr(checkpoint, mode, dying)
    print(t.run(sys.argv[1]).status)
"""


def child(folder: Path, mode: str = "none", at: int = 0) -> subprocess.CompletedProcess:
    code = textwrap.dedent(CHILD).format(repo=str(REPO), tests=str(Path(__file__).parent))
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(folder), mode, str(at)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_a_run_still_equals_an_unbroken_one(tmp_path, unbroken, seed):
    """kill -9 at random steps, between evaluation and row, inside each stage of a save; each life resumes the last."""
    rng = random.Random(seed)
    deaths = [
        [("step", rng.randint(5, 10)), ("checksums", 2), ("timer", rng.randint(0, 60))],
        [("_commit", 2), ("eval", 7), ("_discard", 1)],
    ][seed]
    for mode, at in deaths:
        assert child(tmp_path, mode, at).returncode == -signal.SIGKILL, f"control: {mode} {at} really killed it"
        assert not (tmp_path / "done.json").exists()
    last = child(tmp_path)
    assert last.stdout.strip() == "done", last.stderr
    assert_same_run(tmp_path, unbroken)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, unbroken):
    run(tmp_path)
    (tmp_path / "done.json").unlink()
    (tmp_path / "checkpoints" / "24" / checkpoint.RECORD).write_text("")
    with pytest.warns(CheckpointWarning, match=r"24: checkpoint.json is damaged"):
        result = run(tmp_path)
    assert len(result.skipped_checkpoints) == 1
    assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_is_never_ahead_of_the_evaluations_of_its_step(tmp_path, unbroken):
    def failing(state, step):
        if step == 12:
            raise RuntimeError("out of memory")
        return eval_fn(state, step)

    assert LOOP.saves(12) and LOOP.evaluates(12)
    with pytest.raises(RuntimeError):
        run(tmp_path, eval_fn=failing)
    run(tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_a_fork_goes_on_from_the_trunk_and_equals_it(tmp_path, unbroken):
    run(tmp_path / "trunk", replace(LOOP, keep_latest=1, keep_steps=(9,)))
    assert list_steps(tmp_path / "trunk" / "checkpoints") == [9, 24]
    found = restore(tmp_path / "trunk" / "checkpoints", init(), at_most=9)
    run(tmp_path / "fork", replace(LOOP, start=9), state=found.state)
    rows = untimed(tmp_path / "fork" / "metrics.jsonl")
    assert rows == untimed(unbroken / "metrics.jsonl")[9:]
    assert bits(restore(tmp_path / "fork" / "checkpoints", init()).state) == bits(
        restore(unbroken / "checkpoints", init()).state
    )


def test_a_paused_run_stops_where_asked_and_goes_on_as_if_it_had_not(tmp_path, unbroken):
    first = run(tmp_path, replace(LOOP, pause=10))
    assert (first.status, first.step) == ("paused", 10)
    assert run(tmp_path, replace(LOOP, pause=10)).status == "paused"  # again: nothing to do
    assert not (tmp_path / "done.json").exists()
    assert run(tmp_path).status == "done"
    assert_same_run(tmp_path, unbroken)


def test_rows_do_not_depend_on_how_often_is_logged(tmp_path, unbroken):
    run(tmp_path, replace(LOOP, log_every=7))
    rows = untimed(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 7, 14, 21, 24]
    assert rows == [untimed(unbroken / "metrics.jsonl")[row["step"] - 1] for row in rows]


def test_another_config_is_refused_with_what_changed(tmp_path, unbroken):
    other = {"fingerprint": "f2", "config": {"model": {"d_model": 16}, "seed": 0}}
    with pytest.raises(UserError, match=r"another config \(config.model.d_model: 8 -> 16\); put the config back"):
        run(unbroken, identity=other)
    with pytest.raises(UserError, match=r"d_model: 8 -> 16"):  # and not: a leaf has another shape
        run(unbroken, identity=other, state=init() | {"mu": jnp.zeros(3)})
    elsewhere = IDENTITY | {"device": "TPU v5p"}  # where it ran is no part of the science
    assert run(unbroken, identity=elsewhere).status == "done"
    assert run(unbroken, identity=IDENTITY | {"order": 1}).status == "done"  # what runs before the field had
    with pytest.raises(UserError, match=r"another config \(order: \(absent\) -> 2\)"):
        run(unbroken, identity=IDENTITY | {"order": 2})


def test_config_diff_names_each_leaf():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 3, "e": 4}, {"a": {"b": 2, "c": (1, 2)}, "e": 4, "f": None}
    assert config_diff(old, new) == ["a.b: 1 -> 2", "d: 3 -> (absent)", "f: (absent) -> None"]
    assert config_diff(old, old) == []


def test_resume_never_refuses_a_folder_with_a_run(tmp_path, unbroken):
    with pytest.raises(UserError, match="already holds a run; continue it with --resume=auto"):
        run(unbroken, resume="never")
    assert run(tmp_path, replace(LOOP, steps=2), resume="never").status == "done"


def test_a_batch_error_is_raised_after_the_state_is_saved(tmp_path, unbroken):
    def failing(step):
        if step == 11:
            raise UserError("shard web-00001: record 5 is damaged")
        return batch_fn(step)

    with pytest.raises(UserError, match="record 5 is damaged"):
        run(tmp_path, batch_fn=failing)
    assert list_steps(tmp_path / "checkpoints")[-1] == 11
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 11
    run(tmp_path)
    assert_same_run(tmp_path, unbroken)


def poisoned(steps):
    return lambda step: batch_fn(step) | ({"y": np.full(32, np.nan, np.float32)} if step in steps else {})


def test_one_nan_batch_is_skipped_and_its_row_is_valid_json(tmp_path):
    assert run(tmp_path, batch_fn=poisoned({5})).status == "done"
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[5]["loss"] is None and rows[5]["nonfinite"] == ["loss"] and rows[5]["streak"] == 1
    assert all(row["loss"] is not None for row in rows[:5] + rows[6:])


def test_too_many_skipped_steps_in_a_row_end_the_run_naming_the_way_back(tmp_path):
    few = replace(LOOP, max_skipped=5)
    with pytest.raises(UserError, match=r"step 15: 5 steps in a row.*newest good checkpoint: step 12") as caught:
        run(tmp_path, few, batch_fn=poisoned(range(10, 24)))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="step 15: 5 steps in a row"):  # counted on from the state, not from zero
        run(tmp_path, few, batch_fn=poisoned(range(10, 24)))
    assert run(tmp_path / "ok", few, batch_fn=poisoned(range(10, 14))).status == "done"  # control: 4 are allowed


def test_a_failing_save_ends_the_run_with_older_checkpoints_intact(tmp_path, unbroken, monkeypatch):
    real = checkpoint.checksums

    def full(folder):
        if folder.name == "12.partial":
            raise OSError(28, "No space left on device")
        return real(folder)

    monkeypatch.setattr(checkpoint, "checksums", full)
    with pytest.raises(UserError, match=r"step 12 .*no space left on device; step 8 is intact"):
        run(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    monkeypatch.undo()
    run(tmp_path)
    assert_same_run(tmp_path, unbroken)


def test_an_unwritable_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(tmp_path / "file", step_fn=None)


def test_progress_is_rare_ends_at_the_end_and_knows_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "PROGRESS_SECONDS", 1e9)
    seen = []
    run(tmp_path, progress=seen.append)
    assert [row["step"] for row in seen] == [1, 24]
    assert set(seen[-1]) == {"step", "steps", "loss", "tokens_per_s", "eta_s"} and seen[-1]["eta_s"] == 0


def test_rates_count_training_alone(tmp_path, monkeypatch):
    """On a clock of its own: a step takes a second, an evaluation 100, a save 1,000."""
    now, seen = [0.0], []

    def passes(seconds):
        now[0] += seconds

    class Metric:  # reading it is what waits for the step
        def __array__(self, dtype=None, copy=None):
            passes(1.0)
            return np.float32(0)

    fake = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(loop_module, "time", fake)
    monkeypatch.setattr(loop_module, "PROGRESS_SECONDS", 0.0)
    save = loop_module.Checkpointer.save
    monkeypatch.setattr(loop_module.Checkpointer, "save", lambda *args: passes(1000.0) or save(*args))
    run(
        tmp_path, LOOP, step_fn=lambda state, batch, lr: (state, {"loss": Metric(), "streak": 0}),
        eval_fn=lambda state, step: passes(100.0) or eval_fn(state, step), progress=seen.append,
    )  # fmt: skip
    assert now[0] == 24 + 4 * 100 + 6 * 1000, "control: all of it passed"
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["tokens_per_s"] for row in rows] == [None] + [64.0] * 23
    assert [row["mfu"] for row in rows[1:]] == pytest.approx([1e6 / 1e12] * 23)
    assert [row["tokens_per_s"] for row in seen[1:]] == [64.0] * 23
    assert [row["eta_s"] for row in seen[1:]] == [24.0 - step for step in range(2, 25)]


def test_rows_are_on_the_disk_before_the_checkpoint_of_their_step_begins(tmp_path, monkeypatch):
    events, sync, save = [], loop_module.RunLog.sync, loop_module.Checkpointer.save

    def syncing(log):
        sync(log)
        events.append(("rows", read_rows(tmp_path / "metrics.jsonl")[-1]["step"]))

    def saving(saver, step, *args):
        events.append(("state", step))
        return save(saver, step, *args)

    monkeypatch.setattr(loop_module.RunLog, "sync", syncing)
    monkeypatch.setattr(loop_module.Checkpointer, "save", saving)
    run(tmp_path)
    assert events == [event for step in range(4, 25, 4) for event in (("rows", step), ("state", step))]
    assert restore(tmp_path / "checkpoints", init()).extra["last"]["step"] == 24


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (dict(), [20, 24]),
        (dict(keep_latest=3), [16, 20, 24]),
        (dict(keep_latest=1, keep_steps=(4, 9)), [4, 9, 24]),
        (dict(checkpoint_every=None), [24]),
    ],
)
def test_the_checkpoints_that_stay(tmp_path, change, kept):
    run(tmp_path, replace(LOOP, **change))
    assert list_steps(tmp_path / "checkpoints") == kept


def test_the_profiler_window_is_traced(tmp_path):
    run(tmp_path, replace(LOOP, steps=6, profile=(2, 4)), eval_fn=None)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_next_batch_is_made_before_the_current_loss_is_awaited(tmp_path):
    events = []

    class Metric:  # stands for a device value; reading it is what waits
        def __init__(self, step):
            self.step = step

        def __array__(self, dtype=None, copy=None):
            events.append(("read", self.step))
            return np.float32(0)

    def step(state, batch, lr):
        events.append(("step", batch))
        return state, {"loss": Metric(batch), "streak": 0}

    run(tmp_path, replace(LOOP, steps=4, checkpoint_every=None, eval_steps=()), step_fn=step, eval_fn=None,
        batch_fn=lambda i: events.append(("batch", i)) or i)  # fmt: skip
    order = {event: i for i, event in reversed(list(enumerate(events)))}
    for i in range(1, 3):
        assert order["step", i] < order["batch", i + 1] < order["read", i - 1] < order["read", i]
        assert order["step", i] < order["read", i - 1], "the loss is fetched one step late"


def test_runs_in_a_thread_without_touching_signals(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(run(tmp_path, replace(LOOP, steps=2)).status))
    thread.start()
    thread.join()
    assert result == ["done"]


def test_done_marker_names_the_last_row(unbroken):
    done = json.loads((unbroken / "done.json").read_text())
    assert done["step"] == 24 and done["last"] == read_rows(unbroken / "metrics.jsonl")[-1]


# ------------------------------------------------------------------------------------------------ runs that are no result


def spoiled(change):
    """`step_fn`, but for what `change(step, state, metrics)` puts into its results; steps are counted from 1."""
    count = iter(range(1, 1000))

    def step(state, batch, lr):
        return change(next(count), *step_fn(state, batch, lr))

    return step


def with_params(state: dict, value: float) -> dict:
    return state | {"params": state["params"] | {"v": state["params"]["v"].at[3].set(value)}}


NO_RESULTS = {
    "NaN in a parameter": (lambda i, s, m: (with_params(s, np.nan) if i == 24 else s, m), "NaN or infinity"),
    "an infinite parameter": (lambda i, s, m: (with_params(s, -np.inf) if i == 24 else s, m), "params.v first"),
    "a last loss of NaN": (lambda i, s, m: (s, m | ({"loss": jnp.float32(np.nan)} if i == 24 else {})), "last loss"),
    "every step skipped": (lambda i, s, m: (s, m | {"streak": jnp.int32(i)}), "all 24 steps were skipped"),
}


@pytest.mark.parametrize("how", NO_RESULTS)
def test_a_run_that_ends_without_a_result_is_not_done(how: str, tmp_path: Path) -> None:
    change, word = NO_RESULTS[how]
    loop = replace(LOOP, eval_steps=())
    with pytest.raises(UserError, match=word) as caught:
        run(tmp_path, loop, step_fn=spoiled(change))
    assert "optim.peak_lr" in str(caught.value) and not (tmp_path / "done.json").exists()
    with pytest.raises(UserError, match=word):  # nor when it is started again
        run(tmp_path, loop)


def test_a_last_streak_that_ended_is_a_result(tmp_path: Path) -> None:
    """Positive control: all but the first step skipped, and a loss that was NaN on the way."""
    change = lambda i, s, m: (s, m | {"streak": jnp.int32(i - 1), "loss": m["loss"] * (np.nan if i == 5 else 1)})  # noqa: E731
    assert run(tmp_path, step_fn=spoiled(change)).status == "done"
