"""lm-eval's own Hugging Face backend and ours on the same weights: the same prompts, log-likelihoods and replies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
pytest.importorskip("lm_eval")
import test_harness
from test_evaluate import make_run, rows_in, write_lines

from phi3_jax.entry import run as start
from phi3_jax.evaluation import lm_eval as ours
from phi3_jax.interop import convert

OPTIONS = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl, shots: FOLDER/shots.jsonl}}
test_split: test
fewshot_split: shots
num_fewshot: 2
output_type: multiple_choice
doc_to_text: 'Question: {{q}}\\nAnswer:'
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {version: 1.0}
"""
REPLIES = """task: echoes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl, shots: FOLDER/shots.jsonl}}
test_split: test
fewshot_split: shots
num_fewshot: 1
output_type: generate_until
doc_to_text: 'Question: {{q}}\\nAnswer:'
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - metric: exact_match
metadata: {version: 1.0}
"""


def samples(folder: Path, task: str) -> list[dict]:
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    return sorted(rows_in(path), key=lambda row: row["doc_id"])


@pytest.mark.peer
def test_scores_and_replies_are_those_of_lm_evals_hugging_face_backend(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
    model = tmp_path / "phi-3-tiny"
    convert.export_run(make_run(tmp_path / "run"), model)
    test_harness.write_tokenizer(model)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "add_bos_token": False})
    )
    words = ["red", "green", "a deep blue", "grey, or none of these"]
    for name, numbers in (("test", range(12)), ("shots", range(40, 50))):
        rows = [{"q": f"What is {'very ' * (i % 4)}{i}?", "choices": words, "answer": i % 4} for i in numbers]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    for name, text in (("colours", OPTIONS), ("echoes", REPLIES)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    tasks = ",".join(str(tmp_path / f"{name}.yaml") for name in ("colours", "echoes"))
    common = ["--tasks", tasks, "--log_samples", "--batch_size", "4", "--output_path"]
    theirs = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    theirs += ["--model_args", f"pretrained={model},dtype=float32", *common, str(tmp_path / "theirs")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(theirs, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert start(["--model_args", f"path=hf:{model}", *common, str(tmp_path / "ours")], ours.main) == 0

    a, b = samples(tmp_path / "theirs", "colours"), samples(tmp_path / "ours", "colours")
    assert [x["prompt_hash"] for x in a] == [x["prompt_hash"] for x in b] and len(a) == 12, (
        "the same exemplars are drawn"
    )
    for x, y in zip(a, b, strict=True):
        for (p, greedy), (q, same) in zip(x["filtered_resps"], y["filtered_resps"], strict=True):
            assert abs(float(p) - float(q)) < 1e-4 and str(greedy) == str(same)
        assert (x["acc"], x["acc_norm"]) == (y["acc"], y["acc_norm"])
    a, b = samples(tmp_path / "theirs", "echoes"), samples(tmp_path / "ours", "echoes")
    assert [x["prompt_hash"] for x in a] == [x["prompt_hash"] for x in b]
    assert [x["resps"][0][0].strip() for x in a] == [y["resps"][0][0].strip() for y in b]
    assert len({x["resps"][0][0] for x in a}) > 1, "control: replies differ"
