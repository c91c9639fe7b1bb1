"""The training loop: batches in, one jitted step after the other, rows and checkpoints out, and back after any crash.

Steps are numbered by what is finished: `lr_fn` and `batch_fn` get the number of finished steps (0 for the first
update), rows, evaluations and checkpoints of "step k" describe the state after k updates. Everything a step depends on
is a function of that number and the state, so a run resumed after kill -9 equals an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.training.checkpoint import Checkpointer, Keep, list_steps, restore
from phi3_jax.training.metrics import OneStepLate, Row, RunLog

DONE = "done.json"
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and when to log, evaluate and save. All steps count finished updates.

    `start` is the step of the state handed to `fit` (0, or the fork point for a state taken from a trunk's checkpoint).
    `flops_per_step` and `peak_flops` (FLOP/s of all devices; None where unknown) give the fields flops and mfu.
    """

    steps: int
    tokens_per_step: int
    flops_per_step: float
    peak_flops: float | None = None
    start: int = 0
    log_every: int = 1
    eval_steps: tuple[int, ...] = ()
    checkpoint_every: int | None = None
    keep_latest: int = 2
    keep_every: int | None = None
    keep_steps: tuple[int, ...] = ()
    max_skipped: int = 50
    profile: tuple[int, int] | None = None
    tensorboard: bool = False

    def evaluates(self, step: int) -> bool:
        return step == self.steps or step in self.eval_steps

    def saves(self, step: int) -> bool:
        every = self.checkpoint_every
        return step == self.steps or step in self.keep_steps or bool(every and step % every == 0)

    def logs(self, step: int) -> bool:
        return step == self.steps or step == 1 or step % self.log_every == 0


@dataclass(frozen=True)
class Result:
    """How `fit` ended: "done" or "stopped" (by a signal, saved). `last` is the newest row; seconds are None if unknown."""

    state: Any
    status: Literal["done", "stopped"]
    step: int
    last: Row
    compile_s: float | None = None
    first_step_s: float | None = None
    skipped_checkpoints: tuple[str, ...] = ()


def fit(
    *,
    state: Any,
    step_fn: Callable[[Any, Any, np.float32], tuple[Any, Mapping[str, Any]]],
    lr_fn: Callable[[int], float],
    batch_fn: Callable[[int], Any],
    loop: LoopConfig,
    folder: str | Path,
    identity: Mapping[str, Any],
    eval_fn: Callable[[Any, int], Sequence[Row]] | None = None,
    resume: Literal["auto", "never"] = "auto",
    progress: Callable[[Row], None] | None = None,
    started: float | None = None,
) -> Result:
    """Trains `state` to `loop.steps` in run folder `folder`, going on from its newest whole checkpoint.

    `state` is consumed (donated, or freed when a checkpoint takes its place). `step_fn(state, batch, lr)` returns device
    scalars with at least `loss` and `skipped` (how many steps were skipped since step 0). `identity` (JSON; `fingerprint`
    decides where it is given) is saved with checkpoints and must match on resume. `started` is the `time.time()` that
    `first_step_s` counts from. SIGTERM and SIGINT end the run after the current step with a saved state.

    Raises `UserError` for a folder that cannot be written or holds another run, a full disk, failing batches (after
    saving), and `loop.max_skipped` skipped steps in a row.
    """
    folder = Path(folder)
    begin = _begin(state, loop, folder, identity, resume)
    if begin.done is not None:
        return Result(begin.state, "done", loop.steps, begin.done, skipped_checkpoints=begin.skipped)
    state, step = begin.state, begin.step
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(_closing(begin.saver))
        log = stack.enter_context(contextlib.closing(RunLog(folder, step, loop.tensorboard)))
        stop = stack.enter_context(_stop_on_signals())
        profiler = stack.enter_context(_Profiler(loop.profile, folder / "profile"))
        book = _Book(loop, log, progress, begin, started or time.time())

        if eval_fn and step == loop.start < loop.steps and step in loop.eval_steps and not begin.resumed:
            log.evals(book.eval_rows(step, eval_fn(state, step)))
        batch, failure = batch_fn(step) if step < loop.steps else None, None
        while step < loop.steps:
            profiler.before(step, state)
            lr = np.float32(lr_fn(step))
            with book.timed_first_call():
                state, metrics = step_fn(state, batch, lr)  # returns once dispatched
            step += 1
            batch, failure = _try(batch_fn, step) if step < loop.steps else (None, None)
            book.push(step, lr, metrics)
            leaving = stop.is_set() or failure is not None
            if loop.evaluates(step) or loop.saves(step) or leaving:
                book.flush()
            if loop.evaluates(step) and eval_fn is not None:
                with book.paused():
                    log.evals(book.eval_rows(step, eval_fn(state, step)))
            leaving |= stop.is_set()
            if loop.saves(step) or leaving:
                with book.paused():
                    book.flush()
                    log.sync()
                    saver.save(step, state, book.extra(step, identity))
            saver.check()
            if leaving:
                break
        saver.wait()
        if failure is not None:
            raise failure
        if step == loop.steps:
            _write_json(folder / DONE, {"step": step, "last": book.last})
        status = "done" if step == loop.steps else "stopped"
        return Result(state, status, step, book.last, book.compile_s, book.first_step_s, begin.skipped)


