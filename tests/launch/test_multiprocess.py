"""Real processes on this machine, each started with the real command: one run, one order of data, one way to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.errors import STOPPED
from phi3_jax.records.checkpoint import list_steps, restore
from phi3_jax.records.rows import read_rows
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training.metrics import TIMING_FIELDS

ROOT = Path(__file__).resolve().parents[2]
STEPS = 56  # 60k tokens in batches of 44 windows of 24: long enough to be killed in the middle
COMMAND = [
    "--config", "experiments/scaling.py:mini,budgets=60k", "--config.train.checkpoint_every=5",
    "--config.train.log_every=1", "--config.train.eval_points=1",
]  # fmt: skip
REAL = [sys.executable, "launch/run.py"]
# The command without its parent, counting the records that are decoded for training.
COUNTING = """
import sys
from phi3_jax.data import loader
from phi3_jax.entry import start
train, decode = [0], loader.RecordSource._decode
def counting(self, records, shard, local):
    train[0] += len(records) * (self.name in ("knowledge", "reasoning") and "eval" not in self._shards[0]["file"])
    print("decoded", train[0], file=sys.stderr, flush=True)
    return decode(self, records, shard, local)
loader.RecordSource._decode = counting
sys.exit(start("launch"))
"""

# The command, in which process 1 finds the records of its eighth batch damaged.
DAMAGED = """
import os, sys
from phi3_jax.data import loader
from phi3_jax.errors import UserError
from phi3_jax.entry import start
take = loader._BatchSource.__getitem__
def damaged(self, step):
    if step == 7 and os.environ["PHI3_JAX_PROCESS_ID"] == "1":
        raise UserError("damaged data: record 5; remove it")
    return take(self, step)
loader._BatchSource.__getitem__ = damaged
sys.exit(start("launch"))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, which most of these processes share: it halves the time of this file."""
    return tmp_path_factory.mktemp("compiled")


class Job:
    """Several processes of one command; process i gets `more[i]` as further arguments."""

    def __init__(
        self,
        cache: Path,
        folder: Path,
        processes: int,
        devices: int = 1,
        *,
        more: dict[int, list[str]] | None = None,
        only: tuple[int, ...] | None = None,
        program: list[str] = REAL,
        **environment: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.folder, self.processes = folder, {}
        for i in range(processes) if only is None else only:
            by_hand = {"COORDINATOR": address, "PROCESSES": str(processes), "PROCESS_ID": str(i)}
            self.processes[i] = subprocess.Popen(
                [*program, "--workdir", str(folder), *COMMAND, *(more or {}).get(i, [])],
                cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                env=os.environ | environment | {"XLA_FLAGS": quick.flags(devices), "JAX_COMPILATION_CACHE_DIR": str(cache)}
                | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
                | {f"PHI3_JAX_{name}": value for name, value in by_hand.items() if processes > 1},
            )  # fmt: skip

    def wait_for(self, step: int) -> Job:
        """Returns when the row of `step` is on the disk."""
        deadline = time.time() + 240
        while not any(len(path.read_bytes().splitlines()) >= step for path in self.folder.glob("*/metrics.jsonl")):
            assert time.time() < deadline and all(p.poll() is None for p in self.processes.values())
            time.sleep(0.01)
        return self

    def signal_child(self, i: int, step: int, number: int) -> None:
        """Signals the process that trains, not the parent that speaks for it, once the row of `step` is on the disk."""
        self.wait_for(step)
        # Reading the kernel's own list takes no time in which the child could end, as starting a program would.
        task = Path(f"/proc/{self.processes[i].pid}/task/{self.processes[i].pid}/children")
        os.kill(int(task.read_text()), number)

    def end(self, *statuses: int) -> list[tuple[str, str]]:
        """(stdout, stderr) of every process, which must have ended with these exit statuses within a minute or so."""
        found = [process.communicate(timeout=240) for process in self.processes.values()]
        assert tuple(p.returncode for p in self.processes.values()) == statuses, found
        return found


def only_run(folder: Path) -> Path:
    (path,) = [p.parent for p in folder.glob("*/config.json")]
    return path


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in read_rows(only_run(folder) / name)]


def state_of(folder: Path, devices: int) -> dict[str, jax.Array]:
    """The newest checkpoint, each leaf cut over this many devices where it can be."""
    mesh, root = make_mesh(jax.devices()[:devices]), only_run(folder) / "checkpoints"
    record = json.loads((root / str(list_steps(root)[-1]) / "checkpoint.json").read_text())["record"]

    def leaf(shape: list[int], dtype: str) -> jax.ShapeDtypeStruct:
        axis = next((i for i, size in enumerate(shape) if size % devices == 0), None)
        spec = P() if axis is None else P(*[None] * axis, "data")
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=NamedSharding(mesh, spec))

    return restore(root, {name: leaf(*form) for name, form in record["leaves"].items()}).state


def assert_same_run(a: Path, b: Path) -> None:
    assert rows(a) == rows(b) and rows(a, "evals.jsonl") == rows(b, "evals.jsonl")
    ours, theirs = state_of(a, 1), state_of(b, 1)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def two(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of two processes with a device each."""
    folder = tmp_path_factory.mktemp("two")
    (out, err), (other_out, other_err) = Job(cache, folder, 2).end(0, 0)
    assert f"1 run, {STEPS * 44 * 24:,} tokens" in out and "100% loss" in out and "report: " in out, (
        "control: process 0 speaks"
    )
    others = [line for line in other_out.splitlines() if not line.startswith("[Gloo]")]  # printed by jax's C++
    assert others == [] and err == other_err == ""
    return folder


