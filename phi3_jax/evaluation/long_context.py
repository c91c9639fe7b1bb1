"""The suite `longcontext`: needles by depth and length, RULER's tasks, loss by position, and the effective length.

    needles     questions in the form a base can be trained on (`#ab=48213;`, phi3_jax.data.needles), teacher-forced: the
                share of a value's tokens that are right
    RULER's     11 tasks and `passkey` (phi3_jax.evaluation.ruler), greedy replies, string match; qa from DIR/qa/test.jsonl
    repoqa      functions found by their description (phi3_jax.evaluation.repoqa), from DIR/repoqa/*.json(.gz)
    positions   loss of rows of text in bins of positions that double, on rows that do not depend on the lengths asked for

Items depend on the seed, the task and the length alone, so that models with one tokenizer are compared pairwise.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax import statistics
from phi3_jax.data import long_rows, needles, sources
from phi3_jax.data.corpora import files as inputs
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import repoqa, ruler
from phi3_jax.inference.engine import Completion, Engine
from phi3_jax.inference.forward import Judge
from phi3_jax.interop.loading import Model
from phi3_jax.keys import parse_count
from phi3_jax.sharding.mesh import make_mesh

NEEDLES, POSITIONS, QA, REPOQA = "needles", "positions", "qa", "repoqa"
TASKS = (NEEDLES, POSITIONS, *ruler.TASKS, QA, REPOQA)
ITEMS, ROWS, DEPTHS = 100, 16, 10
PASSES, KEEPS = 0.7, 0.9  # of the digits: at the original length, and of that at a longer one
HAYSTACK = 2_000_000  # tokens of text that are kept

Row = dict[str, Any]
Result = tuple[str, list[Row], list[Row]]


@dataclass(frozen=True)
class Asked:
    """What is measured; None: what the model decides."""

    lengths: tuple[int, ...] | None
    tasks: tuple[str, ...]
    items: int
    depths: int
    seed: int
    batch: int
    chat: bool
    text: str
    folder: Path | None


def asked(flags: Mapping[str, Any]) -> Asked:
    """What flags ask for.

    Raises:
      UserError: an unknown task, a length that is none.
    """
    folder = Path(flags["data_dir"]) if flags["data_dir"] else None
    if folder is not None and not folder.exists():
        raise UserError(f"--data_dir {folder} does not exist; give a text file or a folder of them")
    given = {
        QA: folder is not None and (folder / QA / "test.jsonl").is_file(), REPOQA: repoqa.find(folder) is not None,
    }  # fmt: skip
    names = tuple(flags["tasks"].split(",")) if flags["tasks"] else tuple(t for t in TASKS if given.get(t, True))
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r} of longcontext{nearest(name, TASKS)}")
    if QA in names and not given[QA]:
        raise UserError("qa needs --data_dir DIR with qa/test.jsonl: lines with question, context and answers")
    if REPOQA in names and not given[REPOQA]:
        raise UserError("repoqa needs --data_dir DIR with RepoQA's released file in repoqa/, as .json or .json.gz")
    lengths = tuple(sorted({length_of(text) for text in flags["lengths"].split(",")})) if flags["lengths"] else None
    has_text = folder is not None and (folder.is_file() or any(inputs.local(str(folder)).glob("*.*")))
    return Asked(
        lengths, names, flags["limit"] or ITEMS, flags["depths"] or DEPTHS, flags["seed"], flags["batch"], flags["chat"],
        str(folder) if has_text else "pydocs", folder,
    )  # fmt: skip


def length_of(text: str) -> int:
    """4k is 4,096, as windows are called; other numbers are what they say."""
    text = text.strip()
    if text[-1:] == "k" and text[:-1].isdigit() and len(text) < 8:
        return int(text[:-1]) * 1024
    return parse_count(text, "a length (4k or 4096)")


class Suite:
    """The suite of one model.

    Raises:
      UserError: no tokenizer, a length beyond the context, no chat template.
    """

    def __init__(self, model: Model, asked: Asked) -> None:
        if model.tokenizer is None:
            raise UserError(f"{model.config.name} came without a tokenizer, which the items need; put its files there")
        self.model, self.asked, self.tokenizer = model, asked, model.tokenizer
        self.engine = Engine(model, batch=asked.batch)
        self.original = model.config.longrope.original_context if model.config.longrope else model.config.context
        self.lengths = asked.lengths or _doubling(self.original, model.config.context)
        if self.lengths[-1] > model.config.context:
            raise UserError(
                f"--lengths {self.lengths[-1]:,} exceeds the context of {model.config.context:,}; give at most that, or "
                "extend the model (launch/extend.py)"
            )
        self._documents = self._read()
        self.haystack = np.concatenate(self._documents)
        template = self.engine.template.name if asked.chat else None
        self.writer = ruler.Writer(self.tokenizer, self.haystack, template)

    def _read(self) -> list[np.ndarray]:
        """Ids of the documents that nobody trains on, of all where those are few; the longest first."""
        found: dict[str, list[np.ndarray]] = {side: [] for side in long_rows.SIDES}
        total = dict.fromkeys(found, 0)
        for document in sources.texts(self.asked.text, whole=True).documents:
            side = long_rows.side_of(document)
            if total[side] < HAYSTACK and side != "search":
                ids = np.asarray(self.tokenizer.encode(document), np.int32)
                found[side].append(ids)
                total[side] += ids.size
        held = found["evaluation"]
        enough = total["evaluation"] > 2 * self.lengths[-1] and max(map(len, held)) > self.lengths[-1]
        return sorted(held if enough else held + found["training"], key=len, reverse=True)

    def results(self, progress: Callable[[int, int, str], None] = lambda *_: None) -> Iterator[Result]:
        """(task, rows, items) of every task, and of what follows from them."""
        scores: dict[str, dict[int, float]] = {}
        for number, task in enumerate(self.asked.tasks):
            progress(number, len(self.asked.tasks), task)
            if task == POSITIONS:
                yield task, self._positions(), []
                continue
            rows: list[Row] = []
            items: list[Row] = []
            for length in self.lengths:
                try:
                    new, some, score = self._needles(length) if task == NEEDLES else self._generated(task, length)
                except UserError as error:  # too short a length for this task
                    print(f"note: {error}", file=sys.stderr)
                    continue
                scores.setdefault(task, {})[length] = score
                rows, items = rows + new, items + some
            yield task, rows, items
        yield "effective_length", effective(scores, self.original), []

    # ------------------------------------------------------------------------------------------ tasks

    def _rng(self, task: str, length: int) -> np.random.Generator:
        return np.random.default_rng([self.asked.seed, zlib.crc32(task.encode()), length])

    def _depth(self, number: int) -> float:
        return (number % self.asked.depths + 0.5) / self.asked.depths

    def _needles(self, length: int) -> tuple[list[Row], list[Row], float]:
        form, rng = needles.Form(self.tokenizer), self._rng(NEEDLES, length)
        depths = [self._depth(i) for i in range(self.asked.items)]
        starts = rng.integers(max(1, len(self.haystack) - length - 1), size=len(depths))
        texts = [np.resize(self.haystack[start:], length + 1) for start in starts]
        ids = np.stack([needles.question(t, form, rng, depth) for t, depth in zip(texts, depths, strict=True)])
        nll, hit = self._judge()(long_rows.of_ids(ids, length - form.value))
        digits = statistics.ratio(hit.sum(1), np.full(len(hit), hit.shape[1]))
        shared = {"scoring": "teacher-forced"}
        rows = [_row(f"{NEEDLES} {length}", "digits", digits, form.chance) | shared]
        rows.append(_row(f"{NEEDLES} {length}", "exact", statistics.proportion(hit.all(1)), 0.0) | shared)
        rows += self._by_depth(NEEDLES, length, "digits", depths, hit.mean(1), form.chance)
        items = [
            {"length": length, "depth": d, "digits": float(h.mean()), "nll": float(n.mean())}
            for d, h, n in zip(depths, hit, nll, strict=True)
        ]
        return rows, items, float(hit.mean())

    def _judge(self) -> Judge:
        mesh = make_mesh(jax.devices()[:1], "dp")
        params = jax.device_put(self.model.params, NamedSharding(mesh, P()))
        return Judge(params, self.model.config, mesh, "dp", self.model.dtype)

    def _generated(self, task: str, length: int) -> tuple[list[Row], list[Row], float]:
        rng = self._rng(task, length)
        make = ruler.TASKS.get(task) or self._given(task)
        made = [make(self.writer, length, rng, self._depth(i)) for i in range(self.asked.items)]
        replies: dict[int, Completion] = {}
        for room in sorted({item.room for item in made}):  # prompts are as long as their rooms leave
            some = [i for i, item in enumerate(made) if item.room == room]
            replies |= zip(some, self.engine.generate([made[i].prompt for i in some], max_new_tokens=room), strict=True)
        found = np.array([item.score(replies[i].text) for i, item in enumerate(made)])
        rows = [_row(f"{task} {length}", "match", statistics.ratio(found, np.ones(len(found))), 0.0)]
        if all(item.depth is not None for item in made):
            rows += self._by_depth(task, length, "match", [item.depth or 0.0 for item in made], found, 0.0)
        items = [
            {
                "length": length,
                "depth": one.depth,
                "answers": one.answers,
                "reply": replies[i].text,
                "score": float(found[i]),
            }
            for i, one in enumerate(made)
        ]
        return rows, items, float(found.mean())

    @functools.cache  # noqa: B019  # a suite lives as long as its command
    def _repositories(self) -> list[repoqa.Repo]:
        path = repoqa.find(self.asked.folder)
        assert path is not None  # `asked` has seen it
        return repoqa.read(path)

    def _given(self, task: str) -> ruler.Make:
        """A task whose items come from a file of the user's."""
        if task == REPOQA:
            return repoqa.task(self._repositories())
        assert self.asked.folder is not None
        return ruler.qa(ruler.questions(self.asked.folder / QA / "test.jsonl"))

    def _by_depth(
        self, task: str, length: int, metric: str, depths: list[float], values: np.ndarray, chance: float
    ) -> list[Row]:
        """A row for each depth; the slash keeps them out of the table."""
        rows = []
        for depth in sorted(set(depths)):
            mine = values[np.asarray(depths) == depth]
            rows.append(
                _row(f"{task} {length}/depth {depth:.3g}", metric, statistics.ratio(mine, np.ones(len(mine))), chance)
            )
        return rows

    def _positions(self) -> list[Row]:
        length = next((n for n in reversed(self.lengths) if len(self._documents[0]) > n), None)
        if length is None:
            print(f"note: no document has {self.lengths[0] + 1:,} tokens: no loss by position", file=sys.stderr)
            return []
        pieces = [d[: d.size // (length + 1) * (length + 1)].reshape(-1, length + 1) for d in self._documents]
        ids = np.concatenate(pieces)[:ROWS]
        nll, _ = self._judge()(long_rows.of_ids(ids, 0))
        first = min(self.original, length)
        rows = []
        for begin, end in long_rows.bins(max(1, first // 8), length):
            part = nll[:, begin:end]
            loss = statistics.ratio(part.sum(1, dtype=float), np.full(len(part), part.shape[1]))
            chance = float(np.log(self.tokenizer.vocab_size))
            rows.append(_row(f"{POSITIONS} {begin}-{end}", "loss", loss, chance) | {"scoring": "other"})
        return rows


def _doubling(first: int, last: int) -> tuple[int, ...]:
    found = [min(first, last)]
    while found[-1] < last:
        found.append(min(2 * found[-1], last))
    return tuple(found)


def _row(task: str, metric: str, e: statistics.Estimate, chance: float) -> Row:
    numbers = {"value": e.value, "low": e.low, "high": e.high, "stderr": e.stderr}
    finite = {key: float(x) if np.isfinite(x) else None for key, x in numbers.items()}
    return {"task": task, "metric": metric, "n": e.n, "chance": chance} | finite


def effective(scores: Mapping[str, Mapping[int, float]], original: int) -> list[Row]:
    """The longest length up to which all that were asked for reach a threshold, in tokens; 0 where none does.

    By RULER's tasks: a mean of 85.6 %. By needles: 90 % of the digits at the shortest length, where that is no longer than
    the original one and has at least 70 %.
    """
    rows = []
    of_ruler = [task for task in scores if task in ruler.RULER]
    lengths = sorted(set.intersection(*(set(scores[task]) for task in of_ruler))) if of_ruler else []
    if lengths:
        means = {n: 100 * float(np.mean([scores[task][n] for task in of_ruler])) for n in lengths}
        rows.append(_length("effective_length", means, ruler.THRESHOLD, len(of_ruler)))
    if found := scores.get(NEEDLES):
        first = min(found)
        if first <= original and found[first] >= PASSES:
            rows.append(_length("effective_length needles", found, KEEPS * found[first], len(found)))
    return rows


def _length(task: str, values: Mapping[int, float], threshold: float, count: int) -> Row:
    reached = 0
    for length in sorted(values):
        if values[length] < threshold:
            break
        reached = length
    shared = {"metric": "tokens", "scoring": "other", "chance": None, "low": None, "high": None, "stderr": None}
    return {"task": task, "value": float(reached), "n": count, "threshold": float(threshold)} | shared
