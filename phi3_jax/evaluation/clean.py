"""Scores of the items that a corpus did not hold, beside those of all items.

A curated corpus (phi3_jax.curation.decontaminate) lists in its manifest which items of benchmarks its input held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError
from phi3_jax.records.files import read_json
from phi3_jax.statistics import wilson

SUFFIX = "_clean"


def contaminated(folder: str) -> set[str]:
    """The ids of items that the input of a curated corpus held.

    Raises:
      UserError: no curated corpus, or one that looked for no benchmarks.
    """
    manifest = read_json(Path(folder) / listing.MANIFEST)
    if not manifest.get("contaminated"):
        raise UserError(f"--clean {folder}: it looked for no benchmarks; curate it with the word benchmarks=FOLDER")
    return {item for ids in manifest["contaminated"].values() for item in ids}


def rows(
    scored: Sequence[Mapping[str, Any]], items: Iterable[Mapping[str, Any]], met: set[str]
) -> list[dict[str, Any]]:
    """A row for each benchmark that is a share of right items, over those that are not in `met`.

    Args:
      scored: rows of the suite, of which those of a whole benchmark count.
      items: {task, id, correct} of every item.
      met: ids of contaminated items.

    Returns:
      rows as they came, with metric NAME_clean, value, n, low, high (95 %, Wilson) and met, how many were left out.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)
    found = []
    for row in scored:
        of = by_task.get(row["task"], [])
        if not of or len(of) != row["n"] or not all(item.get("correct") in (0, 1) for item in of):
            continue  # a subset of a benchmark, or no share of right items
        left = [item for item in of if item["id"] not in met]
        right = int(sum(item["correct"] for item in left))
        low, high = wilson(right, len(left))
        score = right / len(left) if left else float("nan")
        changed = {"metric": row["metric"] + SUFFIX, "value": score, "n": len(left), "low": low, "high": high}
        if left:
            found.append({**row, **changed, "met": len(of) - len(left)})
    return found
