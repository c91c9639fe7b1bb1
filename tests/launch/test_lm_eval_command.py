"""lm-eval's tasks from both commands: the same questions in every run, lm-eval's own files, its flags."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent))
pytest.importorskip("lm_eval")
from test_evaluate import evaluate, make_run, rows_in, write_lines

from phi3_jax.entry import run as start
from phi3_jax.evaluation import lm_eval as ours

SUMS = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl, shots: shots.jsonl}}
test_split: test
fewshot_split: shots
num_fewshot: 2
output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{a}}'
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - metric: exact_match
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval")
    make_run(folder / "run")
    for name, numbers in (("test", range(6)), ("shots", range(30, 60))):
        write_lines(folder / f"{name}.jsonl", [{"q": f"{i} and {i}:", "a": f"{2 * i}"} for i in numbers])
    (folder / "sums.yaml").write_text(SUMS)
    options = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
    rows = [{"question": f"Colour {i}?", "choices": options, "answerKey": "ABC"[i % 3]} for i in range(5)]
    write_lines(folder / "data" / "arc_easy" / "hf" / "test.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")


def lm_eval(*words: object) -> int:
    return start([str(word) for word in words], ours.main)


def result(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def prompts(folder: Path, task: str = "sums") -> list[str]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [row["arguments"]["gen_args_0"]["arg_0"] for row in rows_in(path)]


def test_every_run_asks_the_same_questions_as_lm_evals_own_command(place: Path, tmp_path: Path, capsys) -> None:
    words = ["--model", place / "run", "--suite", f"lm-eval:{place / 'sums.yaml'}"]
    assert evaluate(*words, "--out", tmp_path / "a") == 0
    assert evaluate(*words, "--out", tmp_path / "b", "--batch", "auto") == 0
    args = ["--model_args", f"path={place / 'run'}", "--tasks", place / "sums.yaml", "--batch_size", 8]
    assert lm_eval(*args, "--log_samples", "--output_path", tmp_path / "c") == 0
    said = capsys.readouterr().out
    assert "|sums |" in said and "exact_match" in said
    first, *others = (prompts(tmp_path / name) for name in "abc")
    assert all(found == first for found in others) and len(set(first)) == 6
    assert all(text.count("and") == 3 for text in first), "two exemplars and the question"
    assert len({text.split("\n\n")[0] for text in first}) > 1, "control: exemplars are drawn, and not the first ones"
    a, c = result(tmp_path / "a"), result(tmp_path / "c")
    assert a["results"]["sums"]["exact_match,none"] == c["results"]["sums"]["exact_match,none"]
    assert (
        a["n-shot"] == c["n-shot"] == {"sums": 2} and a["config"]["fewshot_seed"] == c["config"]["fewshot_seed"] == 1234
    )
    assert a["task_hashes"] == c["task_hashes"] and a["model_source"] == c["model_source"] == "phi3_jax"
    assert set(c) - set(a) <= {"git_hash", "date", "pretty_env_info", "transformers_version", "lm_eval_version"} | {
        name for name in c if "tokenizer" in name or name.endswith("_id") or name == "upper_git_hash" or "eot" in name
    } | {"max_length"}, "the keys of lm-eval's own file, but for the machine's"
    items = rows_in(tmp_path / "a" / "items" / "lm-eval-sums.jsonl")
    assert [i["prompt_hash"] for i in items] == [
        i["prompt_hash"] for i in rows_in(tmp_path / "b" / "items" / "lm-eval-sums.jsonl")
    ]


def test_a_cache_serves_both_commands(place: Path, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "answers.jsonl"
    args = ["--model", "phi3_jax", "--model_args", f"path={place / 'run'}", "--tasks", "arc_easy", "--use_cache", cache]
    args += ["--data_dir", place / "data", "--limit", 4, "--batch_size", "auto"]
    assert lm_eval(*args) == 0
    assert len(cache.read_bytes().splitlines()) == 12
    table = capsys.readouterr().out
    assert lm_eval(*args) == 0
    said = capsys.readouterr()
    assert said.out == table and "12 answers came from" in said.err
    words = [
        "--model",
        place / "run",
        "--suite",
        "lm-eval:arc_easy",
        "--data_dir",
        place / "data",
        "--out",
        tmp_path / "o",
    ]
    assert evaluate(*words, "--use_cache", cache) == 0
    assert "12 answers are those of an earlier start" in capsys.readouterr().err
    assert len(cache.read_bytes().splitlines()) == 15 and not list((tmp_path / "o").glob(".*"))


def test_items_and_settings_can_be_chosen(place: Path, tmp_path: Path, capsys) -> None:
    words = ["--model", place / "run", "--suite", f"lm-eval:{place / 'sums.yaml'}", "--out", tmp_path]
    assert evaluate(*words, "--samples", '{"sums": [1, 4]}', "--gen_kwargs", "max_gen_toks=2") == 0
    items = rows_in(tmp_path / "items" / "lm-eval-sums.jsonl")
    assert [i["doc_id"] for i in items] == [1, 4] and [i["doc"]["q"][0] for i in items] == ["1", "4"]
    assert all(i["arguments"][0][1]["max_gen_toks"] == 2 and len(i["resps"][0][0].encode()) <= 8 for i in items)
    (row,) = [r for r in rows_in(tmp_path / "evals.jsonl") if r["metric"] == "exact_match"]
    assert (row["n"], row["subset_of"]) == (2, 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "[1]"], "--samples must be a JSON object"),
        (["--samples", '{"sums": [-1]}'], "--samples must be a JSON object"),
        (["--samples", '{"sum": [1]}'], "did you mean 'sums'"),
        (["--samples", '{"sums": [1]}', "--limit", "3"], "leave one out"),
        (["--gen_kwargs", "beams=2"], "generation_kwargs has beams"),
        (["--system", "Be kind."], "add --chat"),
        (["--batch", "all"], "--batch all must be auto, or an integer, 1 to 65,536"),
        (["--batch", "0"], "--batch 0 must be auto, or an integer"),
        (["--use_cache", "."], "cannot read ."),
    ],
)
def test_wrong_words_of_evaluate(place: Path, words: list[str], said: str, tmp_path: Path, capsys) -> None:
    base = ["--model", place / "run", "--suite", f"lm-eval:{place / 'sums.yaml'}", "--out", tmp_path / "out"]
    assert evaluate(*base, *words) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sums"], "path=MODEL missing"),
        (["--model", "hf", "--tasks", "x"], "other models are run by lm-eval itself"),
        (["--model_args", "path=x,dtype=float32", "--tasks", "x"], "--model_args has 'dtype'"),
        (["--model_args", "path=x"], "--tasks missing"),
        (["--model_args", "path=x", "--tasks", "no_such_task_of_any"], "has no task 'no_such_task_of_any'"),
        (["--model_args", "path=x", "--tasks", "x", "--data_dir", "nowhere"], "--data_dir nowhere is no folder"),
        (["--model_args", "path=x", "--tasks", "x", "--limit", "2", "--samples", '{"x": [1]}'], "--limit must be None"),
        (["--model_args", "path=x", "--tasks", "x", "--confirm_run_unsafe_code"], "without a sandbox"),
    ],
)
def test_wrong_words_of_lm_evals_command(words: list[str], said: str, capsys) -> None:
    assert lm_eval(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and said in lines[-1]
