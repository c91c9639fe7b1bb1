"""The suite `calibration`: does a model know what it knows?

Benchmarks with options: the confidence of an answer is its share of the options' probability. TriviaQA: a greedy reply,
and the probability of its tokens; beside it P(True), what the model itself says of its reply (Kadavath et al. 2022,
arXiv:2207.05221). Rows: accuracy; accuracy of the half, of 80 and of 90 % of the answers in which it is surest; AUROC of
right against wrong; expected calibration error of 15 bins of equal mass; Brier score; how often it says that it does not
know.
Long form: the share of a free reply's claims that stand in a reference, or in what a search finds (`longform`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from phi3_jax import statistics
from phi3_jax.data.retrieval import Index
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import dialogue, longform, safety
from phi3_jax.evaluation.copies import engine_of
from phi3_jax.evaluation.kept import Kept
from phi3_jax.evaluation.suites.phi3_report import answers, data, prompts
from phi3_jax.evaluation.suites.phi3_report.benchmarks import BENCHMARKS
from phi3_jax.interop.loading import Model

NAME = "calibration"
TRIVIA = "triviaqa"
# WinoGrande's options stand before what is scored, and have no probability of their own.
TASKS = (
    *(name for name, b in BENCHMARKS.items() if name == TRIVIA or ("harness" in b.scorings and name != "winogrande")),
    longform.NAME,
)
COVERAGES = (0.5, 0.8, 0.9)
DRAWS = 400  # of the bootstrap behind the interval of the calibration error
MAX_NEW = 32
LONG = 256  # tokens of a long-form reply
_UNKNOWN = re.compile(
    r"\b(i (do not|don't|cannot|can't) (know|recall|remember|tell)|i'?m (not sure|unsure)|i am (not sure|unsure)|no idea"
    r"|not known|cannot be determined|unknown|uncertain)\b",
    re.IGNORECASE,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What is measured: the benchmarks by name, and where they lie."""

    tasks: tuple[str, ...]
    folder: Path
    limit: int | None
    batch: int  # rows at a time, of all devices
    devices: int  # with a whole copy of the model each


def asked(flags: Mapping[str, Any]) -> Asked:
    """What flags ask for.

    Raises:
      UserError: no folder, an unknown benchmark, or one that is not there.
    """
    if not flags["data_dir"]:
        raise UserError(f"--suite {NAME} needs --data_dir DIR, a folder with <benchmark>/test.jsonl")
    folder = Path(flags["data_dir"])
    there = [name for name in TASKS if (folder / name / "test.jsonl").is_file()]
    names = [name.strip() for name in flags["tasks"].split(",")] if flags["tasks"] else there
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown benchmark {name!r} of {NAME}{nearest(name, TASKS)}")
        if name == longform.NAME and name not in there:
            raise UserError(f"{folder / longform.FILE} does not exist; write rows of id, prompt and reference there")
    if not names:
        raise UserError(f"--data_dir {folder} holds no benchmark of {NAME}; it looks for {', '.join(TASKS)}")
    return Asked(
        tuple(dict.fromkeys(names)), folder, flags["limit"], flags["batch"] * flags["devices"], flags["devices"]
    )


