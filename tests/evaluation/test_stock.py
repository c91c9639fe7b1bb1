"""lm-eval's own tasks from files: both shapes, a task file of one's own; and no wait for a Hub that is not there."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from phi3_jax.errors import UserError
from phi3_jax.evaluation import stock

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "benchmarks"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def row(number: int) -> dict:
    choices = ["red", "green", "blue"]
    return {
        "id": f"arc_easy/{number}", "benchmark": "arc_easy", "subset": "", "type": "multiple_choice", "context": "",
        "question": f"Which colour is number {number}?", "choices": choices, "answer": number % 3,
        "target": choices[number % 3], "aliases": [], "rationale": "",
    }  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_stock_task_reads_either_shape_from_a_folder_and_needs_no_hub(tmp_path: Path, no_network: None) -> None:
    pytest.importorskip("lm_eval")
    write(tmp_path / "arc_easy" / "test.jsonl", [row(i) for i in range(4)])
    write(tmp_path / "arc_challenge" / "hf" / "test.jsonl", [stock.TO_HUB["arc_easy"](row(i)) for i in range(5)])
    write(tmp_path / "hellaswag" / "test.jsonl", [row(0) | {"benchmark": "hellaswag"}])
    write(tmp_path / "truthfulqa" / "test.jsonl", [])
    _, tasks = stock.build(["arc_easy", "arc_challenge"], tmp_path)
    for name, count in (("arc_easy", 4), ("arc_challenge", 5)):
        task = tasks["tasks"][name]
        docs = list(task.test_docs())
        assert len(docs) == count
        assert (
            task.doc_to_text(docs[2]) == "Question: Which colour is number 2?\nAnswer:"
            and task.doc_to_target(docs[2]) == 2
        )
    for name, said in (
        ("hellaswag", "--suite phi3_report --tasks hellaswag"), ("truthfulqa_mc2", "has no rows"),
        ("boolq", "has no boolq/test.jsonl"), ("mmlu", "has no mmlu/test.jsonl"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            stock.build([name], tmp_path)


def test_a_task_file_of_ones_own_with_data_beside_it(tmp_path: Path, no_network: None) -> None:
    pytest.importorskip("lm_eval")
    write(tmp_path / "rows.jsonl", [{"q": "two and two", "a": "four"}, {"q": "two and one", "a": "three"}])
    lines = ["task: sums", "dataset_path: json", "dataset_kwargs: {data_files: {test: rows.jsonl}}", "test_split: test"]
    lines += ["output_type: generate_until", "doc_to_text: '{{q}}'", "doc_to_target: '{{a}}'"]
    (tmp_path / "sums.yaml").write_text("\n".join(lines))
    _, tasks = stock.build([str(tmp_path / "sums.yaml")], None)
    assert [d["a"] for d in tasks["tasks"]["sums"].test_docs()] == ["four", "three"]
    (tmp_path / "bad.yaml").write_text("task: [")
    for name, said in (("bad.yaml", "is no task file"), ("lost.yaml", "is no task file")):
        with pytest.raises(UserError, match=said):
            stock.build([str(tmp_path / name)], None)


def test_the_hub_is_asked_once_whether_it_is_there(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(socket, "create_connection", lambda *_: socket.socket())
    stock.offline_at_once(False)
    assert not stock.os.environ["HF_HUB_OFFLINE"]  # it answers: left alone

    def refuse(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", refuse)
    stock.offline_at_once(False)
    assert stock.os.environ["HF_HUB_OFFLINE"] == stock.os.environ["HF_DATASETS_OFFLINE"] == "1"


@pytest.mark.shared("benchmarks")
@pytest.mark.parametrize("name", sorted(stock.TO_HUB))
def test_rows_in_the_columns_of_the_hub_are_the_same_rows(name: str) -> None:
    from phi3_jax.evaluation.suites.phi3_report import convert

    lines = (BENCHMARKS / name / "test.jsonl").read_text().splitlines()
    for common in map(json.loads, lines):
        again = getattr(convert, name)(stock.TO_HUB[name](common))
        same = (
            "benchmark",
            "subset",
            "type",
            "context",
            "question",
            "choices",
            "answer",
            "target",
            "aliases",
            "rationale",
        )
        assert {k: again[k] for k in same} == {k: common[k] for k in same}
    assert len(lines) >= 250


def test_tasks_that_make_their_items_get_tokenizer_and_lengths(tmp_path):
    """As RULER's of lm-eval do, which end in an assertion without."""
    pytest.importorskip("lm_eval")
    (tmp_path / "made.py").write_text(
        "import datasets\n\ndef items(**given):\n"
        "    row = {'input': given['tokenizer'], 'outputs': str(given['max_seq_lengths'])}\n"
        "    return {'test': datasets.Dataset.from_list([row])}\n"
    )
    (tmp_path / "made.yaml").write_text(
        "task: made\ncustom_dataset: !function made.items\noutput_type: generate_until\ntest_split: test\n"
        'doc_to_text: "{{input}}"\ndoc_to_target: "{{outputs}}"\nmetric_list:\n  - metric: exact_match\n'
        "metadata:\n  version: 1.0\n"
    )
    metadata = {"tokenizer": "here", "max_seq_lengths": [4096, 8192]}
    _, tasks = stock.build([str(tmp_path / "made.yaml")], None, metadata)
    (task,) = tasks["tasks"].values()
    (doc,) = task.test_docs()
    assert doc == {"input": "here", "outputs": "[4096, 8192]"}
