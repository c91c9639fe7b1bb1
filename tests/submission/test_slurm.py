"""A sweep through a real Slurm on this machine: dependencies, scancel, requeue, and sending again."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
MISSING = [p for p in PROGRAMS if shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin") is None]
MISSING += ["(the daemons are started as root)"] if os.geteuid() else []
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)} (Debian: slurm-wlm, munge)"),
]
STUDY = [
    "--config=experiments/scaling.py:mini,scale=pico,seeds=2,budgets=100k,900k",
    "--config.train.checkpoint_every=50", "--config.train.log_every=1",
]  # fmt: skip
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def wait(until: Callable[[], object], seconds: float, what: str) -> None:
    begin = time.monotonic()
    while not until():
        assert time.monotonic() < begin + seconds, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    print(f"waited {time.monotonic() - begin:.1f} s for {what}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which the clients talk to daemons of our own."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, ports=free_ports(2), user=getpass.getuser(), folder=folder))
    environment = os.environ | {"SLURM_CONF": str(conf), "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    environment["PATH"] += ":/usr/sbin"
    files = ("key-file", "pid-file", "log-file", "seed-file")
    munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in files]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        ["slurmd", "-D", "-N", host, "-f", str(conf)],
    ]
    daemons = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait((folder / "munge.socket").exists, 20, "munged")

        def idle() -> bool:
            done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
            return done.stdout.strip() == "idle"

        wait(idle, 60, f"an idle node; the daemons' words are in {folder}")
        yield environment
        subprocess.run(["scancel", "--me"], env=environment)
        wait(lambda: not queue(environment), 60, "jobs to end")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def queue(environment: dict[str, str]) -> dict[str, tuple[str, str, str]]:
    """{run: (job id, state, reason)} of all jobs, by the run's size, seed and budget."""
    command = ["squeue", "--noheader", "--format=%j %i %T %r"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    return {name.partition("mini-")[2].rpartition("-")[0]: (i, state, reason) for name, i, state, reason in rows}


def submit(environment: dict[str, str], study: Path, *more: str) -> str:
    command = [sys.executable, "launch/submit.py", *STUDY, f"--workdir={study}", "--backend=slurm", *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"$ launch/submit.py {' '.join(more)}\n{done.stdout}")
    return done.stdout


def rows(study: Path, seed: int, tokens: str) -> list[dict]:
    folders = [p for p in study.glob(f"mini-*-s{seed}-*") if p.is_dir() and p.name.endswith(tokens)]
    path = folders[0] / "metrics.jsonl" if folders else study / "none"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def starts(study: Path, seed: int, tokens: str) -> list[int]:
    """The first step of each start of a run: its row says what compiling took."""
    return [row["step"] for row in rows(study, seed, tokens) if "compile_s" in row]


def test_a_sweep_survives_scancel_and_requeue(slurm: dict[str, str], tmp_path: Path) -> None:
    study = tmp_path / "a study; $(false) 'with a name'"

    def client(*words: str) -> None:
        subprocess.run(words, env=slurm, check=True)

    def start_soon(job: str) -> None:
        """Slurm lets a requeued job rest for two minutes; at once would be too early for slurmd, which has revoked it."""
        client("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    submit(slurm, study)
    jobs = queue(slurm)
    assert set(jobs) == {"s0-900k", "s1-900k", "s0-100k", "s1-100k"}
    assert jobs["s0-100k"][1:] == jobs["s1-100k"][1:] == ("PENDING", "Dependency")
    wait(lambda: min(len(rows(study, seed, "900k")) for seed in (0, 1)) > 5, 120, "both trunks to train")
    assert submit(slurm, study, "--status").count("running") == 2

    # scancel ends the job; the run has saved. The signal before the end of a job's time queues the job again.
    client("scancel", jobs["s0-900k"][0])
    client("scancel", "--signal=TERM", jobs["s1-900k"][0])
    wait(lambda: not queue(slurm).keys() & {"s0-900k", "s0-100k"}, 90, "the cancelled job and its fork to go")
    wait(lambda: queue(slurm)["s1-900k"][1] == "PENDING", 60, "the stopped job to be queued again")
    saved = [rows(study, seed, "900k")[-1]["step"] for seed in (0, 1)]
    for seed, step in enumerate(saved):
        (folder,) = (p for p in study.glob(f"mini-*-s{seed}-*900k") if p.is_dir())
        assert (folder / "checkpoints" / str(step)).is_dir() and not (folder / "done.json").exists()

    # Sent again: what was cancelled, and nothing that is queued.
    again = submit(slurm, study)
    assert [line.rpartition(": ")[2].split(";")[0] for line in again.splitlines()].count("sent") == 2
    assert again.count("waiting already") == 2
    start_soon(jobs["s1-900k"][0])
    wait(lambda: len(starts(study, 0, "900k")) == 2, 120, "the trunk sent again to go on")

    # A job requeued by an administrator, or preempted, goes on as well; at once, while it has most of its steps to do.
    job = queue(slurm)["s0-900k"][0]
    client("scontrol", "requeue", job)
    wait(lambda: queue(slurm)["s0-900k"][1] == "PENDING", 60, "the job to be queued again")
    saved.append(rows(study, 0, "900k")[-1]["step"])
    start_soon(job)
    wait(lambda: not queue(slurm), 300, "all jobs to end")

    assert starts(study, 0, "900k") == [1, saved[0] + 1, saved[2] + 1]
    assert starts(study, 1, "900k") == [1, saved[1] + 1]
    for seed in (0, 1):
        steps = [row["step"] for row in rows(study, seed, "900k")]
        assert steps == list(range(1, steps[-1] + 1))
    assert len(list(study.glob("*/done.json"))) == 4 and (study / "report.html").exists()
    assert submit(slurm, study).count(": finished") == 4 and not queue(slurm)
    assert submit(slurm, study, "--status").count(" done ") == 4


def test_two_processes_of_one_job_stop_and_go_on_together(
    slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--config=experiments/scaling.py:mini,scale=pico,budgets=100k,topology=cpu:1x2"
    monkeypatch.setitem(globals(), "STUDY", [words, *STUDY[1:]])
    study = tmp_path / "two"
    submit(slurm, study)
    wait(lambda: len(rows(study, 0, "k")) > 30, 200, "two processes to train")
    (job,) = (job for job, *_ in queue(slurm).values())
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    wait(lambda: [state for _, state, _ in queue(slurm).values()] == ["PENDING"], 60, "the job to be queued again")
    saved = rows(study, 0, "k")[-1]["step"]
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"], env=slurm, check=True)
    wait(lambda: not queue(slurm), 200, "the job to end")
    assert starts(study, 0, "k") == [1, saved + 1]
    assert "attached: 2 x CPU" in next(study.glob("submission/*.out")).read_text()
    assert (study / "report.html").exists() and submit(slurm, study).count(": finished") == 1
