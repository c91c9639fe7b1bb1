"""Forecasts that are written down before the runs they are about, and scored after them.

A study's runner trains everything but the largest size and the largest budget, calls `write`, and only then goes on. The
file's hash stands in itself and in the config.json of every run that starts after it, so that neither can be changed
unseen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.reporting.gains import Endpoint, endpoints, plotted_losses
from phi3_jax.reporting.table import Run, Study, read_study
from phi3_jax.scaling import laws

DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Held:
    """A run that is forecast: its name, non-embedding parameters and tokens."""

    name: str
    n: float
    d: float


@dataclasses.dataclass(frozen=True)
class Score:
    """One forecast beside what came; `measured` is None before the run has ended."""

    run: str
    endpoint: str
    n: float
    d: float
    value: float
    low: float
    high: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus 1."""
        return None if self.measured is None else self.value / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss lies in the 95 % prediction interval."""
        return None if self.measured is None else self.low <= self.measured <= self.high


def path(study: Path) -> Path:
    """Where a study's forecast is."""
    return Path(study) / "forecast.json"


def sha(study: Path) -> str | None:
    """Hash of the study's forecast, None without one."""
    return json.loads(path(study).read_text()).get("sha256") if path(study).exists() else None


def _hash(content: dict[str, Any]) -> str:
    rest = {k: v for k, v in content.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fit_runs(runs: Sequence[Run], endpoint: Endpoint) -> tuple[laws.Fit, list[str] | None] | None:
    """(law of an endpoint, bootstrap cluster of each run), or None where the runs do not determine one.

    Forks share their trunk's noise, so that trunks are clusters; of fewer than eight nothing can be resampled, and the
    clusters are None: the runs themselves.

    N is non-embedding parameters, D the run's tokens, the loss that of its last evaluation.
    """
    there = [run for run in runs if endpoint.key in run.finals and run.size and run.budget]
    try:
        n, d, loss = (
            [run.size for run in there], [run.budget for run in there],
            [run.finals[endpoint.key]["value"] for run in there],
        )  # fmt: skip
        trunks = [str(run.parent or run.name) for run in there]
        return laws.fit(n, d, loss), trunks if len(set(trunks)) >= 8 else None
    except UserError:
        return None


def write(study: Path, held: Sequence[Held]) -> list[str]:
    """Fits every loss of the finished runs, writes the forecasts of `held`; returns lines that say so.

    Losses whose law the runs do not determine are left out; where that is all of them, no file is written.
    """
    found = read_study(study)
    rows, fits = [], {}
    for endpoint in plotted_losses(endpoints(found.runs)):
        result = fit_runs(found.runs, endpoint)
        if result is None:
            continue
        fitted, clusters = result
        draws = laws.bootstrap(fitted, DRAWS, clusters=clusters)
        n, d = np.array([h.n for h in held]), np.array([h.d for h in held])
        predicted = laws.predict(fitted, draws, n, d)
        fits[endpoint.column] = dataclasses.asdict(fitted.law) | {
            "objective": fitted.objective, "runs": len(fitted.n), "at_bounds": list(fitted.edges)
        }  # fmt: skip
        for i, h in enumerate(held):
            rows.append(
                dataclasses.asdict(h) | {"endpoint": endpoint.column} | {k: float(v[i]) for k, v in predicted.items()}
            )
    if not rows:
        return ["no forecast: the finished runs determine no loss law"]
    content = {
        "form": "L(N, D) = E + A / N^alpha + B / D^beta; N non-embedding parameters, D tokens",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fitted_to": sorted(run.name for run in found.runs if run.finished),
        "laws": fits,
        "forecasts": rows,
    }
    content["sha256"] = _hash(content)
    partial = path(study).with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path(study))
    return [
        f"forecast of {len(held)} runs from {len(content['fitted_to'])}, before they start: {path(study)} "
        f"(sha256 {content['sha256'][:12]})"
    ]


def read(study: Path) -> dict[str, Any]:
    """A study's forecast.

    Raises:
      UserError: it was changed after its hash was taken.
    """
    content = json.loads(path(study).read_text())
    if _hash(content) != content.get("sha256"):
        raise UserError(f"{path(study)} was edited after its hash was taken; restore it, or remove it to give it up")
    return content


def score(study: Study) -> list[Score]:
    """Every forecast of a study beside the measured loss, largest runs last; none without a forecast.

    Raises:
      UserError: an edited forecast, or a run that started under another one.
    """
    if not path(study.folder).exists():
        return []
    content, runs = read(study.folder), {run.name: run for run in study.runs}
    out = []
    for row in content["forecasts"]:
        run = runs.get(row["name"])
        started = run.record.get("forecast") if run else None
        if started and started != content["sha256"]:
            raise UserError(
                f"run {row['name']} started under forecast {started[:12]}, forecast.json is {content['sha256'][:12]}: it "
                "was changed after the run began; restore it, or remove it to give it up"
            )
        final = run.finals.get(tuple(row["endpoint"].split("/"))) if run else None
        numbers = (float(row[k]) for k in ("n", "d", "value", "low", "high"))
        out.append(Score(row["name"], row["endpoint"], *numbers, float(final["value"]) if final else None))
    return sorted(out, key=lambda s: (s.endpoint, s.n, s.d))
