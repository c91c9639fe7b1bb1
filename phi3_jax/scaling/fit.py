"""Fits L(N, D) = E + A / N^alpha + B / D^beta to a table: `python -m phi3_jax.scaling.fit runs.csv --n params --d tokens`.

Prints the law, what it is worth (Student's t intervals, every start's end) and where it fails (residuals against size and
data, each size predicted from the others). Forks share their trunk's noise, by the column `parent` or --group. Of a law
that the runs do not determine it prints "not determined: ...", the reason, and no constants. `--json` prints the same as
one object at full precision; rounded constants bias predictions (arXiv:2404.10102), so copy them from there.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("fit"))

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import shipped
from phi3_jax.errors import UserError, nearest
from phi3_jax.records import files, tables
from phi3_jax.scaling import intervals, laws

MIN_DRAWS, MAX_DRAWS = 20, 100_000  # an interval of fewer is none; more are no narrower
WORTH = {
    "intervals": "Student's t, linearised, with the share of noise that clusters have in common as an unknown",
    "bootstrap": "standard errors over resampled runs or clusters",
}
# Runs that differ in these follow different laws.
ONE_OF = ("recipe", "arm", "tokenizer", "ladder", "scale", "data", "build", "scorer")


def read(path: Path, columns: Sequence[str], only: Sequence[str] = ()) -> list[tables.Row]:
    """Finished runs of a table that has the columns; `only` are words COLUMN=VALUE that runs must meet.

    Raises:
      UserError: see `tables.read`; a column it lacks (naming the nearest), or runs of several recipes.
    """
    rows = tables.read(path)
    pairs = [word.partition("=")[::2] for word in only]
    for column in (*columns, *(column for column, _ in pairs)):
        tables.need(rows, column)
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


def clusters(rows: Sequence[tables.Row], column: str) -> list[str]:
    """Bootstrap cluster of each run; one with an empty cell is a cluster of its own, by its name where there is one.

    A trunk has no parent, and its forks name it: it and they are one cluster.
    """
    return [row[column] or row.get("name") or f"line {row.line}" for row in rows]


def describe(
    fitted: laws.Fit, worth: intervals.Worth, names: dict[str, str], draws: np.ndarray | None = None, clusters: int = 0
) -> dict[str, Any]:
    """Everything the command prints, as plain JSON types; of a law that is not determined why, and no constants.

    Args:
      fitted, worth: the law and what it is worth.
      names: {"n", "d", "loss": column}.
      draws: (draws, 5) laws of resampled runs, for their standard errors.
      clusters: how many clusters were resampled.
    """
    law, reason = fitted.law, intervals.undetermined(fitted, worth, draws)
    if reason:
        return {"determined": False, "reason": reason, "runs": len(fitted.n), "columns": names}
    found = {"determined": True} | {name: getattr(law, name) for name in laws.NAMES} | {"a": law.a, "b": 1 - law.a}
    out: dict[str, Any] = found | {"objective": fitted.objective, "runs": len(fitted.n), "columns": names}
    out["intervals"] = {name: list(ends) for name, ends in worth.constants().items()}
    out["shared_noise"] = worth.shared
    if draws is not None and len(draws):
        with_a = np.column_stack([draws, draws[:, 4] / (draws[:, 3] + draws[:, 4])])
        spread = zip((*laws.NAMES, "a"), with_a.std(axis=0, ddof=1), strict=True)
        out["bootstrap"] = {
            "draws": len(draws),
            "clusters": clusters,
            "standard_errors": {k: float(s) for k, s in spread},
        }
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
            "starts_at_optimum": result.get("diagnostics", {}).get("starts_at_optimum"),
            "validation": "each size predicted from the others; forecasts hold out the largest size and budget",
        },
        "uncertainty": "; ".join(WORTH[key] for key in WORTH if key in result) or "none",
        "result": {k: v for k, v in result.items() if k not in ("columns",)},
    }


def text(result: dict[str, Any]) -> str:
    """The result for a reader."""
    if not result["determined"]:
        return f"not determined: {result['reason']}"
    errors = result.get("bootstrap", {}).get("standard_errors", {})
    lines = ["L(N, D) = E + A / N^alpha + B / D^beta", ""]
    for key in (*laws.NAMES, "a"):
        low, high = result["intervals"][key]
        error = f"  bootstrapped SE {errors[key]:.3g}" if key in errors else ""
        lines.append(f"  {key:6} {result[key]:<12.6g} 95% [{low:.4g}, {high:.4g}]{error}")
    more = result["diagnostics"]
    lines += [
        "  (a = beta / (alpha + beta): the compute-optimal size grows as C^a)",
        "",
        f"objective {result['objective']:.10g} over {result['runs']} runs; {more['starts_at_optimum']} of {more['starts']} "
        "starts end there",
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


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    check(flags)
    result = run(flags)
    if flags["card"]:
        try:
            files.write_json(Path(flags["card"]), card(result, Path(flags["table"])))
        except OSError as error:
            raise UserError(f"--card {flags['card']} cannot be written: {error.strerror}; name another") from error
    print(json.dumps(result) if flags["json"] else text(result))


def check(flags: Mapping[str, Any]) -> None:
    """Refuses, before any work, numbers that mean nothing and a card that cannot be written."""
    if 0 < flags["bootstrap"] < MIN_DRAWS:
        raise UserError(
            f"--bootstrap {flags['bootstrap']}: give 0 for no standard errors, or {MIN_DRAWS} to {MAX_DRAWS:,} draws"
        )
    card = Path(flags["card"]) if flags["card"] else None
    if card and card.is_dir():
        raise UserError(f"--card {card} is a folder; give a file in it, such as {card / 'fit_card.json'}")
    if card and not (card.parent.is_dir() and os.access(card.parent, os.W_OK)):
        problem = "cannot be written to" if card.parent.is_dir() else "is no folder"
        raise UserError(f"--card {card}: {card.parent} {problem}; make it, or name another file")


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a command line picks from a table: N, D and loss (runs,), clusters that share noise, and the columns' names."""

    path: Path
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    clusters: list[str]
    names: dict[str, str]

    def fit(self, chosen: np.ndarray | slice = slice(None)) -> laws.Fit:
        """The law of the chosen runs.

        Raises:
          UserError: see `laws.check`; names the table.
        """
        try:
            return laws.fit(self.n[chosen], self.d[chosen], self.loss[chosen])
        except UserError as error:
            raise UserError(f"{self.path}, column {self.names['loss']}: {error}") from error


