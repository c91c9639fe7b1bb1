"""What the page shows of the numbers that rules measured: histograms, documents near a limit, what a rule drops alone."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phi3_jax.curation import documents, store
from phi3_jax.curation.rule import Step
from phi3_jax.curation.table import DOCUMENT
from phi3_jax.curation.work import ROWS, Work

BINS, WIDE = 40, 2.0  # a histogram reaches from 0 to WIDE times the limit; what lies beyond is in the last bin
SHOWN = 5


@dataclass
class Seen:
    """Of one step: documents that only it drops, those it would drop, examples, and a histogram for each check."""

    alone: int = 0
    would: int = 0
    near: list[tuple[float, int, str, float]] = field(default_factory=list)  # distance, document, reason, value
    dropped: list[tuple[int, str, float]] = field(default_factory=list)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def look(work: Work, seed: int) -> dict[str, Seen]:
    """Reads every measured part once.

    Args:
      seed: of the draw of dropped examples; those near a limit are the nearest.
    """
    found = {step.name: Seen() for step in work.steps if not step.corpus}
    for steps, folder in work.measured:
        for number in range(len(work.left)):
            _part(work, found, steps, store.part(folder, number), number, seed)
    for seen in found.values():
        seen.near = sorted((-distance, -doc, reason, value) for distance, doc, reason, value in seen.near)
    return found


def _part(work: Work, found: dict[str, Seen], steps: list[Step], path: Path, number: int, seed: int) -> None:
    columns = store.read(path)
    numbers = {k: v.to_numpy(zero_copy_only=False) for k, v in columns.items() if k != "text"}
    docs = numbers["row"] + number * ROWS
    fails = np.stack([documents.failing(step, numbers) for step in steps]) if steps else np.zeros((0, 0))
    for at, step in enumerate(steps):
        seen, checks = found[step.name], DOCUMENT[step.rule].checks
        failed = fails[at] >= 0
        seen.would += int(failed.sum())
        seen.alone += int((failed & ((fails >= 0).sum(0) == 1)).sum())
        for name in documents.COUNTS.get(step.rule, ()):
            seen.counts[name] += int(numbers[f"{step.name}.{name}"].sum())
        nearest = np.full(len(docs), np.inf)
        which = np.zeros(len(docs), np.int64)
        for index, check in enumerate(checks):
            limit = step.parameters[check.limit] if isinstance(check.limit, str) else None
            if not limit:
                continue
            value = numbers[f"{step.name}.{check.reason}"].astype(np.float64)
            ratio = np.where(np.isnan(value), np.inf, value / limit)
            there = np.clip(ratio[~np.isnan(value)], 0, WIDE) * (BINS / WIDE)
            made = np.bincount(np.minimum(there.astype(np.int64), BINS - 1), minlength=BINS)
            seen.histograms[check.reason] = seen.histograms.get(check.reason, np.zeros(BINS, np.int64)) + made
            distance = np.abs(ratio - 1)
            closer = distance < nearest
            nearest[closer], which[closer] = distance[closer], index
        kept = np.flatnonzero(~failed & np.isfinite(nearest))
        for i in kept[np.argsort(nearest[kept], kind="stable")][:SHOWN].tolist():
            check = checks[int(which[i])]
            value = float(numbers[f"{step.name}.{check.reason}"][i])
            _push(seen.near, (-float(nearest[i]), -int(docs[i]), check.reason, value))
        first = np.flatnonzero(failed & ((fails[:at] >= 0).sum(0) == 0))
        drawn = sorted(first.tolist(), key=lambda i: _draw(int(docs[i]), seed))[:SHOWN]
        for i in drawn:
            check = checks[int(fails[at][i])]
            seen.dropped.append((int(docs[i]), check.reason, float(numbers[f"{step.name}.{check.reason}"][i])))
        seen.dropped = sorted(seen.dropped, key=lambda item: _draw(item[0], seed))[:SHOWN]


def _push(heap: list[tuple[float, int, str, float]], item: tuple[float, int, str, float]) -> None:
    heapq.heappush(heap, item)
    if len(heap) > SHOWN:
        heapq.heappop(heap)


def _draw(doc: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{doc}".encode(), digest_size=8).digest()