def config_diff(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two nested JSON values, as lines `model.d_model: 48 -> 64`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        gone = "(absent)"
        parts = (
            config_diff(old.get(k, gone), new.get(k, gone), f"{path}.{k}" if path else str(k)) for k in keys
        )
        return [line for part in parts for line in part]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and list(old) == list(new):
        return []
    return [] if old == new else [f"{path}: {old} -> {new}"]


@dataclass(frozen=True)
class _Begin:
    """Where the run starts; `done` is the last row of a run that needs nothing more."""

    state: Any
    step: int
    saver: Checkpointer
    resumed: bool
    skipped: tuple[str, ...] = ()
    extra: Mapping[str, Any] | None = None
    done: Row | None = None


def _begin(state: Any, loop: LoopConfig, folder: Path, identity: Mapping[str, Any], resume: str) -> _Begin:
    root = folder / "checkpoints"
    saver = Checkpointer(root, Keep(loop.keep_latest, loop.keep_every, frozenset(loop.keep_steps)))
    if resume == "never":
        if list_steps(root) or (folder / "metrics.jsonl").exists():
            raise UserError(
                f"{folder} already holds a run; continue it with --resume=auto or choose another --workdir"
            )
        return _Begin(state, loop.start, saver, False)
    abstract = jax.tree.map(_abstract_like, state)
    found = restore(root, abstract, at_most=loop.steps)
    if found is None:
        return _Begin(state, loop.start, saver, False)
    _check_identity(folder, found.extra, identity)
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array):
            leaf.delete()
    done = _read_json(folder / DONE)
    finished = done is not None and done["step"] == found.step == loop.steps
    return _Begin(
        found.state, found.step, saver, True, found.skipped, found.extra, done["last"] if finished else None
    )


