"""The benchmarks of the Phi-3 report's table, with its shots, as tasks of lm-eval 0.4.13.

    tasks = build(["arc_challenge", "gsm8k"], data_dir=Path("../shared/benchmarks"))
    results = lm_eval.evaluator.evaluate(lm, tasks, limit=50, log_samples=True, bootstrap_iters=0)
    rows, replies = summarise(results, tasks), items(results, tasks)

Benchmarks with options come in two scorings, whose scores are not comparable (docs/evaluation.md): `letter`, as the report
describes, and `harness`, as lm-eval's stock tasks do it. `benchmarks.py` is the table, `data.py` reads and checks the
items, `convert.py` turns Hub rows into them, `prompts.py` writes what the model sees, `answers.py` reads what it says and
`tasks.py` puts these together. MT-Bench, which needs a judge, is phi3_jax/evaluation/mt_bench.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phi3_jax.errors import UserError
from phi3_jax.evaluation.suites.phi3_report.benchmarks import BENCHMARKS, Benchmark

if TYPE_CHECKING:
    from lm_eval.api.task import Task

NAME = "phi3_report"
__all__ = ["BENCHMARKS", "NAME", "Benchmark", "build", "items", "summarise"]


def build(
    benchmarks: Sequence[str] | None = None,
    scoring: str = "both",
    data_dir: Path | None = None,
    allow_code_execution: bool = False,
) -> dict[str, Task]:
    """Tasks by key: "arc_challenge/letter" and "arc_challenge/harness" where there are options, else "gsm8k".

    Args:
      benchmarks: names of BENCHMARKS; None for the whole suite, which leaves out, with a printed note, what it has no data
        or no permission for.
      scoring: letter, harness or both; says nothing on benchmarks without options, which are always included.
      data_dir: folder of <name>/test.jsonl and <name>/fewshot.jsonl; None reads the Hugging Face Hub.
      allow_code_execution: whether HumanEval and MBPP may run model-written code (in `evaluation.sandbox`).

    Raises:
      UserError: an unknown name or scoring, data that are missing, too few or of a wrong shape, code execution not
        allowed for a benchmark named here, or not possible on this machine.
    """
    return _tasks().build(benchmarks, scoring, data_dir, allow_code_execution)


def summarise(results: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """Metric rows of what lm_eval.evaluator.evaluate returned (with log_samples): one per task, and one per subset.

    Keys: suite, task ("mmlu/letter", then "mmlu/letter/anatomy"), metric (the headline one), value, n, low, high (95%:
    Wilson for shares, normal for mc2), chance (mean over the items), stderr, shots, and subset_of: the number of items of
    the benchmark's full test set where fewer were asked, else None.
    """
    return _tasks().summarise(results, tasks)


def items(results: Mapping[str, Any], tasks: Mapping[str, Task]) -> Iterator[dict[str, Any]]:
    """One JSON-able dict per item: task, id, subset, gold, choice, correct, and logprobs (harness) or reply (the rest)."""
    return _tasks().items(results, tasks)


def _tasks() -> ModuleType:
    if importlib.util.find_spec("lm_eval") is None:  # its import takes seconds, so not before it is needed
        raise UserError("evaluation needs lm-eval; pip install -e '.[eval]'")
    from phi3_jax.evaluation.suites.phi3_report import tasks

    return tasks
