"""How often printed intervals hold: on known laws, and on published runs that were held out.

    python benchmarks/coverage.py --data shared/scaling_data [--tables 200] [--keep analysis/results/coverage]

Known laws: tables of runs are drawn from a law, in ten designs; of every interval, how many hold the truth, and how wide
they are beside Student's t interval of least squares that is told the share of noise which forks have in common.

Published runs (the folders isoflop_studies, gadre_overtraining, loss_to_loss and chinchilla_epoch of --data): the lowest
part of each table's runs, by 6 N D, by size or by tokens, is fitted and the rest forecast. The constants of the forecasts'
intervals (`scaling.backtest.Calibration`) come from tables of other sources: the digitisations of Hoffmann et al. are one
source, and so are the corpora of one group. --keep writes the coverages, and the constants from all tables, as csv.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.scaling import backtest, intervals, laws

TRUE = laws.Law(E=1.7, A=400.0, B=2000.0, alpha=0.34, beta=0.36)
CONSTANTS = {"E": TRUE.E, "alpha": TRUE.alpha, "beta": TRUE.beta, "a": TRUE.a}
SHARED = 0.7  # of the variance, by the forks of a trunk
POINTS = ("centre", "4N 4D", "10D", "10N")
CUTS = (0.5, 0.6, 0.7, 0.8)
LEVEL = 0.97  # of the runs that choose the constants; of other sources about 95 of 100 lie inside


# ------------------------------------------------------------------------------------------------ known laws


@dataclass(frozen=True)
class Design:
    """Sizes and tokens (runs,), noise of ln L, and the trunk of each run where forks share SHARED of its variance."""

    n: np.ndarray
    d: np.ndarray
    noise: float
    trunks: np.ndarray | None = None

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(runs,) losses."""
        noise = rng.normal(size=len(self.n))
        if self.trunks is not None:
            noise = np.sqrt(SHARED) * rng.normal(size=self.trunks.max() + 1)[self.trunks] + np.sqrt(1 - SHARED) * noise
        return TRUE(self.n, self.d) * np.exp(self.noise * noise)

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """N and D (4,) of `POINTS`."""
        n, d = self.n.max(), self.d.max()
        middle = (float(np.exp(np.log(x).mean())) for x in (self.n, self.d))
        return tuple(np.array(x) for x in zip(middle, (4 * n, 4 * d), (n, 10 * d), (10 * n, d), strict=True))  # type: ignore[return-value]


def grid(sizes: int, budgets: int, top: float = 2e9) -> tuple[np.ndarray, np.ndarray]:
    """N and D of every size at every budget."""
    n, d = np.meshgrid(np.geomspace(2e7, top, sizes), np.geomspace(1e9, 6e10, budgets), indexing="ij")
    return n.ravel(), d.ravel()


def designs() -> dict[str, Design]:
    """The designs of the table, by name."""
    ladder = np.repeat(np.geomspace(2e7, 2e9, 7), 3)
    flops = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    iso = TRUE.optimum(flops)[0] * np.tile(np.geomspace(0.2, 5, 7), 5)
    trunks = np.repeat(np.arange(6), 4)
    twice = tuple(np.tile(x, 2) for x in grid(6, 4))
    return {
        "6 x 4 grid, 0.3 %": Design(*grid(6, 4), 0.003),
        "6 x 4 grid, 1.5 %": Design(*grid(6, 4), 0.015),
        "ladder, D = 10, 20, 40 N, 0.3 %": Design(ladder, ladder * np.tile([10, 20, 40], 7), 0.003),
        "ladder, 1.5 %": Design(ladder, ladder * np.tile([10, 20, 40], 7), 0.015),
        "isoFLOP 5 x 7, 0.3 %": Design(iso, flops / 6 / iso, 0.003),
        "3 sizes x 4, 0.3 %": Design(*grid(3, 4, 1e9), 0.003),
        "5 x 3, 1 %": Design(*grid(5, 3, 1e9), 0.01),
        "6 trunks x 4 forks, 0.5 %": Design(*grid(6, 4), 0.005, trunks),
        "same, 2 seeds": Design(*twice, 0.005, np.concatenate([trunks, trunks + 6])),
        "6 trunks x 4 forks, 1.5 %": Design(*grid(6, 4), 0.015, trunks),
    }


