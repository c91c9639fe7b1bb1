"""What a reply to a question about a picture is worth, 0 to 1, by the rules of the benchmarks.

Every function takes what a model generated, with or without chat manners.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from phi3_jax.evaluation.suites.phi3_report import answers

ALLOWED = 0.05  # of relaxed accuracy: the share by which a number may be off
NEAR = 0.5  # of ANLS: answers further apart than this share of the longer one's letters are worth nothing
AGREE = 3  # of VQA accuracy: persons who must have given an answer for it to be right
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {
    word: str(i)
    for i, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
} | {"none": "0"}  # fmt: skip


def choice(reply: str, choices: Sequence[str], gold: int) -> float:
    """Whether the letter that a reply names is the gold option's."""
    return float(answers.letter(reply, choices) == gold)


def relaxed(reply: str, golds: Sequence[str]) -> float:
    """Relaxed accuracy (Methani et al., arXiv:1909.00997; ChartQA, arXiv:2203.10244): a number may be off by 5 %, other
    answers must be the same but for case. As in pix2struct's code "5%" is 0.05, and a gold 0 must be said as it is."""
    said = answers.phrase(reply)
    return max((float(_close(said, gold)) for gold in golds), default=0.0)


def _close(said: str, gold: str) -> bool:
    first, second = _real(said), _real(gold)
    if first is not None and second:
        return abs(first - second) <= ALLOWED * abs(second)
    return said.strip().lower() == gold.strip().lower()


def _real(text: str) -> float | None:
    text = text.strip().replace(",", "").removeprefix("$")
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not np.isfinite(value):
        return None
    return value / 100 if share else value


def anls(reply: str, golds: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al., arXiv:1905.13648): of the nearest gold."""
    said = " ".join(answers.phrase(reply).lower().split())
    best = 0.0
    for gold in (" ".join(gold.lower().split()) for gold in golds):
        longest = max(len(said), len(gold))
        apart = _distance(said, gold) / longest if longest else 0.0
        best = max(best, 1 - apart if apart < NEAR else 0.0)
    return best


def _distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements that make one text of the other."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return row[-1]


def vqa(reply: str, golds: Sequence[str]) -> float:
    """VQA accuracy (Antol et al., arXiv:1505.00468): min(matches / 3, 1), averaged over leaving out each person's answer.

    Answers are compared in the official normal form, but for its table of contractions. One answer alone must match.
    """
    said, given = plain(answers.phrase(reply)), [plain(gold) for gold in golds]
    if len(given) < AGREE:
        return float(said in given)
    matches = [said == one for one in given]
    return float(np.mean([min(1.0, (sum(matches) - one) / AGREE) for one in matches]))


def plain(text: str) -> str:
    """The official normal form: lower case, no articles, digits for number words, no marks."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        near_space = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if near_space or joined else " ")
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text).lower()
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def says_yes(reply: str) -> bool:
    """POPE's rule (Li et al., arXiv:2305.10355): of the first sentence, "no" or "not" anywhere is no, anything else yes."""
    words = reply.split(".")[0].replace(",", "").split()
    return not {"No", "not", "no"} & set(words)


def f1(said: Sequence[bool], gold: Sequence[bool]) -> float:
    """Harmonic mean of precision and recall of "yes"; 0 where nothing right was said."""
    right = sum(a and b for a, b in zip(said, gold, strict=True))
    return 2 * right / (sum(said) + sum(gold)) if right else 0.0


def number_or_words(reply: str, golds: Sequence[str]) -> float:
    """MathVista's free answers: the last number of a reply is the gold one, or its words are."""
    for gold in golds:
        value = answers.number(gold)
        if value is not None and answers.last_number(reply) == value:
            return 1.0
        if value is None and answers.trivia(answers.phrase(reply)) == answers.trivia(gold):
            return 1.0
    return 0.0
