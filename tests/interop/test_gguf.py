"""GGUF files: keys, tensors and tokens as written; what is refused; and (marked gguf) llama.cpp's logits against ours."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_folders import random_folder, tensors_in, write_tensors

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.configs import LongRope, ModelConfig
from phi3_jax.data import tokenizers
from phi3_jax.interop import convert, hf_config, huggingface, safetensors
from phi3_jax.interop import gguf as exporter
from phi3_jax.models.spec import init_params
from phi3_jax.records import checkpoint, targets

gguf = pytest.importorskip("gguf")
ROPE = LongRope(512, tuple(1 + 0.02 * i for i in range(8)), tuple(1 + 1.5 * i for i in range(8)))
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny(member: str, **changes: object) -> ModelConfig:
    """Two layers of a member: 64 wide, heads of 16, two kv heads in medium."""
    shape = dict(
        name="tiny", vocab=320, embed=64, layers=2, heads=4, kv_heads=4 if member == "mini" else 2, head_dim=16, mlp=96,
        context=1024, sliding_window=300, window_rule="transformers",
    )  # fmt: skip
    return dataclasses.replace(phi3_jax.published(member), **shape | changes)


def folder_of(path: Path, cfg: ModelConfig, std: float = 0.1) -> Path:
    """A Hugging Face folder of float16 weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf_config.to_config(cfg, "float16")))
    random = np.random.default_rng(3)
    shapes = huggingface.published_tensors(cfg)
    weights = {k: random.standard_normal(s) * std + (len(s) == 1) for k, s in shapes.items()}
    write_tensors(path, {k: w.astype(np.float16) for k, w in weights.items()})
    return path


def gguf_names(cfg: ModelConfig) -> dict[str, str]:
    blocks = {
        f"model.layers.{i}.{k}.weight": f"blk.{i}.{v}.weight" for i in range(cfg.layers) for k, v in NAMES.items()
    }
    return blocks | {f"{k}.weight": f"{v}.weight" for k, v in ENDS.items()}