def known(design: Design, count: int, seed: int) -> dict[str, list[tuple[float, float, float, float]]]:
    """{interval: [(low, high, truth, width of the t interval that knows the share)]} over drawn tables."""
    rng, out = np.random.default_rng(seed), {}
    n, d = design.points
    for k in range(count):
        fitted = laws.fit(design.n, design.d, design.draw(rng))
        fresh = TRUE(n, d) * np.exp(design.noise * rng.normal(size=len(n)))
        worth = intervals.worth(fitted, design.trunks)
        told = intervals.worth(fitted, design.trunks, np.array([SHARED]))
        if intervals.undetermined(fitted, worth):
            continue
        ends, yard = worth.constants(), told.constants()
        for name, truth in CONSTANTS.items():
            out.setdefault(name, []).append((*ends[name], truth, _width(*yard[name])))
        kinds = {"": worth.new_runs(n, d)}
        if k % 4 == 0:  # seven fits each
            ahead = backtest.forecast(fitted, design.trunks, n, d)
            kinds["forecast "] = ahead.low, ahead.high
        wide = _width(*told.new_runs(n, d))
        for kind, (low, high) in kinds.items():
            for i, point in enumerate(POINTS):
                out.setdefault(kind + point, []).append((low[i], high[i], fresh[i], wide[i]))
    return out


def _width(low: Any, high: Any) -> Any:
    """Width of a t interval as it would be without `intervals.WIDER`."""
    return (high - low) / intervals.WIDER


def known_rows(count: int) -> Iterator[dict[str, object]]:
    """A row a design and interval: coverage, and the median width over the t interval's."""
    for seed, (name, design) in enumerate(designs().items()):
        for kind, found in known(design, count, seed).items():
            low, high, truth, yard = np.array(found).T
            yield {
                "design": name, "interval": kind, "tables": len(found),
                "coverage": round(float(np.mean((low <= truth) & (truth <= high))), 3),
                "width over t": round(float(np.median(high - low) / np.median(yard)), 3),
            }  # fmt: skip


# ------------------------------------------------------------------------------------------------ published runs

Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def published(data: Path) -> dict[tuple[str, str], Table]:
    """{(source, table): N, D and loss}."""
    out = {}
    iso = [r for r in tables.read(data / "isoflop_studies/transform_isoflops.csv") if r["outlier"] == "False"]
    for name, rows in _split(iso, "experiment"):
        source = next(s for s in ("chinchilla", "llama_3", "marin", "misfitting") if s in name)
        out[source, f"isoflop_studies {name}"] = _columns(rows, "params", "tokens", "loss")
    gadre = tables.read(data / "gadre_overtraining/runs.csv")
    for name, rows in _split([r for r in gadre if r.number("chinchilla_multiplier") >= 0.5], "dataset"):
        out["gadre", f"gadre_overtraining {name}"] = _columns(rows, "N", "D", "loss_c4_val")
    for name, rows in _split(tables.read(data / "loss_to_loss/sweep.csv"), "data"):
        out["loss_to_loss", f"loss_to_loss {name}"] = _columns(rows, "params", "tokens", "val_loss")
    n, flops, loss = _columns(
        tables.read(data / "chinchilla_epoch/svg_extracted_data.csv"), "Model Size", "Training FLOP", "loss"
    )
    kept = np.argsort(loss)[:-5]  # as Besiroglu et al. (arXiv:2404.10102)
    out["chinchilla", "chinchilla_epoch"] = n[kept], (flops / 6 / n)[kept], loss[kept]
    return out


def _split(rows: Sequence[tables.Row], column: str) -> Iterator[tuple[str, list[tables.Row]]]:
    for name, found in itertools.groupby(sorted(rows, key=lambda r: r[column]), key=lambda r: r[column]):
        yield name, list(found)


def _columns(rows: Sequence[tables.Row], n: str, d: str, loss: str) -> Table:
    return tuple(np.array([r.number(c) for r in rows]) for c in (n, d, loss))  # type: ignore[return-value]


@dataclass(frozen=True)
class Held:
    """Held-out runs of one table.

    Attributes:
      source, table: where they come from.
      axis, cut: what they are the highest runs of, and the share of the table below them.
      error: (runs,) ln measured - ln forecast.
      reach: the forecast.
      inside: (runs,) whether the t interval, which knows no error of form, holds the loss.
    """

    source: str
    table: str
    axis: str
    cut: float
    error: np.ndarray
    reach: backtest.Reach
    inside: np.ndarray


def held_out(found: Mapping[tuple[str, str], Table], cuts: Sequence[float] = CUTS) -> list[Held]:
    """Every table fitted below every cut of 6 N D, of size and of tokens; laws at a bound forecast nothing."""
    out = []
    for (source, name), (n, d, loss) in found.items():
        for (axis, x), cut in itertools.product({"6 N D": n * d, "N": n, "D": d}.items(), cuts):
            seen = x <= np.quantile(x, cut)
            try:
                fitted = laws.fit(n[seen], d[seen], loss[seen])
            except UserError:
                continue
            if seen.all() or intervals.out_of_reach(fitted):
                continue
            reach = backtest.reach(fitted, None, n[~seen], d[~seen])
            low, high = intervals.worth(fitted).new_runs(n[~seen], d[~seen])
            inside = (low <= loss[~seen]) & (loss[~seen] <= high)
            out.append(Held(source, name, axis, cut, np.log(loss[~seen] / reach.value), reach, inside))
    return out


