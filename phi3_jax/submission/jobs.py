"""A study as a list of jobs, made on a machine that has neither the accelerators nor the data.

A run's own name counts its tokens in whole batches of the data, so jobs name their runs by what was asked for
(`mini-s0-4M`: `study.AskedRun`) and `launch/run.py --run` finds them where the data are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from phi3_jax.data import sources
from phi3_jax.errors import UserError
from phi3_jax.experiment import Command, study_name
from phi3_jax.family import SCALES
from phi3_jax.shipped import script
from phi3_jax.study.asked import AskedRun, asked_runs
from phi3_jax.study.full import full_runs


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing a scheduler starts: runs of a study, in order, after another job has ended well.

    `name` is made of lower-case letters, digits and hyphens and is at most 38 long, whatever the study is called; it
    depends on the study's folder and the runs alone.
    """

    name: str
    runs: tuple[str, ...]
    after: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What is submitted: the parsed command, its scale, and the study's folder as seen from here."""

    command: Command
    scale: str
    folder: Path

    @property
    def config(self) -> ConfigDict:
        return self.command.config

    @property
    def asked(self) -> list[AskedRun]:
        return asked_runs(self.config, self.scale)


def make_study(command: Command) -> Study:
    """The study of a command line.

    Raises:
      UserError: scale=auto, which looks at attached devices; a full-size study without data.
    """
    config = command.config
    if config.scale == "auto":
        raise UserError(f"scale=auto looks at the attached devices; to submit, add scale=full, {', '.join(SCALES)}")
    if config.scale == "full" and not config.data.source:
        raise UserError(f"a full-size run needs data=; choices: {sources.choices()}")
    full_runs(config)  # says which of them cannot be
    return Study(command, config.scale, command.workdir or Path("runs") / study_name(config, config.scale))


def make_jobs(study: Study, place: str, together: bool) -> list[Job]:
    """The study's jobs, trunks before their forks: one a run, or with `together` one a trunk and its forks.

    `place` is the study's folder where the jobs run; it keeps equal runs of two studies apart.
    """
    asked = study.asked
    groups: dict[str, list[AskedRun]] = {}
    for run in asked:
        groups.setdefault(run.trunk or run.name if together else run.name, []).append(run)
    return [
        Job(
            job_name(study.folder.name, runs[0].name, place),
            tuple(run.name for run in runs),
            job_name(study.folder.name, runs[0].trunk, place) if runs[0].trunk else None,
        )
        for runs in groups.values()
    ]


def job_name(study: str, run: str, place: str) -> str:
    """A name that every scheduler takes: words of both, and six digits of a hash of all of it."""
    digest = hashlib.sha256(repr((place, run)).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return "-".join(filter(None, ("p", _slug(study)[:13].strip("-"), _slug(run)[:14].strip("-"), digest)))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def run_command(study: Study, runs: Sequence[str], place: str, python: str = sys.executable) -> list[str]:
    """The words of `python launch/run.py ...` for some runs of a study kept in `place`."""
    command = study.command
    overrides = [f"--config.{text}" for text in command.overrides if not text.startswith("cluster.")]
    options = [f"--config={command.experiment}", *overrides, f"--workdir={place}", f"--run={','.join(runs)}"]
    return [python, *script("run"), *options]
