"""What the runs of experiments/safety_training.py say, by its rule.

Each stage of a chain is a study SIZE-sSEED-STAGE in the folder, whose run has scores of the suite `guard`. Conditions are
judged as those of `scaling.abstention`, a cell being (stage, size, endpoint), each size on its own. A folder that a
repository keeps has `scores.csv`, `rounds.csv` and the rule in their place, as `keep` writes them:

    python -c "from phi3_jax.scaling import safety_training; safety_training.keep('runs/safety-training', 'FOLDER')"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.data.corpora import guarded
from phi3_jax.errors import UserError
from phi3_jax.records import rows as records
from phi3_jax.records import tables
from phi3_jax.records.files import read_json, write_json
from phi3_jax.scaling import abstention
from phi3_jax.scaling.abstention import FAILS, HOLDS, Found
from phi3_jax.scaling.causal import Row

SUITE, TABLE, ROUNDS = "guard", "scores.csv", "rounds.csv"
COSTS = ("twins", "answers", "knowledge")  # conditions that hold where there is a cost
# Of the table: heads, and endpoints; a line is a stage and a size.
SHOWN = {
    "refused": "guard/forbidden/refused",
    "refused unseen": "guard/forbidden unseen/refused",
    "leaked unseen": "guard/forbidden unseen/leaked",
    "twins refused": "guard/twins/refused",
    "twins refused unseen": "guard/twins unseen/refused",
    "twins right": "guard/twins/recall",
    "twins right unseen": "guard/twins unseen/recall",
    "other right": "guard/other/recall",
    "prose": "guard/prose/recall",
    "sorting": "guard/sorting/right",
    "ended": "guard/replies/ended",
}


def read(folder: Path) -> list[Row]:
    """The last scores of every stage that has any, as rows whose arm is the stage.

    Raises:
      UserError: none has.
    """
    if (folder / TABLE).is_file():
        kept = tables.read(folder / TABLE)
        for column in ("size", "seed", "stage"):
            tables.need(kept, column)
        return [_row(at["stage"], at["size"], round(at.number("seed", positive=False)), _scores(at)) for at in kept]
    found = []
    for path in sorted(folder.glob("*/*/evals.jsonl")):
        place = re.fullmatch(r"(\w+)-s(\d+)-(.+)", path.parent.parent.name)
        scores = [row for row in records.read_rows(path) if row["suite"] == SUITE]
        if not place or not scores or place[1] not in family.TRIO:
            continue
        last = max(row["step"] for row in scores)
        values = {f"{SUITE}/{row['task']}/{row['metric']}": row["value"] for row in scores if row["step"] == last}
        found.append(_row(place[3], place[1], int(place[2]), values))
    if not found:
        raise UserError(f"{folder} holds no stages with scores of {SUITE}; run experiments/safety_training.py first")
    return found


def _row(stage: str, size: str, seed: int, scores: Mapping[str, float]) -> Row:
    return Row(stage, size, family.proxy(size, "pico").matrix_params, seed, scores, {})


def _scores(line: tables.Row) -> dict[str, float]:
    return {
        key: line.number(key, positive=False) for key, value in line.items() if key.startswith(f"{SUITE}/") and value
    }


def keep(study: str, folder: str) -> None:
    """Writes the scores of a study and its rule into a folder, whole, in the order of the design."""
    rows = sorted(read(Path(study)), key=lambda row: (family.TRIO.index(row.member), row.seed, row.arm))
    endpoints = sorted({name for row in rows for name in row.scores})
    lines = [
        {"size": row.member, "seed": row.seed, "stage": row.arm}
        | {name: f"{row.scores[name]:.6g}" for name in endpoints if name in row.scores}
        for row in rows
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    tables.write(Path(folder) / TABLE, ("size", "seed", "stage", *endpoints), lines)
    if asked := [dict(zip(("stage", "found"), line.split(None, 1), strict=True)) for line in rounds(Path(study))]:
        tables.write(Path(folder) / ROUNDS, ("stage", "found"), asked)
    write_json(Path(folder) / "study.json", {"design": {"config": {"guard": _rule(Path(study))}}})


def _rule(folder: Path) -> dict[str, Any]:
    """The rule of a study's stages, or of a folder of `keep`.

    Raises:
      UserError: it has none.
    """
    for described in sorted([*folder.glob("study.json"), *folder.glob("*/study.json")])[:1]:
        rule: dict[str, Any] = read_json(described).get("design", {}).get("config", {}).get("guard") or {}
        if rule:
            return rule
    raise UserError(f"{folder} has no study.json with such a rule; give a folder of experiments/safety_training.py")


def rounds(folder: Path) -> Iterator[str]:
    """What each round of asking found, where it was asked."""
    if (folder / ROUNDS).is_file():
        yield from (f"{at['stage']:18}  {at['found']}" for at in tables.read(folder / ROUNDS))
    for path in sorted(folder.glob("*.asked.jsonl")):
        yield f"{path.name.removesuffix('.asked.jsonl'):18}  {guarded.tally(records.read(path)[0])}"


def planned(rule: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(stage, size, seed) of every run of the design that is scored."""
    return [(stage, size, seed) for stage in rule["scored"] for size in family.TRIO for seed in rule["seeds"]]


def verdict(found: Mapping[str, Found], size: str) -> str:
    """What the conditions of one size are together."""
    words = {name: found[f"{name}, {size}"].word for name in ("refusal", "unseen", *COSTS)}
    if words["refusal"] == FAILS:
        return "safety training does not teach the rule"
    if words["refusal"] != HOLDS:
        return "undecided"
    where = {HOLDS: "in unseen wordings too", FAILS: "in its wordings alone"}.get(
        words["unseen"], "beyond its wordings open"
    )
    if cost := [name for name in COSTS if words[name] == HOLDS]:
        return f"the rule is learnt at a cost ({', '.join(cost)}); {where}"
    free = all(words[name] == FAILS for name in COSTS)
    return f"the rule is learnt {'without a cost' if free else 'at a cost that is undecided'}; {where}"


def lines(rows: Sequence[Row], rule: Mapping[str, Any]) -> Iterator[str]:
    """Which planned runs ran, a table, every condition beside what was predicted, a verdict for each size."""
    plan, ran = planned(rule), {(row.arm, row.member, row.seed) for row in rows}
    yield f"{sum(run in ran for run in plan)} of {len(plan)} planned runs ran."
    if missing := [f"{size}-s{seed}-{stage}" for stage, size, seed in plan if (stage, size, seed) not in ran]:
        yield f"Not run: {', '.join(missing)}."
    yield ""
    yield from abstention.table(rows, plan, SHOWN)
    yield ""
    conditions, seeds = rule["conditions"], len(rule["seeds"])
    found = {name: abstention.judge(rows, name, conditions, seeds) for name in conditions}
    for name, one in found.items():
        yield abstention.line(one, conditions[name])
    yield ""
    for size in family.TRIO:
        yield f"Verdict, {size}: {verdict(found, size)}."


def lines_of(folder: Path) -> list[str]:
    """What the rule says of a study's folder, and what each round of asking found.

    Raises:
      UserError: no stage has scores, or a trial, of which the rule says nothing.
    """
    rows = read(folder)
    rule = _rule(folder)
    out = list(lines(rows, rule))
    if rule["trial"]:
        out = ["A trial, with other numbers than the design's, of which it says nothing.", *out]
    return [*out, "", *rounds(folder)]
