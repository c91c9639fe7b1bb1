"""experiments/posttrain.py: supervised fine-tuning from given weights, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.data import dialogues
from phi3_jax.data.loader import open_dataset
from phi3_jax.errors import UserError
from phi3_jax.interop.content import content as content_of
from phi3_jax.interop.loading import Model, load, open_weights
from phi3_jax.records import checkpoint, streaming
from phi3_jax.records.rows import read_rows
from phi3_jax.training import reference

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT.parent / "shared/goldens/posttraining"
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="needs the post-training goldens")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/run.py"), "--config", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    )


def tuned(place: Path, words: str, case: str, *options: str) -> tuple[Path, list[Any], Model]:
    """The folder of a run, named tuned, on a golden's rows; the rows; the base, which is imported anew."""
    base = shutil.copytree(GOLDENS / "base_mini", place / "base")
    rows = json.loads((GOLDENS / f"{case}.json").read_text())["rows"]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    method, _, more = words.partition(",")
    words = f"{ROOT}/experiments/posttrain.py:{method},model=hf:{base},data=rows.jsonl,name=tuned,{more}"
    done = run(words, "--config.train.log_every=1", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    (folder,) = [path.parent for path in (place / "runs/tuned").glob("*/metrics.jsonl")]
    return folder, rows, load(f"hf:{base}")


def alone(rows: list[Any], model: Model) -> Iterator[list[tuple[float, int]]]:
    """(sum of the nll of targets in float64, their number) of each sequence of each row, unpacked."""
    _, examples = dialogues.read(lambda: ((str(i), row) for i, row in enumerate(rows)), model.tokenizer, "mini")
    for _, row in examples():
        found = []
        for example in row:
            logits = np.asarray(model.logits(example.ids[None, :-1]), np.float64)[0]
            nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), example.ids[1:]]
            found.append((float(nll[example.answer[1:]].sum()), example.targets))
        yield found


