"""Does search replace parameters? The runs of a study asked about persons closed-book and after a sentence (reading.py).

    python -m phi3_jax.evaluation.retrieval_probe STUDY [--out analysis/results/search] [--headline ARM-SMALL,ARM-LARGE]

Every finished run on a corpus of facts is loaded and asked for the six values of each person of its universe, once a way:

    closed       the item alone, as in the evaluation `knowledge`
    retrieved, oracle, distractor     after the sentence that search finds, one's own, somebody else's
    copied       not what is right, but what is copied from that distractor: who looks at the name does not

The model goes on from its own answers (free-running). Beside that stand `closed, teacher-forced`, where it goes on from
the right ones, and the questions `first`, a person's first value, before which nothing but the name is said. recall.csv,
differences.csv and recall.md are written. A run knows a value where it is right closed-book: known and unknown values,
without and with search, are the four cells. Intervals of one run are Wilson's with persons as clusters; those of a mean
over seeds are Student's t over seeds, each with a universe of its own (none for one seed). Differences are paired by value.
The runs need not have been trained to read: the windows are made anew from what the data set says of its universe.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("probe"))

import dataclasses
import functools
import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import facts, reading
from phi3_jax.data.meters import knowledge
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.records.files import read_json, write_bytes, write_text
from phi3_jax.records.rows import read_rows
from phi3_jax.statistics import Estimate

Predict = Callable[[Windows], np.ndarray]  # argmax ids (N, T)
Answers = dict[str, np.ndarray]  # {way: right or not, (persons, 6) bool}
BATCH = 512  # windows
CLOSED, RETRIEVED, ORACLE, DISTRACTOR, COPIED = "closed", "retrieved", "oracle", "distractor", "copied"
FORCED = "closed, teacher-forced"
HEADLINE = ("reading-mini", "closed-medium")
KEPT = "search-free-running.npz"  # in a run's folder: its answers; search.npz is an older version's, teacher-forced
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)  # what a cut file of arrays raises


@dataclass(frozen=True)
class Answered:
    """A run's answers about its universe.

    found (persons,) bool: retrieved passages that are the person's own; reasoning: its share of exact reasoning rows.
    """

    arm: str
    member: str
    seed: int
    right: Answers
    found: np.ndarray
    reasoning: float | None = None

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.member}" if self.arm else self.member


@dataclass(frozen=True)
class Asked:
    """Windows of one way to ask; item (N, T) as in facts.extra; expected (N, T) ids that count as right, else -1."""

    windows: Windows
    item: np.ndarray
    expected: np.ndarray


@functools.lru_cache(maxsize=8)
def questions(universe: facts.Universe) -> tuple[dict[str, Asked], np.ndarray]:
    """({way: what is asked}, found (persons,)) of a universe."""
    passages = reading.passages(universe)
    windows = {CLOSED: facts.eval_windows(universe)}
    windows |= {way: reading.eval_windows(universe, passage) for way, passage in passages.items()}
    asked = {}
    for way, (shown, extra) in windows.items():
        asked[way] = Asked(shown, extra["item"], np.where(extra["item"] >= 0, shown.targets, -1))
    wrong = asked[DISTRACTOR]
    others = np.full(wrong.item.shape, -1, np.int32)
    others[wrong.item >= 0] = universe.values[passages[DISTRACTOR]].ravel()
    asked[COPIED] = Asked(wrong.windows, wrong.item, others)
    return asked, passages[RETRIEVED] == np.arange(universe.persons)


def ask(predict: Predict, universe: facts.Universe) -> Answers:
    """Which values are said as expected, (persons, 6) bool, in each way."""
    answers: Answers = {}
    said: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for way, asked in questions(universe)[0].items():
        key = id(asked.windows)  # a distractor is asked once, and looked at twice
        said[key] = said[key] if key in said else _said(predict, asked.windows)
        forced, free = (
            knowledge.per_item(
                np.zeros(ids.shape), ids == asked.expected, asked.item, universe.persons * facts.ATTRIBUTES
            )
            for ids in said[key]
        )
        answers[way] = free[1].reshape(-1, facts.ATTRIBUTES)
        if way == CLOSED:
            answers[FORCED] = forced[1].reshape(-1, facts.ATTRIBUTES)
    return answers


def _said(predict: Predict, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """What is said where the right answers are the input, and where the model's own are; ids (N, T)."""
    from phi3_jax.training.train import free_running

    def forward(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"said": predict(dataclasses.replace(windows, tokens=batch["tokens"]))}

    batch = {"tokens": windows.tokens, "segments": windows.segments, "domains": windows.domains}
    forced = forward(batch)
    return forced["said"], free_running(forward, batch, forced, np.arange(len(windows)))["said"]


