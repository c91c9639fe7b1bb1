"""Search augmentation, the Phi-3 report's remedy for weak factual knowledge: BM25's passages before the question.

An index is one SQLite file with an FTS5 table (standard library only). Its score of a passage D sums, over the query's
different tokens t,  idf(t) * f (k1 + 1) / (f + k1 (1 - b + b |D| / avg |D|)),  f the count of t in D, with FTS5's own
k1 = 1.2, b = 0.75 and idf(t) = ln((N - n + 0.5) / (n + 0.5)), or 1e-6 where that is not positive, n of N passages having
t. Lucene has ln(1 + ...) instead: here a token of half of the passages or more is worth nothing. bm25s' "robertson" is
the same without k1 + 1. Tokens are `unicode61`'s: runs of letters and digits (so Chinese is not cut), case and accents off.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.meters.meter import Row, row
from phi3_jax.data.retrieval import Index, Passage
from phi3_jax.errors import UserError

Generate = Callable[[Sequence[str]], Sequence[str]]
Correct = Callable[[str, Sequence[str]], bool]
TEMPLATE = "{passages}\n\nQuestion: {question}\nAnswer:"
_PUNCTUATION = str.maketrans({**dict.fromkeys(string.punctuation + "‘’´", ""), "_": " "})


def augmented(question: str, passages: Sequence[Passage | str], template: str = TEMPLATE) -> str:
    """Prompt with the passages before the question; without any it is the rest of the template, closed-book."""
    if not ("{passages}" in template and "{question}" in template):
        raise UserError(f"template {template!r} needs both {{passages}} and {{question}}; the default is {TEMPLATE!r}")
    texts = "\n\n".join(passage if isinstance(passage, str) else passage.text for passage in passages)
    parts = {"{passages}": texts, "{question}": question}
    return re.sub(r"\{(passages|question)\}", lambda match: parts[match[0]], template).lstrip("\n")


def contains_answer(reply: str, answers: Sequence[str]) -> bool:
    """Whether the first line of a reply holds an answer as whole words, both normalised; empty answers never match.

    Normalised, as for SQuAD: lower case, no ASCII punctuation, no articles, single blanks; `_` and ‘’´ as for TriviaQA.
    """

    def normal(text: str) -> str:
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())

    line = f" {normal(reply.strip().partition(chr(10))[0])} "
    return any(f" {answer} " in line for answer in map(normal, answers) if answer)


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the oracle passage, which holds one (None where nobody knows it)."""

    question: str
    answers: tuple[str, ...]
    passage: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Right or not, (n,) bool; found: a retrieved passage holds an answer; `oracle` counts where has_oracle alone."""

    closed: np.ndarray
    retrieved: np.ndarray
    oracle: np.ndarray
    found: np.ndarray
    has_oracle: np.ndarray

    def rows(self) -> list[Row]:
        """Metric rows as in `probes`: the accuracies, and the paired difference retrieved - closed."""
        hits = {"closed": self.closed, "retrieved": self.retrieved, "oracle": self.oracle[self.has_oracle]}
        hits |= {"found": self.found}
        scores = [(task, "accuracy", statistics.proportion(right)) for task, right in hits.items() if right.size]
        scores += [("retrieved-closed", "difference", statistics.paired_difference(self.closed, self.retrieved))]
        return [row("search", *score, chance=0.0) for score in scores]

    def cells(self) -> list[dict[str, Any]]:
        """Known and unknown questions (closed-book right and wrong; so generate greedily), without and with search."""
        cells: list[dict[str, Any]] = []
        for kind, of in ("known", self.closed), ("unknown", ~self.closed):
            for search, hits in ("closed", self.closed[of]), ("retrieved", self.retrieved[of]):
                share = float(hits.mean()) if hits.size else None
                cells.append(dict(questions=kind, search=search, n=hits.size, right=int(hits.sum()), share=share))
        return cells

    def table(self) -> str:
        """Markdown: the three scores with their 95 % intervals, and the four cells (without search, by definition)."""
        lines = ["| questions | search | n | right | 95 % |", "|---|---|--:|--:|---|"]
        lines += map("| all | {task} | {n} | {value:.3f} | {low:.3f}–{high:.3f} |".format_map, self.rows()[:-2])
        for cell in self.cells():
            share = f"{cell['share']:.3f}" if cell["n"] else "–"
            lines.append(f"| {cell['questions']} | {cell['search']} | {cell['n']} | {share} | |")
        return "\n".join(lines) + "\n"


def compare(
    generate: Generate, questions: Sequence[Question], index: Index, k: int = 3, correct: Correct = contains_answer
) -> Comparison:
    """Ask questions closed-book, with k retrieved passages, and with the oracle passage where there is one.

    `generate` turns prompts into replies, in order, and is called once a way; `correct` judges a reply by the answers.
    """
    if not questions:
        raise UserError("0 questions to compare with and without search; give 1 or more")

    def ask(before: Sequence[Sequence[Passage | str]], asked: np.ndarray) -> np.ndarray:
        prompts = [augmented(questions[i].question, before[i]) for i in asked]
        right, replies = np.zeros(len(questions), bool), generate(prompts) if prompts else []
        right[asked] = [correct(reply, questions[i].answers) for i, reply in zip(asked, replies, strict=True)]
        return right

    everyone, has_oracle = np.arange(len(questions)), np.array([q.passage is not None for q in questions])
    best = [index.search(q.question, k) for q in questions]
    found = [any(contains_answer(" ".join(p.text.split()), q.answers) for p in ps) for q, ps in zip(questions, best)]
    closed, retrieved = ask([[]] * len(questions), everyone), ask(best, everyone)
    oracle = ask([[q.passage or ""] for q in questions], np.flatnonzero(has_oracle))
    return Comparison(closed, retrieved, oracle, np.array(found), has_oracle)