def pick(flags: Mapping[str, Any]) -> Runs:
    """The runs that the flags `table`, `n`, `d`, `flops`, `loss`, `group`, `only` and `drop_highest` name."""
    if bad := next((word for word in flags["only"] if "=" not in word), None):
        raise UserError(f"--only {bad!r} is not COLUMN=VALUE, such as --only arm=filtered")
    path, tokens, dropped = shipped.find(flags["table"]), flags["flops"] or flags["d"], flags["drop_highest"]
    rows = read(path, [flags["n"], tokens, flags["loss"], *filter(None, [flags["group"]])], flags["only"])
    n, d, loss = (np.array([row.number(column) for row in rows]) for column in (flags["n"], tokens, flags["loss"]))
    if flags["flops"]:
        d = d / (6 * n)
    kept = np.argsort(loss, kind="stable")[: max(0, len(loss) - dropped)]
    kept.sort()
    group = flags["group"] or ("parent" if "parent" in rows[0] else None)
    groups = clusters([rows[i] for i in kept], group) if group else [str(i) for i in kept]
    names = {
        "n": flags["n"],
        "d": f"{flags['flops']} / (6 {flags['n']})" if flags["flops"] else flags["d"],
        "loss": flags["loss"],
    }
    names |= {"dropped": f"the {dropped} highest losses"} if dropped else {}
    return Runs(path, n[kept], d[kept], loss[kept], groups, names)


def run(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fit that the command line asks for."""
    runs = pick(flags)
    fitted = runs.fit()
    draws = laws.bootstrap(fitted, flags["bootstrap"], clusters=runs.clusters) if flags["bootstrap"] else None
    return describe(fitted, intervals.worth(fitted, runs.clusters), runs.names, draws, len(set(runs.clusters)))
