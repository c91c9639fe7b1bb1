"""Slurm: one batch job per run; forks wait for their trunk; a stopped run is queued again and goes on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from phi3_jax.errors import UserError
from phi3_jax.submission import hardware, templates
from phi3_jax.submission.backend import Backend, Submitted, call
from phi3_jax.submission.jobs import Job, Study, run_command

GRACE_SECONDS = 120  # between SIGTERM and the end of the job's time; Slurm may be up to a minute late with it
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED")


class Slurm(Backend):
    """The study's folder and this checkout must be on a file system that the nodes share."""

    def __init__(self, study: Study) -> None:
        super().__init__(study)
        self.hardware = hardware.parse(study.config.topology) if study.config.topology else None
        if self.hardware and self.hardware.tpu:
            raise UserError(f"topology={study.config.topology}: Slurm has no TPUs here; use --backend gke or tpu-vm")

    def file(self, job: Job) -> tuple[str, str]:
        command = run_command(self.study, job.runs, self.place)
        return f"{job.name}.sh", templates.script("slurm.sh", {"root": os.getcwd(), "command": command})

    def commands(self, job: Job, submitted: Mapping[str, Submitted]) -> list[list[str]]:
        options = [
            f"--job-name={job.name}", f"--output={job.name}-%j.out", "--open-mode=append", "--requeue",
            f"--signal=TERM@{GRACE_SECONDS}", *self._size(),
        ]  # fmt: skip
        if self.cluster.queue:
            options.append(f"--partition={self.cluster.queue}")
        if job.after is not None and job.after in submitted:
            options += [f"--dependency=afterok:{submitted[job.after].id}", "--kill-on-invalid-dep=yes"]
        return [["sbatch", "--parsable", *options, *self.options, f"{job.name}.sh"]]

    def _size(self) -> list[str]:
        """Nodes and tasks: one process per GPU, as jax expects of Slurm's tasks; one process in all without a topology."""
        if self.hardware is None:
            return ["--nodes=1", "--ntasks=1"]
        size = [f"--nodes={self.hardware.hosts}", f"--ntasks-per-node={self.hardware.chips}"]
        return size + ([f"--gpus-per-node={self.hardware.chips}"] if self.hardware.gpu else [])

    def submitted(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        names = ",".join(job.name for job in jobs)
        lines = call(["squeue", "--me", "--noheader", f"--name={names}", "--format=%j %T %i"]).splitlines()
        rows = [line.split() for line in lines if line.strip()]
        return {name: Submitted("running" if state in RUNNING else "waiting", id_) for name, state, id_ in rows}

    def hint(self, job: Job) -> str:
        return f"squeue --me --name={job.name}; output in {shlex.quote(str(self.submission))}"
