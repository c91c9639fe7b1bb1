"""Bootstrap of the Chinchilla fit: ours beside one scipy BFGS with numeric gradients a draw, in the same run.

    python benchmarks/bootstrap.py svg_extracted_data.csv [--draws 4000] [--theirs 20]

The table is the one of epoch-research/analyzing-chinchilla. The public way starts every draw from the constants of
Hoffmann's TeX source and differentiates numerically; its time for --theirs draws is scaled to --draws, and said so.
"""

from __future__ import annotations

import csv
import os
import sys
import time

import numpy as np
from scipy import optimize, special

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


def main(arguments: list[str]) -> None:
    path = arguments[0]
    options = dict(zip(arguments[1::2], map(int, arguments[2::2]), strict=True))
    draws, theirs = options.get("--draws", 4000), options.get("--theirs", 20)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    n, c, loss = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
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


if __name__ == "__main__":
    main(sys.argv[1:])
