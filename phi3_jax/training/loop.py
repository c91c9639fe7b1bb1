"""The training loop: batches in, one jitted step after the other, rows and checkpoints out, and back after any crash.

Steps are numbered by what is finished: `lr_fn` and `batch_fn` get the number of finished steps (0 for the first
update), rows, evaluations and checkpoints of "step k" describe the state after k updates. Everything a step depends on
is a function of that number and the state, so a run resumed after kill -9 equals an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import distributed
from phi3_jax.configs import config_diff, shown_changes
from phi3_jax.errors import UserError
from phi3_jax.models.spec import named
from phi3_jax.records import files
from phi3_jax.records.checkpoint import Checkpointer, Keep, abstract_leaf, list_steps, restore
from phi3_jax.records.folder import DONE
from phi3_jax.records.goodput import Clock
from phi3_jax.records.rows import Row, read_rows, valid_json
from phi3_jax.training import best
from phi3_jax.training.best import Wanted
from phi3_jax.training.fetch import Fetcher
from phi3_jax.training.metrics import OneStepLate, RunLog

PROGRESS_SECONDS = 0.5
Status = Literal["done", "paused", "stopped"]


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and when to log, evaluate and save. All steps count finished updates.

    `start` is the step of the state handed to `fit` (0, or the fork point for a state taken from a trunk's checkpoint).
    `flops_per_step` and `peak_flops` (FLOP/s of all devices; None where unknown) give the fields flops and mfu.
    `batch_timeout`: seconds after which a batch is given up. `pause`: the step to stop at and save, for now. `best`: what
    decides which checkpoint is kept as the best one; each evaluated step is saved then.
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
    keep_steps: tuple[int, ...] = ()
    max_skipped: int = 50
    batch_timeout: float = 600.0
    profile: tuple[int, int] | None = None
    tensorboard: bool = False
    pause: int | None = None
    best: Wanted | None = None

    @property
    def end(self) -> int:
        """The step that this start ends with."""
        return self.steps if self.pause is None else min(self.steps, self.pause)

    def evaluates(self, step: int) -> bool:
        return step == self.steps or step in self.eval_steps

    def saves(self, step: int) -> bool:
        every = self.checkpoint_every
        evaluated = bool(self.best and step in self.eval_steps)
        return step == self.steps or step in self.keep_steps or evaluated or bool(every and step % every == 0)

    def logs(self, step: int) -> bool:
        return step == self.steps or step == 1 or step % self.log_every == 0


@dataclass(frozen=True)
class Result:
    """How `fit` ended: "done", "paused" where asked to, or "stopped" by a signal; saved in any case.

    `last` is the newest metrics row.
    """

    state: Any
    status: Status
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
    eval_fn: Callable[[Any, int], Iterable[Row | None]] | None = None,
    resume: str = "auto",
    progress: Callable[[Row], None] = lambda row: None,
    clock: Clock | None = None,
    guard: Callable[[], None] = lambda: None,
    start_from: Callable[[Any], Any] = lambda state: state,
) -> Result:
    """Trains `state` to `loop.steps` in run folder `folder`, going on from its newest whole checkpoint.

    `state` is consumed: donated, or freed where a checkpoint takes its place; where none does, `start_from(state)`, which
    may consume it too, is what training starts with. `step_fn(state, batch, lr)` returns
    device scalars, at least `loss` and `streak` (how many steps in a row were skipped, this one included).
    `batch_fn` is called in a thread. `eval_fn(state, step)` gives rows, and None wherever it may be broken off.
    `identity` is saved with checkpoints and must match on resume (where it has a `fingerprint`, only that and `order`, the
    version of the order of records, 1 where absent).
    `clock` has run since the start of the process. SIGTERM or SIGINT: the current step is finished and saved; an
    evaluation is broken off, and done again on resume. Raises `UserError` for a folder that cannot be written or
    holds another run, a full disk, failing or overdue batches (after saving), `loop.max_skipped` skipped steps in a
    row, and an end without a finite loss, finite parameters or a single step that was not skipped.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        begin = _begin(state, loop, folder, identity, resume, start_from)
        if begin.done is not None:
            return Result(begin.state, "done", loop.steps, begin.done, skipped_checkpoints=begin.skipped)
        state, step = begin.state, begin.step
        clock = clock or stack.enter_context(Clock(folder))
        clock.begins(step)
        saver = stack.enter_context(_closing(begin.saver))
        log = RunLog(folder, begin.rows_up_to, loop.tensorboard, evals_after=begin.evaluations_up_to)
        stack.enter_context(contextlib.closing(log))
        stop = stack.enter_context(_stop_on_signals())
        batches = stack.enter_context(contextlib.closing(Fetcher(batch_fn, loop.batch_timeout, stop)))
        profiler = stack.enter_context(_Profiler(loop.profile, folder / "profile"))
        book = _Book(loop, log, saver, clock, stop, progress, begin, identity, guard, folder)
        if begin.evaluations_up_to < step and (begin.resumed or step in loop.eval_steps):
            book.evaluate(eval_fn, state, step)
        batch, failure = _try(batches.get, step) if step < loop.end else (None, None)
        clock.enter("step")

        while step < loop.end and not distributed.any_process(stop.is_set() or failure is not None):
            profiler.before(step, state)
            lr = np.float32(lr_fn(step))
            with book.timed_first_call():
                state, metrics = step_fn(state, batch, lr)  # returns once dispatched
            step += 1
            if step < loop.end:
                with book.timed_wait(metrics):
                    batch, failure = _try(batches.get, step)
            book.push(step, lr, metrics)
            if loop.evaluates(step):
                book.evaluate(eval_fn, state, step)
            if loop.saves(step):
                book.save(state, step)
            saver.check()

        if book.saved != step:
            book.save(state, step)
        book.wait()
        if failure is not None:
            raise failure
        done = step == loop.steps and book.evaluated
        if done:
            _require_sound(state, step, loop, book.last)
            distributed.on_first(lambda: _write_done(folder / DONE, {"step": step, "last": book.last}))
        status: Status = "done" if done else "paused" if loop.end <= step < loop.steps else "stopped"
        return Result(state, status, step, book.last, book.compile_s, book.first_step_s, begin.skipped)