def calibrate(found: Sequence[Held]) -> backtest.Calibration:
    """Constants from held-out runs, every table and cut counted alike.

    The rate is the root of what the squares of 1.96 errors have beyond those of t intervals, over the squares of distances;
    the factor puts LEVEL of the runs inside.
    """
    weights = np.concatenate([np.full(len(h.error), 1 / len(h.error)) for h in found])
    error, half, distance = (
        np.concatenate(x) for x in zip(*((np.abs(h.error), h.reach.half, h.reach.distance) for h in found), strict=True)
    )
    beyond = np.maximum(0, (1.96 * error) ** 2 - half**2)
    rate = float(np.sqrt(weights @ beyond / (weights @ distance**2)))
    ratio = np.where(error <= half, 0, error / np.concatenate([h.reach.scale(rate) for h in found]))
    order = np.argsort(ratio)
    total = np.cumsum(weights[order])
    factor = float(ratio[order][np.searchsorted(total, LEVEL * total[-1])])
    return backtest.Calibration(round(factor, 3), round(rate, 4))


def scored(found: Sequence[Held]) -> Iterator[dict[str, object]]:
    """A row a table and cut: coverage and width of its held-out runs, with constants from other sources."""
    constants = {s: calibrate([h for h in found if h.source != s]) for s in sorted({h.source for h in found})}
    for h in found:
        width = h.reach.widths(constants[h.source])
        yield {
            "table": h.table, "axis": h.axis, "cut": h.cut, "held": len(h.error),
            "inside": int(np.sum(np.abs(h.error) <= width)), "inside without error of form": int(h.inside.sum()),
            "width": round(float(np.median(2 * np.sinh(width))), 4),
            "rms error": round(float(np.sqrt(np.mean(h.error**2))), 4), "widths": 2 * np.sinh(width),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the command


def main(flags: Mapping[str, Any]) -> None:
    keep = Path(flags["keep"]) if flags["keep"] else None
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    rows = []
    print(
        "known laws: coverage, and in brackets the median width over that of the t interval which knows the shared noise"
    )
    for row in known_rows(flags["tables"]):
        rows.append(row)
        if row["interval"] == "E":
            print(f"\n{row['design']} ({row['tables']} tables determined of {flags['tables']})", flush=True)
        print(f"  {row['interval']:16} {row['coverage']:.3f} [{row['width over t']:.2f}]")
    _keep(keep, "designs", rows)
    if not flags["data"]:
        return
    found = held_out(published(Path(flags["data"])))
    shipped = calibrate(found)
    lines = list(scored(found))
    print("\npublished runs, held out: inside 95 % intervals, and median (high - low) / centre")
    for axis, cut in itertools.product(("6 N D", "N", "D"), CUTS):
        here = [r for r in lines if (r["axis"], r["cut"]) == (axis, cut)]
        held, inside, without = (sum(r[k] for r in here) for k in ("held", "inside", "inside without error of form"))  # type: ignore[misc]
        width = np.median(np.concatenate([r["widths"] for r in here]))  # type: ignore[misc]
        print(
            f"  lowest {100 * cut:.0f} % by {axis}: {inside} of {held} runs of {len(here)} tables "
            f"({100 * inside / held:.1f} %), width {100 * width:.1f} %; without error of form {100 * without / held:.1f} %"
        )
        if (axis, cut) == ("6 N D", 0.7):
            for r in here:
                print(f"      {r['table']:68} {r['inside']:3} of {r['held']:3}, width {100 * r['width']:.1f} %")  # type: ignore[operator]
    print(f"constants from all tables: {shipped}; shipped: {backtest.SHIPPED}")
    _keep(keep, "public", [{k: v for k, v in r.items() if k != "widths"} for r in lines])
    _keep(keep, "calibration", [{"factor": shipped.factor, "rate": shipped.rate}])


def _keep(folder: Path | None, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    if folder:
        tables.write(folder / f"{name}.csv", list(rows[0]), rows)


COMMAND = Command(
    "benchmarks/coverage.py",
    __doc__,
    main,
    {
        "data": Flag(keys.local("folder of published tables; without, known laws alone"), "DIR"),
        "tables": Flag(keys.whole("tables drawn in each design", 200, 8, 10_000)),
        "keep": Flag(keys.local("folder for coverages as csv"), "DIR"),
    },
    "--data shared/scaling_data",
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
