"""Rows of the Hugging Face data sets in the common shape of `data.py`; a benchmark's function has its name.

Column layouts are those that lm-eval 0.4.13's stock tasks read. Rows of data sets that keep subsets apart come with a
column `subset` added by `data.online`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

from phi3_jax.evaluation.suites.phi3_report.answers import boxed

Row = dict[str, Any]


def common(benchmark: str, kind: str, number: Any, subset: str = "", **rest: Any) -> Row:
    """A row of the common shape with empty defaults; id is <benchmark>/<subset>/<number>."""
    row: Row = {
        "id": "/".join(filter(None, (benchmark, subset, str(number)))),
        "benchmark": benchmark,
        "subset": subset,
    }
    row |= {"type": kind, "context": "", "question": "", "choices": [], "answer": -1, "target": "", "aliases": []}
    return row | {"rationale": ""} | rest


def _options(benchmark: str, row: Row, choices: Sequence[str], answer: int, subset: str = "", **rest: Any) -> Row:
    number = row.get("id", row.get("uid", row.get("ind", row.get("idx", _digest(row)))))
    target = choices[answer] if 0 <= answer < len(choices) else ""  # data.check names what is out of range
    rest |= {"choices": list(choices), "answer": int(answer), "target": target}
    return common(benchmark, "multiple_choice", number, subset, **rest)


def _digest(row: Row) -> str:
    return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:12]


def mmlu(row: Row) -> Row:
    return _options("mmlu", row, row["choices"], row["answer"], row["subject"], question=row["question"])


def hellaswag(row: Row) -> Row:
    about = {"context": row["activity_label"], "question": row["ctx"]}
    return _options("hellaswag", row, row["endings"], int(row["label"]), row["split_type"], **about)


def anli(row: Row) -> Row:
    about = {"context": row["premise"], "question": row["hypothesis"], "rationale": row["reason"]}
    subset = row["subset"] if "subset" in row else f"r{row['round']}"
    return _options("anli", row, ("entailment", "neutral", "contradiction"), row["label"], subset, **about)


def gsm8k(row: Row) -> Row:
    rationale, target = row["answer"].split("\n#### ")
    target = target.strip().replace(",", "")
    return common("gsm8k", "generate", _digest(row), question=row["question"], target=target, rationale=rationale)


def math(row: Row) -> Row:
    rest = {"question": row["problem"], "target": boxed(row["solution"]) or "", "rationale": row["solution"]}
    return common("math", "generate", _digest(row), row["subset"] if "subset" in row else row["type"], **rest)


def medqa(row: Row) -> Row:
    choices = [row[f"ending{i}"] for i in range(4)]
    question = f"{row['sent1']} {row['sent2']}" if row["sent2"] else row["sent1"]
    return _options("medqa", row, choices, row["label"], question=question)


def agieval(row: Row) -> Row:
    """Takes the prompt of the Hub's copy apart: `<passage>\\nQ: <question> Answer Choices: (A).. (B)..\\nA: ...`."""
    passage, _, question = f"\n{row['query']}".partition("\nQ: ")
    choices = [re.sub(r"^\([A-Z]\)\s*", "", choice) for choice in row["choices"]]
    about = {"context": passage.removeprefix("\n"), "question": question.rpartition(" Answer Choices: ")[0]}
    return _options("agieval", row, choices, row["gold"][0], row["subset"], **about)


def triviaqa(row: Row) -> Row:
    answer, number = row["answer"], row.get("question_id", _digest(row))
    rest = {"question": row["question"], "target": answer["value"], "aliases": list(answer["aliases"])}
    return common("triviaqa", "generate", number, **rest)


def _labelled(benchmark: str, row: Row, question: str) -> Row:
    texts, labels = row["choices"]["text"], list(row["choices"]["label"])
    return _options(benchmark, row, texts, labels.index(row["answerKey"].strip()), question=question)


def arc_challenge(row: Row) -> Row:
    return _labelled("arc_challenge", row, row["question"])


def arc_easy(row: Row) -> Row:
    return _labelled("arc_easy", row, row["question"])


def openbookqa(row: Row) -> Row:
    return _labelled("openbookqa", row, row["question_stem"])


def commonsense_qa(row: Row) -> Row:
    return _labelled("commonsense_qa", row, row["question"])


def piqa(row: Row) -> Row:
    return _options("piqa", row, (row["sol1"], row["sol2"]), row["label"], question=row["goal"])


def social_iqa(row: Row) -> Row:
    about = {"context": row["context"], "question": row["question"]}
    return _options("social_iqa", row, [row[f"answer{x}"] for x in "ABC"], int(row["label"]) - 1, **about)


def bbh(row: Row) -> Row:
    return common("bbh", "generate", _digest(row), row["subset"], question=row["input"], target=row["target"])


def winogrande(row: Row) -> Row:
    options = (row["option1"], row["option2"])
    return _options("winogrande", row, options, int(row["answer"]) - 1, question=row["sentence"])


def boolq(row: Row) -> Row:
    about = {"context": row["passage"], "question": f"{row['question']}?"}
    return _options("boolq", row, ("no", "yes"), row["label"], **about)


def truthfulqa(row: Row) -> Row:
    """MC1 options, which have the true one first on the Hub, are shuffled by the question."""
    one, two = row["mc1_targets"], row["mc2_targets"]
    order = shuffled(len(one["choices"]), row["question"])
    choices, answer = [one["choices"][i] for i in order], order.index(list(one["labels"]).index(1))
    extra: Row = {"mc2_choices": list(two["choices"]), "mc2_labels": list(two["labels"])}
    return _options("truthfulqa", row, choices, answer, question=row["question"], **extra)


def humaneval(row: Row) -> Row:
    rest = {"question": row["prompt"], "target": row["canonical_solution"]}
    rest |= {"entry_point": row["entry_point"], "test": row["test"]}
    return common("humaneval", "code", row["task_id"].split("/")[-1], **rest)


def mbpp(row: Row) -> Row:
    rest = {"question": row["text"], "target": row["code"], "test_setup_code": row["test_setup_code"]}
    return common("mbpp", "code", row["task_id"], **rest, test_list=list(row["test_list"]))


def gpqa(row: Row) -> Row:
    """Options are shuffled by the question: the Hub has the right one in a column of its own."""
    texts = [row[c].strip() for c in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
    order = shuffled(4, row["Question"])
    about = {"question": row["Question"].strip(), "rationale": (row.get("Explanation") or "").strip()}
    return _options("gpqa", {"id": _digest(row)}, [texts[i] for i in order], order.index(0), **about)


def shuffled(n: int, seed: str) -> list[int]:
    """A permutation of range(n) fixed by a text."""
    order = list(range(n))
    random.Random(int(hashlib.sha256(seed.encode()).hexdigest(), 16)).shuffle(order)
    return order