def universe_of(data: Path) -> facts.Universe:
    """The universe of an exported data set; UserError where it holds none."""
    made = manifests.read(data)["generator"]
    if made["data"] != "facts":
        raise UserError(f"{data} holds {made['data']!r}; search is measured on facts")
    if made["frequency"] == "inverse_rank":
        raise UserError(f"{data} asks for persons drawn by frequency; search is measured on universes asked whole")
    return facts.Universe(
        made["universe"], made["facts"], made["pool"], made["value_bits"], made["frequency"], made["seed"]
    )


def predictor(run: Path) -> Predict:
    """The argmax of a run's newest checkpoint, in batches of BATCH windows."""
    from phi3_jax.interop.loading import load

    model = load(run)

    def predict(windows: Windows) -> np.ndarray:
        out = np.empty(windows.tokens.shape, np.int32)
        for start in range(0, len(windows), BATCH):
            part = windows[np.minimum(np.arange(start, start + BATCH), len(windows) - 1)]  # one shape for all batches
            logits = model.logits(part.tokens, segment_ids=part.segments)
            out[start : start + BATCH] = np.asarray(logits.argmax(-1))[: len(windows) - start]
        return out

    return predict


def answered(study: Path) -> list[Answered]:
    """The answers of all finished runs of a study on facts; UserError where there are none."""
    from phi3_jax.records.folder import DONE

    found = []
    for run in sorted(file.parent for file in study.glob("*/config.json")):
        if not (run / DONE).exists():
            continue
        config = read_json(run / "config.json")["config"]
        universe = universe_of(manifests.beside(run, config["data"]))
        right, hit = _answers(run, universe), questions(universe)[1]
        exact = _reasoning(run)
        found.append(Answered(config["arm"], config["model"]["member"], config["seed"], right, hit, exact))
        print(f"{run.name}: " + ", ".join(f"{way} {a.mean():.3f}" for way, a in right.items()), flush=True)
    if not found:
        raise UserError(f"{study} holds no finished run; train one with launch/run.py --config experiments/search.py")
    return found


def _answers(run: Path, universe: facts.Universe) -> Answers:
    """As `ask`, kept in the run's folder: a finished run does not change."""
    file = run / KEPT
    try:
        with np.load(file) as kept:
            return dict(kept)
    except UNREADABLE:  # or not there: asked again
        answers = ask(predictor(run), universe)
    content = io.BytesIO()
    np.savez_compressed(content, **answers)  # type: ignore[arg-type]  # for mypy, a way could be called allow_pickle
    write_bytes(file, content.getvalue())
    return answers


def _reasoning(run: Path) -> float | None:
    rows = read_rows(run / "evals.jsonl")
    values = [
        row["value"] for row in rows if (row["suite"], row["task"], row["metric"]) == ("reasoning", "row", "exact")
    ]
    return values[-1] if values else None


# ---------------------------------------------------------------------------------------------- what it says


def share(right: np.ndarray, where: np.ndarray) -> Estimate:
    """Share of right (persons, 6) among the values `where`, with a Wilson interval, persons being clusters."""
    clusters = np.broadcast_to(np.arange(len(right))[:, None], right.shape)
    return statistics.proportion(right[where], clusters[where])


def recall_rows(runs: Sequence[Answered]) -> list[dict[str, Any]]:
    """Recall of each run in each way, over all values and over kinds of them; shares, not per cent.

    Kinds: known and unknown closed-book; found and missed by search, whose passage is the person's own or not; first.
    """
    rows = []
    for run in runs:
        known, found = run.right[CLOSED], np.repeat(run.found[:, None], facts.ATTRIBUTES, 1)
        kinds = {"all": np.ones_like(known), "known": known, "unknown": ~known, "found": found, "missed": ~found}
        kinds["first"] = np.broadcast_to(np.arange(facts.ATTRIBUTES) == 0, known.shape)
        for kind, where in kinds.items():
            for way, right in run.right.items():
                e = share(right, where)
                numbers = dict(n=e.n, right=int(right[where].sum()), value=e.value, low=e.low, high=e.high)
                axes = dict(arm=run.arm, member=run.member, seed=run.seed, questions=kind, search=way)
                rows.append(axes | numbers | dict(stderr=e.stderr))
    return rows


def difference_rows(runs: Sequence[Answered], small: str, large: str) -> list[dict[str, Any]]:
    """Recall of `small` (ARM-MEMBER) with search minus that of `large` without, a row per seed and way; paired by value.

    UserError: no seed in which both were asked.
    """
    table = {(run.name, run.seed): run for run in runs}
    seeds = [run.seed for run in runs if run.name == small and (large, run.seed) in table]
    if not seeds:
        raise UserError(f"{small} and {large} share no seed; the runs are {', '.join(sorted({r.name for r in runs}))}")
    rows = []
    for seed in seeds:
        one, other = table[small, seed].right, table[large, seed].right[CLOSED]
        clusters = np.repeat(np.arange(len(other)), facts.ATTRIBUTES)
        for way in (CLOSED, RETRIEVED, ORACLE):
            e = statistics.paired_difference(other, one[way], clusters)
            axes = dict(first=small, search=way, second=large, seed=seed)
            rows.append(axes | dict(value=e.value, low=e.low, high=e.high, stderr=e.stderr))
    return rows


