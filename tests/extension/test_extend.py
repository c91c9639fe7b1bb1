"""The command: what it writes is a model that others load, a killed search ends as it would have, errors are a line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.configs import BlockSparse, ModelConfig
from phi3_jax.extension import command
from phi3_jax.interop import convert
from phi3_jax.models.spec import init_params
from phi3_jax.records import checkpoint

CFG = dataclasses.replace(phi3_jax.proxy("mini", "femto", "clean", vocab=259, context=256), layers=2)


def make_run(folder: Path, cfg: ModelConfig = CFG, window: int = 32) -> Path:
    """A run folder with one checkpoint of a random model that reads bytes."""
    params = init_params(cfg, 0)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    keeper = checkpoint.Checkpointer(folder / "checkpoints")
    keeper.save(7, {"params": params}, {})
    keeper.wait()
    tree = {"model": dataclasses.asdict(cfg), "data": {"source": "pydocs", "window": window}, "steps": 7}
    record = {"name": folder.name, "config": tree, "tokenizer": {"kind": "bytes"}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("text")
    words = ["the", "needle", "of", "a", "long", "document", "is", "found"]
    lines = [{"text": f"{i} " + " ".join(rng.choice(words, 150))} for i in range(120)]
    (folder / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def extend(run: Path, data: Path, out: Path, *more: object) -> int:
    words = ["--model", run, "--to", "4x", "--data", data, "--out", out, "--evaluations", 14, *more]
    return main(["extend", *map(str, words)])


def test_what_is_written_is_a_model_with_the_new_window(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert extend(run, data, out, "--method", "longrope") == 0
    found, model = json.loads((out / "factors.json").read_text()), phi3_jax.load(out)
    assert found["original_max_position_embeddings"] == 32 and found["max_position_embeddings"] == 128
    rope = model.config.longrope
    assert model.config.context == 128 and rope is not None and rope.original_context == 32
    assert list(rope.long) == found["long_factor"] and rope.short == (1.0,) * 4
    tried = found["made_by"]["lists"]
    assert {"none", "pi", "ntk", "yarn", "longrope"} == tried.keys()
    assert found["made_by"]["evaluations"] == 14 and found["made_by"]["s"] == 4
    assert tried["longrope"]["fitness"] == min(
        json.loads(line)["fitness"] for line in (out / "search/values.jsonl").open()
    )
    assert tried["none"]["unseen"]["text"].keys() == {"0-32", "32-64", "64-128"}
    # the released model's logits at short inputs, but for the attention factor; long ones take the list
    ids = np.random.default_rng(0).integers(0, 256, (1, 100))
    plain = dataclasses.replace(phi3_jax.load(run), config=dataclasses.replace(model.config, longrope=None))
    assert np.abs(model.logits(ids) - plain.logits(ids)).max() > 1e-3
    once = dataclasses.replace(rope, short_mscale=1.0, long_mscale=1.0)
    same = dataclasses.replace(model, config=dataclasses.replace(model.config, longrope=once))
    np.testing.assert_allclose(same.logits(ids[:, :32]), plain.logits(ids[:, :32]), atol=1e-5)
    page = (out / "extension.html").read_text()
    assert "with the list of longrope, " in page and page.count("data:image/svg+xml") == 3
    assert f"{tried['longrope']['unseen']['beyond']:.3f}" in page
    depths = tried["longrope"]["unseen"]["by_depth"]
    for length, share in tried["longrope"]["unseen"]["digits"].items():  # 48 questions: 8 depths of 5, 2 of 4
        assert np.average(depths[length], weights=[5] * 8 + [4] * 2) == pytest.approx(share)
    assert extend(run, data, out, "--method", "longrope") == 0  # again: nothing is searched anew
    assert json.loads((out / "factors.json").read_text())["long_factor"] == found["long_factor"]


def test_a_list_travels_to_hugging_face_and_back(run: Path, data: Path, tmp_path: Path) -> None:
    for method, factor in (("ntk", 1.0), ("yarn", 0.1 * np.log(4) + 1)):
        out, folder = tmp_path / method, tmp_path / f"hf-{method}"
        assert extend(run, data, out, "--method", method) == 0
        convert.export_run(out, folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["max_position_embeddings"] == 128 and config["original_max_position_embeddings"] == 32
        assert config["rope_scaling"]["attention_factor"] == pytest.approx(factor)
        ids = np.random.default_rng(0).integers(0, 256, (2, 120))
        theirs = phi3_jax.load(f"hf:{folder}")
        for length in (20, 120):
            np.testing.assert_allclose(
                theirs.logits(ids[:, :length]), phi3_jax.load(out).logits(ids[:, :length]), atol=1e-4
            )


THEIRS = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = numpy.load(sys.argv[2])
with torch.no_grad():
    found = {str(n): model(torch.tensor(ids[:, :n])).logits.numpy() for n in (20, 32, 33, 120)}
numpy.savez(sys.argv[3], **found)
"""


