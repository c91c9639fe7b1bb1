"""The command `launch/submit.py`: options, what would be sent, sending it, and the table of a study."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence

from phi3_jax import launcher
from phi3_jax.errors import UserError, nearest
from phi3_jax.submission import status
from phi3_jax.submission.backend import Backend, Held
from phi3_jax.submission.gke import Gke
from phi3_jax.submission.jobs import Job, Study, make_jobs, make_study
from phi3_jax.submission.local import Local
from phi3_jax.submission.slurm import Slurm
from phi3_jax.submission.tpu_vm import TpuVm

BACKENDS: dict[str, type[Backend]] = {"gke": Gke, "tpu-vm": TpuVm, "slurm": Slurm, "local": Local}
FLAGS = ("--dry_run", "--status")


def main(arguments: Sequence[str], usage: str = "") -> int:
    """Runs the command; prints errors as one line. Exit status 0, or 2 for an error of the user's."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    try:
        flags, backend, rest = _split(arguments)
        study = make_study(launcher.parse(rest))
        if "--status" in flags:
            show(study, backend and BACKENDS[backend](study))
        elif backend is None:
            raise UserError(f"--backend is missing; valid: {', '.join(BACKENDS)}")
        else:
            submit(study, BACKENDS[backend](study), "--dry_run" in flags)
        return 0
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


def _split(arguments: Sequence[str]) -> tuple[set[str], str | None, list[str]]:
    """Flags, backend, and the options that `launch/run.py` shares."""
    flags, backend, rest, queue = set(), None, [], list(arguments)
    while queue:
        word = queue.pop(0)
        if word in FLAGS:
            flags.add(word)
        elif word == "--backend" or word.startswith("--backend="):
            backend = word.partition("=")[2] if "=" in word else queue.pop(0) if queue else ""
            if backend not in BACKENDS:
                raise UserError(f"unknown --backend {backend!r}{nearest(backend, BACKENDS)}")
        elif word.partition("=")[0] in ("--run", "--resume"):
            raise UserError(
                f"{word.partition('=')[0]} is an option of launch/run.py; every run of a study is submitted"
            )
        else:
            rest.append(word)
    return flags, backend, rest


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
    held = backend.held(jobs) if jobs else {}
    for job in jobs:
        now = held.get(job.name)
        if now and now.state in ("waiting", "running", "done"):
            print(f"{job.name}: {', '.join(job.runs)}: {now.state} already")
            continue
        held[job.name] = backend.send(job, files[job.name], held)
        hint = backend.hint(job)
        print(f"{job.name}: {', '.join(job.runs)}: {f'sent; {hint}' if hint else 'done'}", flush=True)


def _print_all(backend: Backend, jobs: Sequence[Job], files: Mapping[str, tuple[str, str] | None]) -> None:
    """Files and commands, as they would be written and run; an id that only sending gives is `ID_OF_<job>`."""
    sent: dict[str, Held] = {}
    for job in jobs:
        print(f"# {job.name}: {', '.join(job.runs)}")
        if file := files[job.name]:
            print(f"# writes {shlex.quote(str(backend.submission / file[0]))}:", file[1], sep="\n")
        for command in backend.commands(job, sent):
            line = shlex.join(command)
            print(f"(cd -- {shlex.quote(str(backend.submission))} && {line})" if file else line)
        print()
        sent[job.name] = Held("waiting", f"ID_OF_{job.name}")


def show(study: Study, backend: Backend | None) -> None:
    """Prints the table of a study; with a backend, its scheduler says which runs wait and which run."""
    held = {}
    if backend is not None:
        jobs = make_jobs(study, backend.place, backend.together)
        states = backend.held(jobs)
        held = {run: states[job.name].state for job in jobs if job.name in states for run in job.runs}
    if not held and not study.folder.exists():
        raise UserError(f"no study in {study.folder}; give the --workdir where it is seen from here, or --backend")
    print(status.text(status.table(study, held)))
