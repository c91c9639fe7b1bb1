"""The report's benchmarks with fake models: gold answers score 1, wrong ones 0; prompts, data and the stock tasks.

Tests marked `real` use the samples in ../shared/benchmarks; a small data set written here covers the same code without.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
import datasets
import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager
from suite_fakes import (
    CODE,
    KEYS,
    OFFLINE,
    SHARED,
    STYLES,
    Fake,
    confined,
    isolated,
    oracle,
    real,
    run,
    write,
    wrong,
)

from phi3_jax.errors import UserError
from phi3_jax.evaluation import suites
from phi3_jax.evaluation.suites import phi3_report
from phi3_jax.evaluation.suites.phi3_report import BENCHMARKS, answers, convert, data, prompts
from phi3_jax.evaluation.suites.phi3_report import tasks as module
from phi3_jax.scaling import published


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def main_rows(results: dict, tasks: dict) -> dict[str, dict]:
    return {row["task"]: row for row in phi3_report.summarise(results, tasks) if row["task"] in tasks}


@pytest.fixture(scope="module")
def everything():
    """All that can be built from the samples, without code."""
    return phi3_report.build([name for name in OFFLINE if name not in CODE], data_dir=SHARED)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in BENCHMARKS:
        write(folder, name)
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_gold_answers_score_one_and_wrong_ones_zero_on_own_data(own, style):
    allow = isolated() and style in ("base", "chat")
    names = [name for name in BENCHMARKS if allow or name not in CODE]
    tasks = phi3_report.build(names, data_dir=own, allow_code_execution=allow)
    assert set(tasks) == {f"{n}/{s}" if s else n for n in names for s in BENCHMARKS[n].scorings or ("",)}
    for key, row in main_rows(run(oracle(style), tasks), tasks).items():
        assert (row["value"], row["n"]) == (pytest.approx(1), 6 if BENCHMARKS[key.split("/")[0]].by_subset else 3), key
    for key, row in main_rows(run(wrong(), tasks), tasks).items():
        assert row["value"] == pytest.approx(0, abs=1e-9), key


@real
@pytest.mark.parametrize("style", ("base", "chat"))
def test_gold_answers_score_one_on_every_sample(everything, style):
    results = run(oracle(style), everything)
    for key, row in main_rows(results, everything).items():
        count = len(lines(SHARED / key.split("/")[0] / "test.jsonl"))
        assert (row["value"], row["n"]) == (pytest.approx(1), count), key
        assert row["low"] > 0.85 and row["high"] <= 1
        size = BENCHMARKS[key.split("/")[0]].size
        assert row["subset_of"] == (size if count < size else None)


@real
def test_wrong_answers_score_zero_on_every_sample(everything):
    for key, row in main_rows(run(wrong(), everything), everything).items():
        assert row["value"] == pytest.approx(0, abs=1e-9), key


@real
@confined
@pytest.mark.parametrize("style", ("base", "chat"))
def test_reference_solutions_pass_and_wrong_ones_fail(style):
    tasks = phi3_report.build(CODE, data_dir=SHARED, allow_code_execution=True)
    results = run(oracle(style), tasks, limit=5)
    assert {key: (row["value"], row["n"]) for key, row in main_rows(results, tasks).items()} == dict.fromkeys(
        CODE, (1, 5)
    )
    assert {row["metric"] for row in main_rows(results, tasks).values()} == {"pass@1"}
    assert all(item["choice"] == "passed" for item in phi3_report.items(results, tasks))
    if style == "base":
        failed = run(wrong(), tasks, limit=5)
        assert {row["value"] for row in main_rows(failed, tasks).values()} == {0}


@real
@pytest.mark.parametrize("key", [key for key in KEYS if key.split("/")[0] not in CODE])
def test_every_task_runs_with_a_limit(everything, key):
    tasks = {key: everything[key]}
    results = run(Fake(lambda request: " B", lambda request: -1.0), tasks, limit=5)
    (row,) = main_rows(results, tasks).values()
    assert row["n"] == 5 and row["shots"] == BENCHMARKS[key.split("/")[0]].shots
    assert set(row) == {
        *("suite", "task", "metric", "value", "n", "low", "high", "chance", "stderr", "shots", "subset_of"),
    }
    for item in (found := list(phi3_report.items(results, tasks))):
        assert json.loads(json.dumps(item)) == item and item["task"] == key
        if key.endswith("harness"):
            assert item["logprobs"] == [-1.0] * len(item["logprobs"]) and len(item["logprobs"]) >= 2
        else:
            assert item["reply"] == " B"
    assert len(found) == 5 and np.isclose(np.mean([item["correct"] for item in found]), row["value"])


@real
def test_a_guess_is_within_its_interval_of_chance(everything):
    tasks = {"arc_challenge/letter": everything["arc_challenge/letter"]}
    rng = random.Random(0)
    (row,) = main_rows(run(Fake(lambda request: rng.choice("ABCD")), tasks), tasks).values()
    assert row["n"] == 300 and row["low"] < row["chance"] == 0.25 < row["high"] and row["high"] - row["low"] < 0.11


@real
def test_chance_sizes_and_published_scores(everything):
    for key, task in everything.items():
        if key != "truthfulqa/harness":  # the mass of mc2, which is not that of one right option
            assert np.mean([module.chance(task, doc) for doc in task._rows]) == pytest.approx(
                task.benchmark.chance, abs=2e-3
            ), key
    sizes = {row["benchmark"]: int(row["n"]) for row in published.table("testset_sizes")}
    sizes["AGIEval"] = 2852  # with gaokao-english, which that table leaves out
    keys = {row["benchmark"] for row in published.table("phi3_academic")}
    for benchmark in BENCHMARKS.values():
        if benchmark.key:
            assert benchmark.key in keys and benchmark.size == sizes[benchmark.key], benchmark.name
    shots = {row["benchmark"]: row["shots"] for row in published.table("phi3_academic")}
    assert all(str(b.shots) == re.match(r"\d+", shots[b.key])[0] for b in BENCHMARKS.values() if b.key)
    assert all(b.cot == ("CoT" in shots[b.key]) for b in BENCHMARKS.values() if b.key)
    assert BENCHMARKS["arc_challenge"].published == {"mini": 0.849, "small": 0.907, "medium": 0.916}
    assert BENCHMARKS["math_format_sample"].published == {}
    assert "not MATH" in BENCHMARKS["math_format_sample"].title


CUES = {"gsm8k": "A:", "bbh": prompts.STEPS, "mbpp": "[BEGIN]\n", "social_iqa/harness": "A:"}
CUES |= {"truthfulqa/harness": "A:", "math_format_sample": "Solution:", "agieval/harness": "the answer is"}


def asked(row: dict) -> str:
    """What of the question stands in a prompt as it is."""
    if row["benchmark"] == "hellaswag":  # loses its marks
        return prompts.hellaswag(row["question"])[:30]
    return row["question"].split("_")[0] if row["benchmark"] == "winogrande" else row["question"]


def prompt(task, doc) -> str:
    text = task.fewshot_context(doc, task.config.num_fewshot)
    return text if isinstance(text, str) else text[doc["answer"]]


@real
@pytest.mark.parametrize("key", KEYS)
def test_prompts_have_the_shots_of_the_right_subset_and_not_the_gold_answer(key, everything):
    name = key.split("/")[0]
    tasks = everything
    if name in CODE:
        if not isolated():
            pytest.skip("this machine cannot isolate model-written code")
        tasks = phi3_report.build([name], data_dir=SHARED, allow_code_execution=True)
    task, benchmark = tasks[key], BENCHMARKS[name]
    fewshot = lines(SHARED / name / "fewshot.jsonl") if benchmark.shots else []
    if benchmark.fewshot_subset:
        fewshot = [row for row in fewshot if row["subset"] == benchmark.fewshot_subset]
    for doc in task._rows[:: max(1, len(task._rows) // 7)]:
        text = prompt(task, doc)
        expected = [row for row in fewshot if not benchmark.by_subset or row["subset"] == doc["subset"]][
            : benchmark.shots
        ]
        places = [text.find(asked(row)) for row in expected]
        assert -1 not in places and places == sorted(places), (key, doc["id"])
        last = text.rfind(asked(doc))
        assert last > max(places, default=-1)
        tail = text[last:]
        if key.endswith("/letter"):
            shown = "".join(re.findall(r"^Answer: ([A-Z])$", text, re.MULTILINE))
            assert shown == "".join("ABCDEFGHIJKLM"[row["answer"]] for row in expected), (key, doc["id"])
        if key.endswith("/harness") and name not in ("winogrande", "truthfulqa"):
            golds = [prompts.harness_options(row)[row["answer"]] for row in expected]
            assert all(f"{prompts.harness_text(row)} {gold}\n\n" in text for row, gold in zip(expected, golds))
        if name == "humaneval":
            assert text == doc["question"]
            continue
        if key in ("winogrande/harness", "openbookqa/harness", "hellaswag/harness"):
            assert text.count("\n\n") >= benchmark.shots
            continue
        cue = CUES.get(key) or CUES.get(name, "Answer:")
        assert text.endswith(cue) and tail.count(cue) == 1, (key, doc["id"])
        assert text.count("\n" + cue) + text.count(f" {cue}") >= benchmark.shots + (cue != "the answer is")
        if name == "bbh":
            assert text.startswith(f"{expected[0]['context']}\n\nQ: ") and text.count(expected[0]["context"]) == 1
            assert all(row["rationale"] in text for row in expected)
        if name == "gsm8k":
            assert text.count("The answer is ") == 8 and text.endswith(f"\n\nQ: {doc['question']}\nA:")
        if name == "mbpp":
            assert text.count("[DONE]") == 3 and "\r" not in text and doc["target"] not in text


def test_prompts_word_for_word_on_own_data(own):
    tasks = phi3_report.build(["medqa", "gpqa", "winogrande", "truthfulqa", "bbh"], data_dir=own)
    texts = {key: prompt(task, task._rows[0]) for key, task in tasks.items()}
    listed = "\n".join(f"{mark}. it is {{{mark}}}" for mark in "ABC")

    def options(number: int) -> str:
        return listed.format(A=number, B=number + 1, C=number + 2)

    def question(number: int) -> str:
        return f"What is {number} and {number}?\n"

    shots = [f"Question:\n{question(n)}Options:\n{options(n)}\nAnswer: {g}\n\n" for n, g in ((101, "C"), (102, "A"))]
    last = f"Question:\n{question(1)}Options:\n{options(1)}\nAnswer:"
    assert texts["medqa/letter"] == texts["gpqa/letter"] == "".join(shots) + last
    assert texts["medqa/harness"] == (
        f"Question: {question(101)}{options(101)}\nAnswer: C\n\nQuestion: {question(102)}{options(102)}\nAnswer: A\n\n"
        f"Question: {question(1)}{options(1)}\nAnswer:"
    )
    assert texts["winogrande/harness"].startswith("The 101 saw the tree because it is 103 was near.\n\nThe 102 saw")
    assert texts["winogrande/harness"].endswith("was near.\n\nThe 1 saw the tree because it is 2")
    assert texts["truthfulqa/harness"].startswith("Q: What is 101 and 101?\nA: yes\n\nQ: What is 102")
    assert texts["bbh"].startswith(
        f"Add.\n\nQ: {question(101)}{prompts.STEPS}So the answer is 202.\n\nQ: {question(102)}"
    )
    reasons = tasks["gpqa/letter"]._rows[0] | {"rationale": "Because."}
    assert prompts.letter_target(reasons) == "Because. The answer is B."


@pytest.mark.parametrize(("multiturn", "turns"), ((True, 11), (False, 1)))
def test_chat_templates_get_turns_or_one_turn(own, multiturn, turns):
    tasks = phi3_report.build(["mmlu", "gsm8k", "bbh", "winogrande"], data_dir=own)
    lm = oracle("chat")
    results = run(lm, tasks, apply_chat_template=True, fewshot_as_multiturn=multiturn)
    assert all(row["value"] == 1 for row in main_rows(results, tasks).values())
    asked = {request.task_name: json.loads(request.args[0]) for request in lm.asked}
    chat = asked["mmlu/letter"][:-1]
    assert len(chat) == turns and [role for role, _ in chat] == ["user", "assistant"] * (turns // 2) + ["user"]
    if multiturn:
        assert chat[1][1] in "ABC" and chat[0][1].endswith("Answer:")
        assert len(asked["gsm8k"][:-1]) == 17 and asked["bbh"][0][1].startswith("Add.\n\nQ: ")


@pytest.mark.skipif(not isolated(), reason="this machine cannot isolate model-written code")
def test_chat_replies_to_humaneval_are_not_stopped_at_their_own_def(own):
    tasks = phi3_report.build(["humaneval"], data_dir=own, allow_code_execution=True)
    for chat, stops in ((False, list(answers.STOPS)), (True, [])):
        lm = oracle("chat")
        results = run(lm, tasks, apply_chat_template=chat)
        assert lm.asked[0].args[1]["until"] == stops and main_rows(results, tasks)["humaneval"]["value"] == 1
        assert lm.asked[0].args[1]["do_sample"] is False


STOCK = {
    **{"arc_easy": "arc_easy", "arc_challenge": "arc_challenge", "piqa": "piqa", "winogrande": "winogrande"},
    **{"boolq": "boolq", "hellaswag": "hellaswag", "social_iqa": "social_iqa", "openbookqa": "openbookqa"},
    **{"commonsense_qa": "commonsense_qa", "medqa": "medqa_4options"},
}
FOLDERS = (
    "arc",
    "piqa",
    "winogrande",
    "super_glue/boolq",
    "hellaswag",
    "siqa",
    "openbookqa",
    "commonsense_qa",
    "medqa",
)


def hashed(request) -> float:
    digest = hashlib.sha256("\0".join(request.args[:2]).encode()).digest()
    return -60 * int.from_bytes(digest[:4], "big") / 2**32


@real
@pytest.mark.parametrize("name", STOCK)
def test_harness_scoring_is_the_stock_tasks(name, monkeypatch):
    """The same requests in the same order, and the same scores, as lm-eval's own task on the Hub's layout."""

    def local(*args, **kwargs):
        found = datasets.Dataset.from_list(lines(SHARED / name / "hf" / "test.jsonl"))
        return datasets.DatasetDict(train=found, validation=found, test=found)

    monkeypatch.setattr(datasets, "load_dataset", local)
    top = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[str(top / folder) for folder in FOLDERS])
    stock = manager.load([STOCK[name]])["tasks"]
    ours = phi3_report.build([name], "harness", SHARED)
    ours[f"{name}/harness"].set_config("num_fewshot", 0)
    lms, results = (Fake(score=hashed), Fake(score=hashed)), []
    for lm, tasks in zip(lms, (stock, ours)):
        results.append(run(lm, tasks))
    first, second = ([request.args for request in lm.asked] for lm in lms)
    assert first == second
    theirs = results[0]["results"][STOCK[name]]
    compared = [metric for metric in theirs if metric in ("acc,none", "acc_norm,none")]
    assert compared and f"{BENCHMARKS[name].metric},none" in compared
    for metric in compared:
        assert results[1]["results"][f"{name}/harness"][metric] == theirs[metric]
    (row,) = main_rows(results[1], ours).values()
    assert row["value"] == theirs[f"{BENCHMARKS[name].metric},none"] and 0 < row["value"] < 1


@real
@pytest.mark.parametrize("name", OFFLINE)
def test_converters_give_the_common_rows(name):
    benchmark = BENCHMARKS[name]
    for file in ("test", "fewshot"):
        path = SHARED / name / "hf" / f"{file}.jsonl"
        if not path.is_file():
            continue
        want = lines(SHARED / name / f"{file}.jsonl")
        want = [row for row in want if row["subset"] != benchmark.fewshot_subset]
        have = [benchmark.convert(row) for row in lines(path)]
        assert len(have) == len(want)
        for mine, row in zip(have, want):
            keys = {"choices", "answer", "target", "question", "context", "type"}
            if name == "truthfulqa":  # shuffled
                assert sorted(mine["choices"]) == sorted(row["choices"])
                assert (mine["mc2_choices"], mine["mc2_labels"]) == (row["mc2_choices"], row["mc2_labels"])
                keys -= {"choices", "answer"}
            if name == "triviaqa":  # the Hub's layout here has lost question marks, and the aliases their order
                assert mine["question"].rstrip("? ") == row["question"].rstrip("? ")
                assert {*mine["aliases"], mine["target"]} == {*row["aliases"], row["target"]}
                keys -= {"question"}
            keys |= {"entry_point", "test"} & set(row) | {"test_setup_code", "test_list"} & set(row)
            assert {key: mine[key] for key in keys} == {key: row[key] for key in keys}
            data.check(mine | {"benchmark": name}, benchmark, "here")


@real
@pytest.mark.parametrize("name", ("gsm8k", "bbh"))
def test_exemplars_shipped_with_lm_eval_are_those_of_the_samples(name):
    wanted = BENCHMARKS[name].fewshot_subset
    rows = {row["id"]: row for row in lines(SHARED / name / "fewshot.jsonl")}
    have = data.shipped(BENCHMARKS[name])
    assert len(have) == len([row for row in rows.values() if wanted in (None, row["subset"])])
    for row in have:
        same = rows[row["id"]]
        assert row["context"].startswith(same["context"])  # that of snarks is cut in the samples
        assert {k: v for k, v in row.items() if k != "context"} == {k: same[k] for k in row if k != "context"}


def test_an_online_suite_reads_the_hub_by_subset_and_split(monkeypatch):
    asked = []

    def hub(dataset, config, split):
        asked.append((dataset, config, split))
        rows = 3 if "[:" not in split or split.endswith(":-20]") else int(split.split(":")[1][:-1])
        named = dict(uid="u", premise="p", label=0, reason="")
        return [named | {"round": 1, "hypothesis": f"{split} {n}"} for n in range(rows)]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    tasks = phi3_report.build(["anli"], "letter")
    rounds = [("facebook/anli", None, part) for r in (1, 2, 3) for part in (f"test_r{r}", f"train_r{r}[:7]")]
    assert asked == rounds
    assert [doc["subset"] for doc in tasks["anli/letter"]._rows] == ["r1", "r2", "r3"] * 3

    def refuse(dataset, config, split):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"piqa: cannot read baber/piqa.*no route.*--data_dir"):
        phi3_report.build(["piqa"])
    with pytest.raises(UserError, match=r"gpqa.*Idavidrein/gpqa.*gated.*hf auth login"):
        phi3_report.build(["gpqa"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"goal": "x"}])
    with pytest.raises(UserError, match=r"baber/piqa validation row 0 has not the columns.*sol1"):
        phi3_report.build(["piqa"])


def test_gpqa_rows_are_shuffled_by_question_and_keep_the_gold():
    row = {"Question": "Q1?", "Correct Answer": "right ", "Explanation": None}
    row |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    places = {convert.gpqa(row | {"Question": f"Q{n}?"})["answer"] for n in range(40)}
    assert places == {0, 1, 2, 3} and convert.gpqa(row) == convert.gpqa(dict(row))
    data.check(convert.gpqa(row), BENCHMARKS["gpqa"], "here")
    assert convert.gpqa(row)["target"] == "right"


def test_limits_take_turns_between_subsets(own):
    tasks = phi3_report.build(["mmlu"], "letter", own)
    results = run(oracle(), tasks, limit=2)
    rows = phi3_report.summarise(results, tasks)
    assert [row["task"] for row in rows] == ["mmlu/letter", "mmlu/letter/one", "mmlu/letter/two"]
    assert [row["n"] for row in rows] == [2, 1, 1] and {row["subset_of"] for row in rows} == {14042}
    assert rows[0]["metric"] == "accuracy" and rows[0]["suite"] == phi3_report.NAME


def test_mc2_is_the_mass_on_true_answers(own):
    tasks = phi3_report.build(["truthfulqa"], "harness", own)
    probabilities = (0.1, 0.2, 0.5)  # yes, certainly, no
    results = run(Fake(score=lambda request: math.log(probabilities[request.idx])), tasks)
    (row,) = main_rows(results, tasks).values()
    assert (row["metric"], row["value"]) == ("mc2", pytest.approx(0.375)) and row["chance"] == pytest.approx(2 / 3)
    item = next(phi3_report.items(results, tasks))
    assert item["gold"] == [0, 1] and item["choice"] == 2 and item["correct"] == pytest.approx(0.375)


def test_headline_of_arc_is_normalised_by_length(own):
    tasks = phi3_report.build(["arc_easy", "social_iqa"], "harness", own)
    for task in tasks.values():
        task._rows[:] = [
            row | {"choices": ["x", "a long one"], "answer": 1, "target": "a long one"} for row in task._rows
        ]
    results = run(Fake(score=lambda request: -1.0 - 2.0 * request.idx), tasks)  # -1 for 1 character, -3 for 10
    assert [row["value"] for row in main_rows(results, tasks).values()] == [1, 0]
    assert results["results"]["arc_easy/harness"]["acc,none"] == 0


@pytest.mark.parametrize(
    ("benchmarks", "options", "words"),
    (
        (["arc_chalenge"], {}, r"unknown benchmark 'arc_chalenge'; did you mean 'arc_challenge'"),
        (["piqa"], {"scoring": "letters"}, r"unknown scoring 'letters'; did you mean 'letter'.*both"),
        (["mt_bench"], {}, r"mt_bench needs a judge"),
        (["piqa", "humaneval"], {}, r"humaneval runs model-written code; give --allow_code_execution"),
        (["mbpp"], {}, r"mbpp.*--allow_code_execution"),
    ),
)
def test_bad_requests_are_one_line(own, benchmarks, options, words):
    with pytest.raises(UserError, match=words) as error:
        phi3_report.build(benchmarks, data_dir=own, **options)
    assert "\n" not in str(error.value)


def test_unknown_suite():
    assert suites.load("phi3_report") is phi3_report
    with pytest.raises(UserError, match="unknown suite 'phi3_rapport'; did you mean 'phi3_report'"):
        suites.load("phi3_rapport")


def test_missing_benchmarks_are_left_out_with_a_note_or_an_error(tmp_path, capsys):
    with pytest.raises(UserError, match=r"has no benchmark; want a folder with <name>/test.jsonl"):
        phi3_report.build(data_dir=tmp_path)
    for name in ("piqa", "math_format_sample", "mbpp"):
        write(tmp_path, name)
    assert list(phi3_report.build(data_dir=tmp_path)) == ["math_format_sample", "piqa/letter", "piqa/harness"]
    notes = capsys.readouterr().err
    assert "leaves out mbpp: runs model-written code; give --allow_code_execution" in notes
    (line,) = (line for line in notes.splitlines() if "no <name>/test.jsonl" in line)
    assert str(tmp_path) in line and "gpqa" in line and " piqa" not in line and "mbpp" not in line
    with pytest.raises(UserError, match=r"cannot read .*/math/test.jsonl \(No such file.*math"):
        phi3_report.build(["math"], data_dir=tmp_path)
    with pytest.raises(UserError, match=r"gpqa has no offline copy.*no gpqa/test.jsonl"):
        phi3_report.build(["gpqa"], data_dir=tmp_path)
    with pytest.raises(UserError, match="math_format_sample is not on the Hub"):
        phi3_report.build(["math_format_sample"])
    write(tmp_path, "math")
    assert "math_format_sample" not in phi3_report.build(data_dir=tmp_path)


def test_too_few_exemplars_and_shared_ones(tmp_path):
    write(tmp_path, "mmlu")
    file = tmp_path / "mmlu" / "fewshot.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[:10]))
    with pytest.raises(UserError, match=r"fewshot.jsonl has 4 rows of subset 'two', mmlu needs 5.*add 1"):
        phi3_report.build(["mmlu"], data_dir=tmp_path)
    stolen = json.dumps(json.loads((tmp_path / "mmlu" / "test.jsonl").read_text().splitlines()[0]))
    file.write_text("\n".join([stolen, *rows]))
    with pytest.raises(UserError, match=r"exemplar 'mmlu/one/item1' is also the test item"):
        phi3_report.build(["mmlu"], data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    (
        ("piqa", "{not json", r"line 2 is not JSON"),
        ("piqa", "\udcff", r"line 2 is not JSON"),
        ("piqa", "[1, 2]", r"line 2 is \[1, 2\]; want an object"),
        ("piqa", {"question": ...}, r"line 2: key 'question' is missing; want a string"),
        ("piqa", {"question": 3}, r"line 2: key 'question' is 3; want a string"),
        ("piqa", {"question": " "}, r"line 2: key 'question' is ' '; want a question"),
        ("piqa", {"answer": 3}, r"line 2: key 'answer' is 3; want 0 to 2, for it has 3 choices"),
        ("piqa", {"answer": -1}, r"key 'answer' is -1; want 0 to 2"),
        ("piqa", {"answer": "1"}, r"key 'answer' is '1'; want an integer"),
        ("piqa", {"answer": True}, r"key 'answer' is True; want an integer"),
        ("piqa", {"answer": None}, r"key 'answer' is None; want an integer"),
        ("piqa", {"choices": "abc"}, r"key 'choices' is 'abc'; want a list"),
        ("piqa", {"choices": ["a", 2]}, r"key 'choices' is \['a', 2\]; want a list of strings"),
        ("piqa", {"choices": ["a"]}, r"key 'choices' is \['a'\]; want 2 to 26 options"),
        ("piqa", {"choices": ["", "b", "c"]}, r"want options that are not empty"),
        ("piqa", {"target": "other"}, r"key 'target' is 'other'; want choices\[answer\]"),
        ("piqa", {"type": "generate"}, r"key 'type' is 'generate'; want 'multiple_choice'"),
        ("piqa", {"id": "piqa/item1"}, r"line 2: key 'id' is 'piqa/item1', as in line 1"),
        ("winogrande", {"question": "no blank"}, r"want a sentence with one _"),
        ("truthfulqa", {"mc2_labels": [1, 0]}, r"key 'mc2_labels' is \[1, 0\]; want 3 of 0 and 1"),
        ("truthfulqa", {"mc2_labels": [1, 2, 0]}, r"want 3 of 0 and 1"),
        ("truthfulqa", {"mc2_choices": ...}, r"key 'mc2_choices' is missing; want a list"),
        ("gsm8k", {"target": ""}, r"key 'target' is ''; want the gold answer"),
        ("math", {"rationale": None}, r"key 'rationale' is None; want a string"),
    ),
)
def test_rows_of_a_wrong_shape_are_named(tmp_path, name, change, words):
    file = write(tmp_path, name) / name / "test.jsonl"
    rows = file.read_text().splitlines()
    if isinstance(change, dict):
        row = {k: v for k, v in (json.loads(rows[1]) | change).items() if v is not ...}
        change = json.dumps(row)
    rows[1] = change
    file.write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=words) as error:
        phi3_report.build([name], data_dir=tmp_path)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_empty_files_are_named(tmp_path):
    file = write(tmp_path, "piqa") / "piqa" / "test.jsonl"
    file.write_text("\n\n")
    with pytest.raises(UserError, match=r"test.jsonl has no rows"):
        phi3_report.build(["piqa"], data_dir=tmp_path)


def test_lm_eval_can_print_the_configurations(own):
    tasks = phi3_report.build(["mmlu", "gsm8k"], data_dir=own)
    configs = run(oracle(), tasks, limit=1)["configs"]
    assert configs["gsm8k"]["num_fewshot"] == 8 and json.dumps(configs, default=str)
    assert "def generate_text" in configs["gsm8k"]["doc_to_text"]


def test_the_table_in_the_docs_is_that_of_the_code():
    text = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row[1:] for row in cells if len(row) == 8}
    assert set(table) == set(BENCHMARKS)
    for name, (title, shots, letter, harness, chance, sizes, hub) in table.items():
        benchmark = BENCHMARKS[name]
        assert (title, shots) == (benchmark.title, f"{benchmark.shots}{' CoT' if benchmark.cot else ''}")
        kind = {"letter": letter, "harness": harness}
        assert kind["harness"] == benchmark.metric if benchmark.scorings else kind["letter"] == benchmark.metric
        assert float(chance) == pytest.approx(benchmark.chance, abs=5e-3)
        assert sizes.split(" / ")[1].replace(",", "") == str(benchmark.size)
        assert hub.strip("`").split("`")[0] == benchmark.hub.dataset
        if (SHARED / name).is_dir():
            assert sizes.split(" / ")[0] == str(len(lines(SHARED / name / "test.jsonl")))
