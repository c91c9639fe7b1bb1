"""How far seeds lie apart, by endpoint, size and tokens: `analysis/results/seed_sd.csv`, from the studies that ship.

Runs of one study, arm, size and budget that differ in their seed give a variance; those of several arms are pooled by their
degrees of freedom. After a study is added, `python -c "from phi3_jax.scaling import noise; noise.write()"` writes it anew.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import special

from phi3_jax import shipped
from phi3_jax.errors import UserError, nearest
from phi3_jax.records import tables

TABLE = "analysis/results/seed_sd.csv"
SOURCES = ("data_optimal/runs.csv", "search/runs.csv", "calibration/A.csv")
_ALIKE = 1.5  # a size within this factor of a measured one has its noise


@dataclasses.dataclass(frozen=True)
class Noise:
    """Standard deviation between seeds of one endpoint at one size and budget, in its own unit (a share is 0 to 1).

    Attributes:
      endpoint: SUITE/TASK/METRIC.
      non_embedding: parameters of the size.
      tokens: that the runs were trained on.
      sd: pooled over arms.
      free: degrees of freedom: runs minus arms.
      runs: how many runs are behind it.
    """

    endpoint: str
    non_embedding: int
    tokens: int
    sd: float
    free: int
    runs: int

    @property
    def most(self) -> float:
        """Upper end of a one-sided 95 % interval of the standard deviation (chi-square)."""
        return self.sd * math.sqrt(self.free / float(special.chdtri(self.free, 0.95)))


def measure(found: Iterable[Sequence[tables.Row]]) -> list[Noise]:
    """The noise of every endpoint and size of which two seeds ran; `found` holds the rows of one table each."""
    groups: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for rows in found:
        cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
        for row in rows:
            if row.get("status", "finished") == "finished":
                key = tuple(row.get(column, "") for column in ("arm", "non_embedding", "budget"))
                for column in row:
                    if column.count("/") == 2 and "recall_by_frequency" not in column and row[column]:
                        name = _name(column, row.get("scorer", ""))
                        cells.setdefault(key, {}).setdefault(name, []).append(row.number(column, positive=False))
        for (_, count, budget), endpoints in cells.items():
            for name, values in endpoints.items():
                if len(values) > 1:
                    groups.setdefault((name, int(float(count)), int(float(budget))), []).append(np.array(values))
    out = []
    for (name, size, tokens), arms in sorted(groups.items()):
        free = sum(len(v) - 1 for v in arms)
        squares = sum(float(np.square(v - v.mean()).sum()) for v in arms)
        out.append(Noise(name, size, tokens, math.sqrt(squares / free), free, sum(map(len, arms))))
    return out


def _name(column: str, scorer: str) -> str:
    """An endpoint's name of today: the recall of the first scorer was the teacher-forced one (`data.meters.knowledge`)."""
    suite, _, metric = column.split("/")
    old = suite == "knowledge" and metric == "recall" and scorer in ("", "1")
    return f"{column}_teacher_forced" if old else column


def write(path: Path | None = None) -> None:
    """Measures the studies that ship and writes the table."""
    root = shipped.root() / "analysis/results"
    found = measure(tables.read(root / name) for name in SOURCES if (root / name).is_file())
    rows = [dataclasses.asdict(n) | {"sd": f"{n.sd:.4g}"} for n in found]
    tables.write(path or shipped.root() / TABLE, [f.name for f in dataclasses.fields(Noise)], rows)


@functools.cache
def table() -> tuple[Noise, ...]:
    """The table that ships."""
    rows = tables.read(shipped.find(TABLE) if (shipped.root() / TABLE).is_file() else Path(TABLE))
    return tuple(
        Noise(
            r["endpoint"],
            int(r["non_embedding"]),
            int(r["tokens"]),
            r.number("sd", positive=False),
            int(r["free"]),
            int(r["runs"]),
        )
        for r in rows
    )


def of(endpoint: str, size: float, tokens: float | None = None) -> Noise:
    """The noise of an endpoint at the measured size nearest to `size` parameters, there of most degrees of freedom.

    With `tokens`, of runs that were trained on about as many.

    Raises:
      UserError: an endpoint that was not measured, or no size (or tokens) within a factor of 1.5.
    """
    names = {n.endpoint for n in table()}
    if endpoint not in names:
        raise UserError(
            f"no noise between seeds was measured of {endpoint!r}{nearest(endpoint, sorted(names))}; give --seed_sd"
        )
    alike = [n for n in table() if n.endpoint == endpoint]
    if tokens is not None:
        alike = [n for n in alike if abs(math.log(n.tokens / tokens)) < math.log(_ALIKE)]
        if not alike:
            raise UserError(
                f"no noise between seeds of {endpoint} was measured near {tokens:,.0f} tokens; give --seed_sd"
            )
    found = min(alike, key=lambda n: (abs(math.log(n.non_embedding / size)), -n.free))
    if abs(math.log(found.non_embedding / size)) > math.log(_ALIKE):
        sizes = ", ".join(f"{n.non_embedding:,}" for n in table() if n.endpoint == endpoint)
        raise UserError(
            f"no noise between seeds of {endpoint} was measured near {size:,.0f} parameters, but at {sizes}; give --seed_sd"
        )
    return found
