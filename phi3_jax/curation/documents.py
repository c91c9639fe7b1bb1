"""The rules on single documents, over one part: numbers first, then limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.curation import store
from phi3_jax.curation.rule import Check, Step
from phi3_jax.curation.table import DOCUMENT

NAMES = ("id", "source", "genre", "licence", "given")  # what a rule sees of a row, beside its metadata


def columns_of(steps: Sequence[Step]) -> list[str]:
    """The names of the numbers that some steps measure: STEP.CHECK, or STEP.n for a count without a limit."""
    return [f"{step.name}.{check.reason}" for step in steps for check in DOCUMENT[step.rule].checks]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the text that some rules leave of each document, and every number that they measure.

    Args:
      task: steps, as [name, rule, parameters]; read, text, the parts of rows and of their texts so far; rows, those that
        are still there; out.
    """
    out = Path(task["out"])
    if out.is_file():
        return {}
    steps = [Step(*step) for step in task["steps"]]
    rows = np.asarray(task["rows"], np.int64)
    texts = texts_of(Path(task["text"]), rows)
    fields = store.read(Path(task["read"]), [*NAMES, "meta"])
    names = {name: fields[name].take(rows).to_pylist() for name in NAMES}
    metas = fields["meta"].take(rows).to_pylist()
    plan = [(step, DOCUMENT[step.rule], _how(step)) for step in steps]
    values: dict[str, np.ndarray] = {name: np.zeros(len(rows)) for name in columns_of(steps)}
    counts = {
        f"{step.name}.{name}": np.zeros(len(rows)) for step, rule, _ in plan for name in COUNTS.get(step.rule, ())
    }
    needs_meta = any(rule.meta for _, rule, _ in plan)
    for at, text in enumerate(texts):
        row: dict[str, Any] = {name: column[at] for name, column in names.items()}
        row |= json.loads(metas[at]) if needs_meta else {}
        for step, rule, how in plan:
            if row["genre"] in step.parameters.get("exempt", ()):
                for check in rule.checks:
                    values[f"{step.name}.{check.reason}"][at] = np.nan
                continue
            found, text = rule.measure(text, row, **how)
            for check, value in zip(rule.checks, found):
                values[f"{step.name}.{check.reason}"][at] = value
            for name, value in zip(COUNTS.get(step.rule, ()), found):
                counts[f"{step.name}.{name}"][at] = value
        texts[at] = text
    store.write(out, {"row": rows, "text": texts, **values, **counts})
    return {}


COUNTS = {"personal": ("mail", "address", "phone")}  # what is counted without a limit


def _how(step: Step) -> dict[str, Any]:
    how = DOCUMENT[step.rule].how(step.parameters)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in how.items() if name != "exempt"}


def texts_of(path: Path, rows: np.ndarray) -> list[str]:
    """The texts of some rows of a part."""
    found = store.read(path, ["text", "row"] if has_rows(path) else ["text"])
    at = np.searchsorted(found["row"].to_numpy(), rows) if "row" in found else rows
    return found["text"].take(at).to_pylist()


def has_rows(path: Path) -> bool:
    """Whether a part holds some rows of the part that was read, and says which; parts of a result hold all of theirs."""
    return path.parent.name not in ("read", "parts")


def failing(step: Step, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which check each document fails first: its index, or -1."""
    checks: Sequence[Check] = DOCUMENT[step.rule].checks
    first: np.ndarray | None = None
    for index in reversed(range(len(checks))):
        check = checks[index]
        value = numbers[f"{step.name}.{check.reason}"]
        first = np.full(len(value), -1) if first is None else first
        limit = step.parameters[check.limit] if isinstance(check.limit, str) else check.limit
        first[value > limit if check.above else value < limit] = index
    return np.full(len(numbers["row"]), -1) if first is None else first
