"""The tasks that lm-eval runs, and what is read out of its results."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from phi3_jax import statistics
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import sandbox
from phi3_jax.evaluation.suites.phi3_report import answers, data, prompts
from phi3_jax.evaluation.suites.phi3_report.benchmarks import BENCHMARKS, Benchmark

Doc = dict[str, Any]
SUITE = "phi3_report"
SCORINGS = ("both", "letter", "harness")
REPLY = 500  # characters of a reply that `items` keeps
GENERATION: dict[str, tuple[int, list[str]]] = {  # tokens at most, stop strings
    "letter": (12, ["\n\n", "\nQuestion:"]),
    "gpqa/letter": (512, ["\nQuestion:"]),
    "gsm8k": (512, ["\nQ:"]),
    "math": (1024, ["\nProblem:"]),
    "math_format_sample": (1024, ["\nProblem:"]),
    "triviaqa": (32, ["\n\n", "\nQuestion:"]),
    "bbh": (512, ["\nQ:"]),
    "humaneval": (512, list(answers.STOPS)),
    "mbpp": (512, ["[DONE]"]),
}
HASHES = ("doc_hash", "prompt_hash", "target_hash")  # lm-eval's, of an item
YES_OR_NO = ("boolean_expressions", "sports_understanding", "web_of_lies")  # BBH tasks of two answers without options


class _Rows(list):
    """Docs in memory with the one attribute of a data set that ConfigurableTask reads."""

    @property
    def features(self) -> Doc:
        return self[0]


class ReportTask(ConfigurableTask):
    """One benchmark in one scoring ("" where it has no options), on rows in memory."""

    def __init__(self, benchmark: Benchmark, scoring: str, rows: Sequence[Doc], shots: Mapping[str, list[Doc]]) -> None:
        self.benchmark, self.scoring = benchmark, scoring
        self.key = f"{benchmark.name}/{scoring}" if scoring else benchmark.name
        self.headline = "accuracy" if scoring == "letter" else benchmark.metric
        self._rows, self._shots = _Rows(rows), shots
        super().__init__(config=_config(self))

    def download(self, dataset_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Takes the rows in memory for lm-eval's data set."""
        self.dataset = {"test": self._rows, "fewshot": []}

    def fewshot_context(self, doc: Doc, *args: Any, **kwargs: Any) -> str | list[str]:
        """lm-eval's own, turns of a chat included, with the exemplars of the item's subset."""
        if self._shots:
            self.sampler.replace_df(self._shots[doc["subset"] if self.benchmark.by_subset else ""])
        return super().fewshot_context(doc, *args, **kwargs)

    def construct_requests(self, doc: Doc, ctx: str | list[str], **kwargs: Any) -> Instance | list[Instance]:
        """lm-eval's own; a chat reply to HumanEval is not stopped, for its fenced function has a `def` of its own."""
        chat = kwargs.get("apply_chat_template", False)
        requests = super().construct_requests(doc, ctx, **kwargs)
        if chat and self.benchmark.name == "humaneval":
            requests.arguments[1]["until"] = []
        return requests

    def apply_filters(self) -> None:
        """lm-eval's own; then programs run, all at once, and a reply becomes a dict of reply, passed, status, detail."""
        super().apply_filters()
        if self.benchmark.kind != "code":
            return
        programs = [_program(instance.doc, instance.filtered_resps["none"]) for instance in self._instances]
        for instance, outcome in zip(self._instances, sandbox.run_all(programs), strict=True):
            ran = {"passed": outcome.passed, "status": outcome.status, "detail": outcome.detail}
            instance.filtered_resps["none"] = {"reply": instance.filtered_resps["none"], **ran}


def build(
    benchmarks: Sequence[str] | None, scoring: str, data_dir: Path | None, allow_code_execution: bool
) -> dict[str, ReportTask]:
    """See the package's `build`."""
    if scoring not in SCORINGS:
        raise UserError(f"unknown scoring {scoring!r}{nearest(scoring, SCORINGS)}")
    names = list(dict.fromkeys(benchmarks)) if benchmarks is not None else _whole(data_dir, allow_code_execution)
    for name in names:
        _permitted(name, allow_code_execution, data_dir)
    tasks = {}
    for name in names:
        benchmark = BENCHMARKS[name]
        try:
            rows, shots = data.load(benchmark, data_dir)
        except UserError as error:
            if benchmarks is None and name == "gpqa" and data_dir is None:
                _note(str(error))
                continue
            raise
        for lead in (few[0] for few in shots.values() if name == "bbh"):
            lead["lead"] = f"{lead['context']}\n\n"
        wanted = benchmark.scorings if scoring == "both" else (scoring,)
        for task in (ReportTask(benchmark, s, rows, shots) for s in (wanted if benchmark.scorings else ("",))):
            tasks[task.key] = task
    return tasks


