"""Hugging Face folders in and out: bitwise round trips, exact logits, and what a user can get wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hf_folders import GOLDENS, random_folder, tensors_in, write_tensors

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.interop import convert, hf_config, huggingface, loading, safetensors
from phi3_jax.models.spec import init_params, param_specs
from phi3_jax.records import checkpoint, targets
from phi3_jax.records.folder import KEPT
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.sharding.rules import param_shardings

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("mini_window", "medium_longrope", "small", "moe")


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bitwise(kind, dtype, shard_bytes, tmp_path, monkeypatch) -> None:
    source = random_folder(tmp_path / "source", kind, dtype)
    (source / "tokenizer_config.json").write_text('{"any": "thing"}')
    monkeypatch.setattr(safetensors, "SHARD_BYTES", shard_bytes)
    convert.import_folder(source, tmp_path / "run")
    convert.export_run(tmp_path / "run", tmp_path / "back")
    there, back = tensors_in(source), tensors_in(tmp_path / "back")
    assert there.keys() == back.keys()
    for name in there:
        assert there[name].dtype == back[name].dtype
        assert there[name].tobytes() == back[name].tobytes(), name
    assert (shard_bytes < 1e9) == (tmp_path / "back" / safetensors.INDEX).exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    ids = [[1, 2, 3, 4]]
    logits = [phi3_jax.load(p).logits(ids) for p in (f"hf:{source}", tmp_path / "run", f"hf:{tmp_path / 'back'}")]
    assert all(x.dtype == jnp.float32 and np.array_equal(x, logits[0]) for x in logits)


@pytest.mark.parametrize("kind", ["mini_window", "small"])
def test_import_onto_a_mesh_reads_each_shard(kind: str, tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", kind, np.float32)
    cfg = loading.folder_config(source)
    mesh = make_mesh(jax.devices()[:8])
    shardings = param_shardings(param_specs(cfg), "fsdp", mesh)
    sharded = phi3_jax.load(f"hf:{source}", shardings=shardings)
    alone = phi3_jax.load(f"hf:{source}")
    assert sharded.params["blocks"]["qkv"]["weight"].addressable_shards[0].data.size * 8 == (
        alone.params["blocks"]["qkv"]["weight"].size
    )
    jax.tree.map(np.testing.assert_array_equal, sharded.params, alone.params)


@pytest.mark.parametrize(("member", "ladder"), [("mini", "clean"), ("medium", "family"), ("mini", "family")])
def test_a_trained_proxy_exports_with_its_multipliers_folded(member: str, ladder: str, tmp_path: Path) -> None:
    cfg = phi3_jax.proxy(member, "pico", ladder, vocab=64, context=64)
    cfg = dataclasses.replace(cfg, layers=cfg.layers * 2)  # the residual multiplier is not 1
    assert cfg.residual_multiplier != 1 and cfg.width_ratio > 0
    params = init_params(cfg, 0)
    params["unembedding"] = jax.random.normal(jax.random.key(1), params["unembedding"].shape)
    run = tmp_path / "run"
    keeper = checkpoint.Checkpointer(run / "checkpoints")
    keeper.save(3, {"params": params}, {})
    keeper.wait()
    (run / "config.json").write_text(json.dumps({"config": {"model": dataclasses.asdict(cfg)}}))
    convert.export_run(run, tmp_path / "out")
    ids = np.arange(48).reshape(2, 24)
    ours, exported = phi3_jax.load(run).logits(ids), phi3_jax.load(f"hf:{tmp_path / 'out'}").logits(ids)
    assert loading.folder_config(tmp_path / "out").mup is None
    np.testing.assert_allclose(ours, exported, atol=2e-5 * float(jnp.abs(ours).max()))


def test_transformers_loads_exports_strictly(tmp_path: Path) -> None:
    """In a process of its own, for torch and jax do not share threads well; needs torch and transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    script = (
        "import sys, numpy as np, torch, transformers\n"
        "model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True,"
        " attn_implementation='eager', dtype=torch.float32)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "ids = torch.arange(24).reshape(2, 12) % 48\n"
        "np.save(sys.argv[2], model(ids).logits.detach().numpy())\n"
    )
    for kind in ("mini_window", "medium_longrope", "moe"):
        source = random_folder(tmp_path / kind, kind, np.float32)
        convert.import_folder(source, tmp_path / f"{kind}-run")
        out = tmp_path / f"{kind}-out"
        convert.export_run(tmp_path / f"{kind}-run", out)
        subprocess.run([sys.executable, "-c", script, str(out), str(out / "logits.npy")], check=True)
        theirs = np.load(out / "logits.npy")
        ours = phi3_jax.load(f"hf:{out}").logits(np.arange(24).reshape(2, 12) % 48)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


