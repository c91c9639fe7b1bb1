"""Makes `published/families.csv`: `python analysis/families.py base_llm_benchmark_eval.csv published/families.csv`.

The input is the benchmark table of Ruan et al. (arXiv:2405.10938, Apache-2.0).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from phi3_jax.records import tables
from phi3_jax.scaling.published import FamilyGain


def family_gains(path: Path) -> list[FamilyGain]:
    """The rows of `scaling.published.families`, by the input.

    Every three neighbouring sizes of at least 1B parameters of one family; of two models of one size the first counts.
    """
    models = tables.read(path)
    names = [c for c in models[0] if c not in ("Model", "Model Family", "FLOPs (1E21)") and "Size" not in c]
    by_family: dict[str, dict[float, Mapping[str, str]]] = {}
    for model in models:
        size = float(model["Model Size (B)"])
        if size >= 1:
            by_family.setdefault(model["Model Family"], {}).setdefault(size, model)
    out: list[FamilyGain] = []
    for name, sizes in by_family.items():
        order = sorted(sizes)
        for small, middle, large in zip(order, order[1:], order[2:], strict=False):
            d1, d2 = np.diff(np.log2((small, middle, large)))
            for benchmark in names:
                p = [100 * _score(sizes[s][benchmark]) for s in (small, middle, large)]
                if np.isfinite(p).all():
                    first, second = (p[1] - p[0]) / d1, (p[2] - p[1]) / d2
                    out.append(
                        FamilyGain(
                            family=name,
                            benchmark=benchmark,
                            small=small,
                            middle=middle,
                            large=large,
                            first=first,
                            second=second,
                        )
                    )
    return out


def _score(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


if __name__ == "__main__":
    rows = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in family_gains(Path(sys.argv[1]))
    ]
    tables.write(Path(sys.argv[2]), tuple(FamilyGain.__annotations__), rows)