def values(reader: object) -> dict[str, object]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def weights_in(reader: object) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def export(model: str, target: Path, *more: str) -> object:
    assert main(["export", "--model", model, "--to", f"gguf:{target}", *more]) == 0
    return gguf.GGUFReader(target)


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("longrope", [None, ROPE])
@pytest.mark.parametrize("form", exporter.FILES)
@pytest.mark.parametrize("member", ["mini", "medium"])
def test_keys_and_tensors(member, form, longrope, tmp_path: Path, capsys) -> None:
    cfg = tiny(member, longrope=longrope)
    source = folder_of(tmp_path / "source", cfg)
    model = f"hf:{source}"
    if member == "medium":
        convert.import_folder(source, tmp_path / "run")
        model = str(tmp_path / "run" / "checkpoints" / "0")
    target = tmp_path / f"tiny.{form.upper()}.gguf"
    reader = export(model, target, "--name", "a name")
    last = capsys.readouterr().out.splitlines()[-1]
    bits = 8 * target.stat().st_size / sum(math.prod(s) for s in huggingface.published_tensors(cfg).values())
    for word in (form, "0.00 GB", str(target), f"{bits:.2f} bits per weight"):
        assert word in last

    kind = {"f16": 1, "q8_0": 7, "q4_0": 2}[form]
    expected = {
        "general.architecture": "phi3", "general.type": "model", "general.name": "a name",
        "general.description": "source", "general.file_type": kind, "general.quantization_version": 2,
        "phi3.vocab_size": 320, "phi3.context_length": 1024, "phi3.embedding_length": 64, "phi3.block_count": 2,
        "phi3.rope.scaling.original_context_length": 512 if longrope else 1024, "phi3.feed_forward_length": 96,
        "phi3.attention.head_count": 4, "phi3.attention.head_count_kv": cfg.kv_heads, "phi3.rope.dimension_count": 16,
        "phi3.attention.layer_norm_rms_epsilon": np.float32(1e-5), "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 300, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    if longrope:
        expected["phi3.rope.scaling.attn_factor"] = np.float32(math.sqrt(1 + math.log(2) / math.log(512)))
    assert values(reader) == expected

    published, written = tensors_in(source), weights_in(reader)
    if longrope:
        for which in ("short", "long"):
            factors = written.pop(f"rope_factors_{which}.weight")
            np.testing.assert_array_equal(factors, np.float32(getattr(longrope, which)))
    names = gguf_names(cfg)
    assert published.keys() == names.keys() and written.keys() == set(names.values())
    for name, there in published.items():
        there, back = there.astype(np.float32), written[names[name]]
        assert there.shape == back.shape
        if there.ndim == 1 or form == "f16":
            np.testing.assert_array_equal(there, back)
            continue
        blocks = there.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / (127 if form == "q8_0" else 8)
        bound = step / 2 if form == "q8_0" else np.maximum(step / 2, np.abs(blocks) - 7 * step)  # -8..7 has one end
        assert (np.abs(back.reshape(-1, 32) - blocks) <= bound + 1e-3 * np.abs(blocks)).all(), name
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert all(types[n] == ("F32" if "norm" in n or "rope" in n else form.upper()) for n in types)


def test_rows_are_queries_keys_values_and_gate_then_up(tmp_path: Path) -> None:
    cfg = tiny("medium")
    source = folder_of(tmp_path / "source", cfg)
    written = weights_in(export(f"hf:{source}", tmp_path / "a.F16.gguf"))
    blocks = phi3_jax.load(f"hf:{source}").params["blocks"]
    qkv = np.asarray(
        blocks["qkv"]["weight"][1], np.float32
    )  # embed, kv head, its queries then key then value, head_dim
    rows = [qkv[:, :, :2].reshape(64, 64), qkv[:, :, 2].reshape(64, 32), qkv[:, :, 3].reshape(64, 32)]
    np.testing.assert_array_equal(written["blk.1.attn_qkv.weight"], np.concatenate(rows, axis=1).T)
    gate_up = np.asarray(blocks["gate_up"]["weight"][1], np.float32)
    np.testing.assert_array_equal(written["blk.1.ffn_up.weight"], gate_up.transpose(1, 2, 0).reshape(192, 64))


def saved_run(path: Path, cfg: ModelConfig, data: dict[str, str] | None = None) -> Path:
    params = init_params(cfg, 0)
    if not cfg.tied:
        params["unembedding"] = 0.3 * jax.random.normal(jax.random.key(1), params["unembedding"].shape)
    keeper = checkpoint.Checkpointer(path / "checkpoints")
    keeper.save(3, {"params": params}, {})
    keeper.wait()
    (path / "config.json").write_text(json.dumps({"config": {"model": dataclasses.asdict(cfg), "data": data}}))
    return path


def proxy(member: str, ladder: str, **changes: object) -> ModelConfig:
    cfg = phi3_jax.proxy(member, "nano", ladder, vocab=320, context=64)
    return dataclasses.replace(cfg, layers=cfg.layers * 2, **changes)


def byte_run(path: Path, cfg: ModelConfig) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"tokenizer": {"kind": "bytes"}}))
    return saved_run(path / "run", cfg, {"folder": str(path)})


@pytest.mark.parametrize(("member", "ladder"), [("mini", "clean"), ("small", "clean"), ("medium", "family")])
def test_multipliers_are_folded_as_in_safetensors(member: str, ladder: str, tmp_path: Path) -> None:
    cfg = proxy(member, ladder)
    assert cfg.residual_multiplier != 1 and cfg.width_ratio != 1
    run = saved_run(tmp_path / "run", cfg)
    written = weights_in(export(str(run), tmp_path / "a.F16.gguf"))
    assert main(["export", "--model", str(run), "--to", f"hf:{tmp_path / 'out'}"]) == 0
    published, names = tensors_in(tmp_path / "out"), gguf_names(cfg)
    for name, there in published.items():
        there = there if there.ndim == 1 else there.astype(np.float16)
        np.testing.assert_array_equal(there.astype(np.float32), written[names[name]])


