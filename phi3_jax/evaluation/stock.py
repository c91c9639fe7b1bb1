"""lm-eval's own tasks: by name from the Hub or from a folder of files, and task files of one's own."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from phi3_jax import statistics
from phi3_jax.errors import UserError, nearest
from phi3_jax.records import files

NAME = "lm-eval"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_SECONDS = 5  # of the Hub, before it counts as out of reach
SEEDS = (0, 1234, 1234, 1234)  # lm-eval's own: of random, numpy, torch, and of the exemplars that are shown
RESULTS = "lm-eval"  # the folder of results in lm-eval's own form

Row = dict[str, Any]


def offline_at_once(local: bool) -> None:
    """Tells the Hub's client that it is offline where its server does not answer, or nothing of it is needed.

    Left to itself it tries each file again for minutes. To be called before the client is imported; data that it keeps are
    still found.
    """
    if not local and not os.environ.get("HF_HUB_OFFLINE"):
        address = urllib.request.getproxies().get("https") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        parts = urlsplit(address if "//" in address else f"//{address}")
        try:
            socket.create_connection((parts.hostname, parts.port or 443), ANSWER_SECONDS).close()
            return
        except OSError:
            pass
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def build(
    names: Sequence[str], data_dir: Path | None, metadata: Mapping[str, Any] | None = None
) -> tuple[Any, Mapping[str, Any]]:
    """Tasks of lm-eval, by name or by task file, behind the interface of a suite.

    Args:
      metadata: what tasks that make their own items need to know: tokenizer, max_seq_lengths.

    Raises:
      UserError: no such task, or its data are not to be had; or it would run code.
    """
    manager = manager_of(names, metadata or {})
    specs = specifications(names, data_dir, manager)
    seeded()
    try:
        tasks = manager.load(specs)
    except Exception as error:  # datasets, jinja and file systems each raise their own
        raise unloadable(names, error) from error
    if unsafe := [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(
            f"{', '.join(unsafe)} of lm-eval would run model-written code without a sandbox; use --suite phi3_report "
            "--tasks humaneval,mbpp --allow_code_execution"
        )
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS[3])
    return SimpleNamespace(NAME=NAME, summarise=stock_rows, items=stock_items), tasks


def seeded() -> None:
    """Seeds what lm-eval's own command seeds before it makes items and prompts, with the same numbers."""
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])


def specifications(names: Sequence[str], data_dir: Path | None, manager: Any) -> list[str | dict[str, Any]]:
    """What lm-eval's task manager loads: names, or configs of task files and of tasks that read `data_dir`.

    Raises:
      UserError: no such task, or no data of it in `data_dir`.
    """
    specs: list[str | dict[str, Any]] = []
    for name in names:
        if is_file(name):
            specs.append(_own(Path(name)))
        elif name not in manager.task_index:
            near = [n for n in manager.all_tasks if n.split("_")[0] == name.split("_")[0]] or manager.all_tasks
            raise UserError(f"lm-eval has no task {name!r}{_near(name, near)}")
        else:
            specs.append(name if data_dir is None else _local(manager.task_index[name], name, data_dir))
    return specs


def unloadable(names: Sequence[str], error: Exception) -> UserError:
    """What loading tasks raised, in one line with a way out."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if any(map(is_file, names)):
        return UserError(f"lm-eval cannot load {', '.join(names)}: {first}; mend the file or its data_files")
    return UserError(
        f"lm-eval cannot load {', '.join(names)}: {first}; its data come from the Hugging Face Hub: without it give "
        f"--data_dir DIR with {names[0]}/test.jsonl, or a task file (--suite lm-eval:task.yaml)"
    )


def is_file(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.endswith((".yaml", ".yml"))


def told(tasks: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Changes how the tasks with replies draw them, as lm-eval's --gen_kwargs does."""
    for task in tasks.get("tasks", tasks).values():
        if settings and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(settings), update=True)


def manager_of(names: Sequence[str], metadata: Mapping[str, Any], include: str | None = None) -> Any:
    """lm-eval's index of its own tasks (and of those in the folder `include`), or one of none where all are files."""
    return _manager(not all(map(is_file, names)), json.dumps(metadata, sort_keys=True, default=str), include)


@functools.cache
def _manager(stock: bool, metadata: str, include: str | None) -> Any:
    """It takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=stock, metadata=json.loads(metadata))


def _own(path: Path) -> Row:
    """The config of a task file, whose data files are looked for beside it too."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(path)
    except Exception as error:  # yaml's, and what an imported function raises
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is no task file of lm-eval: {first}; see lm-eval's docs/new_task_guide.md") from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise UserError(f"{path} names no task; write `task: NAME` into it")
    options = config.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        config["dataset_kwargs"] = options | {"data_files": _beside(options["data_files"], path.parent)}
    return config


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(name, folder) for name in files]
    return str(folder / files) if (folder / files).exists() and not Path(files).exists() else files


