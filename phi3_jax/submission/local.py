"""This machine: the jobs one after the other, each trunk with its forks, on all attached devices."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence

from phi3_jax.errors import STOPPED, Stopped, UserError
from phi3_jax.submission.backend import Backend, Submitted
from phi3_jax.submission.jobs import Job, run_command


class Local(Backend):
    """Needs nothing; ends when the last job has ended."""

    together = True

    def file(self, job: Job) -> None:
        return None

    def commands(self, job: Job, submitted: Mapping[str, Submitted]) -> list[list[str]]:
        return [run_command(self.study, job.runs, self.place)]

    def submitted(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        return {}

    def hint(self, job: Job) -> str:
        return ""

    def send(self, job: Job, file: tuple[str, str] | None, submitted: Mapping[str, Submitted]) -> Submitted:
        """Trains the job and waits for it; SIGTERM reaches it, and it saves.

        Raises:
          UserError: it failed.
          Stopped: it was stopped.
        """
        (command,) = self.commands(job, submitted)
        child = subprocess.Popen(command)
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            status = child.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the child as well
            status = child.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if status == STOPPED:
            raise Stopped("stopped and saved; the same command goes on from here")
        if status:
            raise UserError(f"{', '.join(job.runs)} ended with status {status}; the reason stands above")
        return Submitted("done", job.name)