@pytest.mark.parametrize("form", ["q4_0", "q8_0"])
def test_a_quantised_run_is_written_as_it_is(form: str, tmp_path: Path, capsys) -> None:
    """The blocks are those of a direct export, bit for bit; muP's factors go into the scales."""
    convert.import_folder(folder_of(tmp_path / "source", tiny("medium")), tmp_path / "run")
    words = ["--model", str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "rounded"), "--tokens", "0"]
    assert main(["quantize", *words]) == 0
    direct, through = (export(str(tmp_path / n), tmp_path / f"{n}.{form.upper()}.gguf") for n in ("run", "rounded"))
    assert {t.name for t in direct.tensors} == {t.name for t in through.tensors} and len(direct.tensors) > 10
    for a, b in zip(direct.tensors, through.tensors, strict=True):
        np.testing.assert_array_equal(a.data, b.data, err_msg=a.name)

    run = byte_run(tmp_path / "bytes", proxy("mini", "clean"))
    words = ["--model", str(run), "--format", form, "--out", str(tmp_path / "proxy"), "--tokens", "0"]
    assert main(["quantize", *words]) == 0
    files = [tmp_path / f"{path.name}-p.{form.upper()}.gguf" for path in (run, tmp_path / "proxy")]
    direct, through = (weights_in(export(str(p), f)) for p, f in zip((run, tmp_path / "proxy"), files, strict=True))
    assert huggingface.folding(proxy("mini", "clean")), "there are factors"
    for name, weights in direct.items():
        step = np.abs(weights).max() / (7 if form == "q4_0" else 127)
        assert np.abs(weights - through[name]).max() < (1.05 if weights.ndim > 1 else 1e-6) * step, name
        assert weights.ndim == 1 or np.corrcoef(weights.ravel(), through[name].ravel())[0, 1] > 0.999
    capsys.readouterr()
    rounded, other = str(tmp_path / "rounded"), "q8_0" if form == "q4_0" else "q4_0"
    refused(["--model", rounded, "--to", f"gguf:{tmp_path / 'x'}.{other}.gguf"], capsys, "is quantised in", form)
    refused(["--model", rounded, "--to", f"hf:{tmp_path / 'x'}"], capsys, "is quantised; export the run")