@pytest.mark.slow
def test_two_processes_equal_one_with_two_devices_bit_for_bit(cache: Path, two: Path, tmp_path: Path) -> None:
    Job(cache, tmp_path, 1, devices=2).end(0)
    assert [row["step"] for row in rows(two)] == list(range(1, STEPS + 1)), "every row once: process 0 alone writes"
    assert len(rows(two, "evals.jsonl")) > 10
    assert_same_run(two, tmp_path)


@pytest.mark.slow
def test_stopped_killed_and_started_again_it_equals_the_unbroken_run(cache: Path, two: Path, tmp_path: Path) -> None:
    job = Job(cache, tmp_path, 2).wait_for(2)
    job.processes[1].send_signal(signal.SIGTERM)  # one is told, both stop at one step and save it
    (out, _), _ = job.end(STOPPED, STOPPED)
    assert "stopped; the same command goes on from here" in out
    (stopped,) = list_steps(only_run(tmp_path) / "checkpoints")
    assert 2 <= stopped == len(rows(tmp_path)) < STEPS - 4

    job = Job(cache, tmp_path, 2)
    job.signal_child(0, stopped + 2, signal.SIGKILL)
    (_, err), (_, other_err) = job.end(1, 1)
    assert err.startswith("error: process 0 of 2 was ended by SIGKILL; start the same command on every process again")
    assert other_err.startswith("error: process 0, the coordinator localhost:") and other_err.count("\n") == 1
    assert not (only_run(tmp_path) / "done.json").exists()

    killed = len(rows(tmp_path))
    assert killed < STEPS
    job = Job(cache, tmp_path, 2)
    job.signal_child(1, killed + 2, signal.SIGKILL)
    (_, err), (_, other_err) = job.end(1, 1)
    last = err.splitlines()[-1]  # the kill before may have left half a checkpoint, of which process 0 warns
    assert last.startswith("error: process 1 died (no sign of life for 30 s); ") and err.count("error: ") == 1
    assert other_err.startswith("error: process 1 of 2 was ended by SIGKILL; ")

    Job(cache, tmp_path, 2).end(0, 0)
    assert_same_run(tmp_path, two)


FSDP = {i: ["--config.train.strategy=fsdp"] for i in range(4)}


@pytest.fixture(scope="module")
def four(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four processes with a device each; with sharded parameters each writes a quarter of a checkpoint."""
    folder = tmp_path_factory.mktemp("four")
    outs = Job(cache, folder, 4, more=FSDP, program=[sys.executable, "-c", COUNTING]).end(0, 0, 0, 0)
    decoded = [int(err.split()[-1]) for _, err in outs]
    assert decoded == [11 * STEPS] * 4, "each reads its share of the 44 rows"
    return folder


@pytest.mark.slow
def test_four_processes_equal_one_with_four_devices_to_rounding(cache: Path, four: Path, tmp_path: Path) -> None:
    """The sums over devices are in another order, and what that does to the last digits grows with the steps."""
    Job(cache, tmp_path, 1, devices=4, more=FSDP).end(0)
    assert [row["step"] for row in rows(four)] == [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))
    for a, b in list(zip(rows(four), rows(tmp_path), strict=True))[:20]:
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), 1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_loads_on_any_number_of_devices_bit_for_bit(four: Path) -> None:
    one, *more = (state_of(four, devices) for devices in (1, 2, 8))
    for state in more:
        assert len(state) > 20 and any(not leaf.is_fully_replicated for leaf in state.values())
        for name, leaf in state.items():
            np.testing.assert_array_equal(leaf, one[name], err_msg=name)


@pytest.mark.slow
def test_two_processes_with_two_devices_equal_four_with_one_bit_for_bit(
    cache: Path, four: Path, tmp_path: Path
) -> None:
    Job(cache, tmp_path, 2, devices=2, more=FSDP).end(0, 0)
    assert_same_run(tmp_path, four)


@pytest.mark.slow
def test_what_stops_one_process_stops_all_after_saving_one_step(cache: Path, tmp_path: Path) -> None:
    job = Job(cache, tmp_path, 2, program=[sys.executable, "-c", DAMAGED])
    (_, err), (_, other_err) = job.end(2, 2)
    assert err == "error: process 1 stopped: damaged data: record 5; remove it\n"
    assert other_err == "error: damaged data: record 5; remove it\n"
    assert list_steps(only_run(tmp_path) / "checkpoints")[-1] == len(rows(tmp_path)) == 7


def test_processes_with_different_configs_are_refused_with_the_difference(cache: Path, tmp_path: Path) -> None:
    job = Job(cache, tmp_path / "x", 2, more={1: ["--config.optim.peak_lr=0.01"]})
    for _, err in job.end(2, 2):
        assert "process 0 -> process 1: config.optim.peak_lr: None -> 0.01" in err
        assert err.startswith("error: the processes have different configs") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("present, said", [(1, "did not answer within 3 s"), (0, "not all 2 processes came")])
def test_a_job_that_does_not_come_together_says_so(cache: Path, tmp_path: Path, present: int, said: str) -> None:
    job = Job(cache, tmp_path / "x", 2, only=(present,), PHI3_JAX_START_TIMEOUT="3")
    ((_, err),) = job.end(2)
    assert "localhost:" in err and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