@pytest.mark.peer
@pytest.mark.parametrize("method", ["longrope", "longrope2", "yarn"])
def test_an_exported_extension_has_the_logits_of_transformers_in_both_regimes(
    run: Path, data: Path, tmp_path: Path, method: str
) -> None:
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    out, folder, ids = tmp_path / "out", tmp_path / "hf", np.random.default_rng(3).integers(0, 256, (2, 120))
    assert extend(run, data, out, "--method", method) == 0
    convert.export_run(out, folder)
    np.save(tmp_path / "ids.npy", ids)
    words = [folder, tmp_path / "ids.npy", tmp_path / "theirs.npz"]
    subprocess.run([sys.executable, "-c", THEIRS, *map(str, words)], check=True, capture_output=True)
    model, theirs = phi3_jax.load(out), np.load(tmp_path / "theirs.npz")
    for length in (20, 32, 33, 120):  # the window that the model was trained in has 32
        np.testing.assert_allclose(model.logits(ids[:, :length]), theirs[str(length)], atol=1e-4)


def test_a_killed_search_ends_as_it_would_have(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extend(run, data, tmp_path / "whole", "--seed", 3) == 0
    judged, count = command.fitness_of, 0

    def dies(*given: object) -> dict[str, float]:
        nonlocal count
        count += 1
        if count > 9:
            raise KeyboardInterrupt
        return judged(*given)

    monkeypatch.setattr(command, "fitness_of", dies)
    assert extend(run, data, tmp_path / "killed", "--seed", 3) == 75
    assert not (tmp_path / "killed/config.json").exists()
    with (tmp_path / "killed/search/values.jsonl").open("a") as file:
        file.write('{"factors": [1.0, ')  # torn by the kill
    monkeypatch.setattr(command, "fitness_of", judged)
    assert extend(run, data, tmp_path / "killed", "--seed", 3) == 0
    one, other = (json.loads((tmp_path / name / "factors.json").read_text()) for name in ("whole", "killed"))
    for tree in (one, other):
        tree["made_by"].pop("seconds")
    assert one == other


def test_what_cannot_be_extended_is_a_line(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(said: str, *more: object, model: Path | str = run, to: str = "4x", out: str = "refused") -> None:
        words = ["--model", model, "--to", to, "--data", data, "--out", tmp_path / out, "--evaluations", 14, *more]
        before = sorted(tmp_path.rglob("*"))
        assert main(["extend", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0], error
        assert sorted(tmp_path.rglob("*")) == before

    refused("--to 1x is 32 tokens, not above the original 32", to="1x")
    refused("'wide' is not a target (8x, 128k or 131072)", to="wide")
    refused("the data's longest document has", to="128x")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, factors, said in (
        ("short", [1.0, 2.0], "has 2 factors"), ("falling", [1.0, 3.0, 2.0, 4.0], "falls from 3 to 2"),
        ("small", [0.5, 1.0, 2.0, 4.0], "factor 0.5"), ("text", ["a"] * 4, "no number"),
    ):  # fmt: skip
        (lists / f"{name}.json").write_text(json.dumps({"long_factor": factors}))
        refused(said, "--factors", lists / f"{name}.json")
    for factor in (0, -1.5, "1", True, float("nan")):
        (lists / "scaled.json").write_text(json.dumps({"long_factor": [1.0] * 4, "attention_factor": factor}))
        refused("give a number above 0, or leave it out", "--factors", lists / "scaled.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    refused("exists and holds no extension", out="full")
    assert extend(run, data, tmp_path / "long", "--method", "pi") == 0
    capsys.readouterr()
    refused("has LongRoPE lists from 32 to 128 tokens already", model=tmp_path / "long")
    refused("another extension (method: pi -> ntk)", "--method", "ntk", out="long")
    refused("--to 16,777,216: mini-clean-femto needs", "--original", 2, to="16777216")


def test_a_list_of_ones_own_and_block_sparse_layers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = phi3_jax.proxy("small", "femto", "family", vocab=259, context=256)
    cfg = dataclasses.replace(cfg, blocksparse=BlockSparse(8, 1, 3))
    half = cfg.head_dim // 2
    (tmp_path / "own.json").write_text(
        json.dumps({"rope_scaling": {"long_factor": [1.0 + 0.25 * i for i in range(half)]}})
    )
    assert extend(make_run(tmp_path / "small", cfg), data, tmp_path / "out", "--factors", tmp_path / "own.json") == 0
    assert "matters most in the 2 dense layers of 4: the others see 8 tokens back" in capsys.readouterr().out
    rope = phi3_jax.load(tmp_path / "out").config.longrope
    assert rope.long[3] == 1.75 and not rope.mscale_when_short


def test_a_list_brings_its_attention_factor(run: Path, data: Path, tmp_path: Path) -> None:
    assert extend(run, data, tmp_path / "yarn", "--method", "yarn") == 0
    assert extend(run, data, tmp_path / "taken", "--factors", tmp_path / "yarn/factors.json") == 0
    one, other = (json.loads((tmp_path / name / "factors.json").read_text()) for name in ("yarn", "taken"))
    assert one["attention_factor"] == other["attention_factor"] == pytest.approx(1 + 0.1 * np.log(4))
    tried = one["made_by"]["lists"]["yarn"], other["made_by"]["lists"]["given"]
    assert tried[0]["fitness"] == tried[1]["fitness"] and tried[0]["unseen"] == tried[1]["unseen"]
    assert phi3_jax.load(tmp_path / "taken").config.longrope == phi3_jax.load(tmp_path / "yarn").config.longrope


@pytest.mark.slow
def test_training_goes_on_in_mixed_windows_and_what_comes_out_is_the_model(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "trained"
    words = ("--method", "yarn", "--train", 1024, "--mix", 0.5)
    assert extend(run, data, out, *words) == 0
    assert "short inputs: " in capsys.readouterr().out
    model, searched = phi3_jax.load(out), phi3_jax.load(out / "search/model")
    assert model.config.context == 128 and model.config.longrope == searched.config.longrope
    changed = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), model.params, searched.params)
    assert max(jax.tree.leaves(changed)) > 1e-5
    (config,) = out.glob("*/config.json")
    tree = json.loads(config.read_text())["config"]
    assert tree["data"]["source"].startswith("long:") and tree["steps"] * tree["batch_windows"] * 128 == 1024
    found = json.loads((out / "factors.json").read_text())["made_by"]["trained"]
    assert found["tokens"] == 1024 and found["short"] > 0
    assert "After 1,024 tokens of training" in (out / "extension.html").read_text()
    metrics = json.loads((config.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["loss/short"] > 0 and metrics["loss/long"] > 0
    assert extend(run, data, out, *words) == 0  # finished: nothing is trained again
    assert main(["extend", "--model", str(run), "--to", "4x", "--out", str(tmp_path / "x"), "--mix", "1.5"]) == 2
    assert "--mix 1.5 must be a number, 0 to 1" in capsys.readouterr().err