@pytest.mark.slow
def test_a_hugging_face_folder_is_fine_tuned_on_its_own_ids(tmp_path: Path) -> None:
    options = "--config.data.held_out=0", "--config.data.window=2048"
    folder, rows, model = tuned(tmp_path, "sft,epochs=8,lr=5e-3", "sft_mini", *options)
    losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.01

    # The first loss is the base's mean over the targets of the batch, which is everything.
    ds = open_dataset(tmp_path / "runs/tuned/data")
    assert ds.manifest["generator"]["template"] == "mini" and ds.manifest["sources"][0]["windows"] == 1
    total, count = np.sum([row[0] for row in alone(rows, model)], axis=0)
    assert ds.manifest["sources"][0]["targets"] == count
    assert losses[0] == pytest.approx(total / count, abs=2e-5)
    after = load(str(tmp_path / "runs/tuned"))  # a study of one run is that run
    assert after.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.parametrize(
    "words,message",
    [
        ("sft,data=chats.jsonl", "sft needs model="),
        ("dpo,model=hf:base", "dpo needs data="),
        ("sft,model=mini,data=chats.jsonl", "mini is a name to plan with"),
        ("sft,model=hf:base,topology=h200:1", "needs data="),
        ("sft,model=nowhere,data=chats.jsonl", "nowhere"),
        ("sft,model=hf:base,data=nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("sft,model=hf:base,data=bad.jsonl", "bad.jsonl:1: messages has no turn of the assistant"),
        ("sft,model=hf:base,data=chats.jsonl,epochs=-1", "epochs=-1"),
        ("dpo,model=hf:base,data=chats.jsonl", "chats.jsonl holds conversations, not preferences"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(tmp_path: Path, words: str, message: str) -> None:
    shutil.copytree(GOLDENS / "base_mini", tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    done = run(f"{ROOT}/experiments/posttrain.py:{words}", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_preferences_are_learnt_from_a_reference_made_once(tmp_path: Path) -> None:
    options = "--config.data.window=512", "--config.data.held_out=0.3"
    folder, rows, model = tuned(tmp_path, "dpo,epochs=6,lr=2e-3", "dpo_mini", *options)
    metrics = read_rows(folder / "metrics.jsonl")
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are the same
    assert metrics[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    assert metrics[-1]["rewards/margin"] > 0.05 and metrics[-1]["loss"] < metrics[0]["loss"]
    evals = {(row["step"], row["metric"]): row["value"] for row in read_rows(folder / "evals.jsonl")}
    assert {metric for _, metric in evals} == {"accuracy", "margin", "loss"}

    # The checkpoint of the first best accuracy is kept beside the newest, and named.
    accuracy = {step: value for (step, metric), value in evals.items() if metric == "accuracy" and step}
    first = min(step for step, value in accuracy.items() if value == max(accuracy.values()))
    best = json.loads((folder / "best.json").read_text())
    assert (best["step"], best["value"]) == (first, accuracy[first])
    load(str(folder / best["checkpoint"]))

    # The reference is the base's log-probability of each response.
    expected = np.array([[-nats for nats, _ in pair] for pair in alone(rows, model)])
    (kept,) = reference.read(folder)
    kept = kept.reshape(-1, 2)[np.any(kept.reshape(-1, 2) != 0, axis=1)]
    assert 10 < len(kept) < len(rows)
    assert np.abs(kept[:, None] - expected[None]).max(-1).min(1).max() < 1e-3


def saved(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(every leaf of the newest checkpoint but step counts, its record) of a run."""
    reader = streaming.Reader(folder / "checkpoints", "")
    record = json.loads((reader.path / checkpoint.RECORD).read_text())["record"]
    return {name: reader.read(name, None) for name in reader.dtypes}, record


@pytest.mark.slow
def test_adapters_are_trained_resumed_merged_and_trained_on(tmp_path: Path) -> None:
    words = "--config.data.held_out=0", "--config.data.window=512", "--config.train.checkpoint_every=1"
    folder, _, _ = tuned(tmp_path, "sft,epochs=4,lr=5e-3,lora=4", "sft_mini", *words)
    leaves, record = saved(folder)
    assert {name.rpartition(".")[2] for name in leaves if "blocks" in name} == {"lora_a", "lora_b"}
    assert not any("embedding" in name or "norm.scale" in name for name in leaves)
    content = record["extra"]["identity"]["config"]["init_content"]
    assert content == content_of(open_weights(f"hf:{tmp_path / 'base'}"))
    losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]

    # Stopped before its last step, it ends with the same bits.
    steps = sorted((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    assert len(steps) == 2
    shutil.rmtree(steps[-1])
    (folder / "done.json").unlink()
    again = f"{ROOT}/experiments/posttrain.py:sft,model=hf:{tmp_path / 'base'},data=rows.jsonl,name=tuned"
    done = run(f"{again},epochs=4,lr=5e-3,lora=4", "--config.train.log_every=1", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed, _ = saved(folder)
    assert resumed.keys() == leaves.keys()
    for name, value in leaves.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)

    # As a model it is its base with the adapters, merged into the frozen weights of further ones, or trained on.
    sft, ids = tmp_path / "runs/tuned", np.arange(30)[None]
    pairs = json.loads((GOLDENS / "dpo_mini.json").read_text())["rows"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    last = {}
    for name, more in (("merged", "lora=2"), ("on", "continue=true"), ("fly", "lora=2")):
        config = f"{ROOT}/experiments/posttrain.py:dpo,model={sft},data=pairs.jsonl,name={name},epochs=6,lr=5e-3,{more}"
        done = run(
            config,
            *words[:2],
            "--config.train.log_every=1",
            *["--config.preference.on_the_fly=true"] * (name == "fly"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        (place,) = [path.parent for path in (tmp_path / f"runs/{name}").glob("*/metrics.jsonl")]
        metrics = read_rows(place / "metrics.jsonl")
        assert metrics[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)  # the reference is what it starts from
        assert metrics[-1]["rewards/margin"] > 1e-3
        last[name] = place
        if name == "fly":
            assert not (place / reference.NAME).exists()
            continue
        expected = np.array([[-nats for nats, _ in pair] for pair in alone(pairs, load(str(sft)))])
        (kept,) = reference.read(place)
        kept = kept.reshape(-1, 2)[np.any(kept.reshape(-1, 2) != 0, axis=1)]
        assert np.abs(kept[:, None] - expected[None]).max(-1).min(1).max() < 1e-3
    assert saved(last["merged"])[0]["params.blocks.qkv.lora_a"].shape[-1] == 2
    kept, made = ([row["loss"] for row in read_rows(last[name] / "metrics.jsonl")] for name in ("merged", "fly"))
    np.testing.assert_allclose(kept, made, rtol=1e-5)
    assert saved(last["on"])[0]["params.blocks.qkv.lora_a"].shape[-1] == 4
    for name, base in (("merged", str(sft)), ("on", f"hf:{tmp_path / 'base'}")):
        whole, beside = load(str(last[name])).logits(ids), load(base, adapter=str(last[name])).logits(ids)
        np.testing.assert_allclose(whole, beside, atol=1e-6)
        assert np.abs(whole - load(str(sft)).logits(ids)).max() > 1e-4
    with pytest.raises(UserError, match="is an adapter for other weights"):
        load(str(sft), adapter=str(last["on"]))


@pytest.mark.parametrize(
    "words,options,message",
    [
        ("lora=0", (), "lora=0 must be an integer, 1 to"),
        ("lora=4", ("--config.lora.targets=qkv,dwn",), "no projection 'dwn' for an adapter; did you mean 'down'"),
        ("lora=4", ("--config.lora.targets=q_proj,v_proj",), "name that, or k_proj too"),
        ("lora=4", ("--config.lora.rank_pattern=down_prj:2",), "is called 'down_prj'; did you mean 'down_proj'"),
        ("lora=4", ("--config.optim.name=muon",), "muon learns whole matrices"),
        ("continue=true", (), "is no run of adapters"),
        ("epochs=1", ("--config.lora.alpha=8",), "lora.rank is not set"),
        ("epochs=1", ("--config.preference.on_the_fly=true",), "reference, and this run trains all weights"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(
    tmp_path: Path, words: str, options: tuple[str, ...], message: str
) -> None:
    shutil.copytree(GOLDENS / "base_mini", tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    done = run(
        f"{ROOT}/experiments/posttrain.py:sft,model=hf:base,data=chats.jsonl,name=x,{words}", *options, cwd=tmp_path
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "runs/x").exists()
