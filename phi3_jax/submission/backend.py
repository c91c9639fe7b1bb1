"""What a scheduler must know to do: turn a job into a file and commands, and say what it holds already."""

from __future__ import annotations

import abc
import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.records.files import write_bytes
from phi3_jax.submission.jobs import Job, Study


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job a scheduler holds: `state` is waiting, running, done or failed; `id` is the scheduler's."""

    state: str
    id: str


class Backend(abc.ABC):
    """Where jobs are sent. Making one checks the options it needs; it asks nobody until `submitted` or `send`.

    `place` is the study's folder as the jobs see it; `together`: a trunk and its forks are one job.
    """

    together = False

    def __init__(self, study: Study) -> None:
        self.study, self.cluster = study, study.config.cluster
        self.place = str(study.folder.absolute())

    @property
    def submission(self) -> Path:
        """Where files for the scheduler, and what it writes, are kept."""
        return self.study.folder / "submission"

    @property
    def options(self) -> list[str]:
        """The words of cluster.options, as a shell would split them.

        Raises:
          UserError: a quotation mark without its pair.
        """
        try:
            return shlex.split(self.cluster.options)
        except ValueError as error:
            raise UserError(f"cluster.options={self.cluster.options!r}: {error}; quote each word once") from error

    @abc.abstractmethod
    def file(self, job: Job) -> tuple[str, str] | None:
        """Name (below `submission`, a safe word) and text of the file that is sent, where there is one."""

    @abc.abstractmethod
    def commands(self, job: Job, submitted: Mapping[str, Submitted]) -> list[list[str]]:
        """Commands that send a job, run in `submission`; `submitted` has the ids of jobs sent before."""

    @abc.abstractmethod
    def submitted(self, jobs: Sequence[Job]) -> dict[str, Submitted]:
        """Those of the jobs that the scheduler knows, by name."""

    @abc.abstractmethod
    def hint(self, job: Job) -> str:
        """How to look after a job that was sent, in a line."""

    def send(self, job: Job, file: tuple[str, str] | None, submitted: Mapping[str, Submitted]) -> Submitted:
        """Writes a job's file and runs its commands."""
        try:
            self.submission.mkdir(parents=True, exist_ok=True)
            if file is not None:
                write_bytes(self.submission / file[0], file[1].encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.submission} ({error.strerror}); choose another --workdir"
            ) from error
        out = ""
        for command in self.commands(job, submitted):
            out = call(command, self.submission)
        return Submitted("waiting", out.strip())


def call(command: Sequence[str], folder: Path | None = None) -> str:
    """Standard output of a scheduler's client.

    Raises:
      UserError: it is not installed, or what it complained of.
    """
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed here; install it, or see what it would be sent with --dry_run")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise UserError(f"{' '.join(command[:3])} failed with status {done.returncode}: {said[-1]}")
    return done.stdout