def _check_identity(folder: Path, extra: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    old, new = extra["identity"], json.loads(json.dumps(identity))
    if old.get("fingerprint", old) == new.get("fingerprint", new):
        return
    lines = [line for line in config_diff(old, new) if not line.startswith("fingerprint:")]
    more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
    raise UserError(
        f"{folder} was trained with another config ({'; '.join(lines[:8]) or 'fingerprint differs'}{more}); "
        "put the config back or choose another --workdir"
    )


class _Book:
    """Turns device metrics into rows: tokens, FLOPs and rates, the count of skipped steps, and progress."""

    def __init__(self, loop: LoopConfig, log: RunLog, progress: Any, begin: _Begin, started: float) -> None:
        self.loop, self.log, self.progress, self.started = loop, log, progress, started
        extra = begin.extra or {}
        self.last: Row = dict(extra.get("last", {}))
        self.skipped = tuple(extra.get("skipped", (None, 0)))  # (total so far, of which in a row now)
        self.compile_s: float | None = None
        self.first_step_s: float | None = None
        self._late = OneStepLate()
        self._lr: dict[int, np.float32] = {}
        self._clock_step: int | None = None  # the step at which the clock of the next row's rates started
        self._clock = self._shown = time.perf_counter()
        self._first: tuple[int, float] | None = None
        self._pause = self._row_pause = 0.0
        self._new_start = True

    @contextlib.contextmanager
    def timed_first_call(self) -> Iterator[None]:
        """The first call of a step traces and compiles it before it returns."""
        begin = time.perf_counter()
        yield
        if self.compile_s is None:
            self.compile_s = time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is no training time."""
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin

    def push(self, step: int, lr: np.float32, metrics: Mapping[str, Any]) -> None:
        self._lr[step] = lr
        self._finished(self._late.push(step, metrics))

    def flush(self) -> None:
        self._finished(self._late.flush())

    def extra(self, step: int, identity: Mapping[str, Any]) -> Row:
        """What a checkpoint holds beside the state."""
        return {
            "next_step": step,
            "identity": dict(identity),
            "skipped": list(self.skipped),
            "last": self.last,
        }

    def eval_rows(self, step: int, rows: Sequence[Row]) -> list[Row]:
        return [self._axes(step) | row for row in rows]

    def _axes(self, step: int) -> Row:
        return {
            "step": step,
            "tokens": step * self.loop.tokens_per_step,
            "flops": step * self.loop.flops_per_step,
        }

    def _finished(self, ready: tuple[int, Row] | None) -> None:
        if ready is None:
            return
        step, metrics = ready
        lr, now = self._lr.pop(step), time.perf_counter()
        if self._first is None:
            self._first, self.first_step_s = (step, now), time.time() - self.started
            self._clock_step, self._clock = step, now
        self._count_skipped(step, metrics)
        rate = self._rate(step, now)
        if self.loop.logs(step):
            self.last = self._axes(step) | metrics | {"lr": float(lr)} | self._speed(rate)
            self.log.metrics(self.last)
            self._clock_step, self._clock, self._row_pause = step, now, self._pause
        if self.progress and (now - self._shown >= PROGRESS_SECONDS or step == self.loop.steps):
            self._shown = now
            self.progress(self._progress(step, metrics, now))

    def _count_skipped(self, step: int, metrics: Row) -> None:
        """Ends a run that skips `max_skipped` steps in a row; `metrics["skipped"]` counts since step 0."""
        total, streak = metrics.get("skipped", 0), self.skipped[1]
        before = self.skipped[0] if self.skipped[0] is not None else total
        streak = streak + 1 if total > before else 0
        self.skipped = (total, streak)
        if streak >= self.loop.max_skipped:
            raise UserError(
                f"step {step}: {streak} steps in a row were skipped (loss or gradient not finite, or spiking); "
                "look at the data or lower the learning rate, and resume from the newest checkpoint"
            )

    def _rate(self, step: int, now: float) -> float | None:
        """Steps a second since the clock was set, without pauses."""
        seconds = now - self._clock - (self._pause - self._row_pause)
        done = step - (self._clock_step if self._clock_step is not None else step)
        return done / seconds if done > 0 and seconds > 0 else None

    def _speed(self, rate: float | None) -> Row:
        flops = None if rate is None else rate * self.loop.flops_per_step
        row: Row = {"tokens_per_s": None if rate is None else round(rate * self.loop.tokens_per_step, 1)}
        row["mfu"] = flops / self.loop.peak_flops if flops and self.loop.peak_flops else None
        if self._new_start:  # the first row of every start says what the start cost
            row |= {"compile_s": _rounded(self.compile_s), "first_step_s": _rounded(self.first_step_s)}
            self._new_start = False
        return row

    def _progress(self, step: int, metrics: Row, now: float) -> Row:
        first, since = self._first or (step, now)
        seconds = now - since - self._pause
        rate = (step - first) / seconds if step > first and seconds > 0 else None
        return {
            "step": step,
            "steps": self.loop.steps,
            "loss": metrics.get("loss"),
            "tokens_per_s": None if rate is None else rate * self.loop.tokens_per_step,
            "eta_s": None if rate is None else (self.loop.steps - step) / rate,
        }


class _Profiler:
    """Traces steps [start, stop) into `folder` with the jax profiler."""

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        self.window, self.folder, self.running = window, folder, False

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Called before step number `step` is dispatched."""
        if self.window is None:
            return
        start, stop = self.window
        if not self.running and start <= step < stop:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and step >= stop:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False


@contextlib.contextmanager
def _closing(saver: Checkpointer) -> Iterator[Checkpointer]:
    """Waits for the save in flight, also when training fails; the first failure is the one that is raised."""
    try:
        yield saver
    except BaseException:
        with contextlib.suppress(UserError):
            saver.wait()
        raise
    saver.wait()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; elsewhere than in the main thread it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _try(batch_fn: Callable[[int], Any], step: int) -> tuple[Any, Exception | None]:
    """(batch, None), or (None, the failure), so that the state can be saved before the failure is raised."""
    try:
        return batch_fn(step), None
    except Exception as failure:
        return None, failure


def _abstract_like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    os.replace(partial, path)