# ------------------------------------------------------------------------------------------------ wrong input


def edit_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rename(old: str, new: str):
    return lambda header: header.__setitem__(new, header.pop(old))


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


NORMS = [f"model.layers.{i}.input_layernorm.weight" for i in range(2)]


def break_folder(folder: Path, how: str) -> list[str]:
    """Damages a folder; returns words that the error must hold."""
    weights = folder / "model.safetensors"
    if how == "missing and extra":
        for name in NORMS:
            edit_header(weights, rename(name, f"{name}.odd"))
        return ["2 tensors missing", "2 tensors not in this model", *NORMS, *(f"{n}.odd" for n in NORMS)]
    if how == "misshapen":
        edit_config(folder, intermediate_size=44)
        return ["misshapen", *(f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("down", "gate_up"))]
    if how == "dtype":
        edit_header(weights, lambda h: [h[n].__setitem__("dtype", "I32") for n in NORMS])
        return ["dtype", *NORMS, "I32"]
    if how == "wrong size":
        edit_header(weights, lambda h: h[NORMS[0]].update(dtype="BF16"))
        return ["damaged", NORMS[0]]
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return ["truncated", "model.safetensors"]
    if how == "garbage":
        weights.write_bytes(b"\x10" + bytes(7) + b"not json, not it")
        return ["header cannot be read"]
    if how == "empty":
        weights.write_bytes(b"")
        return ["truncated"]
    if how == "absent shard":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / safetensors.INDEX).write_text(json.dumps(index))
        return ["model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"]
    if how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        return ["pytorch_model.bin", "pickle"]
    if how == "no weights":
        weights.unlink()
        return ["no *.safetensors"]
    if how == "no config":
        (folder / "config.json").unlink()
        return ["config.json is missing"]
    fields = {
        "model_type": ({"model_type": "phi"}, ["unknown model_type 'phi'", "phi3small"]),
        "heads": ({"num_attention_heads": 5}, ["num_attention_heads=5", "hidden_size=32"]),
        "kv heads": ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "use 1, 2"]),
        "type": ({"hidden_size": "32"}, ["hidden_size='32'", "int"]),
        "lost size": ({"vocab_size": None}, ["vocab_size is missing"]),
        "longrope": (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 8}},
            ["short_factor has 5 factors", "needs 8"],
        ),
        "rope type": ({"rope_scaling": {"type": "yarn", "factor": 4}}, ["'yarn'", "longrope"]),
        "activation": ({"hidden_act": "relu"}, ["hidden_act='relu'", "silu"]),
    }[how]
    edit_config(folder, **fields[0])
    return fields[1]


BREAKAGES = (
    "missing and extra", "misshapen", "dtype", "wrong size", "truncated", "garbage", "empty", "absent shard",
    "pickle", "no weights", "no config", "model_type", "heads", "kv heads", "type", "lost size", "longrope", "rope type",
    "activation",
)  # fmt: skip


