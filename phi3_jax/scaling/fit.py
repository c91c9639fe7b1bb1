"""Fits L(N, D) = E + A / N^alpha + B / D^beta to a table: `python -m phi3_jax.scaling.fit runs.csv --n params --d tokens`.

Prints the law, what it is worth (bootstrap intervals, profiles of the exponents, every start's end) and where it fails
(residuals against size and data, each size predicted from the others). `--json` prints the same as one object at full
precision; rounded constants bias predictions (arXiv:2404.10102), so copy them from there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError, nearest
from phi3_jax.scaling import laws

ONE_OF = ("recipe", "arm", "tokenizer", "ladder", "scale", "data")  # runs that differ in these follow different laws


def read(path: Path, columns: Sequence[str], only: Sequence[str] = ()) -> list[dict[str, str]]:
    """Finished runs of a csv file that has the columns; `only` are words COLUMN=VALUE that runs must meet.

    Raises:
      UserError: no such file, not a table, a column it lacks (naming the nearest), or runs of several recipes.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{path} has no rows; it needs a header and a line a run")
    pairs = [word.partition("=")[::2] for word in only]
    for column in (*columns, *(column for column, _ in pairs)):
        if column not in rows[0]:
            raise UserError(f"{path} has no column {column!r}{nearest(column, list(rows[0]))}")
    for column, value in pairs:
        there = sorted({row[column] for row in rows})
        rows = [row for row in rows if row[column] == value]
        if not rows:
            raise UserError(f"--only {column}={value}: no such run{nearest(value, there)}")
    if "status" in rows[0]:
        rows = [row for row in rows if row["status"] == "finished"]
        if not rows:
            raise UserError(f"{path} has no finished run; the law is one of final losses")
    for column in ONE_OF:
        found = sorted({row.get(column) or "" for row in rows})
        if len(found) > 1:
            raise UserError(
                f"{path} mixes runs of {column} {', '.join(map(repr, found[:6]))}: one law describes one recipe; keep one "
                f"with --only {column}={found[-1]}"
            )
    return rows


def number(row: dict[str, str], column: str, line: int) -> float:
    """A positive number of a row.

    Raises:
      UserError: anything else, naming line and column.
    """
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"line {line}: {column} is {row[column]!r}, not a positive number; leave the run out")
    return value


def describe(fitted: laws.Fit, draws: np.ndarray, clusters: int, names: dict[str, str]) -> dict[str, Any]:
    """Everything the command prints, as plain JSON types."""
    law = fitted.law
    found = {name: getattr(law, name) for name in laws.NAMES} | {"a": law.a, "b": 1 - law.a}
    out: dict[str, Any] = found | {"objective": fitted.objective, "runs": len(fitted.n), "columns": names}
    if len(draws):
        with_a = np.column_stack([draws, draws[:, 4] / (draws[:, 3] + draws[:, 4])])
        low, high = laws.interval(with_a)
        with np.errstate(over="ignore"):  # a draw that determines no law can have any constants
            spread = with_a.std(axis=0, ddof=1)
        keys = (*laws.NAMES, "a")
        out["intervals"] = {k: [float(x), float(y)] for k, x, y in zip(keys, low, high, strict=True)}
        out["standard_errors"] = {k: float(s) for k, s in zip(keys, spread, strict=True)}
        out["bootstrap"] = {"draws": len(draws), "clusters": clusters}
    out["profile_intervals"] = {name: list(laws.profile_interval(fitted, name)) for name in ("alpha", "beta")}
    out["diagnostics"] = {
        "condition_number": fitted.condition,
        "at_bounds": list(fitted.edges),
        "starts": len(fitted.optima),
        "starts_at_optimum": int(np.sum(fitted.optima[:, 0] <= fitted.objective * 1.0001)),
        "rms_log_residual": float(np.sqrt(np.mean(fitted.residuals**2))),
        "residual_correlation": laws.trends(fitted),
        "leave_one_size_out": [{"size": n, "log_error": e} for n, e in laws.leave_one_size_out(fitted)],
    }
    return out


