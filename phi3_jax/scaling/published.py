"""The published numbers of the Phi-3 family, from `analysis/published/` (its README says where each comes from)."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path
from typing import TypedDict

import numpy as np
from scipy import special

from phi3_jax import family, shipped
from phi3_jax.errors import UserError, nearest
from phi3_jax.records import tables

FOLDER = shipped.root() / "analysis" / "published"
SIZES = tuple(float(family.published_params(m) or 0) for m in family.TRIO)  # parameters
TOKENS = tuple(family.published_tokens(m) for m in family.TRIO)
FLOPS = tuple(6 * n * d for n, d in zip(SIZES, TOKENS, strict=True))
NOT_AVERAGED = ("GPQA", "MT-Bench")  # rows of the table that its average leaves out


@cache
def table(name: str, folder: Path = FOLDER) -> tuple[dict[str, str], ...]:
    """Rows of `analysis/published/<name>.csv`.

    Raises:
      UserError: no such table, naming the nearest.
    """
    path = folder / f"{name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.csv"))
        where = nearest(name, known) if known else f"; {folder} is missing: run from a clone of the repository"
        raise UserError(f"no published table {name!r}{where}")
    return tuple(tables.read(path))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the report's table: accuracies (0 to 1) of mini, small, medium, items, chance level and skill group."""

    name: str
    scores: tuple[float, float, float]
    n: int
    chance: float
    group: str


def benchmarks(version: str = "v4") -> list[Benchmark]:
    """The rows that the report averages, in its order, of one version of the table.

    Versions: v4, the report; azure, the cards of 23 April 2024 with their two swaps put right (`inconsistencies`); hf, the
    Hugging Face card of that time, whose mini is the 128k variant. Rows that a version lacks, or has for fewer than three
    sizes, are left out.

    Raises:
      UserError: another version.
    """
    columns = {
        "v4": ("mini_v4", "small_v4", "medium_v4"),
        "azure": ("mini4k_azure_2024-04-23", "small_preview_azure_2024-04-23", "medium_preview_azure_2024-04-23"),
        "hf": ("mini128k_hfcard_2024-04", "small_preview_hfcard_2024-04", "medium_preview_hfcard_2024-04"),
    }
    if version not in columns:
        raise UserError(f"unknown version {version!r} of the table{nearest(version, columns)}")
    about = {row["benchmark"]: row for row in table("testset_sizes")}
    rows = {
        row["benchmark"]: [_number(row.get(c)) for c in columns[version]] for row in table("phi3_academic_versions")
    }
    if version == "azure":
        for a, b in SWAPPED:
            rows[a][0], rows[b][0] = rows[b][0], rows[a][0]
    out = []
    for row in table("phi3_academic"):
        name = row["benchmark"]
        scores = rows.get(name, [math.nan])
        if name in about and name not in NOT_AVERAGED and len(scores) == 3 and np.isfinite(scores).all():
            entry = about[name]
            mini, small, medium = (s / 100 for s in scores)
            chance = _number(entry["chance"]) if entry["chance"] else 0.0
            out.append(Benchmark(name, (mini, small, medium), int(entry["n"]), chance, entry["group"]))
    return out


def benchmark(name: str, version: str = "v4") -> Benchmark:
    """One row.

    Raises:
      UserError: unknown benchmark, naming the nearest.
    """
    rows = {b.name: b for b in benchmarks(version)}
    if name not in rows:
        raise UserError(f"unknown benchmark {name!r}{nearest(name, rows)}")
    return rows[name]


# ------------------------------------------------------------------------------------------------ inconsistencies

SWAPPED = (("MedQA", "MBPP"), ("PIQA", "OpenBookQA"))  # in the mini column of the card of 23 April 2024


@dataclasses.dataclass(frozen=True)
class Inconsistency:
    """A place where published numbers contradict each other: what is printed, and what it should be by the others."""

    what: str
    printed: float
    expected: float