@pytest.mark.parametrize("how", BREAKAGES)
def test_a_broken_folder_is_refused_in_one_line(how: str, tmp_path: Path, capsys) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    words = break_folder(source, how)
    status = main(["convert", "--from", f"hf:{source}", "--to", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with pytest.raises(UserError, match=re.escape(words[0])):
        phi3_jax.load(f"hf:{source}")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--from", "hf:a", "--to", "hf:b"], "one of them"),
        (["--from", "a", "--to", "b"], "one of them"),
        (["--from", "hf:a"], "--to missing"),
        (["--form", "hf:a", "--to", "b"], "--from"),
        (["--from", "hf:nowhere", "--to", "b"], "no folder nowhere"),
        (["--from", "nowhere", "--to", "hf:b"], "no folder nowhere"),
        (["--from", "hf:weights.bin", "--to", "b"], "pickle"),
        (["--from", "a", "--to", "hf:b", "--window_rule", "released"], "no meaning"),
    ],
)
def test_wrong_flags(flags: list[str], word: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *flags]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_targets_are_never_overwritten(tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert.import_folder(source, tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_leaves_nothing(direction: str, tmp_path: Path, monkeypatch) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    full = OSError(errno.ENOSPC, "No space left on device")
    if direction == "import":

        def fail(*_: object) -> None:
            raise full

        monkeypatch.setattr(checkpoint, "checksums", fail)
        with pytest.raises(UserError, match="no space left"):
            convert.import_folder(source, tmp_path / "run")
    else:
        convert.import_folder(source, tmp_path / "kept")
        write, count = safetensors.os.pwrite, iter(range(100))

        def sometimes(*arguments: object) -> int:
            if next(count) > 3:
                raise full
            return write(*arguments)

        monkeypatch.setattr(safetensors.os, "pwrite", sometimes)
        with pytest.raises(UserError, match="no space left"):
            convert.export_run(tmp_path / "kept", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} <= {"source", "kept"}


def test_a_disk_too_small_is_found_before_writing(tmp_path: Path, monkeypatch) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free some space"):
        convert.import_folder(source, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    convert.import_folder(source, tmp_path / "run")
    chunk = max((p for p in (tmp_path / "run").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(UserError, match="checksum"):
        convert.export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_models_accept_a_stored_copy_of_the_table_only(tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", "small", np.float32)
    tensors = tensors_in(source)
    table = tensors["model.embed_tokens.weight"]
    for head, fits in ((table, True), (table + 1, False)):
        (source / "model.safetensors").unlink()
        write_tensors(source, tensors | {"lm_head.weight": head})
        if fits:
            phi3_jax.load(f"hf:{source}")
        else:
            with pytest.raises(UserError, match=r"lm_head.weight differs"):
                phi3_jax.load(f"hf:{source}")


def test_logits_refuse_what_they_cannot_answer(tmp_path: Path) -> None:
    model = phi3_jax.load(f"hf:{random_folder(tmp_path / 'source', 'mini_window', np.float32)}")
    for inputs, word in (
        ("text", "without a tokenizer"),
        ([[1, 48]], "outside the vocabulary"),
        ([[-1]], "outside the vocabulary"),
        ([[0.5]], "integers"),
        (np.zeros((1, 65), int), "context of 64"),
    ):
        with pytest.raises(UserError, match=word):
            model.logits(inputs)
    with pytest.raises(UserError, match="positions"):
        model.logits([[1, 2, 3]], positions=[[0, 1]])


def test_published_configs_are_read_back_as_the_family() -> None:
    for member, context in (("mini", "4k"), ("small", "8k"), ("medium", "4k"), ("mini", "128k")):
        cfg = phi3_jax.published(member, context)
        again = hf_config.from_config(hf_config.to_config(cfg, "bfloat16"), cfg.name, cfg.window_rule)
        assert dataclasses.replace(again, sliding_window=cfg.sliding_window) == cfg
        assert again.sliding_window == cfg.window_keys


def test_published_names_and_sizes() -> None:
    shapes = huggingface.published_tensors(phi3_jax.published("mini"))
    assert len(shapes) == 195 and sum(int(np.prod(s)) for s in shapes.values()) == 3_821_079_552
    assert shapes["model.layers.31.self_attn.qkv_proj.weight"] == (9216, 3072)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (16384, 3072)
    small = huggingface.published_tensors(phi3_jax.published("small"))
    assert sum(int(np.prod(s)) for s in small.values()) == 7_392_272_384
    assert small["model.layers.0.self_attn.query_key_value.bias"] == (6144,)
    moe = huggingface.published_tensors(phi3_jax.published("moe"))
    assert sum(int(np.prod(s)) for s in moe.values()) == 41_873_153_344
    assert moe["model.layers.31.block_sparse_moe.experts.15.w2.weight"] == (4096, 6400)


def test_importing_the_package_starts_neither_jax_nor_tensorflow() -> None:
    code = "import sys, phi3_jax; print(sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


assert {p.stem for p in GOLDENS.glob("*.json")} >= set(KINDS)


def test_a_run_that_keeps_only_a_tokenizer_is_exported_with_a_config(tmp_path) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    convert.import_folder(source, tmp_path / "run")
    kept = tmp_path / "run" / KEPT
    (kept / "config.json").unlink()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(kept / "tokenizer.json"))  # as a run trained here keeps it
    text = (kept / "tokenizer.json").read_bytes()
    convert.export_run(tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == text
    made = loading.folder_config(tmp_path / "back")
    assert dataclasses.replace(made, name="") == dataclasses.replace(loading.run_config(tmp_path / "run"), name="")
