"""Where the wall time of a run goes, written down as it goes, so that the account survives kill -9 (no jax import).

Every attempt (a process that trains the run) appends rows to `goodput.jsonl`: its number, the steps finished, and the
seconds spent so far in each of `PHASES`. What an attempt lost is known only to those after it, from the step that they
start from: `account` adds a run's attempts up.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_jax.records import rows

FILE = "goodput.jsonl"
# start: process start to the first batch; data: the devices idle for want of a batch; checkpoint: the part of a save that
# training waits for; compile: the first call of the training step, and the compiler elsewhere. The rest is step.
PHASES = ("start", "compile", "data", "step", "checkpoint", "evaluation")
ACCOUNT = (*PHASES, "lost", "restarted")
ONCE = ("start", "compile")  # what every attempt pays before it trains
DIGITS = 6  # microseconds: a step compiled before in this process is called in less than a millisecond
PULSE_SECONDS, PULSE_SHARE = 0.25, 0.01  # a row at least this often; in a long attempt every hundredth of it
_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax._src.dispatch.BACKEND_COMPILE_EVENT


class Clock:
    """Splits the time of one attempt into phases; a context that writes rows to `folder` until it ends.

    Every moment since `started` (a `time.monotonic()`; now where absent or in the future) is booked once. Rows that
    cannot be written are left out: what fills the disk is reported by the files that matter. With `write=False`
    (all processes but the first) there are no rows.
    """

    def __init__(self, folder: str | Path, started: float | None = None, write: bool = True) -> None:
        now = time.monotonic()
        self.started = min(started or now, now)
        self.path = Path(folder) / FILE
        self._write = write
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "start", self.started
        self._compiled_up_to = self.started
        self._step, self._attempt = 0, 0
        self._from: int | None = None
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._owner = threading.get_ident()

    def __enter__(self) -> Clock:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._compiled)
        self._attempt = max((row["attempt"] for row in read(self.path.parent)), default=0) + 1
        self.write("open")
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="goodput")
        self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._compiled)
        self._closed.set()
        self._pulse.join()
        self.write("end")

    def wall(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def begins(self, step: int) -> None:
        """Notes that this attempt trains on from `step` finished steps."""
        self._step = self._from = step
        self.write("begin")

    def finished(self, step: int) -> None:
        """Notes that `step` steps are finished."""
        self._step = step

    def saves(self) -> None:
        """Notes that the state of the steps finished is being saved: where a later attempt may go on from."""
        self.write("save")

    def enter(self, phase: str) -> str:
        """Books what comes from now on under `phase`; returns the phase before."""
        with self._lock:
            now, before = time.monotonic(), self._phase
            self._seconds[before] += now - self._since
            self._phase, self._since = phase, now
            if phase != before:
                self._compiled_up_to = now
            return before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time belongs to phase `name`."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, seconds: float, to: str) -> None:
        """Books the last `seconds` of the phase in progress under phase `to` instead."""
        with self._lock:
            self._seconds[self._phase] -= seconds
            self._seconds[to] += seconds

    def write(self, event: str = "pulse") -> None:
        """Appends a row with the seconds up to now."""
        with self._lock:
            self.enter(self._phase)
            row = {"attempt": self._attempt, "event": event, "from": self._from, "step": self._step}
            row["seconds"] = {name: round(value, DIGITS) for name, value in self._seconds.items()}
            if self._write:
                with contextlib.suppress(OSError):
                    rows.append(self.path, row)

    def _beat(self) -> None:
        while not self._closed.wait(max(PULSE_SECONDS, PULSE_SHARE * self.wall())):
            self.write()

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == self._owner and self._phase != "compile":
            # jax measures by the wall clock, which may jump: never more than has passed since the last of these.
            now = time.monotonic()
            self.move(min(max(0.0, duration_secs), now - self._compiled_up_to), "compile")
            self._compiled_up_to = now


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run folder's goodput file, in the order of writing; [] without one. Torn lines are left out."""
    found = []
    with contextlib.suppress(OSError):  # an account is no reason to stop a run or its report
        for row in rows.read(Path(folder) / FILE)[0]:
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                numbers = {name: int(row[name]) for name in ("attempt", "step")}
                seconds = {name: float(row["seconds"][name]) for name in PHASES}
                if all(map(math.isfinite, seconds.values())):
                    found.append({"event": None, "from": None} | row | numbers | {"seconds": seconds})
    return found


def account(folder: str | Path) -> dict[str, Any] | None:
    """The wall time of a run over all its attempts, or None where it left no rows.

    What an attempt did after the step from which a later one went on is lost; restarted is start and compile of all
    attempts but the first.

    Returns:
      wall_s: seconds of all attempts, without the time between them; attempts: their number; lost_steps: steps
      finished in vain; seconds: {name of ACCOUNT: s}, which add up to wall_s.
    """
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in read(folder):
        attempts.setdefault(row["attempt"], []).append(row)
    if not attempts:
        return None
    seconds, lost_steps, limit = dict.fromkeys(ACCOUNT, 0.0), 0, math.inf
    for number in sorted(attempts, reverse=True):  # the last first: `limit` is where those after it went on from
        last, kept = attempts[number][-1], _kept(attempts[number], limit)
        for name, spent in last["seconds"].items():
            if name in ONCE:
                seconds[name if number == min(attempts) else "restarted"] += spent
            else:
                seconds[name] += kept[name]
                seconds["lost"] += spent - kept[name]
        if last["from"] is not None:
            lost_steps += last["step"] - int(min(last["step"], max(last["from"], limit)))
            limit = min(limit, last["from"])
    return {
        "wall_s": round(sum(seconds.values()), DIGITS),
        "attempts": len(attempts),
        "lost_steps": lost_steps,
        "seconds": {name: round(value, DIGITS) for name, value in seconds.items()},
    }


def _kept(written: list[dict[str, Any]], limit: float) -> dict[str, float]:
    """The seconds of one attempt that were of use, where the next went on from step `limit` (infinity: all)."""
    saved = [row for row in written if row["event"] in ("save", "end") and row["step"] <= limit]
    kept = written[-1:] if limit == math.inf else saved[-1:]
    return kept[0]["seconds"] if kept else dict.fromkeys(PHASES, 0.0)
