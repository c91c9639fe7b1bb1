"""The fate of one document: what each rule measured, where it went, and what it is a copy of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.curation import store
from phi3_jax.curation.documents import failing
from phi3_jax.curation.rule import Step
from phi3_jax.curation.table import DOCUMENT, reasons_of
from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError
from phi3_jax.records import files

ROWS = 1 << 32


def why(out: Path, identifier: str) -> str:
    """What happened to a document, in lines.

    Args:
      out: a curated folder, finished or not.
      identifier: an id, its first digits, or the id that the document's row gave itself.

    Raises:
      UserError: no curation there, or no such document.
    """
    described = files.read_state(out / listing.CURATION).get("config")
    if described is None:
        raise UserError(f"{out} holds no curation; name the folder that --output named")
    steps = [Step(s["step"], s["rule"], s["parameters"], s["rule"] not in DOCUMENT) for s in described["steps"]]
    stages = out / "stages"
    number, row, columns = _find(stages, identifier)
    field = {name: column[row].as_py() for name, column in columns.items()}
    lines = [
        f"{field['id']} from {field['place']}, source {field['source']}, genre {field['genre'] or 'not stated'}",
        f"  {len(field['text']):,} characters: {' '.join(field['text'].split())[:100]}",
    ]
    fates = _fates(stages, number * ROWS + row, steps)
    for at, step in enumerate(steps):
        lines += [f"{step.name}", *_numbers(stages, step, steps, number, row)]
        if at in fates:
            reason, other, value = fates[at]
            copy = f", a copy ({value:.3f}) of {_name(stages, other)}" if other >= 0 else ""
            cost = f", {value:.3f} bits of facts per word" if step.rule == "knowledge" else ""
            lines.append(f"  dropped: {reason}{copy}{cost}")
            return "\n".join(lines)
    lines.append(
        "it stays" if (out / listing.MANIFEST).is_file() else "not dropped so far; the curation is not finished"
    )
    return "\n".join(lines)


def _find(stages: Path, identifier: str) -> tuple[int, int, dict[str, Any]]:
    for path in sorted((stages / "read").glob("part-*.parquet")):
        columns = store.read(path)
        for name in ("id", "given"):
            values = columns[name].to_pylist()
            for row, value in enumerate(values):
                if value == identifier or (name == "id" and len(identifier) >= 6 and value.startswith(identifier)):
                    return int(path.stem.rpartition("-")[2]), row, columns
    raise UserError(f"no document {identifier!r} in {stages.parent}; an id is in the column id of parts/ and rejected/")


def _fates(stages: Path, doc: int, steps: Sequence[Step]) -> dict[int, tuple[str, int, float]]:
    """{step: (reason, the one that stays, similarity)}."""
    found = {}
    for path in sorted(stages.glob("dropped-*.parquet")):
        columns = {name: column.to_numpy(zero_copy_only=False) for name, column in store.read(path).items()}
        for at in (columns["doc"] == doc).nonzero()[0].tolist():
            step = int(columns["step"][at])
            reason = reasons_of(steps[step].rule)[int(columns["check"][at])]
            found[step] = reason, int(columns["other"][at]), float(columns["value"][at])
    return found


def _numbers(stages: Path, step: Step, steps: Sequence[Step], number: int, row: int) -> Iterator[str]:
    """A line for each number that a rule measured of the document."""
    for folder in sorted(stages.glob("[0-9][0-9]-*")):
        path = store.part(folder, number)
        if step.corpus or not path.is_file() or not (checks := DOCUMENT[step.rule].checks):
            continue
        columns = store.read(path)
        if f"{step.name}.{checks[0].reason}" not in columns or "row" not in columns:
            continue
        here = (columns["row"].to_numpy() == row).nonzero()[0]
        if not len(here):
            return
        numbers = {k: v.to_numpy(zero_copy_only=False)[here] for k, v in columns.items() if k != "text"}
        fails = int(failing(step, numbers)[0])
        for at, check in enumerate(checks):
            limit = step.parameters[check.limit] if isinstance(check.limit, str) else check.limit
            value = float(numbers[f"{step.name}.{check.reason}"][0])
            shown = "exempt" if value != value else f"{value:.6g}"
            side = "at most" if check.above else "at least"
            yield f"  {'*' if at == fails else ' '} {check.reason:32} {shown:>12}  {side} {limit:g}"
        return


def _name(stages: Path, doc: int) -> str:
    path = store.part(stages / "read", doc // ROWS)
    return str(store.read(path, ["id"])["id"][doc % ROWS].as_py()) if path.is_file() else "a text of the other corpus"