def card(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checklist of "(Mis)fitting scaling laws" (arXiv:2502.18969) for one fit."""
    return {
        "form": "L(N, D) = E + A / N^alpha + B / D^beta",
        "variables": {
            "N": f"column {result['columns']['n']!r}: as the table counts it (in a runs.csv of ours non_embedding "
            "leaves the embedding and the head out, parameters has them)",
            "D": f"column {result['columns']['d']!r}",
            "C": "6 N D where FLOPs are used",
            "loss": f"column {result['columns']['loss']!r}, at the end of each run",
        },
        "data": {
            "table": path.name,
            "points": result["runs"],
            "checkpoints": "the last of each run only; no point from inside a decay",
            "excluded": result["columns"].get("dropped", "none"),
        },
        "fit": {
            "loss": f"sum of Huber(delta = {laws.DELTA}) of log residuals",
            "start": f"non-negative least squares on a grid of {len(laws.GRID)} x {len(laws.GRID)} exponents; the best "
            f"{laws.STARTS} cells",
            "optimiser": "BFGS with analytic gradients",
            "stop": "relative gain below 1e-13 twice, the second time from a fresh metric",
            "starts_at_optimum": result["diagnostics"]["starts_at_optimum"],
            "validation": "each size predicted from the others; forecasts hold out the largest size and budget",
        },
        "uncertainty": result.get("bootstrap", "none") and "bootstrap over runs or clusters; profiles of the exponents",
        "result": {k: v for k, v in result.items() if k not in ("columns",)},
    }


def text(result: dict[str, Any]) -> str:
    """The result for a reader."""
    intervals, errors = result.get("intervals", {}), result.get("standard_errors", {})
    lines = ["L(N, D) = E + A / N^alpha + B / D^beta", ""]
    for key in (*laws.NAMES, "a"):
        line = f"  {key:6} {result[key]:<12.6g}"
        if key in intervals:
            low, high = intervals[key]
            line += f" 95% [{low:.4g}, {high:.4g}]  SE {errors[key]:.3g}"
        lines.append(line)
    more = result["diagnostics"]
    profiles = ", ".join(f"{k} [{low:.3f}, {high:.3f}]" for k, (low, high) in result["profile_intervals"].items())
    lines += [
        "  (a = beta / (alpha + beta): the compute-optimal size grows as C^a)",
        "",
        f"objective {result['objective']:.10g} over {result['runs']} runs; {more['starts_at_optimum']} of {more['starts']} "
        "starts end there",
        f"profile intervals: {profiles}",
        f"condition number {more['condition_number']:.3g}; at bounds: {', '.join(more['at_bounds']) or 'none'}",
        f"residuals: {100 * more['rms_log_residual']:.2f} % of the loss (RMS); correlation with "
        + ", ".join(f"{k} {v:+.2f}" for k, v in more["residual_correlation"].items()),
    ]
    worst = max(more["leave_one_size_out"], key=lambda row: abs(row["log_error"]), default=None)
    if worst:
        lines.append(
            f"each size predicted from the others: worst {100 * worst['log_error']:+.2f} % at N = {worst['size']:.4g} "
            f"({len(more['leave_one_size_out'])} sizes)"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3_jax.scaling.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="csv file, one line a run; of a study: its runs.csv")
    parser.add_argument("--n", default="non_embedding", help="column of parameters (default non_embedding)")
    parser.add_argument("--d", default="budget", help="column of tokens (default budget)")
    parser.add_argument("--flops", help="column of FLOPs: D = FLOPs / (6 N) instead of --d")
    parser.add_argument("--loss", default="loss", help="column of final losses (default loss)")
    parser.add_argument("--group", help="column of bootstrap clusters, such as the trunk that forks share")
    parser.add_argument(
        "--only", action="append", default=[], metavar="COLUMN=VALUE", help="keep the runs with this value"
    )
    parser.add_argument("--drop_highest", type=int, default=0, metavar="K", help="leave out the K highest losses")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="DRAWS", help="default 1000; 0 for none")
    parser.add_argument("--card", type=Path, metavar="FILE", help="write the checklist of the fit here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        result = run(options)
        if options.card:
            options.card.write_text(json.dumps(card(result, options.table), indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if options.json else text(result))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The fit that the command line asks for."""
    tokens = options.flops or options.d
    rows = read(options.table, [options.n, tokens, options.loss, *filter(None, [options.group])], options.only)
    n, d, loss = (
        np.array([number(row, column, i + 2) for i, row in enumerate(rows)])
        for column in (options.n, tokens, options.loss)
    )
    if options.flops:
        d = d / (6 * n)
    kept = np.argsort(loss, kind="stable")[: max(0, len(loss) - options.drop_highest)]
    kept.sort()
    fitted = laws.fit(n[kept], d[kept], loss[kept])
    groups = [rows[i][options.group] for i in kept] if options.group else None
    draws = laws.bootstrap(fitted, options.bootstrap, clusters=groups) if options.bootstrap else np.empty((0, 5))
    names = {
        "n": options.n,
        "d": f"{options.flops} / (6 {options.n})" if options.flops else options.d,
        "loss": options.loss,
    }
    names |= {"dropped": f"the {options.drop_highest} highest losses"} if options.drop_highest else {}
    return describe(fitted, draws, len(set(groups)) if groups else len(kept), names)


if __name__ == "__main__":
    sys.exit(main())
