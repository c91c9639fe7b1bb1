"""The report of any study: `python -m phi3_jax.scaling.report runs/<study> [--keep DIR]`.

Writes report.html, figures/ and runs.csv into the study's folder. `--keep` also writes the small tables that a
repository keeps and notebooks read: runs.csv without what only a log needs, and study.json with the design, versions and
machine, but no path.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.reporting.page import write_report
from phi3_jax.reporting.table import read_study, write_csv


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
    (out / "study.json").write_text(json.dumps(about, indent=1) + "\n")
    written = [out / "study.json", write_csv(study, out / "runs.csv")]
    _drop(out / "runs.csv", ("label", "flops_predicted", "seconds_predicted", "peak_bytes_predicted", "git_commit"))
    if (folder / "forecast.json").exists():
        (out / "forecast.json").write_bytes((folder / "forecast.json").read_bytes())
        written.append(out / "forecast.json")
    return written


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _drop(path: Path, columns: tuple[str, ...]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [c for c in rows[0] if c not in columns and any(row[c] for row in rows)] if rows else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in row.items()})


def _short(text: str) -> str:
    """A float with eight digits, anything else as it is."""
    try:
        return text if text.isdigit() else f"{float(text):.8g}"
    except ValueError:
        return text


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="python -m phi3_jax.scaling.report", description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="folder of a study, such as runs/sweep-pico-clean")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the small tables that a repository keeps here")
    options = parser.parse_args(arguments)
    try:
        study = read_study(options.study)
        if not any(run.finished for run in study.runs):
            raise UserError(f"{options.study} has no finished run; the command in its study.json continues it")
        print(f"report: {write_report(options.study)}")
        for path in keep(options.study, options.keep) if options.keep else ():
            print(f"kept: {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
