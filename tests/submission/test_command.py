"""The command: nothing started by looking, nothing sent twice, errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TPU = [f"--config.cluster.{word}" for word in ("image=r.dev/i:1", "volume=10.0.0.2:/s", "project=p", "zone=z")]
SLICE = "mini,scale=pico,topology=v5p:4x4x8"
FORKS = "mini,scale=pico,budgets=40k,80k"


def test_listing_jobs_starts_no_backend_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from phi3_jax.__main__ import main;"
        "status = main(['submit', *sys.argv[1:]]); import jax; from jax._src import xla_bridge;"
        "before = xla_bridge.backends_are_initialized(); jax.devices();"
        "print(status, before, xla_bridge.backends_are_initialized())"
    )
    words = "sweep,scale=full,data=pydocs,topology=2xv5p:4x4x8"
    arguments = [
        f"--config=experiments/scaling.py:{words}",
        f"--workdir={tmp_path / 's'}",
        "--backend=tpu-vm",
        "--dry_run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, *TPU],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": ""},
    )
    assert done.stdout.splitlines()[-1] == "0 False True", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words,arguments,message",
    [
        ("mini", ["--backend=local"], "scale=auto looks at the attached devices"),
        ("mini,scale=full", ["--backend=slurm"], "a full-size run needs data="),
        (FORKS, [], "--backend is missing; valid: gke, tpu-vm, slurm, local"),
        (FORKS, ["--backend=slrum"], "did you mean 'slurm'"),
        (FORKS, ["--backend=slurm", "--run=x"], "--run is an option of launch/run.py"),
        (FORKS, ["--backend=slurm", "--dryrun"], "unknown argument '--dryrun'; did you mean '--dry_run'"),
        (FORKS, ["--backend=gke"], "add the word topology="),
        (f"{FORKS},topology=v5q:4x4x4", ["--backend=gke"], "unknown chip 'v5q' in topology 'v5q:4x4x4'; did you mean"),
        (f"{FORKS},topology=cpu:2x1", ["--backend=gke"], "TPUs or GPUs"),
        (f"{FORKS},topology=v5p:4x4x4", ["--backend=slurm"], "--backend gke or tpu-vm"),
        (f"{FORKS},topology=h200:8", ["--backend=tpu-vm", *TPU], "TPU VMs come as v4, v5e, v5p, v6e"),
        (SLICE, ["--backend=gke"], "jobset.yaml needs 'image'; give it with --config.cluster.image=VALUE"),
        (SLICE, ["--backend=gke", "--config.cluster.image=i"], "needs 'volume'"),
        (SLICE, ["--backend=gke", *TPU, "--config.cluster.options=spot"], "cluster.options='spot' is no node label"),
        (SLICE, ["--backend=gke", *TPU, "--config.cluster.options='"], "cluster.options"),
        (SLICE, ["--backend=tpu-vm", *TPU[:3]], "needs 'zone'"),
        (FORKS, ["--status"], "no study in"),
    ],
)
def test_wrong_input_is_one_line_and_sends_nothing(
    words: str, arguments: list[str], message: str, submit: Callable, clients: Any, tmp_path: Path
) -> None:
    status, out, err = submit(words, *arguments)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert out == "" and not (tmp_path / "study").exists()
    assert not clients.calls("sbatch") and not clients.calls("kubectl", "apply")


@pytest.mark.parametrize("backend,program", [("slurm", "squeue"), ("gke", "kubectl"), ("tpu-vm", "gcloud")])
def test_a_missing_client_is_named(
    backend: str, program: str, submit: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = SLICE if backend != "slurm" else FORKS
    status, _, err = submit(words, f"--backend={backend}", *TPU)
    assert status == 2 and f"{program} is not installed" in err and "--dry_run" in err
    assert submit(words, f"--backend={backend}", "--dry_run", *TPU)[0] == 0


def test_a_client_that_fails_is_quoted_in_one_line(submit: Callable, clients: Any) -> None:
    (clients.folder / "sbatch").write_text("#!/bin/sh\necho first >&2\necho 'invalid partition' >&2\nexit 1\n")
    status, _, err = submit(FORKS, "--backend=slurm")
    assert status == 2 and "sbatch" in err and err.endswith("invalid partition\n") and err.count("\n") == 1


def test_forks_wait_for_the_id_of_their_trunk(submit: Callable, clients: Any) -> None:
    status, _, err = submit(FORKS, "--backend=slurm", "--config.cluster.queue=gpu", "--config.cluster.options=--mem=4G")
    assert status == 0, err
    trunk, fork = clients.calls("sbatch")
    assert "--dependency=afterok:17" in fork and not any("dependency" in word for word in trunk)
    for call in (trunk, fork):
        assert {"--partition=gpu", "--mem=4G", "--requeue", "--parsable"} <= set(call)


def test_a_queued_trunk_is_not_sent_again_and_its_forks_wait_for_it(submit: Callable, clients: Any) -> None:
    submit(FORKS, "--backend=slurm")
    name = next(word for word in clients.calls("sbatch")[0] if word.startswith("--job-name=")).partition("=")[2]
    clients.answer("squeue", f"{name} RUNNING 4321\n")
    status, out, _ = submit(FORKS, "--backend=slurm")
    assert status == 0 and "running already" in out
    *_, last = calls = clients.calls("sbatch")
    assert len(calls) == 3 and "--dependency=afterok:4321" in last


def test_queued_resources(submit: Callable, clients: Any) -> None:
    words = "mini,scale=pico,topology=2xv5p:4x4x8"
    status, out, err = submit(words, "--backend=tpu-vm", *TPU, "--config.cluster.options=--spot")
    assert status == 0, err
    (create,) = clients.calls("gcloud", "compute", "tpus", "queued-resources", "create")
    name = create[5]
    nodes = {"--accelerator-type=v5p-256", "--node-count=2", f"--node-prefix={name}"}
    assert nodes | {"--project=p", "--spot"} <= set(create)
    assert "delete" in out  # what to type when it is done
    rows = [{"name": f"projects/p/locations/z/queuedResources/{name}", "state": {"state": "SUSPENDED"}}]
    clients.answer("gcloud", json.dumps(rows))
    assert submit(words, "--backend=tpu-vm", *TPU)[0] == 0
    assert [call[4] for call in clients.calls("gcloud")] == ["list", "create", "list", "delete", "create"]
    rows[0]["state"]["state"] = "ACTIVE"
    clients.answer("gcloud", json.dumps(rows))
    assert "running already" in submit(words, "--backend=tpu-vm", *TPU)[1]
