"""Which of several processes this one is, by its environment, and a parent that says in one line why it died.

jax's coordination client, in C++, ends a process whose coordinator or peer is gone with an abort and a stack trace, and
no Python of that process runs any more. So where there are several processes, `train` puts the command into a child, and
the parent translates. Nothing here imports jax.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from phi3_jax.errors import STOPPED, UserError

BY_HAND = ("PHI3_JAX_COORDINATOR", "PHI3_JAX_PROCESSES", "PHI3_JAX_PROCESS_ID")
START_TIMEOUT = "PHI3_JAX_START_TIMEOUT"
START_SECONDS = 300  # clusters start slowly; jax's own default
HEARTBEAT_SECONDS = 30  # silence after which a process counts as dead; a long step or compilation is not silent
AGAIN = "start the same command on every process again: it goes on from the last checkpoint"


@dataclass(frozen=True)
class Cluster:
    """What the environment says of the processes of a job; fields that jax finds by itself are None.

    `found_by` is "hand" (the variables of BY_HAND), "slurm", "mpi" or "tpu".
    """

    found_by: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    @property
    def me(self) -> str:
        return "this process" if self.process is None else f"process {self.process} of {self.processes}"


def cluster(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The job of several processes that this one is part of, or None where it is alone.

    In this order: the three variables of BY_HAND; a Slurm step (srun) or an Open MPI job of several tasks; a TPU slice
    of several hosts (GKE's variables, or on a TPU VM the metadata server), or several slices. Of all but the first, jax
    finds the address by itself.

    Raises:
      UserError: some but not all of BY_HAND, or values that make no sense.
    """
    if any(environment.get(name) for name in BY_HAND):
        return _by_hand(environment)
    tasks = lambda name: int(environment.get(name) or 1)  # noqa: E731
    if tasks("SLURM_STEP_NUM_TASKS") > 1:  # set by srun; the batch script itself is one process
        return Cluster("slurm", None, tasks("SLURM_STEP_NUM_TASKS"), int(environment["SLURM_PROCID"]))
    if tasks("OMPI_COMM_WORLD_SIZE") > 1:
        return Cluster("mpi", None, tasks("OMPI_COMM_WORLD_SIZE"), int(environment["OMPI_COMM_WORLD_RANK"]))
    if util.find_spec("libtpu") is None or environment.get("JAX_PLATFORMS", "tpu").find("tpu") < 0:
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if tasks("MEGASCALE_NUM_SLICES") > 1 or len(hosts.split(",")) > 1:
        return Cluster("tpu")
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu() and _tpu_vm_hosts(environment) > 1:
        return Cluster("tpu")
    return None


def _by_hand(environment: Mapping[str, str]) -> Cluster | None:
    missing = [name for name in BY_HAND if not environment.get(name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too; a job set up by hand needs {', '.join(BY_HAND)}")
    address, *numbers = (environment[name] for name in BY_HAND)
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"PHI3_JAX_COORDINATOR={address!r} is not host:port; for example 10.0.0.1:8476")
    if not all(number.isdigit() for number in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise UserError(
            f"PHI3_JAX_PROCESS_ID={numbers[1]} of PHI3_JAX_PROCESSES={numbers[0]}: processes are numbered from 0 to one "
            "less than their number"
        )
    return Cluster("hand", address, int(numbers[0]), int(numbers[1])) if int(numbers[0]) > 1 else None


def start_seconds(environment: Mapping[str, str] = os.environ) -> int:
    """Seconds that a process waits for the coordinator and for all others to come."""
    text = environment.get(START_TIMEOUT, str(START_SECONDS))
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{START_TIMEOUT}={text!r} is not a whole number of seconds, 1 or more")
    return int(text)


def _has_tpu() -> bool:
    return any(Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0"))


def _tpu_vm_hosts(environment: Mapping[str, str]) -> int:
    """Hosts of this TPU VM's slice, from the attribute of the metadata server that jax reads too; 1 without a server."""
    import urllib.request  # takes longer than all of this file

    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return len(answer.read().decode().split(","))
    except OSError:
        return 1


# ------------------------------------------------------------------------------------------------ parent


def train(flags: Any) -> int:
    """Trains what a command's `Flags` ask for, in a child where this is one of several processes; the exit status."""
    if job := cluster():
        return supervise(job, [sys.executable, "-m", "phi3_jax.study.launch", *flags.words])
    return importlib.import_module("phi3_jax.study.launch").main(flags)


def supervise(job: Cluster, command: Sequence[str]) -> int:
    """Runs a command, hands signals on, and returns its exit status, or that of `explain` with a line on why it died."""
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True, preexec_fn=end_with_parent
    )
    hand_on = lambda number, _: child.send_signal(number)  # noqa: E731
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    hidden: list[str] = []
    assert child.stderr is not None  # a pipe
    try:
        for line in child.stderr:
            # What follows jax's first word on a dead peer is its end; an error of ours may stand between.
            if (hidden or _FATAL.match(line)) and not line.startswith("error: "):
                hidden.append(line)
            else:
                print(line, end="", file=sys.stderr, flush=True)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status in (0, 1, 2, STOPPED):
        return status
    reason, status = explain(job, status, "".join(hidden))
    print(f"error: {reason}", file=sys.stderr)
    return status


_FATAL = re.compile(r"[EF]\d{4} .*(coordination_service|client\.h)")


def explain(job: Cluster, status: int, log: str) -> tuple[str, int]:
    """(reason, exit status) of a child that ended with `status`, having written `log` last."""
    where = f"the coordinator {job.coordinator}" if job.coordinator else "the coordinator"
    seconds = start_seconds()
    if "RegisterTask" in log:
        if job.process == 0:
            return f"not all {job.processes} processes came to {where} within {seconds} s ({START_TIMEOUT}); {_LOOK}", 2
        return f"{where} did not answer within {seconds} s ({START_TIMEOUT}); {_LOOK}", 2
    if silent := re.search(r"unhealthy \(stopped sending heartbeats\):\s*(\d[\d, ]*)", log):
        return f"process {silent[1].strip()} died (no sign of life for {HEARTBEAT_SECONDS} s); {AGAIN}", 1
    if "coordination service" in log:
        return f"process 0, {where}, died or cannot be reached; {AGAIN}", 1
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"{job.me} was ended by {name}; {AGAIN}", 1


_LOOK = "see that every process runs, with one address for all, and that its port is open"


def end_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent of this process dies; a training process then stops and saves."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


CORES = "PHI3_JAX_CORES"  # by which such a process is told its cores


def join() -> None:
    """What a process that was started beside others does first: it ends with its parent, and keeps to its cores."""
    end_with_parent()  # no worker trains on unseen
    if hasattr(os, "sched_setaffinity") and (cores := os.environ.get(CORES)):
        os.sched_setaffinity(0, map(int, cores.split(",")))  # before jax makes its thread pool


_LIBC = ctypes.CDLL(None)  # loaded here, for little is safe between fork and exec
