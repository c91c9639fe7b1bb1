"""Items in their common shape, from a folder (`--data_dir`) or the Hugging Face Hub, checked row by row.

A folder has <name>/test.jsonl and, where there are shots, <name>/fewshot.jsonl; every line is an object with

    id, benchmark, subset, type, context, question, target, rationale : str      choices, aliases : [str]      answer : int

(`choices` without letters; `answer` the index of the gold one, -1 where there are none; `target` the gold option's text,
short answer or solution) and, besides, mc2_choices and mc2_labels (truthfulqa), entry_point and test (humaneval),
test_setup_code and test_list (mbpp).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.evaluation.suites.phi3_report.benchmarks import LM_EVAL, Benchmark
from phi3_jax.evaluation.suites.phi3_report.convert import common

Row = dict[str, Any]
TEXTS = ("id", "benchmark", "subset", "type", "context", "question", "target", "rationale")
EXTRA: dict[str, dict[str, type]] = {
    "truthfulqa": {"mc2_choices": list, "mc2_labels": list},
    "humaneval": {"entry_point": str, "test": str},
    "mbpp": {"test_setup_code": str, "test_list": list},
}
WORDS = {str: "a string", int: "an integer", list: "a list"}


def load(benchmark: Benchmark, data_dir: Path | None) -> tuple[list[Row], dict[str, list[Row]]]:
    """Test rows, and the exemplars of each subset ("" where all share them).

    Test rows take turns between subsets, so that a limit takes as many of each.

    Raises:
      UserError: data that are missing, of a wrong shape, fewer exemplars than shots, or a test item among them.
    """
    if data_dir is None:
        test, fewshot, where = *online(benchmark), f"the Hub's {benchmark.hub.dataset}"
    else:
        folder = Path(data_dir) / benchmark.name
        test, where = read(folder / "test.jsonl", benchmark), str(folder / "fewshot.jsonl")
        fewshot = read(folder / "fewshot.jsonl", benchmark) if benchmark.shots else []
    shots = exemplars(benchmark, test, fewshot, where)
    if data_dir is not None:
        used = {_asked(row): row["id"] for rows in shots.values() for row in rows}
        for row in test:
            if (same := used.get(_asked(row))) is not None:
                raise UserError(
                    f"{where}: exemplar {same!r} is also the test item {row['id']!r}; take it out of one file"
                )
    return (_in_turns(test) if benchmark.by_subset else test), shots


def exemplars(benchmark: Benchmark, test: Iterable[Row], fewshot: Iterable[Row], where: str) -> dict[str, list[Row]]:
    """The first `shots` rows of each subset that the test rows need.

    Raises:
      UserError: too few of them; `where` names their source.
    """
    if not benchmark.shots:
        return {}
    wanted = benchmark.fewshot_subset
    rows = [row for row in fewshot if wanted in (None, row["subset"])]
    subsets = sorted({row["subset"] for row in test}) if benchmark.by_subset else [""]
    found = {
        subset: [row for row in rows if not benchmark.by_subset or row["subset"] == subset][: benchmark.shots]
        for subset in subsets
    }
    for subset, chosen in found.items():
        if len(chosen) < benchmark.shots:
            of = f" of subset {subset or wanted!r}" if subset or wanted else ""
            raise UserError(
                f"{where} has {len(chosen)} rows{of}, {benchmark.name} needs {benchmark.shots} for its "
                f"{benchmark.shots} shots; add {benchmark.shots - len(chosen)} or leave out {benchmark.name}"
            )
    return found


def read(path: Path, benchmark: Benchmark) -> list[Row]:
    """Rows of a JSONL file.

    Raises:
      UserError: no such file, no rows, or the first row of a wrong shape, with file, line and key.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); --data_dir wants a folder with {benchmark.name}/{path.name} in it, "
            f"or leave out --data_dir to read {benchmark.hub.dataset} online, or leave out {benchmark.name}"
        ) from error
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({str(error).splitlines()[0]}); want one object per line") from error
        check(row, benchmark, where)
        if (first := seen.setdefault(row["id"], number)) != number:
            raise UserError(f"{where}: key 'id' is {row['id']!r}, as in line {first}; ids must differ")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows; want one JSON object per line")
    return rows


