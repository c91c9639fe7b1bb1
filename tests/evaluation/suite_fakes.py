"""Fake models, and a small data set of our own, for the tests of the report's benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
from lm_eval import evaluator
from lm_eval.api.model import LM

from phi3_jax.errors import UserError
from phi3_jax.evaluation import sandbox
from phi3_jax.evaluation.suites.phi3_report import BENCHMARKS, convert

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "benchmarks"
real = pytest.mark.shared("benchmarks")
OFFLINE = [name for name in BENCHMARKS if name not in ("math", "gpqa")]
CODE = ("humaneval", "mbpp")
KEYS = [f"{name}/{s}" if s else name for name in OFFLINE for s in BENCHMARKS[name].scorings or ("",)]
STYLES = {"base": "{}", "chat": "The correct answer is **{}**.", "sentence": "The answer is ({}).", "bracket": "({})"}


def isolated() -> bool:
    try:
        return bool(sandbox.layers())
    except UserError:
        return False


confined = pytest.mark.skipif(not isolated(), reason="this machine cannot isolate model-written code")


class Fake(LM):
    """Answers by `say(instance)` and `score(instance)`, and remembers what it was asked."""

    tokenizer_name = "fake"

    def __init__(self, say=lambda request: "", score=lambda request: 0.0):
        super().__init__()
        self.say, self.score, self.asked = say, score, []

    def generate_until(self, requests):
        self.asked += requests
        return [self.say(request) for request in requests]

    def loglikelihood(self, requests):
        self.asked += requests
        return [(self.score(request), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def apply_chat_template(self, messages, add_generation_prompt=True):
        return json.dumps([[m["role"], m["content"]] for m in messages] + [["assistant", None]])


def is_gold(request) -> bool:
    doc = request.doc
    return bool(doc["mc2_labels"][request.idx]) if doc["benchmark"] == "truthfulqa" else request.idx == doc["answer"]


def oracle(style: str = "base") -> Fake:
    def say(request) -> str:
        doc = request.doc
        name, target = doc["benchmark"], doc["target"]
        if request.task_name.endswith("/letter"):
            return " " + STYLES[style].format("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[doc["answer"]])
        if name == "humaneval":
            whole = doc["question"] + target
            return target if style == "base" else f"Sure!\n```python\n{whole}\n```\nThis\ndef is not code."
        if name == "mbpp":
            return (
                f"{target}\n[DONE]" if style == "base" else f"Here it is:\n\n```python\n{target}\n```\nHope it helps."
            )
        if name == "triviaqa":
            return f" {target}\n\nQuestion: next" if style == "base" else f"\n\nThe answer is {target.upper()}."
        if name in ("math", "math_format_sample"):
            return f"We find $\\boxed{{{target}}}$." if style == "base" else f"**Answer: {target}**"
        return f"Some work, 1 + 1. So the answer is {target}." if style == "base" else f"Work.\n\n**Answer:** {target}"

    return Fake(say, lambda request: 0.0 if is_gold(request) else -40.0)


def wrong() -> Fake:
    replies = {"triviaqa": "zzz", "humaneval": "    raise ValueError\n", "mbpp": "def f():\n    pass\n[DONE]"}

    def say(request) -> str:
        doc = request.doc
        if request.task_name.endswith("/letter"):
            return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[(doc["answer"] + 1) % len(doc["choices"])]
        return replies.get(doc["benchmark"], "The answer is 987654321, \\boxed{987654321}.")

    return Fake(say, lambda request: -40.0 if is_gold(request) else 0.0)


def run(lm: Fake, tasks: dict, **options) -> dict:
    return evaluator.evaluate(lm, tasks, log_samples=True, bootstrap_iters=0, **options)


# A data set of our own, in the shape of `data.py`.
def written(name: str, number: int, subset: str = "", shot: bool = False) -> dict:
    kind, about = BENCHMARKS[name].kind, {"question": f"What is {number} and {number}?"}
    if kind == "multiple_choice":
        about |= {"choices": [f"it is {number + i}" for i in range(3)], "answer": number % 3}
        about["target"] = about["choices"][number % 3]
        about["context"] = "A story of numbers." if name in ("boolq", "anli", "hellaswag", "social_iqa") else ""
        if name == "anli":
            about |= {"choices": ["entailment", "neutral", "contradiction"]}
            about["target"] = about["choices"][number % 3]
        if name == "winogrande":
            about["question"] = f"The {number} saw the tree because _ was near."
        if name == "truthfulqa":
            about |= {"mc2_choices": ["yes", "certainly", "no"], "mc2_labels": [1, 1, 0]}
    elif kind == "code":
        about["target"] = f"    return {number}\n" if name == "humaneval" else f"def f():\r\n    return {number}"
        about |= {"test_setup_code": "", "test_list": [f"assert f() == {number}"]}
        about |= {"entry_point": "f", "test": f"def check(f):\n    assert f() == {number}\n"}
        if name == "humaneval":
            about["question"] = f'import math\n\n\ndef f():\n    """Returns {number}."""\n'
    else:
        about |= {"target": str(2 * number), "rationale": f"It is {2 * number}."}
        if name == "bbh":
            about |= {"context": "Add." if shot else "", "rationale": f"So the answer is {2 * number}." if shot else ""}
    return convert.common(name, kind, f"{'shot' if shot else 'item'}{number}", subset, **about)


def write(folder: Path, name: str) -> Path:
    benchmark = BENCHMARKS[name]
    subsets = ("one", "two") if benchmark.by_subset else ("",)
    for file, count in (("test", 3), ("fewshot", benchmark.shots + 1)):
        shot = file == "fewshot"
        sets = (benchmark.fewshot_subset,) if shot and benchmark.fewshot_subset else subsets
        rows = [written(name, n + (100 if shot else 0), subset, shot) for subset in sets for n in range(1, count + 1)]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