class Suite:
    """The suite of one model.

    Raises:
      UserError: no tokenizer; data with a fault.
    """

    def __init__(self, model: Model, asked: Asked, kept: Kept | None = None) -> None:
        if model.tokenizer is None:
            raise UserError(f"{model.config.name} came without a tokenizer, which prompts need; put its files there")
        self.engine = engine_of(model, asked.batch // asked.devices, asked.devices)
        self.asked, self.kept = asked, kept or Kept()
        stock = [name for name in asked.tasks if name != longform.NAME]
        self._data = {name: data.load(BENCHMARKS[name], asked.folder) for name in stock}
        self._prompts = longform.read(asked.folder)[: asked.limit] if longform.NAME in asked.tasks else []
        searched = any(row["reference"] is None for row in self._prompts)
        self._index = Index.build(asked.folder / longform.DOCUMENTS, ":memory:") if searched else ""

    def results(self, progress: Callable[[int, int, str], None] = lambda *_: None) -> Iterator[safety.Result]:
        """(benchmark, rows, items) of each."""
        for name, (docs, shots) in self._data.items():
            docs = docs[: self.asked.limit]
            items: list[Row] = []
            for start in range(0, len(docs), self.asked.batch):
                part = docs[start : start + self.asked.batch]
                texts = [self._text(name, doc, shots) for doc in part]
                answer = self._replies if name == TRIVIA else self._choices
                items += answer(name, part, texts)
                progress(len(items), len(docs), name)
            yield name, of_items(name, items), items
        if self._prompts:
            items = self._free(progress)
            found = longform.measures(items)
            yield longform.NAME, [safety.row(longform.NAME, key, e, "generate") for key, e in found.items()], items

    def _free(self, progress: Callable[[int, int, str], None]) -> list[Row]:
        """Free replies, in the model's chat template, and which of their claims stand in the references."""
        template, room = dialogue.template_name(self.engine), max(1, min(LONG, self.engine.config.context // 2))
        items: list[Row] = []
        for start in range(0, len(self._prompts), self.asked.batch):
            part = self._prompts[start : start + self.asked.batch]
            talks = [[{"role": "user", "content": row["prompt"]}] for row in part]
            ids = [
                dialogue.prompt_ids(self.engine, talk, template)[-(self.engine.config.context - room) :]
                for talk in talks
            ]

            def make(ids: list[list[int]] = ids) -> list[Any]:
                return [reply.text for reply in self.engine.generate(ids, room, stop=dialogue.stops(template))]

            keys = [self.kept.name(NAME, longform.NAME, one, room) for one in ids]
            for row, text, context in zip(part, self._kept(keys, make), ids, strict=True):
                judged = longform.judged(text, row["reference"] or self._index, row["prompt"])
                about = {"id": row["id"], "prompt": row["prompt"], "reply": text}
                items.append(about | judged | {"prompt_hash": _hash(context)})
            progress(len(items), len(self._prompts), longform.NAME)
        return items

    def _text(self, name: str, doc: Row, shots: Mapping[str, Sequence[Row]]) -> str:
        """The prompt, after the benchmark's exemplars."""
        few = shots.get(doc["subset"] if BENCHMARKS[name].by_subset else "", ())
        return "".join(f"{_asks(row)} {_says(row)}\n\n" for row in few) + _asks(doc)

    def _fit(self, text: str, room: int) -> list[int]:
        return self.engine.encode(text)[-(self.engine.config.context - room) :]

    def _kept(self, keys: Sequence[str], make: Callable[[], list[Any]]) -> list[Any]:
        """Answers to a batch: those of an earlier start, or made whole and kept."""
        found = [self.kept.get(key) for key in keys]
        if None in found:
            found = make()
            self.kept.add(dict(zip(keys, found, strict=True)))
        return found

    def _choices(self, name: str, part: Sequence[Row], texts: Sequence[str]) -> list[Row]:
        options = [[self.engine.encode(f" {text}") for text in prompts.harness_options(doc)] for doc in part]
        ids = [self._fit(text, max(map(len, some))) for text, some in zip(texts, options, strict=True)]

        def make() -> list[Any]:
            pairs = [(context, o) for context, some in zip(ids, options, strict=True) for o in some]
            scores = iter([s.logprob for s in self.engine.score(pairs)])
            return [[next(scores) for _ in some] for some in options]

        keys = [self.kept.name(NAME, *both) for both in zip(ids, options, strict=True)]
        items = []
        for doc, values, context in zip(part, self._kept(keys, make), ids, strict=True):
            p = special.softmax(np.array(values))
            choice = int(np.argmax(p))
            item = {
                "id": doc["id"],
                "choice": choice,
                "correct": choice == doc["answer"],
                "confidence": float(p[choice]),
            }
            items.append(item | {"logprobs": values, "prompt_hash": _hash(context)})
        return items

    def _replies(self, name: str, part: Sequence[Row], texts: Sequence[str]) -> list[Row]:
        room = max(1, min(MAX_NEW, self.engine.config.context // 4))
        ids = [self._fit(text, room) for text in texts]

        def make() -> list[Any]:
            replies = self.engine.generate(ids, room, stop=["\n"])
            sure = self._true([doc["question"] for doc in part], [reply.text.strip() for reply in replies])
            return [[r.text, float(sum(r.logprobs)), p] for r, p in zip(replies, sure, strict=True)]

        items = []
        keys = [self.kept.name(NAME, context, room) for context in ids]
        for doc, (text, logprob, p_true), context in zip(part, self._kept(keys, make), ids, strict=True):
            said = answers.trivia(answers.phrase(text))
            right = said in {answers.trivia(gold) for gold in (doc["target"], *doc["aliases"])} - {""}
            item = {"id": doc["id"], "reply": text, "correct": right, "confidence": math.exp(min(0.0, logprob))}
            item |= {"p_true": p_true, "abstained": not said or bool(_UNKNOWN.search(text))}
            items.append(item | {"prompt_hash": _hash(context)})
        return items

    def _true(self, questions: Sequence[str], replies: Sequence[str]) -> list[float]:
        """P(True): what the model says of a proposed answer."""
        words = [self.engine.encode(f" {word}") for word in ("True", "False")]
        contexts = [
            self._fit(
                f"Question: {q}\nProposed answer: {r}\nIs the proposed answer True or False?\nAnswer:",
                max(map(len, words)),
            )
            for q, r in zip(questions, replies, strict=True)
        ]
        scores = self.engine.score([(context, word) for context in contexts for word in words])
        gaps = np.array([s.logprob for s in scores]).reshape(-1, 2)
        return [float(x) for x in special.expit(gaps[:, 0] - gaps[:, 1])]


def _asks(doc: Row) -> str:
    return prompts.generate_text(doc) if doc["benchmark"] == TRIVIA else str(prompts.harness_text(doc))


def _says(doc: Row) -> str:
    return str(doc["target"]) if doc["benchmark"] == TRIVIA else prompts.harness_options(doc)[doc["answer"]]


def _hash(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ rows


def of_items(task: str, items: Sequence[Row]) -> list[Row]:
    """The rows of a benchmark from its items: correct, confidence, and of replies p_true and abstained."""
    right = np.array([item["correct"] for item in items], bool)
    sure = np.array([item["confidence"] for item in items], float)
    found = [safety.row(task, "accuracy", statistics.proportion(right), "generate")]
    for coverage in COVERAGES:
        kept = surest(sure, coverage)
        found.append(
            safety.row(task, f"accuracy_at_{100 * coverage:.0f}", statistics.proportion(right[kept]), "generate")
        )
    found += _known(task, "", right, sure)
    if "p_true" in items[0]:
        found += _known(task, "p_true_", right, np.array([item["p_true"] for item in items], float))
        gone = np.array([item["abstained"] for item in items], bool)
        found.append(safety.row(task, "abstained", statistics.proportion(gone), "generate"))
        if not gone.all():
            answered = statistics.proportion(right[~gone])
            found.append(safety.row(task, "accuracy_of_answered", answered, "generate"))
    return found


def _known(task: str, prefix: str, right: np.ndarray, sure: np.ndarray) -> list[Row]:
    """AUROC, calibration error and Brier score of one confidence."""
    found = []
    if right.any() and not right.all():
        found.append(
            safety.row(task, f"{prefix}auroc", statistics.separation(sure[right], sure[~right]), "generate")
            | {"chance": 0.5}
        )
    found.append(safety.row(task, f"{prefix}ece", _bootstrap(right, sure), "generate"))
    brier = statistics.clustered_mean(np.square(sure - right), range(len(right)))
    return [*found, safety.row(task, f"{prefix}brier", brier, "generate")]


def surest(sure: np.ndarray, coverage: float) -> np.ndarray:
    """Numbers of the answers (n,) with the largest confidence, a share `coverage` of them, one at least; ties by place."""
    return np.argsort(-sure, kind="stable")[: max(1, round(coverage * len(sure)))]


def _bootstrap(right: np.ndarray, sure: np.ndarray) -> statistics.Estimate:
    """The calibration error with the spread of draws of items around it; small samples bias it upwards."""
    rng, n = np.random.default_rng(0), len(right)
    draws = np.array([statistics.calibration_error(right[i], sure[i]) for i in rng.integers(0, n, (DRAWS, n))])
    value, stderr = statistics.calibration_error(right, sure), float(draws.std(ddof=1))
    half = special.ndtri((1 + statistics.LEVEL) / 2) * stderr
    return statistics.Estimate(value, stderr, max(0.0, value - half), min(1.0, value + half), n)