# ---------------------------------------------------------------------------------------------------- from files


def _local(entry: Any, name: str, data_dir: Path) -> Row:
    """What makes a task read its splits from DIR/<benchmark>: the Hub's columns of hf/*.jsonl, or rows of the common shape.

    The benchmark is the folder that has the task's name, or the longest beginning of it (`mmlu` of `mmlu_anatomy`).
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    folders = [p for p in data_dir.iterdir() if p.is_dir() and (name == p.name or name.startswith(f"{p.name}_"))]
    if not folders:
        raise UserError(
            f"--data_dir {data_dir} has no {name}/test.jsonl; add it, or leave --data_dir out to use the Hub"
        )
    folder = max(folders, key=lambda p: len(p.name))
    if not entry.yaml_path or entry.kind.name != "TASK":
        raise UserError(f"{NAME}:{name} is a group, which --data_dir cannot serve; name single tasks, such as arc_easy")
    config = load_yaml(entry.yaml_path)
    test = _read(folder, "test", name)
    fewshot = _read(folder, "fewshot", name) if any((folder / f).exists() for f in _files("fewshot")) else []
    shots = config.get("num_fewshot") or 0
    if not fewshot and shots and not (config.get("fewshot_config") or {}).get("samples"):
        raise UserError(f"{name} shows {shots} exemplars; add {folder / 'fewshot.jsonl'}")
    if not fewshot:
        config |= {"training_split": None, "fewshot_split": None}
    splits = {config[key]: fewshot for key in ("training_split", "fewshot_split") if config.get(key)}
    asked = config.get("test_split") or config.get("validation_split")
    splits |= {config.get("validation_split") or asked: test, asked: test}

    if config.get("doc_to_image"):
        splits = {split: [_found(row, folder) for row in rows] for split, rows in splits.items()}

    def load(**_: Any) -> Any:
        import datasets

        chosen = {split: _of_subset(rows, config.get("dataset_name"), split) for split, rows in splits.items()}
        if not chosen[asked]:
            raise UserError(f"{folder} has no rows of {config.get('dataset_name') or asked}")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in chosen.items() if rows})

    return config | {"task": name, "custom_dataset": load, "dataset_kwargs": None}


def _found(row: Row, folder: Path) -> Row:
    """A row whose columns `image..` name files of the folder, with their paths.

    Raises:
      UserError: a picture that is not there.
    """
    named = {
        name: value for name, value in row.items() if name.startswith("image") and isinstance(value, str) and value
    }
    for name, value in named.items():
        if not (folder / value).is_file():
            raise UserError(
                f"{folder}: {name} is {value!r}, which is not there; put the picture's file into the folder"
            )
    return row | {name: str(folder / value) for name, value in named.items()}


def _files(split: str) -> tuple[str, str]:
    return f"hf/{split}.jsonl", f"{split}.jsonl"


def _read(folder: Path, split: str, task: str) -> list[Row]:
    path = next((folder / name for name in _files(split) if (folder / name).exists()), folder / f"{split}.jsonl")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data_dir: cannot read {path} ({error})") from error
    rows = [files.parse_json(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no rows, or rows that are no objects; want one JSON object per line")
    if not {"benchmark", "type", "choices", "answer"} <= rows[0].keys():
        return rows
    if (turn := TO_HUB.get(rows[0]["benchmark"])) is None:
        raise UserError(
            f"{path}: {task} of lm-eval reads other columns, which cannot be made from these; put the Hub's rows into "
            f"{folder / 'hf' / path.name}, or use --suite phi3_report --tasks {rows[0]['benchmark']}"
        )
    return [turn(row) for row in rows]


def _of_subset(rows: list[Row], name: str | None, split: str) -> list[Row]:
    """The rows of a task that asks for one subject (MMLU) or round (ANLI); all where the rows have none of it."""
    for key, wanted in (("subject", name), ("subset", name), ("round", split[-1:])):
        if any(str(row.get(key)) == wanted for row in rows):
            return [row for row in rows if str(row.get(key)) == wanted]
    return [] if rows and name and "subject" in rows[0] else rows


def _labelled(question: str) -> Callable[[Row], Row]:
    def turn(row: Row) -> Row:
        labels = list(LETTERS[: len(row["choices"])])
        choices = {"text": row["choices"], "label": labels}
        return {"id": row["id"], question: row["question"], "choices": choices, "answerKey": labels[row["answer"]]}

    return turn


# Rows of the common shape in the columns of the Hub: the inverses of `suites/phi3_report/convert.py`, where they exist.
TO_HUB: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _labelled("question"),
    "arc_challenge": _labelled("question"),
    "commonsense_qa": _labelled("question"),
    "openbookqa": _labelled("question_stem"),
    "mmlu": lambda r: {k: r[k] for k in ("question", "choices", "answer")} | {"subject": r["subset"]},
    "anli": lambda r: {
        "uid": r["id"], "premise": r["context"], "hypothesis": r["question"], "label": r["answer"],
        "reason": r["rationale"],
        "round": r["subset"][-1:],
    },
    "gsm8k": lambda r: {"question": r["question"], "answer": f"{r['rationale']}\n#### {r['target']}"},
    "piqa": lambda r: {
        "goal": r["question"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["answer"],
    },
    "social_iqa": lambda r: {
        "context": r["context"], "question": r["question"], "label": str(r["answer"] + 1),
        **{f"answer{x}": text for x, text in zip("ABC", r["choices"], strict=True)},
    },
    "winogrande": lambda r: {
        "sentence": r["question"], "option1": r["choices"][0], "option2": r["choices"][1], "answer": str(r["answer"] + 1),
    },
    "boolq": lambda r: {"passage": r["context"], "question": r["question"].removesuffix("?"), "label": r["answer"]},
    "triviaqa": lambda r: {"question": r["question"], "answer": {"value": r["target"], "aliases": r["aliases"]}},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- rows


def _near(name: str, valid: Sequence[str]) -> str:
    """`nearest` without the list of thousands."""
    return nearest(name, valid).partition("; valid:")[0].partition(" valid:")[0].rstrip(";") or "; see lm-eval ls tasks"


def stock_rows(results: Mapping[str, Any], tasks: Any) -> list[Row]:
    """One row per task, filter and metric; intervals (Wilson for 0/1, else normal) where a metric is a mean over items."""
    rows = []
    for task, scores in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        count = results.get("n-samples", {}).get(task, {})
        for name, value in scores.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own = [s[metric] for s in samples if s.get("filter") == chosen and metric in s]
            row = {"suite": NAME, "task": task, "metric": metric if chosen == "none" else f"{metric},{chosen}"}
            row |= {"value": float(value), "n": int(count.get("effective") or len(own)), "chance": None}
            row |= {
                "stderr": None,
                "low": None,
                "high": None,
                "scoring": "lm-eval",
                "shots": results["n-shot"].get(task),
            }
            total = count.get("original")
            row["subset_of"] = total if total and total > row["n"] else None
            numeric = bool(own) and all(isinstance(v, (bool, int, float)) for v in own)
            if numeric and math.isclose(sum(own) / len(own), value, rel_tol=1e-6, abs_tol=1e-9):
                share = set(map(float, own)) <= {0.0, 1.0}
                found = statistics.proportion(own) if share else statistics.clustered_mean(own, range(len(own)))
                row |= {"stderr": found.stderr, "low": found.low, "high": found.high}
            else:
                row["scoring"] = "other" if not 0 <= value <= 1 else "lm-eval"
            rows.append(row)
    return rows


def stock_items(results: Mapping[str, Any], tasks: Any) -> Iterator[Row]:
    """The samples that lm-eval logged, each with its task."""
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            yield {"task": task, **sample}


# ---------------------------------------------------------------------------------------------------- lm-eval's form


def readable_samples(results: Mapping[str, Any], readable: Callable[[str], str]) -> None:
    """Puts conversations in place of their markers, in prompts and in the hashes made of them, in place.

    A marker differs in every process; the same conversation then has the same hash.
    """
    from lm_eval.utils import hash_string

    for samples in results.get("samples", {}).values():
        for sample in samples:
            shown = [[readable(a) if isinstance(a, str) else a for a in arguments] for arguments in sample["arguments"]]
            if shown != [list(arguments) for arguments in sample["arguments"]]:
                sample["arguments"] = shown
                sample["prompt_hash"] = hash_string(shown[0][0])


def write_results(out: Path, results: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Results and samples as lm-eval's own command writes them, for its tools that read and compare them.

    Args:
      out: the folder gets lm-eval/<model>/results_<date>.json and samples_<task>_<date>.jsonl.
      results: of `lm_eval.evaluator.evaluate`, with samples.
      about: config (a mapping), model (its path), system, template: how it was asked.

    Raises:
      UserError: it cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(out / RESULTS))
    tracker.general_config_tracker.log_experiment_args(
        "phi3_jax", {"path": about["model"]}, about["system"], about["template"], about["template"] is not None
    )
    samples = copy.deepcopy(results["samples"])
    whole = {k: v for k, v in results.items() if k != "samples"} | {"config": dict(about["config"])}
    tracker.save_results_aggregated(results=whole, samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task.replace("/", "-"), samples=samples[task])
    folder = out / RESULTS / str(tracker.general_config_tracker.model_name_sanitized)
    path = folder / f"results_{getattr(tracker, 'date_id', '')}.json"
    if not path.is_file():  # lm-eval's tracker logs what went wrong, and goes on
        raise UserError(f"cannot write {path}; free some space, or choose another --out")
    return path