def inconsistencies() -> list[Inconsistency]:
    """The report's own contradictions, recomputed from its tables; an empty list would mean that they are consistent."""
    rows = [row for row in table("phi3_academic") if row["benchmark"] not in NOT_AVERAGED]
    averages = next(row for row in rows if row["benchmark"].startswith("Average"))
    rows = [row for row in rows if row is not averages]
    out = []
    models = [c for c in averages if c not in ("benchmark", "shots", "metric", "source")]
    for model in models:
        values = np.array([_number(row[model]) for row in rows])
        printed, mean = _number(averages[model]), float(values.mean())
        # The report truncates to a tenth: a printed average is between 0 and 0.1 below the mean.
        if np.isfinite(values).all() and math.isfinite(printed) and not -0.02 <= mean - printed < 0.1:
            out.append(Inconsistency(f"average of {model} over the {len(rows)} rows", printed, mean))
    by_name = {row["benchmark"]: row for row in rows}
    for model in models:
        truthful, trivia = (_number(by_name[name][model]) for name in ("TruthfulQA", "TriviaQA"))
        if truthful == trivia:
            card = _card("TruthfulQA", "GPT-3.5")
            out.append(Inconsistency(f"TruthfulQA of {model} equals its TriviaQA", truthful, card))
    versions = {row["benchmark"]: row for row in table("phi3_academic_versions")}
    early, final = "mini4k_azure_2024-04-23", "mini_v4"
    for a, b in SWAPPED:
        first = [_number(versions[name][early]) for name in (a, b)]
        last = [_number(versions[name][final]) for name in (a, b)]
        if first == last[::-1] and first != last:
            out += [Inconsistency(f"{name} of mini in the card of 23 April 2024: swapped", p, o)
                    for name, p, o in zip((a, b), first, last, strict=True)]  # fmt: skip
    return out


def _card(benchmark: str, model: str) -> float:
    """Median of a benchmark's value for a model over the model cards, nan where none has it."""
    names = benchmark.lower().replace(" ", "")
    found = [
        _number(row["value"])
        for row in table("phi3_modelcard_tables_long")
        if row["benchmark"].lower().replace(" ", "").startswith(names) and model.lower() in row["model"].lower()
    ]
    return float(np.median(found)) if found else math.nan


# ------------------------------------------------------------------------------------------------ other families


class FamilyGain(TypedDict):
    """One size triple (billions of parameters) of another family on one benchmark, points per doubling of parameters."""

    family: str
    benchmark: str
    small: float
    middle: float
    large: float
    first: float
    second: float


def families() -> list[FamilyGain]:
    """Gains of other model families: a row per size triple and benchmark."""
    return [
        FamilyGain(
            family=row["family"],
            benchmark=row["benchmark"],
            small=float(row["small"]),
            middle=float(row["middle"]),
            large=float(row["large"]),
            first=float(row["first"]),
            second=float(row["second"]),
        )
        for row in table("families")
    ]


@dataclasses.dataclass(frozen=True)
class Safety:
    """A row of the report's responsible-AI table: a mean score, or a share of conversations with a defect.

    Attributes:
      values: of mini, small, medium; lower is better.
      share: whether it is a share, whose error its number of conversations would give; that is not published.
    """

    name: str
    metric: str
    values: tuple[float, float, float]
    share: bool

    @property
    def steps(self) -> tuple[float, float]:
        """Change per doubling of parameters, mini to small and small to medium."""
        first, second = np.diff(self.values) / np.diff(np.log2(SIZES))
        return float(first), float(second)

    def conversations(self, a: int, b: int, power: float = 0.8, level: float = 0.95) -> float:
        """How many conversations a model tell two of the three shares apart, by the normal approximation; inf if equal.

        n = (z_level + z_power)^2 (p (1 - p) + q (1 - q)) / (p - q)^2, two-sided.
        """
        p, q = self.values[a], self.values[b]
        if p == q:
            return math.inf
        z = special.ndtri((1 + level) / 2) + special.ndtri(power)
        return float(z**2 * (p * (1 - p) + q * (1 - q)) / (p - q) ** 2)


def safety() -> tuple[Safety, ...]:
    """The five rows of `phi3_safety`."""
    columns = ("phi3_mini_3.8b", "phi3_small_7b", "phi3_medium_14b")
    found = []
    for row in table("phi3_safety"):
        mini, small, medium = (_number(row[name]) for name in columns)
        found.append(Safety(row["category"], row["metric"], (mini, small, medium), row["metric"].startswith("DR-")))
    return tuple(found)