def _whole(data_dir: Path | None, allow_code_execution: bool) -> list[str]:
    names, missing = [], []
    for name, benchmark in BENCHMARKS.items():
        there = data_dir is None or (Path(data_dir) / name / "test.jsonl").is_file()
        if name == "math_format_sample" and (data_dir is None or not there or "math" in names):
            continue
        if not there:
            missing.append(name)
        elif benchmark.kind == "code" and not allow_code_execution:
            _note(f"{name}: runs model-written code; give --allow_code_execution")
        else:
            names.append(name)
    if missing and names:
        _note(f"{', '.join(missing)}: no <name>/test.jsonl in {data_dir}")
    if not names:
        raise UserError(f"{data_dir} has no benchmark; want a folder with <name>/test.jsonl, e.g. mmlu/test.jsonl")
    return names


def _permitted(name: str, allow_code_execution: bool, data_dir: Path | None) -> None:
    if name == "mt_bench":
        raise UserError("mt_bench needs a judge and is no task of this suite; use phi3_jax.evaluation.mt_bench")
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}")
    if BENCHMARKS[name].kind == "code":
        if not allow_code_execution:
            raise UserError(
                f"{name} runs model-written code; give --allow_code_execution to run it in a sandbox without network, "
                f"or leave out {name}"
            )
        sandbox.layers()  # raises where the machine cannot isolate
    if name == "math_format_sample" and data_dir is None:
        raise UserError("math_format_sample is not on the Hub; give --data_dir, or use math")
    if name == "gpqa" and data_dir is not None and not (Path(data_dir) / name / "test.jsonl").is_file():
        raise UserError(
            f"gpqa has no offline copy (its authors ask not to post it): {data_dir} has no gpqa/test.jsonl; leave out "
            "--data_dir and log in to the Hub, where Idavidrein/gpqa is gated, or leave out gpqa"
        )


def _note(text: str) -> None:
    print(f"{SUITE} leaves out {text}", file=sys.stderr)


def _config(task: ReportTask) -> dict[str, Any]:
    """lm-eval's configuration; all its callables are functions of this package, which it can copy and print."""
    benchmark, scoring = task.benchmark, task.scoring
    config: dict[str, Any] = {
        "task": task.key,
        "task_alias": f"{benchmark.title} ({scoring})" if scoring else benchmark.title,
        "test_split": "test",
        "fewshot_split": "fewshot",
        "num_fewshot": benchmark.shots,
        "fewshot_config": {"sampler": "first_n"},
        "metadata": {"version": 1.0},
    }
    if scoring == "harness":
        truthful = benchmark.metric == "mc2"
        config |= {"output_type": "multiple_choice", "process_results": _score_mc2 if truthful else _score_options}
        config |= {"doc_to_text": prompts.harness_text, "doc_to_target": prompts.harness_target}
        config["doc_to_choice"] = prompts.harness_options
        metrics = ("mc2",) if truthful else ("acc",) if benchmark.name == "winogrande" else ("acc", "acc_norm")
    else:
        lettered = scoring == "letter"
        tokens, stops = GENERATION.get(task.key) or GENERATION[scoring]
        config |= {"output_type": "generate_until", "process_results": _score_letter if lettered else _score_reply}
        config["doc_to_text"] = prompts.letter_text if lettered else prompts.generate_text
        config["doc_to_target"] = prompts.letter_target if lettered else prompts.generate_target
        config["target_delimiter"] = "" if benchmark.name in ("bbh", "mbpp") else " "
        config["generation_kwargs"] = {"until": stops, "max_gen_toks": tokens, "do_sample": False, "temperature": 0.0}
        metrics = (task.headline,)
    mean = {"aggregation": "mean", "higher_is_better": True}
    return config | {"metric_list": [{"metric": metric, **mean} for metric in metrics]}


def _score_letter(doc: Doc, results: list[str]) -> dict[str, float]:
    return {"accuracy": float(_chosen(doc, results[0]) == doc["answer"])}


def _chosen(doc: Doc, reply: str) -> int | None:
    return answers.letter(reply, doc["choices"], last=BENCHMARKS[doc["benchmark"]].cot)


def _score_options(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, float]:
    """acc: the likeliest option; acc_norm: the likeliest a character, of options as they are scored (lm-eval's)."""
    scores = _by_metric(doc, [result[0] for result in results])
    return {metric: float(np.argmax(values) == doc["answer"]) for metric, values in scores.items()}


def _by_metric(doc: Doc, logprobs: Sequence[float]) -> dict[str, np.ndarray]:
    values, lengths = np.asarray(logprobs, float), [len(text) for text in prompts.harness_options(doc)]
    return {"acc": values} | ({} if doc["benchmark"] == "winogrande" else {"acc_norm": values / np.asarray(lengths)})


