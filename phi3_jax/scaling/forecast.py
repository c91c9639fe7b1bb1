"""Forecasts of runs beyond those of a table: `python -m phi3_jax.scaling.forecast runs.csv --n params --d tokens`.

Fits the runs of least 6 N D, forecasts the others and says how many of them lie in their 95 % intervals; with --at, fits
all and forecasts runs that have not been. The intervals carry the error of the law's form (`scaling.backtest`).

A study's forecasts are written down before its runs: its runner trains everything but the largest size and the largest
budget, calls `write`, and only then goes on. The file's hash stands in itself and in the config.json of every run that
starts after it, so that neither can be changed unseen.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("forecast"))

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.records.files import read_json, read_state, write_json
from phi3_jax.records.table import Run, Study, read_study
from phi3_jax.scaling import backtest, fit, intervals, laws
from phi3_jax.scaling.endpoints import Endpoint, endpoints, plotted_losses

NUMBERS = ("n", "d", "value", "low", "high")


class Unreadable(UserError):
    """A forecast that a disk or a hand has spoiled: there is nothing to score, which is no reason for no report."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A run that is forecast: its name, non-embedding parameters and tokens."""

    name: str
    n: float
    d: float


@dataclasses.dataclass(frozen=True)
class Score:
    """One forecast and what came; `measured` is None before the run has ended."""

    run: str
    endpoint: str
    n: float
    d: float
    value: float
    low: float
    high: float
    measured: float | None
    gadre: float | None = None  # by Gadre's form; forecasts of older versions have none

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
    return read_state(path(study)).get("sha256")