def test_a_tied_table_is_written_once(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", tiny("mini", tied=True))
    names = {t.name for t in export(f"hf:{source}", tmp_path / "a.F16.gguf").tensors}
    assert "token_embd.weight" in names and "output.weight" not in names


@pytest.mark.parametrize(("member", "form", "gigabytes"), [("mini", "q4_0", 2.15), ("medium", "q8_0", 14.83)])
def test_published_sizes(member: str, form: str, gigabytes: float) -> None:
    slots, total = exporter.plan(phi3_jax.published(member), form)
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert sum(math.prod(s.shape) for s in slots.values()) == phi3_jax.family.published_params(member)


# ------------------------------------------------------------------------------------------------ tokens

TEXT = "The model answers; the other models, 12 of them, answered before.\n  naïve → café\t(x_1 = 3) 😀"
CONTROLS = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>")


def bpe_folder(path: Path, cfg: ModelConfig, *, rstrip: bool = True, byte_level: bool = False) -> Path:
    """A folder whose tokenizer joins as the published one of mini: blanks as "▁", unseen characters as bytes."""
    import tokenizers as hf

    folder_of(path, cfg)
    model = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    if byte_level:
        model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [hf.AddedToken(c, special=True, rstrip=rstrip and c == "<|end|>") for c in CONTROLS]
    first = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = hf.trainers.BpeTrainer(vocab_size=317, special_tokens=first, show_progress=False)
    model.train_from_iterator(
        ["the other model answers the models that answered many other questions before"] * 20, trainer
    )
    assert model.get_vocab_size() == 317
    model.add_tokens([hf.AddedToken("__", normalized=False)])
    model.save(str(path / "tokenizer.json"))
    spec = json.loads((path / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    config |= {"add_bos_token": True, "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_byte_fallback_vocabulary_is_written(tmp_path: Path) -> None:
    source = bpe_folder(tmp_path / "source", tiny("mini"))
    convert.import_folder(source, tmp_path / "run")
    found = values(export(str(tmp_path / "run"), tmp_path / "a.F16.gguf"))
    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in found.items() if k.startswith("tokenizer.")}
    texts, scores, types = (keys.pop(k) for k in ("tokens", "scores", "token_type"))
    assert keys == {
        "model": "llama", "pre": "default", "add_space_prefix": True, "add_bos_token": True, "add_eos_token": False,
        "bos_token_id": 1, "eos_token_id": 3, "unknown_token_id": 0, "padding_token_id": 3,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    ids = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(texts) == len(scores) == len(types) == 320 and all(texts[i] == text for text, i in ids.items())
    assert types[:5] == [2, 3, 3, 3, 3] and types[5:261] == [6] * 256 and set(types[261:317]) == {1}
    assert [texts[317], types[317], scores[317]] == ["__", 4, -1000.0]
    assert texts[318:] == ["[PAD318]", "[PAD319]"] and types[318:] == [5, 5]
    assert scores[0] == 0 and scores[1:5] == [-1000.0] * 4 and scores[5:317] == [-float(i) for i in range(5, 317)]
    assert found["general.name"] == "phi-3 source"  # for llama.cpp to strip blanks after control tokens
    source = bpe_folder(tmp_path / "Phi-3-plain", tiny("mini"), rstrip=False)
    assert values(export(f"hf:{source}", tmp_path / "b.F16.gguf"))["general.name"] == "phi_3-plain"


@pytest.mark.parametrize(("listed", "generation", "others"), [
    (None, None, []), (3, [3, 4], []), ([3, 300], 301, [300, 301]), (300, None, [300]), ([9], [8, 300, 400], [8, 9, 300]),
])  # fmt: skip
def test_stop_ids_survive_import_quantisation_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture, listed: object, generation: object, others: list[int]
) -> None:
    """The union of what the tokenizer ends with (2, 3, 4) and what both files list; ids beyond the 320 are none."""
    source = bpe_folder(tmp_path / "source", tiny("mini"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": listed}))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    want = tuple(sorted({2, 3, 4, *others}))
    convert.import_folder(source, tmp_path / "run")
    words = ["--model", str(tmp_path / "run"), "--format", "q8_0", "--out", str(tmp_path / "q"), "--tokens", "0"]
    assert main(["quantize", *words]) == 0
    convert.export_run(tmp_path / "run", tmp_path / "again")
    models = [f"hf:{source}", str(tmp_path / "run"), str(tmp_path / "q"), f"hf:{tmp_path / 'again'}"]
    assert [phi3_jax.load(m).stop_ids for m in models] == [want] * 4
    for number, model in enumerate(models):
        capsys.readouterr()
        file = tmp_path / f"{number}.gguf"
        form = "q8_0" if model == str(tmp_path / "q") else "f16"
        found = values(export(model, file, "--format", form))
        ends = {found.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")} - {None}
        by_text = {i for i, t in enumerate(found["tokenizer.ggml.tokens"]) if t in ("</s>", "<|endoftext|>", "<|end|>")}
        turns = [found.get(f"tokenizer.ggml.{k}_token_id") for k in ("eot", "eom")]
        assert turns == [*others, None, None][:2], model
        lost = set(want) - ends - by_text
        assert lost == set(others[2:]), model
        said = capsys.readouterr()
        assert ("will end no reply in llama.cpp" in said.out + said.err) == bool(lost)


def test_joins_out_of_order_score_by_their_order(tmp_path: Path) -> None:
    source = bpe_folder(tmp_path / "source", tiny("mini"))
    spec = json.loads((source / "tokenizer.json").read_text())
    pairs = spec["model"]["merges"]
    pairs[0], pairs[1] = pairs[1], pairs[0]
    (source / "tokenizer.json").write_text(json.dumps(spec))
    found = values(export(f"hf:{source}", tmp_path / "a.F16.gguf"))
    score = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    joined = ["".join(p.split(" ") if isinstance(p, str) else p) for p in pairs]
    assert [score[text] for text in joined[:5]] == [0, -1, -2, -3, -4]


@pytest.mark.parametrize("vocab", [259, 320])
def test_a_byte_vocabulary_is_written(vocab: int, tmp_path: Path) -> None:
    run = byte_run(tmp_path / "bytes", proxy("mini", "clean", vocab=vocab, name="my-phi3"))
    found = values(export(str(run), tmp_path / "a.Q8_0.gguf"))
    texts, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert texts[:2] == ["<0x00>", "<0x01>"] and texts[32] == "▁" and texts[256:259] == ["<s>", "</s>", "<pad>"]
    assert types[:259] == [6] * 32 + [1] + [6] * 223 + [3] * 3
    assert (texts[259:261], types[259:261]) == ((["<unk>", "[PAD260]"], [2, 5]) if vocab > 259 else ([], []))
    special = {"bos": 256, "eos": 257, "padding": 258, "unknown": min(259, vocab - 1)}
    assert all(found[f"tokenizer.ggml.{k}_token_id"] == i for k, i in special.items())
    assert not any(found[f"tokenizer.ggml.add_{k}"] for k in ("bos_token", "eos_token", "space_prefix"))
    assert found["general.name"] == "my-phi_3"  # a name with phi3 asks for tokens that are not there


@pytest.mark.parametrize("byte_level", [None, True])
def test_no_vocabulary_says_so(byte_level: bool | None, tmp_path: Path, capsys) -> None:
    cfg = tiny("mini")
    source = bpe_folder(tmp_path / "a", cfg, byte_level=True) if byte_level else folder_of(tmp_path / "a", cfg)
    found = values(export(f"hf:{source}", tmp_path / "a.F16.gguf"))
    assert found["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in found
    assert capsys.readouterr().out.startswith("notice: ")


# ------------------------------------------------------------------------------------------------ what is refused


def refused(arguments: list[str], capsys, *words: str) -> None:
    assert main(["export", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("small", ["the layout phi3small, LayerNorm, biases, block-sparse attention", "--to hf:FOLDER"]),
        ("moe", ["experts", "--to hf:FOLDER"]),
        ("width", ["mlp.down_proj.weight", "rows of 40", "blocks of 32", "--format f16"]),
        ("mscales", ["different attention factors", "--to hf:FOLDER"]),
        ("large", ["holds 70000", "f16 ends at 65504", "lm_head.weight"]),
        ("nan", ["NaN or infinite", "model.norm.weight"]),
        ("tied", ["ties its embeddings", "untied"]),
        ("tokenizer", ["has id 300", "300 embeddings"]),
        ("name", ["--name Phi-3-mine", "<|endoftext|>", "without phi-3"]),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(kind: str, words: list[str], tmp_path: Path, capsys) -> None:
    more, path, form = [], tmp_path / "source", "F16"
    if kind in ("small", "moe"):
        random_folder(path, kind, np.float32)
    elif kind == "width":
        folder_of(path, tiny("mini", mlp=40))
        form = "q4_0"
    elif kind == "mscales":
        saved_run(path, tiny("mini", longrope=dataclasses.replace(ROPE, short_mscale=1.1, long_mscale=1.2)))
    elif kind == "tokenizer":
        bpe_folder(path, tiny("mini", vocab=300))
    elif kind == "tied":
        saved_run(path, proxy("mini", "clean", tied=True, embed_multiplier=2.0))
    elif kind == "name":
        byte_run(path, proxy("mini", "clean"))
        more = ["--name", "Phi-3-mine"]
    else:
        folder_of(path, tiny("mini"))
        tensors = {k: v.astype(np.float32) for k, v in tensors_in(path).items()}
        name = words[-1]
        tensors[name].reshape(-1)[5] = 70000 if kind == "large" else np.nan
        (path / "model.safetensors").unlink()
        write_tensors(path, tensors)
    model = {"tied": str(path), "mscales": str(path), "name": str(path / "run")}.get(kind, f"hf:{path}")
    refused(["--model", model, "--to", f"gguf:{tmp_path / f'a.{form}.gguf'}", *more], capsys, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--model", "hf:x", "--to", "gguf:a.gguf"],
            ["a.gguf names no format", "a.F16.gguf", "a.Q8_0.gguf", "a.Q4_0.gguf"],
        ),
        (["--model", "hf:x", "--to", "gguf:a.gguf", "--format", "q4_k"], ["q4_k", "f16, q8_0, q4_0"]),
        (["--model", "hf:x", "--to", "gguf:a.Q8_0.gguf", "--format", "q4_0"], ["says q8_0", "--format says q4_0"]),
        (["--model", "hf:x", "--to", "a.Q8_0.gguf"], ["gguf:FILE or hf:FOLDER"]),
        (["--model", "hf:x", "--to", "gguf:"], ["gguf:FILE or hf:FOLDER"]),
        (["--model", "hf:x", "--to", "hf:y"], ["already", "gguf:FILE"]),
        (["--model", "x", "--to", "hf:y", "--name", "n"], ["--name has no meaning"]),
        (["--model", "x", "--to", "gguf:a.f16.gguf"], ["no folder x"]),
        (["--model", "hf:x", "--to", "gguf:a.f16.gguf"], ["no folder x"]),
        (["--modl", "x"], ["'--modl'", "'--model'"]),
        (["--model"], ["--model needs a value"]),
        (["--model", "x"], ["--to missing", "gguf:NAME.Q4_0.gguf"]),
    ],
)
def test_wrong_flags(flags: list[str], words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    refused(flags, capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(["--model", "hf:x", "--to", f"gguf:{tmp_path}/a.f16.gguf"], capsys, "pip install 'phi3_jax[gguf]'")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_never_overwritten(tmp_path: Path, capsys) -> None:
    source, target = folder_of(tmp_path / "source", tiny("mini")), tmp_path / "a.F16.gguf"
    target.write_text("mine")
    refused(["--model", f"hf:{source}", "--to", f"gguf:{target}"], capsys, "exists", "another --to")
    assert target.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("when", ["before", "reserving", "writing"])
def test_a_full_disk_leaves_nothing(when: str, tmp_path: Path, monkeypatch, capsys) -> None:
    source = folder_of(tmp_path / "source", tiny("mini"))
    write, count = safetensors.os.pwrite, iter(range(1000))

    def fail(*arguments: object) -> int:
        if when == "reserving" or next(count) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: usage)
    else:
        monkeypatch.setattr(exporter.os, "posix_fallocate" if when == "reserving" else "pwrite", fail)
    words = ["free some space"] if when == "before" else ["no space left on device", "nothing was left"]
    refused(["--model", f"hf:{source}", "--to", f"gguf:{tmp_path / 'a.F16.gguf'}"], capsys, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------------ llama.cpp

PROMPTS, LENGTH = 50, 24
# Largest and mean difference of a logit over the largest logit. Measured: f16 1.3e-3 and 1.3e-4 (llama.cpp rounds
# activations and cache to float16), q8_0 and q4_0 2.9e-2 and 3.1e-3 (it rounds activations to 8 bits in blocks of 32).
TOLERANCES = {"f16": (2e-3, 2e-4), "q8_0": (4e-2, 4e-3), "q4_0": (4e-2, 4e-3)}


def llama(path: Path, context: int = 512) -> object:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=context, logits_all=True, verbose=False, n_threads=1)


def theirs(model: object, prompts: np.ndarray) -> np.ndarray:
    """llama.cpp's logits (prompt, time, vocab)."""
    logits = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt.tolist())
        logits.append(np.array(model.scores[: prompt.size]))
    return np.stack(logits)


def compare(ours: np.ndarray, other: np.ndarray, form: str, what: str) -> None:
    """Asserts the tolerances, and the same top token wherever ours leads by more than the largest difference."""
    largest, mean = TOLERANCES[form]
    error, scale = np.abs(ours - other), np.abs(ours).max()
    same, two = ours.argmax(-1) == other.argmax(-1), np.sort(ours, axis=-1)[..., -2:]
    print(f"{what}: {error.max() / scale:.1e}, mean {error.mean() / scale:.1e}, {same.mean():.4f} of top tokens equal")
    assert error.max() <= largest * scale and error.mean() <= mean * scale
    clear = two[..., 1] - two[..., 0] > largest * scale
    assert clear[:, -1].mean() > 0.4 and same[clear].all()


@pytest.mark.gguf
@pytest.mark.parametrize("regime", ["none", "short", "long"])
@pytest.mark.parametrize("form", exporter.FILES)
@pytest.mark.parametrize("member", ["mini", "medium"])
def test_llama_cpp_answers_as_we_do(member, form, regime, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    cfg = tiny(member, longrope=None if regime == "none" else ROPE)
    source = folder_of(tmp_path / "source", cfg)
    convert.import_folder(source, tmp_path / "run")
    reader = export(str(tmp_path / "run"), tmp_path / f"a.{form}.gguf")
    if form != "f16":  # our forward on the weights as the file holds them
        back, names = weights_in(reader), gguf_names(cfg)
        (source / "model.safetensors").unlink()
        write_tensors(source, {k: back[v] for k, v in names.items()})
    model = f"hf:{source}" if form != "f16" else tmp_path / "run"
    prompts = np.random.default_rng(0).integers(0, 320, (PROMPTS, LENGTH))
    # llama.cpp takes the long factors where the context it allocated exceeds the original one.
    other = theirs(llama(tmp_path / f"a.{form}.gguf", 1024 if regime == "long" else 512), prompts)
    loaded = phi3_jax.load(model, dtype="float32")
    ours = {r: np.asarray(loaded.logits(prompts, rope_regime=r)) for r in ("short", "long")}
    chosen = ours["long" if regime == "long" else "short"]
    compare(chosen, other, form, f"{member} {form} {regime}")
    if regime != "none":  # the wrong list would be seen
        apart = np.abs(ours["short"] - ours["long"]).mean() / np.abs(chosen).max()
        assert apart > 2 * TOLERANCES[form][1], apart


@pytest.mark.gguf
@pytest.mark.parametrize(("member", "ladder"), [("mini", "clean"), ("medium", "family")])
def test_llama_cpp_runs_a_proxy_with_its_bytes(member: str, ladder: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    run = byte_run(tmp_path / "bytes", proxy(member, ladder))
    export(str(run), tmp_path / "a.F16.gguf")
    model, ours = llama(tmp_path / "a.F16.gguf"), phi3_jax.load(run)
    ids = model.tokenize(TEXT.encode(), add_bos=False)
    assert ids == list(TEXT.encode()) and model.detokenize(ids) == TEXT.encode()
    assert (model.token_bos(), model.token_eos()) == (256, 257)
    prompts = np.random.default_rng(0).integers(0, 256, (PROMPTS, LENGTH))
    compare(np.asarray(ours.logits(prompts)), theirs(model, prompts), "f16", f"{member} {ladder} f16")


@pytest.mark.gguf
@pytest.mark.parametrize("rstrip", [False, True])
def test_llama_cpp_cuts_text_as_we_do(rstrip: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    source = bpe_folder(tmp_path / "source", tiny("mini"), rstrip=rstrip)
    export(f"hf:{source}", tmp_path / "a.Q4_0.gguf")
    model, ours = llama(tmp_path / "a.Q4_0.gguf"), tokenizers.load(source)
    for text in (TEXT, "the models", " the", "a<|end|>b", "<0x41>", "   ", "x__y"):
        assert model.tokenize(text.encode(), add_bos=False) == ours.encode(text), text
    turn = model.tokenize(b"<|end|>\nthe", add_bos=True, special=True)
    newline = [] if rstrip else ours.encode("\nthe")
    assert turn == [1, 4, *(newline or ours.encode("the"))]
    assert (model.token_bos(), model.token_eos()) == (1, 3)
