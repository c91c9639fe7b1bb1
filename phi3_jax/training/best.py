"""The best checkpoint of a run by what it scores on held-out rows: kept while the run goes on, and named in best.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.records import files

NAME = "best.json"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A metric of a run's evaluations, as its rows have it, and whether more of it is better."""

    suite: str
    task: str
    metric: str
    more: bool

    def value(self, row: Mapping[str, Any]) -> float | None:
        """Of a row, higher is better; None where it is of something else."""
        if any(row.get(name) != getattr(self, name) for name in ("suite", "task", "metric")):
            return None
        value = row.get("value")
        return None if value is None else float(value) if self.more else -float(value)

    def best(self, rows: Iterable[Mapping[str, Any]]) -> tuple[int, float] | None:
        """(step, value) of the first of the best rows after step 0, which no checkpoint stands for."""
        found = [(value, -row["step"]) for row in rows if row["step"] and (value := self.value(row)) is not None]
        value, step = max(found, default=(None, 0))
        return None if value is None else (-step, value if self.more else -value)


def wanted(manifest: Mapping[str, Any]) -> Wanted | None:
    """What decides on data of post-training: reward accuracy of the first held-out pairs, else the first rows' loss."""
    pairs = manifest["loss"] == "preference"
    found = [entry["name"] for entry in manifest["evals"] if entry["meter"] == ("preference" if pairs else "text")]
    if manifest["kind"] != "chats" or not found:
        return None
    return (
        Wanted("preference", f"{found[0]} pairs", "accuracy", True)
        if pairs
        else Wanted("text", found[0], "loss", False)
    )


def write(folder: Path, which: Wanted, found: tuple[int, float]) -> None:
    """Names the best checkpoint so far."""
    step, value = found
    record = {"step": step, "metric": which.metric, "value": value, "checkpoint": f"checkpoints/{step}"}
    files.write_json(folder / NAME, record)


def line(folder: Path) -> str | None:
    """A line about the best checkpoint of a run; None where none is named."""
    record = files.read_state(folder / NAME)
    if not record:
        return None
    return f"best: {record['metric']} {record['value']:.4f} at step {record['step']}: {folder / record['checkpoint']}"