def _hash(content: dict[str, Any]) -> str:
    rest = {k: v for k, v in content.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fit_runs(runs: Sequence[Run], endpoint: Endpoint) -> tuple[laws.Fit, list[str]]:
    """(law of an endpoint, trunk of each run, whose noise its forks share).

    N is non-embedding parameters, D the run's tokens, the loss that of its last evaluation.

    Raises:
      UserError: see `laws.check`; or runs of several builds.
    """
    builds = sorted({str(run.record["build"]) for run in runs if run.finals and run.record.get("build")})
    if len(builds) > 1:
        raise UserError(
            f"runs of the builds {' and '.join(builds)} follow no one law; train them with one version of the code"
        )
    there = [(run, run.size, run.budget) for run in runs if endpoint.key in run.finals and run.size and run.budget]
    loss = [run.finals[endpoint.key]["value"] for run, _, _ in there]
    fitted = laws.fit([size for _, size, _ in there], [budget for _, _, budget in there], loss)
    return fitted, [str(run.parent or run.name) for run, _, _ in there]


def write(study: Path, held: Sequence[Held]) -> list[str]:
    """Fits every loss of the finished runs, writes the forecasts of `held`; returns lines that say so.

    Losses whose law the runs do not determine are left out; where that is all of them, no file is written.
    """
    found = read_study(study)
    rows, fits = [], {}
    for endpoint in plotted_losses(endpoints(found.runs)):
        try:
            fitted, trunks = fit_runs(found.runs, endpoint)
            ahead = backtest.forecast(fitted, trunks, [h.n for h in held], [h.d for h in held])
        except UserError:  # too few runs for a law, or one at a bound
            continue
        fits[endpoint.column] = dataclasses.asdict(fitted.law) | {"objective": fitted.objective, "runs": len(fitted.n)}
        for h, row in zip(held, ahead.rows(), strict=True):
            rows.append({"name": h.name, "endpoint": endpoint.column} | row)
    if not rows:
        return ["no forecast: the finished runs determine no loss law"]
    content: dict[str, Any] = {
        "form": "L(N, D) = E + A / N^alpha + B / D^beta; N non-embedding parameters, D tokens",
        "interval": "95 %, with the error of form from backtests; law_low to law_high holds if the form does",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fitted_to": sorted(run.name for run in found.runs if run.finished),
        "laws": fits,
        "forecasts": rows,
    }
    content["sha256"] = _hash(content)
    write_json(path(study), content)
    return [
        f"forecast of {len(held)} runs from {len(content['fitted_to'])}, before they start: {path(study)} "
        f"(sha256 {content['sha256'][:12]})"
    ]


def read(study: Path) -> dict[str, Any]:
    """A study's forecast.

    Raises:
      Unreadable: it holds no JSON object.
      UserError: it was changed after its hash was taken.
    """
    try:
        content = read_json(path(study))
    except UserError as error:
        raise Unreadable(str(error)) from error
    if _hash(content) != content.get("sha256"):
        raise UserError(f"{path(study)} was edited after its hash was taken; restore it, or remove it to give it up")
    return content


def score(study: Study) -> list[Score]:
    """Every forecast of a study and the measured loss, largest runs last; none without a forecast.

    Raises:
      UserError: an edited forecast, or a run that started under another one.
    """
    if not path(study.folder).exists():
        return []
    content, out = read(study.folder), []
    try:
        rows = [
            (row, str(row["name"]), str(row["endpoint"]), [float(row[k]) for k in NUMBERS])
            for row in content["forecasts"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{path(study.folder)} holds no forecasts; restore it, or remove it to give it up") from error
    runs = {run.name: run for run in study.runs}
    for row, name, endpoint, numbers in rows:
        run = runs.get(name)
        started = run.record.get("forecast") if run else None
        if started and started != content["sha256"]:
            raise UserError(
                f"run {name} started under forecast {str(started)[:12]}, {path(study.folder)} is {content['sha256'][:12]}: "
                "it was changed after the run began; restore it, or remove it to give it up"
            )
        key = tuple(endpoint.split("/"))
        final = run.finals.get(key) if run and len(key) == 3 else None
        n, d, value, low, high = numbers
        measured = float(final["value"]) if final else None
        out.append(Score(name, endpoint, n, d, value, low, high, measured, row.get("gadre")))
    return sorted(out, key=lambda s: (s.endpoint, s.n, s.d))


# ------------------------------------------------------------------------------------------------ the command


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    runs = fit.pick(flags)
    if bad := next((point for point in flags["at"] if len(point) != 2), None):
        raise UserError(f"--at {','.join(f'{x:g}' for x in bad)} is not N,D, such as --at 1e9,2e10")
    at = np.array(flags["at"], float).reshape(-1, 2)
    compute = runs.n * runs.d
    seen = np.ones(len(compute), bool) if len(at) else compute <= np.quantile(compute, 1 - flags["held"])
    n, d = at.T if len(at) else (runs.n[~seen], runs.d[~seen])
    if not len(n):
        raise UserError(
            f"--held {flags['held']:g} of {len(seen)} runs holds out none; give a larger share, or --at N,D"
        )
    fitted = runs.fit(seen)
    if reason := intervals.out_of_reach(fitted):
        result: dict[str, Any] = {"determined": False, "reason": reason, "runs": len(fitted.n)}
        print(json.dumps(result) if flags["json"] else f"not determined: {reason}")
        return
    ahead = backtest.forecast(fitted, [c for c, kept in zip(runs.clusters, seen, strict=True) if kept], n, d)
    measured = None if len(at) else runs.loss[~seen]
    result = {"determined": True, "runs": len(fitted.n), "columns": runs.names, "forecasts": ahead.rows()}
    result["calibration"] = dataclasses.asdict(backtest.SHIPPED)
    if measured is not None:
        for row, loss in zip(result["forecasts"], measured, strict=True):
            row |= {"measured": float(loss), "inside": bool(row["low"] <= loss <= row["high"])}
        result["score"] = scored(ahead, measured)
    print(json.dumps(result) if flags["json"] else text(result))


def scored(ahead: backtest.Forecast, measured: np.ndarray) -> dict[str, Any]:
    """How forecasts (points,) fared: how many lie inside, median width over centre, and errors of ln loss (RMS)."""
    inside, alone = (
        int(np.sum((low <= measured) & (measured <= high)))
        for low, high in ((ahead.low, ahead.high), (ahead.law_low, ahead.law_high))
    )
    error, gadre = (
        float(np.sqrt(np.mean(np.square(np.log(value / measured))))) for value in (ahead.value, ahead.gadre)
    )
    return {
        "held": len(measured), "inside": inside, "inside_if_the_form_held": alone,
        "width": float(np.median((ahead.high - ahead.low) / ahead.value)), "rms_error": error,
        "rms_error_gadre": gadre if np.isfinite(gadre) else None,
    }  # fmt: skip


def text(result: Mapping[str, Any]) -> str:
    """The forecasts for a reader."""
    lines = [
        f"fitted to {result['runs']} runs; x: N, D or 6 N D beyond theirs, as a factor; losses with 95 % intervals",
        f"{'N':>12}{'tokens':>12}{'x':>8}{'forecast':>10}  {'with error of form':20} {'if the form held':20} "
        f"{'Gadre':>8}{'measured':>10}",
    ]
    for row in result["forecasts"]:
        ends, alone = (f"[{row[a]:.4f}, {row[b]:.4f}]" for a, b in (("low", "high"), ("law_low", "law_high")))
        came = f"{row['measured']:10.4f} {'inside' if row['inside'] else 'outside'}" if "measured" in row else ""
        gadre = "–" if row["gadre"] is None else f"{row['gadre']:.4f}"
        lines.append(
            f"{row['n']:12.4g}{row['d']:12.4g}{np.exp(row['distance']):8.2f}{row['value']:10.4f}  {ends:20} {alone:20} "
            f"{gadre:>8}{came}"
        )
    if score := result.get("score"):
        gadre = "" if score["rms_error_gadre"] is None else f", {100 * score['rms_error_gadre']:.2f} % by Gadre's form"
        lines.append(
            f"{score['inside']} of {score['held']} held-out losses lie in their interval (without error of form: "
            f"{score['inside_if_the_form_held']}); median width {100 * score['width']:.1f} %, error "
            f"{100 * score['rms_error']:.2f} % (RMS){gadre}"
        )
    return "\n".join(lines)