def _require_sound(state: Any, step: int, loop: LoopConfig, last: Row) -> None:
    """UserError for a finished run that trained nothing, or whose loss or parameters are not finite."""
    remedy = "this run is no result: lower the learning rate (optim.peak_lr) or look at the data"
    count = loop.steps - loop.start
    if 0 < count <= last.get("streak", 0):
        raise UserError(f"step {step}: all {count} steps were skipped; {remedy}")
    if count > 0 and last.get("loss") is None:
        raise UserError(f"step {step}: the last loss is not finite; {remedy}")
    leaves = named(getattr(state, "params", state))
    floats = {name: x for name, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = jax.jit(lambda tree: {k: jnp.isfinite(x).all() for k, x in tree.items()})(floats)
    if odd := [name for name, fine in finite.items() if not fine]:
        raise UserError(f"step {step}: NaN or infinity in {len(odd)} parameters, {odd[0]} first; {remedy}")


@dataclass(frozen=True)
class _Begin:
    """Where the run starts; `done` is the last row of a run that needs nothing more.

    A save that came before the evaluation of its step, because a signal broke that off, says so in `extra`.
    """

    state: Any
    step: int
    saver: Checkpointer
    resumed: bool
    skipped: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    done: Row | None = None

    @property
    def rows_up_to(self) -> int:
        """The last step whose row is not written again."""
        return self.step if self.resumed else self.step - 1

    @property
    def evaluations_up_to(self) -> int:
        """The last step whose evaluation is not made again."""
        return self.step if self.resumed and self.extra.get("evaluated", True) else self.step - 1


def _begin(
    state: Any,
    loop: LoopConfig,
    folder: Path,
    identity: Mapping[str, Any],
    resume: str,
    start_from: Callable[[Any], Any],
) -> _Begin:
    root = folder / "checkpoints"
    saver = Checkpointer(root, Keep(loop.keep_latest, frozenset(loop.keep_steps)))
    if resume == "never":
        if distributed.from_first(lambda: bool(list_steps(root)) or (folder / "metrics.jsonl").exists()):
            raise UserError(f"{folder} already holds a run; continue it with --resume=auto or choose another --workdir")
        return _Begin(start_from(state), loop.start, saver, False)
    abstract = jax.tree.map(abstract_leaf, state)

    def accept(extra: dict[str, Any]) -> None:
        _check_identity(folder, extra, identity)
        for leaf in jax.tree.leaves(state):  # so that two states never take memory at a time
            if isinstance(leaf, jax.Array):
                leaf.delete()

    found = restore(root, abstract, at_most=loop.steps, check=accept)
    if found is None:
        return _Begin(start_from(state), loop.start, saver, False)
    done = distributed.from_first(lambda: files.read_state(folder / DONE))
    finished = done.get("step") == found.step == loop.steps and isinstance(done.get("last"), dict)
    return _Begin(found.state, found.step, saver, True, found.skipped, found.extra, done["last"] if finished else None)


def _check_identity(folder: Path, extra: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    old, new = extra.get("identity") or {}, files.as_json(identity)
    if all((old.get("fingerprint", old) == new.get("fingerprint", new), old.get("order", 1) == new.get("order", 1))):
        return
    lines = [line for line in config_diff(old, new) if not line.startswith("fingerprint:")]
    raise UserError(
        f"{folder} was trained with another config ({shown_changes(lines) or 'fingerprint differs'}); put the config back "
        "or choose another --workdir"
    )


class _Rate:
    """Steps a second since the last mark, without the time spent in pauses."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._time = 0.0

    def mark(self, step: int, now: float) -> None:
        self._step, self._time = step, now

    def pause(self, seconds: float) -> None:
        self._time += seconds

    def per_second(self, step: int, now: float) -> float | None:
        if self._step is None or step <= self._step or now <= self._time:
            return None
        return (step - self._step) / (now - self._time)


class _Book:
    """Turns device metrics into rows (tokens, FLOPs, rates) and progress, and ends a run of skipped steps."""

    def __init__(
        self,
        loop: LoopConfig,
        log: RunLog,
        saver: Checkpointer,
        clock: Clock,
        stop: threading.Event,
        progress: Callable[[Row], None],
        begin: _Begin,
        identity: Mapping[str, Any],
        guard: Callable[[], None],
        folder: Path,
    ) -> None:
        self.guard, self.folder = guard, folder
        self.loop, self.log, self.saver, self.clock, self.stop = loop, log, saver, clock, stop
        self.progress, self.identity = progress, dict(identity)
        self.last: Row = dict(begin.extra.get("last", {}))
        self.saved, self.evaluated = begin.step, True
        self.compile_s: float | None = None
        self.first_step_s: float | None = None
        self._late = OneStepLate()
        self._lr: dict[int, np.float32] = {}
        self._row_rate, self._run_rate = _Rate(), _Rate()
        self._shown = -PROGRESS_SECONDS
        self._start_row: Row | None = None

    @contextlib.contextmanager
    def timed_first_call(self) -> Iterator[None]:
        """The first call of a step traces and compiles it before it returns."""
        if self.compile_s is not None:
            yield
            return
        begin = time.perf_counter()
        with self.clock.phase("compile"):
            yield
        self.compile_s = time.perf_counter() - begin

    @contextlib.contextmanager
    def timed_wait(self, metrics: Mapping[str, Any]) -> Iterator[None]:
        """A wait for data is one only where the step just dispatched, which gives `metrics`, is over before it."""
        begin = time.monotonic()
        yield
        if all(x.is_ready() for x in metrics.values() if isinstance(x, jax.Array)):  # type: ignore[attr-defined]
            self.clock.move(time.monotonic() - begin, "data")

    def push(self, step: int, lr: np.float32, metrics: Mapping[str, Any]) -> None:
        """Takes the device metrics of the step just dispatched and books those of the one before."""
        self._lr[step] = lr
        self._book(self._late.push(step, metrics))

    def evaluate(self, eval_fn: Callable[[Any, int], Iterable[Row | None]] | None, state: Any, step: int) -> None:
        """Writes the rows of `eval_fn` once all are there, none where a signal comes first to any process."""
        self._book(self._late.flush())
        self.evaluated, rows = eval_fn is None, []
        if eval_fn is None or distributed.any_process(self.stop.is_set()):
            return
        with self._paused("evaluation"):
            for row in eval_fn(state, step):
                if row is not None:
                    rows.append(self._axes(step) | row)
                elif distributed.any_process(self.stop.is_set()):  # asked as often by every process
                    return
            self.log.evals(rows)
        self.evaluated = True

    def save(self, state: Any, step: int) -> None:
        """Puts all rows up to `step` on the disk, then starts saving the state: rows are never behind a checkpoint."""
        self._book(self._late.flush())
        self.guard()
        with self._paused("checkpoint"):
            self.log.sync()
            self._keep_best()
            extra = {"next_step": step, "identity": self.identity, "last": self.last, "evaluated": self.evaluated}
            self.saver.save(step, state, extra)
        self.saved = step
        self.clock.saves()

    def _keep_best(self) -> None:
        """From the next save on the best checkpoint so far stays; the last one did until then."""
        which = self.loop.best
        if which is None or not distributed.is_first():
            return
        if found := which.best(read_rows(self.folder / "evals.jsonl")):
            self.saver.wait()
            self.saver.keep = Keep(self.loop.keep_latest, frozenset({*self.loop.keep_steps, found[0]}))
            best.write(self.folder, which, found)

    def wait(self) -> None:
        """Waits for the last save."""
        with self._paused("checkpoint"):
            self.saver.wait()

    @contextlib.contextmanager
    def _paused(self, phase: str) -> Iterator[None]:
        """The time spent inside belongs to `phase` and is no training time."""
        begin = time.perf_counter()
        try:
            with self.clock.phase(phase):
                yield
        finally:
            for rate in (self._row_rate, self._run_rate):
                rate.pause(time.perf_counter() - begin)

    def _axes(self, step: int) -> Row:
        """The fields that place a row on the axes of a study."""
        flops = step * self.loop.flops_per_step
        return {"step": step, "tokens": step * self.loop.tokens_per_step, "flops": flops}

    def _book(self, ready: tuple[int, Row] | None) -> None:
        if ready is None:
            return
        step, metrics = ready
        lr, now = self._lr.pop(step), time.perf_counter()
        self.clock.finished(step)
        if self._start_row is None:
            self.first_step_s = self.clock.wall()
            self._start_row = {"compile_s": self.compile_s, "first_step_s": self.first_step_s}
            self._row_rate.mark(step, now)
            self._run_rate.mark(step, now)
        if self.loop.logs(step):
            speed = self._speed(self._row_rate.per_second(step, now))
            self.last = valid_json(self._axes(step) | metrics | {"lr": lr} | speed | self._start_row)
            self.log.metrics(self.last)
            self._row_rate.mark(step, now)
            self._start_row = {}
        if metrics["streak"] >= self.loop.max_skipped:
            self._give_up(step, metrics["streak"])
        if now - self._shown >= PROGRESS_SECONDS or step == self.loop.steps:
            self._shown = now
            self._report(step, metrics["loss"], self._run_rate.per_second(step, now))

    def _speed(self, rate: float | None) -> Row:
        peak, flops = self.loop.peak_flops, self.loop.flops_per_step
        return {
            "tokens_per_s": rate and rate * self.loop.tokens_per_step,
            "mfu": rate * flops / peak if rate and peak else None,
        }

    def _report(self, step: int, loss: float, rate: float | None) -> None:
        self.progress(
            {
                "step": step,
                "steps": self.loop.steps,
                "loss": loss,
                "tokens_per_s": rate and rate * self.loop.tokens_per_step,
                "eta_s": (self.loop.steps - step) / rate if rate else None,
            }
        )

    def _give_up(self, step: int, streak: int) -> None:
        self.saver.wait()
        good = list_steps(self.saver.root)
        raise UserError(
            f"step {step}: {streak} steps in a row had a loss or gradient that is not finite or far too large and were "
            f"skipped; newest good checkpoint: {f'step {good[-1]}' if good else 'none'}; "
            "look at the data there or lower the learning rate"
        )


class _Profiler:
    """Traces steps start..stop (a window of finished-step numbers) into `folder`."""

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        self.window, self.folder, self._on = window, folder, False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step is dispatched."""
        if self.window is None:
            return
        if not self._on and self.window[0] <= step < self.window[1]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._on = True
        elif self._on and step >= self.window[1]:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on, self.window = False, None

    def __enter__(self) -> _Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """SIGTERM and the first SIGINT set the event; a second SIGINT interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _closing(saver: Checkpointer) -> Iterator[Checkpointer]:
    """On an error elsewhere, still lets the save in flight finish, without hiding that error."""
    try:
        yield saver
    except BaseException:
        with contextlib.suppress(UserError):
            saver.wait()
        raise


def _try(batch_fn: Callable[[int], Any], step: int) -> tuple[Any, Exception | None]:
    try:
        return batch_fn(step), None
    except Exception as error:
        return None, error


def _write_done(path: Path, value: Any) -> None:
    try:
        files.write_json(path, value, indent=None)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space and run again") from error
