"""Bootstrap of the Chinchilla fit: ours compared with one scipy BFGS with numeric gradients per draw, in the same run.

    python benchmarks/bootstrap.py svg_extracted_data.csv [--draws 4000] [--theirs 20]

The table is the one of epoch-research/analyzing-chinchilla. The public way starts every draw from the constants of
Hoffmann's TeX source and differentiates numerically; its time for --theirs draws is scaled to --draws, and said so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, special

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.records import tables
from phi3_jax.scaling import laws

TEX = np.array([np.log(406.4), np.log(410.7), 0.5267228, 0.33917084, 0.2849083])
PUBLISHED = {"E": 0.0257, "A": 124.6, "B": 1293.2, "alpha": 0.0154, "beta": 0.0206}  # arXiv:2404.10102


def public_way(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """One draw as the public notebook does it: BFGS from the TeX constants, gradients by finite differences."""

    def objective(theta: np.ndarray) -> float:
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * np.log(n), b - beta * np.log(d), np.full_like(n, e)])
        return special.huber(laws.DELTA, np.log(loss) - special.logsumexp(terms, axis=0)).sum()

    return optimize.minimize(objective, TEX, method="BFGS").x


def natural(theta: np.ndarray) -> list[float]:
    """E, A, B, alpha, beta of a, b, e, alpha, beta."""
    a, b, e, alpha, beta = theta
    return [*np.exp([e, a, b]), alpha, beta]


def main(flags: Mapping[str, Any]) -> None:
    draws, theirs = flags["draws"], flags["theirs"]
    rows = tables.read(Path(flags["table"]))
    n, c, loss = (np.array([r.number(k) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    keep = np.argsort(loss)[:-5]
    n, d, loss = n[keep], c[keep] / (6 * n[keep]), loss[keep]

    start = time.perf_counter()
    fit = laws.fit(n, d, loss)
    fitted = time.perf_counter() - start
    start = time.perf_counter()
    ours = laws.bootstrap(fit, draws)
    seconds = time.perf_counter() - start

    rng = np.random.default_rng(0)
    start = time.perf_counter()
    samples = [rng.integers(0, len(n), len(n)) for _ in range(theirs)]
    found = np.array([natural(public_way(n[i], d[i], loss[i])) for i in samples])
    scaled = (time.perf_counter() - start) * draws / theirs

    print(f"{len(n)} runs, {os.cpu_count()} cores; objective {fit.objective:.10f} in {fitted:.2f} s")
    print(f"ours: {draws} draws in {seconds:.2f} s")
    print(f"one BFGS a draw, numeric gradients: {scaled:.0f} s for {draws} draws (scaled from {theirs})")
    print(f"ratio {scaled / seconds:.0f}")
    print(f"{'':6}{'ours':>10}{'published':>11}{'ratio':>7}{'public way':>12}  (standard errors; {theirs} draws)")
    for i, name in enumerate(laws.NAMES):
        error = ours[:, i].std(ddof=1)
        print(
            f"{name:6}{error:10.4g}{PUBLISHED[name]:11.4g}{error / PUBLISHED[name]:7.2f}{found[:, i].std(ddof=1):12.4g}"
        )


COMMAND = Command(
    "benchmarks/bootstrap.py",
    __doc__,
    main,
    {
        "table": Flag(
            keys.local("csv file with the columns Model Size, Training FLOP and loss"), "TABLE", needed=True, bare=True
        ),
        "draws": Flag(keys.whole("draws of ours", 4000, 2)),
        "theirs": Flag(keys.whole("draws of the public way", 20, 2)),
    },
    "svg_extracted_data.csv",
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
