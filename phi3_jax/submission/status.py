"""What a study's folder says about its runs: finished ones, and a table of all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from phi3_jax import configs
from phi3_jax.configs import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.records import files
from phi3_jax.records.checkpoint import list_steps
from phi3_jax.records.files import read_state
from phi3_jax.records.folder import DONE, ERROR
from phi3_jax.records.rows import read_rows
from phi3_jax.study import runs as studies
from phi3_jax.study.arms import parts
from phi3_jax.study.asked import resolve_runs
from phi3_jax.submission.jobs import Study

FRESH_SECONDS = 600  # a run whose last row is younger is taken for running where no scheduler says so


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One line of the table; None where the folder does not say."""

    run: str
    state: str = "waiting"  # or running, stopped, failed, done
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    checkpoint: int | None = None
    age: float | None = None  # seconds since the last row
    error: str = ""


def planned_runs(study: Study) -> dict[str, RunConfig]:
    """{asked name: run} as the study's own data and devices say; empty before its first job has started.

    Raises:
      UserError: a run's folder holds another experiment, with what changed.
    """
    folder = study.folder
    record = read_state(folder / "study.json")
    places = {part.data for part in parts(study.config, study.scale)}
    data = {place: read_state(folder / place / "manifest.json") for place in places}
    if not (record and all(data.values())):
        return {}
    devices = record["design"].get("devices", 1)
    runs = studies.plan_study(study.config, study.scale, data, folder, devices)
    from phi3_jax.records.folder import refuse_other

    for run in runs:
        refuse_other(run, folder / run.name)
    return resolve_runs(study.asked, runs)


def finished(study: Study) -> set[str]:
    """Asked names of the runs that need nothing more: trained to their last step under the same fingerprint.

    Budgets less than a batch apart are one run, and so finished together.
    """
    runs = planned_runs(study)
    if not runs:
        return set()
    done = {name for name, run in runs.items() if _done(study.folder / run.name, run)}
    others = {ask.name for ask in study.asked} - runs.keys()
    return done | (others if len(done) == len(runs) else set())


def _done(folder: Path, run: RunConfig) -> bool:
    return (folder / "config.json").exists() and read_state(folder / DONE).get("step") == run.steps


def table(study: Study, scheduled: Mapping[str, str]) -> list[RunStatus]:
    """One row per run asked for; `scheduled` maps asked names to the scheduler's states."""
    runs = planned_runs(study)
    return [
        _row(ask.name, runs.get(ask.name), study.folder, scheduled.get(ask.name))
        for ask in study.asked
        if ask.name in runs or not runs
    ]


def of_folder(folder: Path) -> list[RunStatus]:
    """One row per run of the study in a folder, as its study.json has them, under the names of their folders.

    Raises:
      UserError: no study there, or a study.json that lists no runs.
    """
    if not (folder / "study.json").exists():
        raise UserError(f"{folder} holds no study (no study.json); give the folder that launch/run.py trains in")
    try:
        runs = [configs.run_from_dict(tree) for tree in files.read_json(folder / "study.json")["runs"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'study.json'} lists no runs; the command that made the study writes it again"
        ) from error
    return [_row(run.name, run, folder, None) for run in runs]


def refuse_other(study: Study) -> None:
    """Raises UserError where a study's folder holds runs, none of which the command asks for."""
    record = read_state(study.folder / "study.json")
    there = {run.get("name") for run in record.get("runs", ())}
    asked = {run.name for run in planned_runs(study).values()}
    if there and not there & asked:
        raise UserError(
            f"{study.folder} holds another study: {', '.join(sorted(map(str, there))[:3])}, none of which this command "
            f"asks for; see --status {study.folder}, or choose another --workdir"
        )


def _row(name: str, run: RunConfig | None, study: Path, scheduled: str | None) -> RunStatus:
    if run is None:
        return RunStatus(name, scheduled or "waiting")
    folder = study / run.name
    rows = read_rows(folder / "metrics.jsonl")
    error = (folder / ERROR).read_text().strip() if (folder / ERROR).exists() else ""
    age = time.time() - (folder / "metrics.jsonl").stat().st_mtime if rows else None
    if _done(folder, run):
        state = "done"
    elif scheduled in ("waiting", "running"):
        state = scheduled
    elif error or scheduled == "failed":
        state = "failed"
    elif age is None:
        state = "waiting"
    else:
        saved = read_state(folder / "status.json").get("step") == rows[-1]["step"]
        state = "running" if age < FRESH_SECONDS and not saved else "stopped"
    newest = max(list_steps(folder / "checkpoints"), default=None)
    last = rows[-1] if rows else {}
    return RunStatus(name, state, last.get("step"), run.steps, last.get("loss"), newest, age, error)


def text(rows: list[RunStatus]) -> str:
    """The table as aligned text, and below it why runs failed."""
    cells = [("run", "state", "step", "loss", "checkpoint", "last row")]
    for row in rows:
        cells.append(
            (
                row.run,
                row.state,
                f"{_dash(row.step)} / {_dash(row.steps)}",
                "-" if row.loss is None else f"{row.loss:.4f}",
                _dash(row.checkpoint),
                "-" if row.age is None else _ago(row.age),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"{row.run}: {row.error.splitlines()[-1]}" for row in rows if row.error)])


def _dash(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit} ago"
    return f"{seconds:.0f} s ago"