def over_seeds(rows: Sequence[Mapping[str, Any]], *axes: str) -> dict[tuple[Any, ...], Estimate]:
    """Mean and t interval over seeds of the rows' values, by the given axes; kinds without values are left out."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if np.isfinite(row["value"]):
            groups.setdefault(tuple(row[axis] for axis in axes), []).append(row["value"])
    return {key: statistics.over_seeds(values) for key, values in groups.items()}


def _cell(e: Estimate | None, sign: str = "") -> str:
    if e is None:
        return "–"
    low, high = (e.low, e.high) if sign else (max(0.0, e.low), min(1.0, e.high))  # a share; t knows no bounds
    interval = f" [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]" if e.n > 1 else ""
    return f"{100 * e.value:{sign}.1f}{interval}"


def markdown(runs: Sequence[Answered], recall: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> str:
    """The tables, in per cent: recall in each way, the four cells, and the differences."""
    ways, names = list(runs[0].right), list(dict.fromkeys(run.name for run in runs))
    means = over_seeds(recall, "arm", "member", "questions", "search")
    label = {run.name: (run.arm, run.member) for run in runs}
    seeds = sorted({run.seed for run in runs})
    found = np.mean([run.found.mean() for run in runs])
    lines = [
        f"Recall in per cent, mean over seeds {', '.join(map(str, seeds))} with 95 % t intervals over seeds; "
        f"{facts.ATTRIBUTES * len(runs[0].found):,} values per seed, chance 0.4; the model goes on from its own answers "
        "but where teacher-forced is said. Written by "
        f"`python -m phi3_jax.evaluation.retrieval_probe`; single runs with Wilson intervals are in recall.csv.",
        f"Search returned the person's own sentence for {100 * found:.1f} % of the persons.",
        "", "| proxy | " + " | ".join([*ways, "reasoning"]) + " |", "|---|" + "--:|" * (len(ways) + 1),
    ]  # fmt: skip
    for one in names:
        exact = [run.reasoning for run in runs if run.name == one and run.reasoning is not None]
        cells = [_cell(means.get((*label[one], "all", way))) for way in ways]
        cells.append(_cell(statistics.over_seeds(exact) if exact else None))
        lines.append(f"| {one} | " + " | ".join(cells) + " |")
    lines += ["", "copied: answers taken from the distractor. reasoning: reasoning rows that are right throughout.", ""]
    kinds = [(kind, way) for kind in ("known", "unknown", "found", "missed") for way in (CLOSED, RETRIEVED)]
    lines += ["By kind of value, without and with search (closed-book, known is 100 and unknown 0 by definition):", ""]
    lines += ["| proxy | " + " | ".join(f"{kind}, {way}" for kind, way in kinds) + " |", "|---|" + "--:|" * len(kinds)]
    for one in names:
        lines.append(f"| {one} | " + " | ".join(_cell(means.get((*label[one], *pair))) for pair in kinds) + " |")
    lines += ["", "Differences in points, paired by value within a seed:", ""]
    lines += ["| small | search | minus large, closed-book | points |", "|---|---|---|--:|"]
    for (first, way, second), e in over_seeds(differences, "first", "search", "second").items():
        lines.append(f"| {first} | {way} | {second} | {_cell(e, '+')} |")
    return "\n".join(lines) + "\n"


def write(study: Path, out: Path, headlines: Sequence[tuple[str, str]] = (HEADLINE,)) -> str:
    """Asks a study's runs and writes recall.csv, differences.csv and recall.md to `out`; returns the markdown."""
    runs = answered(study)
    recall = recall_rows(runs)
    differences = [row for pair in headlines for row in difference_rows(runs, *pair)]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("recall.csv", recall), ("differences.csv", differences)):
        rounded = ({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        tables.write(out / name, list(rows[0]), rounded)
    text = markdown(runs, recall, differences)
    write_text(out / "recall.md", text)
    return text


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    pairs: list[tuple[str, str]] = []
    for pair in flags["headline"]:
        if len(pair) != 2:
            raise UserError(
                f"--headline {','.join(pair)} is not two groups of runs, such as --headline {','.join(HEADLINE)}"
            )
        pairs.append((pair[0], pair[1]))
    study = Path(flags["study"])
    print(write(study, Path(flags["out"] or study / "search"), pairs or [HEADLINE]), end="")
