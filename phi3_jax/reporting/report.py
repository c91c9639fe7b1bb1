"""The report of any study: `python -m phi3_jax.scaling.report runs/<study> [--keep DIR]`.

Writes report.html, figures/ and runs.csv into the study's folder. `--keep` also writes the small tables that a
repository keeps and notebooks read: runs.csv without what only a log needs, and study.json with the design, versions and
machine, but no path.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("report"))

import contextlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.records import files, tables
from phi3_jax.records.table import read_study, write_csv
from phi3_jax.reporting.page import write_report
from phi3_jax.scaling import forecast


def keep(folder: Path, out: Path) -> list[Path]:
    """Copies of a study's tables in `out`, for a repository; returns what was written."""
    study = read_study(folder)
    design = study.meta.get("design", {})
    records = [run.record for run in study.runs if run.record]
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "name": study.meta.get("name"),
        "title": study.meta.get("title"),
        "design": {"scale": design.get("scale"), "config": design.get("config"), "data": design.get("data")},
        "packages": records[0].get("packages") if records else None,
        "git_commits": sorted({r["git_commit"] for r in records if r.get("git_commit")}),
        "machine": {
            "device": sorted({r["device"] for r in records if r.get("device")}),
            "processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        },
        "seconds": sum(s for run in study.runs if (s := run.status_file.get("seconds"))),
    }  # fmt: skip
    files.write_json(out / "study.json", about)
    written = [out / "study.json", write_csv(study, out / "runs.csv")]
    _drop(out / "runs.csv", ("label", "flops_predicted", "seconds_predicted", "peak_bytes_predicted", "git_commit"))
    if forecast.path(folder).exists():
        with contextlib.suppress(forecast.Unreadable):  # the report says so
            forecast.read(folder)
            written.append(forecast.path(out))
            files.write_bytes(written[-1], forecast.path(folder).read_bytes())
    return written


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _drop(path: Path, columns: tuple[str, ...]) -> None:
    rows = tables.read(path)
    names = [c for c in rows[0] if c not in columns and any(row[c] for row in rows)]
    tables.write(path, names, ({k: _short(v) for k, v in row.items()} for row in rows))


def _short(text: str) -> str:
    """A float with eight digits, anything else as it is."""
    try:
        return text if text.isdigit() else f"{float(text):.8g}"
    except ValueError:
        return text


def check(folder: Path) -> None:
    """Refuses what is no study, and a study of which no run has finished, in one line."""
    study = read_study(folder)
    if not study.meta and not study.runs:
        inside = (folder.resolve().parent / "study.json").is_file()
        raise UserError(
            f"{folder} is no study: it has no study.json and no folder of a run, so no finished run; give "
            + (f"the study {folder.resolve().parent}" if inside else "the folder that launch/run.py trained into")
        )
    if not any(run.finished for run in study.runs):
        raise UserError(f"{folder} has no finished run; the command in its study.json continues it")


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    study = Path(flags["study"])
    check(study)
    print(f"report: {write_report(study)}")
    if not flags["keep"]:
        return
    try:
        written = keep(study, Path(flags["keep"]))
    except OSError as error:
        raise UserError(f"--keep {flags['keep']} cannot be written: {error.strerror}; name another folder") from error
    print(*(f"kept: {path}" for path in written), sep="\n")
