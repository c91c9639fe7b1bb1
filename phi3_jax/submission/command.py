"""The command `launch/submit.py`: what would be sent, sending it, and the table of a study."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_jax import experiment
from phi3_jax.commands import Flags
from phi3_jax.errors import UserError
from phi3_jax.submission import status
from phi3_jax.submission.backend import Backend, Submitted
from phi3_jax.submission.gke import Gke
from phi3_jax.submission.jobs import Job, Study, make_jobs, make_study
from phi3_jax.submission.local import Local
from phi3_jax.submission.slurm import Slurm
from phi3_jax.submission.tpu_vm import TpuVm

BACKENDS: dict[str, type[Backend]] = {"gke": Gke, "tpu-vm": TpuVm, "slurm": Slurm, "local": Local}


def main(flags: Flags) -> None:
    """The command."""
    if lost := next((name for name in ("run", "resume") if flags[name]), None):
        raise UserError(f"--{lost} is an option of launch/run.py; every run of a study is submitted")
    if flags["study"]:
        _show_folder(flags)
        return
    if not flags["config"]:
        raise UserError("--config is missing; for example --config experiments/scaling.py:sweep,scale=full")
    study = make_study(experiment.asked(flags))
    backend = BACKENDS[flags["backend"]](study) if flags["backend"] else None
    if flags["status"]:
        show(study, backend)
    elif backend is None:
        raise UserError(f"--backend is missing; valid: {', '.join(BACKENDS)}")
    else:
        submit(study, backend, flags["dry_run"])


def _show_folder(flags: Flags) -> None:
    """The table of a study of which only the folder is known."""
    if not flags["status"]:
        raise UserError(f"unknown argument {flags['study']!r}; a folder alone is for --status {flags['study']}")
    if flags["backend"]:
        raise UserError(
            f"--backend {flags['backend']} asks for the study's jobs; give its --config and --workdir as well"
        )
    if lost := [f"--{name}" for name in ("config", "workdir", "dry_run") if flags[name]]:
        raise UserError(f"--status {flags['study']} is of a folder alone; leave it out, or {' and '.join(lost)}")
    print(status.text(status.of_folder(Path(flags["study"]))))


def submit(study: Study, backend: Backend, dry_run: bool) -> None:
    """Sends the study's jobs, without those that are finished or that the scheduler holds; or prints them all."""
    done = status.finished(study)
    jobs = []
    for job in make_jobs(study, backend.place, backend.together):
        if skipped := [run for run in job.runs if run in done]:
            print(f"{job.name}: {', '.join(skipped)}: finished")
        if left := tuple(run for run in job.runs if run not in done):
            jobs.append(dataclasses.replace(job, runs=left))
    files = {job.name: backend.file(job) for job in jobs}  # all of them first: an option that is missing sends nothing
    if dry_run:
        _print_all(backend, jobs, files)
        return
    submitted = backend.submitted(jobs) if jobs else {}
    for job in jobs:
        now = submitted.get(job.name)
        if now and now.state in ("waiting", "running", "done"):
            print(f"{job.name}: {', '.join(job.runs)}: {now.state} already")
            continue
        submitted[job.name] = backend.send(job, files[job.name], submitted)
        hint = backend.hint(job)
        print(f"{job.name}: {', '.join(job.runs)}: {f'sent; {hint}' if hint else 'done'}", flush=True)


def _print_all(backend: Backend, jobs: Sequence[Job], files: Mapping[str, tuple[str, str] | None]) -> None:
    """Files and commands, as they would be written and run; an id that only sending gives is `ID_OF_<job>`."""
    sent: dict[str, Submitted] = {}
    for job in jobs:
        print(f"# {job.name}: {', '.join(job.runs)}")
        if file := files[job.name]:
            print(f"# writes {shlex.quote(str(backend.submission / file[0]))}:", file[1], sep="\n")
        for command in backend.commands(job, sent):
            line = shlex.join(command)
            print(f"(cd -- {shlex.quote(str(backend.submission))} && {line})" if file else line)
        print()
        sent[job.name] = Submitted("waiting", f"ID_OF_{job.name}")


def show(study: Study, backend: Backend | None) -> None:
    """Prints the table of a study; with a backend, its scheduler says which runs wait and which run."""
    scheduled = {}
    if backend is not None:
        jobs = make_jobs(study, backend.place, backend.together)
        states = backend.submitted(jobs)
        scheduled = {run: states[job.name].state for job in jobs if job.name in states for run in job.runs}
    if not scheduled and not study.folder.exists():
        raise UserError(f"no study in {study.folder}; give the --workdir where it is seen from here, or --backend")
    status.refuse_other(study)
    print(status.text(status.table(study, scheduled)))
