"""Two evaluations on the same items, item by item: paired differences and McNemar's exact test.

An item is the same where its number and its prompt are. Compared are items that were answered right (`correct`) or refused
(`refused`); XSTest's safe and unsafe prompts apart. Beside each p stands Holm's, of all tasks of the command together
(Holm 1979): with twenty tasks, one p below .05 is what chance gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.errors import UserError
from phi3_jax.records import rows as lines
from phi3_jax.statistics import Estimate

KEYS = ("refused", "correct")

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A task of both: the shares, the second minus the first, how many items each alone has, and McNemar's exact p."""

    task: str
    key: str
    first: float
    second: float
    difference: Estimate
    lost: int
    won: int
    p: float


def compared(task: str, key: str, first: Sequence[Row], second: Sequence[Row]) -> Pair:
    """Two models on the items that both were asked.

    Raises:
      UserError: no item in common.
    """
    old = {_same(item): bool(item[key]) for item in first}
    both = [(old[name], bool(item[key])) for item in second if (name := _same(item)) in old]
    if not both:
        raise UserError(f"{task}: the two were asked no prompt in common; evaluate both on the same data")
    a, b = np.array(both).T
    won, lost = int((~a & b).sum()), int((a & ~b).sum())
    p = min(1.0, 2 * float(special.bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0
    return Pair(task, key, float(a.mean()), float(b.mean()), statistics.paired_difference(a, b), lost, won, p)


def _same(item: Row) -> tuple[str, ...]:
    """What tells an item from others: its number within its subset, and what was asked where the item says so."""
    asked = item.get("prompt") if isinstance(item.get("prompt"), str) else item.get("prompt_hash")
    return str(item.get("id")), str(item.get("subset", "")), str(asked)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down p of several tests, in their order."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate([(len(p) - k) * p[i] for k, i in enumerate(order)])
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, stepped)
    return [float(x) for x in out]


def pairs_of(first: Path, second: Path) -> Iterator[Pair]:
    """The tasks that both folders of `evaluate` hold items of.

    Raises:
      UserError: a folder without items, no task in both, or none that is right or wrong.
    """
    for folder in (first, second):
        if not (folder / "items").is_dir():
            raise UserError(f"{folder} holds no items; give a folder that `evaluate` wrote (its --out)")
    names = sorted(path.name for path in (first / "items").glob("*.jsonl") if (second / "items" / path.name).is_file())
    if not names:
        raise UserError(f"{first} and {second} share no task; evaluate both with the same --suite and --tasks")
    some = False
    for name in names:
        items = [_read(folder / "items" / name) for folder in (first, second)]
        key = next((key for key in KEYS if all(map(_all(key), items))), None)
        if key is None:
            continue
        some, task = True, name.removesuffix(".jsonl")
        kinds = sorted({bool(row["safe"]) for row in items[0] if "safe" in row}, reverse=True)
        if len(kinds) < 2:
            yield compared(task, key, *items)
        else:
            for safe in kinds:
                parts = ([row for row in rows if bool(row.get("safe")) == safe] for rows in items)
                yield compared(f"{task} {'safe' if safe else 'unsafe'}", key, *parts)
    if not some:
        raise UserError(f"{first}: no item of {', '.join(names)} is right or wrong, or refused; nothing can be tested")


def _read(path: Path) -> list[Row]:
    found, bad = lines.read(path)
    if bad:
        raise UserError(f"{path} has {bad} line(s) that are no JSON; evaluate again to write it anew")
    return found


def _all(key: str) -> Callable[[Sequence[Row]], bool]:
    """Whether there are items, and each says yes or no; a score in between, such as a mean of probabilities, is neither."""
    return lambda rows: bool(rows) and all(row.get(key) in (0, 1) for row in rows)


def table(pairs: Sequence[Pair]) -> Iterator[str]:
    """A line a task, shares and differences in per cent."""
    width = max(4, *(len(pair.task) for pair in pairs))
    heads = f"{'n':>6}  {'first':>6}  {'second':>6}  {'second - first':>22}  lost   won       p    Holm"
    yield f"{'task':{width}}  {'share':8}  {heads}"
    for pair, adjusted in zip(pairs, holm([pair.p for pair in pairs]), strict=True):
        e = pair.difference
        shown = f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"
        yield (
            f"{pair.task:{width}}  {pair.key:8}  {e.n:6}  {100 * pair.first:6.1f}  {100 * pair.second:6.1f}  {shown:>22}  "
            f"{pair.lost:4}  {pair.won:4}  {pair.p:6.4f}  {adjusted:6.4f}"
        )


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    print(*table(list(pairs_of(Path(flags["first"]), Path(flags["second"])))), sep="\n")
