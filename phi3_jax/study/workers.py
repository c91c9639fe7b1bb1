"""Runs trained, and other processes run, side by side on one machine, a pinned process per core."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from phi3_jax import cluster, distributed
from phi3_jax.configs import RunConfig
from phi3_jax.errors import STOPPED
from phi3_jax.records.checkpoint import list_steps
from phi3_jax.records.files import read_state
from phi3_jax.records.folder import DONE
from phi3_jax.study import runs as studies

# XLA:CPU asks malloc for a step's buffers and frees them after it. glibc's defaults give such blocks back to the kernel, so
# that every step faults its memory in anew, 4 KiB at a time; these keep it, in huge pages. Other C libraries ignore them.
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40, "top_pad": 64 * 2**20, "arena_max": 1,
    }.items()
)  # fmt: skip


def memory_kept() -> dict[str, str]:
    """What a process of small steps on CPU is started with, so that it keeps its memory."""
    return {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC)}


def is_done(run: RunConfig, folder: Path) -> bool:
    """Whether a run needs nothing more. One that says less of itself than it could is finished anew: no step is made."""
    place = folder / run.name
    if not list_steps(place / "checkpoints"):
        return (place / DONE).exists()
    whole = all(read_state(place / name) for name in ("config.json", "plan.json", "status.json"))
    return whole and read_state(place / DONE).get("step") == run.steps


def unfinished(runs: Sequence[RunConfig], folder: Path) -> list[RunConfig]:
    done = distributed.from_first(lambda: [run.name for run in runs if is_done(run, folder)])
    return [run for run in runs if run.name not in done]


def train_in_turn(
    runs: Sequence[RunConfig], folder: Path, resume: str, pauses: Mapping[str, int], ended: Callable[[], None]
) -> tuple[list[str], bool]:
    """One run after the other on all attached devices; `pauses` are steps that runs stop at for now.

    `ended` is called whenever a run has come to an end, one way or the other.
    """
    from phi3_jax.study.worker import train
    from phi3_jax.training.progress import Bar, Bars, of_run

    with Bars() as bars:
        found: dict[str, Bar] = {}
        for group in studies.groups(unfinished(runs, folder)):
            for run in group:

                def show(row: dict[str, Any], name: str = run.name) -> None:
                    found[name] = of_run(row)
                    bars.show(found)

                progress = show if distributed.is_first() else None
                result = train(run, folder, resume=resume, progress=progress, pause=pauses.get(run.name))
                distributed.on_first(ended)
                if result.status == "stopped":
                    return [], True
    return [], False


class Beside:
    """One process among several of a machine, with cores of its own.

    Attributes:
      name: what its log and its errors are called.
      cores: that it may use.
    """

    def __init__(self, words: Sequence[str], folder: Path, name: str, cores: set[int], **options: Any) -> None:
        self.name, self.cores = name, cores
        self.log = (folder / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], stderr=self.log, text=True, start_new_session=True, **options
        )
        self.errors: list[str] = []

    def finish(self) -> list[str]:
        """Errors of an ended process; one that a signal stopped has none."""
        self.log.close()
        status = self.process.returncode
        if status not in (0, STOPPED, -signal.SIGTERM) and not self.errors:
            self.errors.append(f"{self.name}: {_why_ended(status, self.log.name)}")
        if not self.errors:
            Path(self.log.name).unlink(missing_ok=True)
        return self.errors


class _Worker(Beside):
    """One process that trains a group of runs on one core (or on all, when it is alone)."""

    def __init__(
        self, group: Sequence[RunConfig], folder: Path, resume: str, pauses: Mapping[str, int], cores: set[int]
    ) -> None:
        names = [run.name for run in group]
        asked = [f"{name}@{pauses[name]}" if name in pauses else name for name in names]
        environment = (
            os.environ
            | memory_kept()
            | {
                # LLVM's first level compiles a third faster than its third; the programs are as fast.
                "XLA_FLAGS": f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}",
                "PHI3_JAX_STARTED": str(time.monotonic()),  # one clock for all processes of a machine
                "PHI3_JAX_RESUME": resume,
                cluster.CORES: ",".join(map(str, sorted(cores))),
            }
        )
        words = ["phi3_jax.study.worker", str(folder), *asked]
        super().__init__(words, folder, names[0], cores, stdout=subprocess.PIPE, env=environment)
        self.progress: dict[str, dict[str, Any]] = {}
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None  # a pipe
        for line in self.process.stdout:
            message = json.loads(line) if line.startswith("{") else {}
            if "steps" in message:
                self.progress[message["run"]] = message
            elif "error" in message:
                self.errors.append(f"{message['run']}: {message['error']}")
            for skipped in message.get("skipped_checkpoints", ()):
                print(f"warning: {skipped}", file=sys.stderr)

    def finish(self) -> list[str]:
        self.thread.join()
        return super().finish()


def _why_ended(status: int, log: str) -> str:
    if status == -signal.SIGKILL:
        return (
            "the training process was killed (SIGKILL), as happens where memory runs out; the same command goes on from "
            "the last checkpoint, and after `taskset -c 0` one run at a time"
        )
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"the training process ended with {name}; see {log}"


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def train_side_by_side(
    runs: Sequence[RunConfig], folder: Path, resume: str, pauses: Mapping[str, int], ended: Callable[[], None]
) -> tuple[list[str], bool]:
    """As `train_in_turn`, one pinned process per core, costliest group first: on CPU this beats one with all threads."""
    from phi3_jax.training.progress import Bars, of_run

    groups = studies.groups(unfinished(runs, folder))
    rows: dict[str, dict[str, Any]] = {}
    with Bars() as bars:

        def show(workers: Sequence[_Worker]) -> None:
            for worker in workers:
                rows.update(worker.progress)
            bars.show({name: of_run(row) for name, row in rows.items()})

        starts = [functools.partial(_Worker, group, folder, resume, pauses) for group in groups]
        return side_by_side(starts, show, lambda _: ended())


P = TypeVar("P", bound=Beside)


def side_by_side(
    starts: Sequence[Callable[[set[int]], P]], show: Callable[[Sequence[P]], None], ended: Callable[[P], None]
) -> tuple[list[str], bool]:
    """Starts processes in order, one a core of this machine, and alone on all of them where there is one.

    Args:
      starts: each starts a process on the cores that it is given.
      show: called some times a second with all processes that run or have just ended.
      ended: called with each that has ended, one way or the other.

    Returns:
      (errors, whether a signal stopped them: the rest has then not begun, and those that ran have stopped).
    """
    queue, free = list(starts), [{core} for core in _cores()]
    if len(queue) == 1:
        free = [set(_cores())]
    running: list[P] = []
    errors: list[str] = []
    stop, told = threading.Event(), False
    handlers = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while queue or running:
            if stop.is_set() and not told:
                told = True  # once: a second signal would cut the saving short
                queue.clear()
                for one in running:
                    one.process.terminate()
            while queue and free:
                running.append(queue.pop(0)(free.pop()))
            over = [one for one in running if one.process.poll() is not None]
            for one in over:
                errors += one.finish()
                if one.process.returncode in (STOPPED, -signal.SIGTERM):
                    stop.set()  # who stops one stops the study; in a job all processes get the signal, in any order
            show(running)
            for one in over:
                running.remove(one)
                free.append(one.cores)
                ended(one)
            stop.wait(0.3) if not stop.is_set() else time.sleep(0.3)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return errors, stop.is_set()
