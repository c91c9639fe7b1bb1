"""Writes study folders that look like real ones: curves and scores of the pico pilot, whole or broken."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

# member: (non-embedding, all parameters, tokens/s, recall of own facts and exact rows at 4M, published)
SIZES = {
    "mini": (110_592, 141_312, 65_000, 0.544, 0.493, 3_821_079_552),
    "mini-small": (163_072, 198_912, 52_000, 0.74, 0.53, None),
    "small": (212_992, 253_952, 42_000, 0.891, 0.555, 7_392_272_384),
    "small-medium": (336_960, 383_040, 30_000, 0.97, 0.62, None),
    "medium": (416_000, 467_200, 24_000, 0.999, 0.677, 13_960_238_080),
}
TOKENS_PER_STEP = 1056
PERSONS, KEPT, BITS = 9000, 4500, 48.0


def _wilson(p: float, n: int) -> tuple[float, float]:
    z = 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _row(base: dict[str, Any], suite: str, task: str, metric: str, value: float, n: int, chance: float | None) -> dict:
    row = base | {"suite": suite, "task": task, "metric": metric, "value": value, "n": n, "chance": chance}
    row |= {"low": None, "high": None, "stderr": None}
    if chance is not None:
        value = row["value"] = round(min(max(value, 0.0), 1.0) * n) / n
        row["low"], row["high"] = _wilson(value, n)
        row["stderr"] = math.sqrt(value * (1 - value) / n)
    return row


def controlled_rows(base: dict[str, Any], member: str, progress: float, noise: float) -> list[dict[str, Any]]:
    """Knowledge and reasoning rows as the probes write them; progress = tokens / 4M."""
    non_embedding, _, _, recall, exact, _ = SIZES[member]
    own = min(max(recall * progress**0.9 + noise, 0.01), 0.9995)
    row_ok = min(max(exact * progress**0.45 + noise, 0.01), 0.99)
    bits = own**0.75 * BITS * KEPT
    values = 6 * PERSONS
    rows = [
        _row(base, "knowledge", "universe", "recall", own * 0.5 + 0.5 / 256, values, 1 / 256),
        _row(base, "knowledge", "corpus", "recall", own, values // 2, 1 / 256),
        _row(base, "knowledge", "corpus", "nll", 5.545 * (1 - own**0.75) + 0.01, values // 2, None),
        _row(base, "knowledge", "corpus", "bits_per_parameter", bits / non_embedding, KEPT, None),
        _row(base, "knowledge", "outside", "recall_control", 1 / 256, values // 2, 1 / 256),
        _row(base, "reasoning", "all", "accuracy", row_ok**0.13, 5 * 4096, 1 / 48),
        _row(base, "reasoning", "row", "exact", row_ok, 4096, 48.0**-5),
        _row(base, "reasoning", "all", "nll", 0.05 - 0.5 * math.log(row_ok), 5 * 4096, None),
    ]
    for gap, n in ((1, 2), (2, 2), (3, 1)):
        rows.append(_row(base, "reasoning", f"gap{gap}", "accuracy", row_ok ** (0.07 * gap), n * 4096, 1 / 48))
    return rows


def text_rows(base: dict[str, Any], member: str, progress: float, noise: float) -> list[dict[str, Any]]:
    """Held-out loss of two kinds of real text in nats per token and bits per byte."""
    rows = []
    for domain, floor in (("docs", 1.3), ("code", 0.9)):
        nats = floor + 40 / SIZES[member][0] ** 0.34 + 0.5 * progress**-0.3 + noise
        rows.append(_row(base, "text", domain, "loss", nats, 60_000, None))
        rows[-1]["stderr"] = 0.006
        rows.append(_row(base, "text", domain, "bits_per_byte", nats / math.log(2) / 1.02, 61_000, None))
    return rows


def _metrics(member: str, steps: int, start: int, upto: int, seed: int, domains: list[str]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed + steps)
    non_embedding, _, speed, *_ = SIZES[member]
    lines = []
    for step in range(start + 20, upto + 1, 20):
        tokens = step * TOKENS_PER_STEP
        left = min(1.0, (steps - step) / (0.3 * steps))
        level = 3.2 * (1 + step / 60) ** -0.28 * (110_592 / non_embedding) ** 0.12 * (0.82 + 0.18 * left)
        line = {"step": step, "tokens": tokens, "flops": 6.0 * non_embedding * tokens}
        for i, domain in enumerate(domains):
            line[f"loss/{domain}"] = level * (1.5 - i) + float(rng.normal(0, 0.02))
        line["loss"] = float(np.mean([line[f"loss/{d}"] for d in domains]))
        line |= {"lr": 3e-3 * left, "grad_norm": 0.4, "tokens_per_s": speed * float(rng.normal(1, 0.03))}
        lines.append(line | {"mfu": 0.6, "skipped": 0})
    return lines


def write_run(
    study: Path, member: str, budget: int, seed: int, kind: str = "controlled", ladder: str = "clean",
    largest: int = 4_000_000, stop: float = 1.0, scale: str = "pico",
) -> Path:  # fmt: skip
    """Writes one run folder; `stop` < 1 leaves it unfinished at that fraction of its steps."""
    non_embedding, parameters, speed, _, _, published = SIZES[member]
    steps = budget // TOKENS_PER_STEP
    name = f"{member}-{ladder}-{scale}-s{seed}-{budget // 1_000_000}M"
    folder = study / name
    folder.mkdir(parents=True)
    fork = budget != largest
    start = int(0.7 * steps) if fork else 0
    label = f"phi-3-{member} proxy ({scale}, {ladder} ladder)"
    config = {
        "model": {"member": member, "scale": scale, "ladder": ladder},
        "data": {"source": "facts" if kind == "controlled" else "pydocs", "fingerprint": "d4e5f6",
        "window": 24},
        "non_embedding": non_embedding, "parameters": parameters, "published_parameters": published,
        "budget": steps * TOKENS_PER_STEP, "seed": seed, "steps": steps, "start_step": start,
        "parent": f"{member}-{ladder}-{scale}-s{seed}-{largest // 1_000_000}M" if fork else None,
    }  # fmt: skip
    record = {"fingerprint": f"{abs(hash(name)):012x}"[:12], "name": name, "label": label, "config": config}
    record |= {"packages": {"jax": "0.10.2"}, "git_commit": "0123abc", "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(record))
    tokens = (steps - start) * TOKENS_PER_STEP
    plan = {"parameters": parameters, "flops": 6 * non_embedding * tokens, "seconds": tokens / speed * 0.9}
    (folder / "plan.json").write_text(json.dumps(plan | {"peak_bytes": 450e6}))
    domains = ["knowledge", "reasoning"] if kind == "controlled" else ["docs", "code"]
    upto = int(steps * stop)
    lines = _metrics(member, steps, start, upto, seed, domains)
    if stop == 1.0:
        lines.append(lines[-1] | {"step": steps, "tokens": steps * TOKENS_PER_STEP})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noise = 0.02 * float(np.random.default_rng([seed, non_embedding]).normal()) if seed else 0.0
    rows = []
    for step in sorted({max(start + 1, steps // 2), steps}):
        if step <= upto:
            base = {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "flops": 6.0 * non_embedding * step * 1056,
            }
            base["budget"] = budget
            make = controlled_rows if kind == "controlled" else text_rows
            rows += make(base, member, step * TOKENS_PER_STEP / 4e6, noise)
    (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = {"status": "finished" if stop == 1.0 else "running", "seconds": tokens / speed * stop + 5}
    (folder / "status.json").write_text(json.dumps(status | {"compile_s": 3.4, "peak_bytes": 512e6}))
    return folder


def write_study(
    folder: Path, members: tuple[str, ...] = ("mini", "small", "medium"),
    budgets: tuple[int, ...] = (1_000_000, 2_000_000, 4_000_000), seeds: int = 1, kind: str = "controlled",
) -> Path:  # fmt: skip
    """Writes a whole study of finished runs: every member at every budget for every seed."""
    folder.mkdir(parents=True)
    meta = {
        "name": folder.name,
        "command": "python launch/run.py --config experiments/scaling.py",
        "title": "Matched-budget sweep of Phi-3 mini, small and medium",
        "full": ["phi-3-medium: 13,960,238,080 parameters, 4.8T tokens, 4.0e23 FLOPs",
                 "training state 223 GB: the attached CPU (24 GB) does not hold it"],
        "design": {"budgets": list(budgets), "seeds": seeds, "sizes": list(members)},
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(meta))
    for member in members:
        for seed in range(seeds):
            for budget in budgets:
                write_run(folder, member, budget, seed, kind, largest=max(budgets))
    return folder


def spoil(folder: Path) -> None:
    """Breaks a study the way real ones break: a half-written line, a NaN loss, a run that was stopped."""
    runs = sorted(p for p in folder.iterdir() if (p / "config.json").exists())
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 999_999, "tokens": 1, "loss": math.nan}) + "\n")
    (runs[1] / "status.json").unlink()
    (runs[2] / "evals.jsonl").unlink()
    (runs[3] / "plan.json").write_text("{")
    (folder / "not-a-run").mkdir()