def _score_mc2(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Share of the options' probability that is on true ones (Lin et al., arXiv:2109.07958)."""
    values = np.asarray([result[0] for result in results], float)
    mass = np.exp(values - values.max())
    return {"mc2": float(mass[np.asarray(doc["mc2_labels"]) == 1].sum() / mass.sum())}


def _score_reply(doc: Doc, results: list[Any]) -> dict[str, float]:
    if BENCHMARKS[doc["benchmark"]].kind == "code":
        return {"pass@1": float(results[0]["passed"])}
    return {"exact_match": float(_right(doc, results[0]))}


def _right(doc: Doc, reply: str) -> bool:
    name, target = doc["benchmark"], doc["target"]
    if name == "gsm8k":
        return (found := answers.last_number(reply)) is not None and found == answers.number(target)
    if name == "triviaqa":
        return answers.trivia(answers.phrase(reply)) in {answers.trivia(text) for text in (target, *doc["aliases"])} - {
            ""
        }
    if name == "bbh":
        return answers.equal_short(reply, target)
    return answers.equal_mathematics(answers.mathematical_answer(reply), target)


def _parsed(doc: Doc, reply: str) -> str | None:
    parse: dict[str, Callable[[str], Any]] = {
        "gsm8k": answers.last_number,
        "triviaqa": answers.phrase,
        "bbh": lambda text: answers.after_cue(text, doc["target"]),
    }
    found = parse.get(doc["benchmark"], answers.mathematical_answer)(reply)
    return None if found is None else str(found)


def _program(doc: Doc, reply: str) -> str:
    if doc["benchmark"] == "humaneval":
        return answers.humaneval_program(doc["question"], reply, doc["test"], doc["entry_point"])
    return answers.mbpp_program(reply, doc["test_setup_code"], doc["test_list"])


def chance(task: ReportTask, doc: Doc) -> float:
    """What a uniform guess over an item's possible answers scores; 0 where they are not listed."""
    if task.headline == "mc2":
        return sum(doc["mc2_labels"]) / len(doc["mc2_labels"])
    if task.scoring:
        return 1 / len(doc["choices"])
    if task.benchmark.name != "bbh":
        return 0.0
    listed = re.findall(r"^(?:\([A-Z]\)|-) ", doc["question"].partition("\nOptions:")[2], re.MULTILINE)
    return 1 / len(listed) if listed else 0.5 if doc["subset"] in YES_OR_NO else 0.0


def summarise(results: Mapping[str, Any], tasks: Mapping[str, ReportTask]) -> list[dict[str, Any]]:
    """See the package's `summarise`."""
    rows = []
    for key, task in tasks.items():
        samples = _samples(results, key)
        of = task.benchmark.size if len(samples) < task.benchmark.size else None
        groups = {key: samples}
        if task.benchmark.by_subset:
            for subset in dict.fromkeys(sample["doc"]["subset"] for sample in samples):
                groups[f"{key}/{subset}"] = [sample for sample in samples if sample["doc"]["subset"] == subset]
        rows += [_row(task, name, group) | {"subset_of": of} for name, group in groups.items()]
    return rows


def _row(task: ReportTask, name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = np.asarray([sample[task.headline] for sample in samples], float)
    if task.headline == "mc2":
        estimate = statistics.clustered_mean(values, np.arange(len(values)))
        ends = [None if np.isnan(end) else float(np.clip(end, 0, 1)) for end in (estimate.low, estimate.high)]
    else:
        estimate = statistics.proportion(values)
        ends = [estimate.low, estimate.high]
    row = {"suite": SUITE, "task": name, "metric": task.headline, "value": estimate.value, "n": len(values)}
    row |= {"low": ends[0], "high": ends[1], "chance": float(np.mean([chance(task, s["doc"]) for s in samples]))}
    return row | {"stderr": None if np.isnan(estimate.stderr) else estimate.stderr, "shots": task.benchmark.shots}


def items(results: Mapping[str, Any], tasks: Mapping[str, ReportTask]) -> Iterator[dict[str, Any]]:
    """See the package's `items`."""
    for key, task in tasks.items():
        for sample in _samples(results, key):
            doc, given = sample["doc"], sample["filtered_resps"]
            item = {"task": key, "id": doc["id"], "subset": doc["subset"], "correct": sample[task.headline]}
            item |= {name: sample[name] for name in HASHES} | {"prompt": sample["arguments"][0][0]}
            if task.scoring == "harness":
                logprobs = [float(result[0]) for result in given]
                truthful = task.headline == "mc2"
                scores = np.asarray(logprobs) if truthful else _by_metric(doc, logprobs)[task.headline]
                gold = [i for i, label in enumerate(doc["mc2_labels"]) if label] if truthful else doc["answer"]
                yield item | {"gold": gold, "choice": int(np.argmax(scores)), "logprobs": logprobs}
            elif task.scoring == "letter":
                choice, marks = _chosen(doc, given[0]), answers.letters(len(doc["choices"]))
                letter = None if choice is None else marks[choice]
                yield item | {"gold": doc["answer"], "choice": choice, "letter": letter, "reply": given[0][:REPLY]}
            elif task.benchmark.kind == "code":
                ran = given[0]
                yield item | {"gold": None, "choice": ran["status"], "reply": ran["reply"][:REPLY]}
            else:
                yield item | {"gold": doc["target"], "choice": _parsed(doc, given[0]), "reply": given[0][:REPLY]}


def _samples(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    if key not in (results.get("samples") or {}):
        raise ValueError(f"no samples of {key}: run lm_eval.evaluator.evaluate with log_samples=True")
    return sorted(results["samples"][key], key=lambda sample: sample["doc_id"])