def check(row: Any, benchmark: Benchmark, where: str) -> None:
    """Checks one row's shape.

    Raises:
      UserError: naming `where`, the key, its value and what it should be.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is {_cut(row)}; want an object with the keys {', '.join(TEXTS)}, choices, answer, aliases"
        )
    types: dict[str, type] = dict.fromkeys(TEXTS, str) | {"choices": list, "aliases": list, "answer": int}
    for key, kind in (types | EXTRA.get(benchmark.name, {})).items():
        if key not in row:
            raise UserError(f"{where}: key {key!r} is missing; want {WORDS[kind]}")
        value = row[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where}: key {key!r} is {_cut(value)}; want {WORDS[kind]}")
        if isinstance(value, list) and key != "mc2_labels" and not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: key {key!r} is {_cut(value)}; want a list of strings")

    def want(right: bool, key: str, what: str) -> None:
        if not right:
            raise UserError(f"{where}: key {key!r} is {_cut(row[key])}; want {what}")

    options = row["choices"]
    want(row["type"] == benchmark.kind, "type", repr(benchmark.kind))
    want(bool(row["question"].strip()), "question", "a question")
    if benchmark.kind == "multiple_choice":
        want(2 <= len(options) <= 26, "choices", "2 to 26 options")
        want(all(text.strip() for text in options), "choices", "options that are not empty")
        want(0 <= row["answer"] < len(options), "answer", f"0 to {len(options) - 1}, for it has {len(options)} choices")
        want(row["target"] == options[row["answer"]], "target", f"choices[answer], {_cut(options[row['answer']])}")
    else:
        want(bool(row["target"].strip()), "target", "the gold answer")
    if benchmark.name == "winogrande":
        want(row["question"].count("_") == 1, "question", "a sentence with one _")
    if benchmark.name == "truthfulqa":
        labels, count = row["mc2_labels"], len(row["mc2_choices"])
        known = all(type(label) is int and label in (0, 1) for label in labels)
        want(
            known and len(labels) == count > 0 and labels[0] == 1, "mc2_labels", f"{count} of 0 and 1, the first one 1"
        )


def online(benchmark: Benchmark) -> tuple[list[Row], list[Row]]:
    """Test rows and few-shot rows from the Hub.

    Raises:
      UserError: the Hub cannot be reached, or does not let us.
    """
    hub, test, fewshot = benchmark.hub, [], []
    for subset in benchmark.subsets or ("",):
        test += _split(benchmark, hub.split, subset)
        if hub.fewshot and hub.fewshot != LM_EVAL:
            few = (
                hub.fewshot if "[" in hub.fewshot or benchmark.name == "mmlu" else f"{hub.fewshot}[:{benchmark.shots}]"
            )
            fewshot += _split(benchmark, few, subset)
    return test, shipped(benchmark) if hub.fewshot == LM_EVAL else fewshot


def shipped(benchmark: Benchmark) -> list[Row]:
    """The chain-of-thought exemplars of GSM-8K and BBH (Wei et al. 2022; Suzgun et al. 2022) that lm-eval ships."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    if benchmark.name == "gsm8k":
        files = {benchmark.fewshot_subset or "": folder / "gsm8k" / "gsm8k-cot.yaml"}
    else:
        files = {subset: folder / "bbh" / "cot_fewshot" / f"{subset}.yaml" for subset in benchmark.subsets}
    rows = []
    for subset, file in files.items():
        config = yaml.safe_load(file.read_text())
        for number, sample in enumerate(config["fewshot_config"]["samples"]):
            question, worked = sample.get("question", sample.get("input")), sample["target"].strip()
            rationale, _, answer = worked.rpartition("he answer is ")
            rest = {"question": question.strip(), "target": answer.removesuffix("."), "rationale": worked}
            if benchmark.name == "gsm8k":
                rest["rationale"] = rationale[:-1].strip()
            else:
                rest["context"] = config["description"].strip()
            rows.append(common(benchmark.name, benchmark.kind, f"cot{number}", subset, **rest))
    return rows


def _split(benchmark: Benchmark, split: str, subset: str) -> list[Row]:
    import datasets

    hub = benchmark.hub
    dataset, split = hub.dataset.format(subset=subset), split.format(subset=subset)
    config = hub.config and hub.config.format(subset=subset)
    try:
        found = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the Hub's client has no common class of errors
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        if benchmark.name == "gpqa":
            raise UserError(
                f"gpqa: cannot read {dataset} ({reason}); it is gated and has no offline copy: accept its terms at "
                f"https://huggingface.co/datasets/{dataset}, log in with `hf auth login`, or leave out gpqa"
            ) from error
        raise UserError(
            f"{benchmark.name}: cannot read {dataset} from the Hub ({reason}); give --data_dir, a folder with "
            f"{benchmark.name}/test.jsonl, or leave out {benchmark.name}"
        ) from error
    rows = []
    for number, raw in enumerate(found):
        where = f"{dataset} {split} row {number}"
        try:
            row = benchmark.convert(raw | ({"subset": subset} if subset else {}))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{where} has not the columns of lm-eval 0.4.13's layout ({type(error).__name__}: {error}); give --data_dir"
            ) from error
        check(row, benchmark, where)
        rows.append(row)
    return rows


def _in_turns(rows: list[Row]) -> list[Row]:
    seen: Counter[str] = Counter()
    order = []
    for place, row in enumerate(rows):
        order.append((seen[row["subset"]], place))
        seen[row["subset"]] += 1
    return [rows[place] for _, place in sorted(order)]


def _asked(row: Row) -> tuple:
    return row["context"], row["question"], tuple(row["choices"])


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
