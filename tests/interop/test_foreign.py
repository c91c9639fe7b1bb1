"""Files that others wrote: every field has a type and a range, nothing that changes a model is passed over."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_folders import GOLDENS, random_folder, tensors_in, write_tensors

import phi3_jax
from phi3_jax import configs, finite
from phi3_jax.__main__ import main
from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.interop import convert, gguf, hf_config, loading, safetensors
from phi3_jax.models import flops
from phi3_jax.models.spec import count_params
from phi3_jax.records import streaming
from phi3_jax.records.folder import KEPT

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG = {"type": "longrope", **FACTORS}


def config_of(kind: str = "mini_window", **changes: object) -> dict:
    config = json.loads((GOLDENS / f"{kind}.json").read_text())["config"] | changes
    return {k: v for k, v in config.items() if v is not ...}


def read(kind: str = "mini_window", **changes: object) -> configs.ModelConfig:
    return hf_config.from_config(config_of(kind, **changes), "m")


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, (word, message)


# ------------------------------------------------------------------------------------------------ config.json

WRONG = [
    ("rope_theta", x) for x in (0, -1, math.nan, math.inf, -math.inf, "10000", True, [1e4], 10**400, {})
] + [
    ("vocab_size", x) for x in (math.nan, 0, -1, "48", 48.0, True, [48], 10**400, 2**31)
] + [
    ("sliding_window", x) for x in (0, -1, 5.0, "5", True, math.inf, 2**40)
] + [
    ("rms_norm_eps", x) for x in (-1e-5, math.nan, "1e-5", False)
] + [
    ("initializer_range", math.inf), ("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("head_dim", 15),
    ("head_dim", 0), ("head_dim", "16"), ("tie_word_embeddings", 1), ("tie_word_embeddings", "false"),
    ("attention_bias", "no"), ("hidden_act", ["silu"]), ("hidden_act", "gelu"), ("partial_rotary_factor", 0.5),
    ("max_position_embeddings", 1e5), ("original_max_position_embeddings", "64"), ("num_key_value_heads", True),
    ("rope_scaling", "longrope"), ("rope_scaling", [1]), ("rope_scaling", 2.0), ("rope_parameters", "default"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_field_of_another_type_or_range_is_refused_by_name(name: str, value: object) -> None:
    refused(lambda: read(**{name: value}), "m/config.json", name)


UNREAD = {
    "rope_interleaved": True, "rotary_dim": 8, "rotary_pct": 0.5, "rope_local_base_freq": 1e4, "mlp_bias": True,
    "qkv_bias": True, "norm_type": "layernorm", "qk_norm": True, "embedding_multiplier": 12.0, "logit_scale": 0.5,
    "residual_multiplier": 0.22, "attention_multiplier": 0.01, "final_logit_softcapping": 30.0, "max_window_layers": 4,
    "attn_logit_softcapping": 50.0, "mup_width_multiplier": 8.0, "alibi": True, "attention_window": [128, 0],
    "quantization_config": {"quant_method": "gptq", "bits": 4}, "layer_norm_eps": 1e-6, "num_experts": 4,
    "attention_sink": 4, "use_expert_bias": True, "router_layers": ["gate"], "scale_embeddings": True,
    "layer_types": ["full_attention", "sliding_attention"], "attention_chunk_size": 16, "embd_layer": {"x": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_a_field_that_changes_the_model_is_never_passed_over(name: str) -> None:
    refused(lambda: read(**{name: UNREAD[name]}), "m/config.json", name)


def test_fields_that_ask_for_nothing_pass() -> None:
    plain = read()
    harmless = {name: None for name in UNREAD} | {
        "attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.0, "torch_dtype": "bfloat16", "use_cache": False,
        "_attn_implementation": "eager", "output_attentions": True, "use_flash_attn": True, "unsloth_version": "1",
        "logit_scale": 1.0, "qkv_bias": False, "max_window_layers": 0, "rotary_dim": 0, "rope_type": "default",
        "pruned_heads": {}, "_name_or_path": "norm/rope", "auto_map": {"AutoConfig": "x"}, "id2label": {"0": "bias"},
        "chunk_size_feed_forward": 0, "partial_rotary_factor": 1, "layer_types": ["sliding_attention"] * 2,
        "hidden_act": "swish", "attention_bias": True, "num_labels": 2, "temperature": 0.7,
    }  # fmt: skip
    assert read(**harmless) == plain


ROPES = {
    "without a type": dict(rope_scaling=FACTORS),
    "lists of the default type": dict(rope_scaling={"type": "default", **FACTORS}),
    "yarn": dict(rope_scaling={"type": "yarn", "factor": 4.0}),
    "linear": dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "a factor of the default type": dict(rope_parameters={"rope_type": "default", "factor": 2.0}),
    "two types": dict(rope_scaling=LONG | {"rope_type": "default"}),
    "partial": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}),
    "partial longrope": dict(rope_scaling=LONG | {"partial_rotary_factor": 0.5}),
    "by layer": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    "a base as text": dict(rope_parameters={"rope_type": "default", "rope_theta": "10000"}),
    "a base of zero": dict(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    "an unknown field": dict(rope_scaling=LONG | {"beta_fast": 32}),
    "a type that is no text": dict(rope_scaling=LONG | {"type": 1}),
    "attention_factor as text": dict(rope_scaling=LONG | {"attention_factor": "1.2"}),
    "attention_factor NaN": dict(rope_scaling=LONG | {"attention_factor": math.nan}),
    "attention_factor zero": dict(rope_scaling=LONG | {"attention_factor": 0}),
    "a factor too large": dict(rope_scaling=LONG | {"factor": 10**400}),
    "a mscale as text": dict(rope_scaling=LONG | {"short_mscale": "1"}),
    "a list with a boolean": dict(rope_scaling=LONG | {"short_factor": [1.0] * 7 + [True]}),
    "a list with NaN": dict(rope_scaling=LONG | {"long_factor": [1.0] * 7 + [math.nan]}),
    "a list with a large number": dict(rope_scaling=LONG | {"long_factor": [1.0] * 7 + [10**400]}),
    "a list with text": dict(rope_scaling=LONG | {"long_factor": ["1.0"] * 8}),
    "a list with zero": dict(rope_scaling=LONG | {"long_factor": [0.0] * 8}),
    "a short list": dict(rope_scaling=LONG | {"long_factor": [2.0] * 7}),
    "a list that is a number": dict(rope_scaling=LONG | {"long_factor": 2.0}),
    "two objects that differ": dict(
        rope_scaling=LONG, rope_parameters={"rope_type": "longrope", **FACTORS, "rope_theta": 5e5}
    ),
    "original only inside": dict(
        original_max_position_embeddings=..., rope_scaling=LONG | {"original_max_position_embeddings": 16}
    ),
    "original of one": dict(original_max_position_embeddings=1, rope_scaling=LONG),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_that_is_not_understood_is_refused(name: str) -> None:
    refused(
        lambda: read(**{"max_position_embeddings": 64, **ROPES[name]}),
        "m/config.json",
        "original" if "original" in name else "rope",
    )


def test_rope_means_what_transformers_makes_of_it() -> None:
    long = dict(max_position_embeddings=64, original_max_position_embeddings=16)
    plain = read(**long, rope_scaling=LONG)
    assert plain.longrope == configs.LongRope(16, (1.0,) * 8, (2.0,) * 8)
    new = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **FACTORS}
    for same in (
        dict(rope_scaling=LONG | {"type": "su"}),
        dict(rope_scaling=..., rope_theta=..., rope_parameters=new),
        dict(rope_scaling=LONG, rope_parameters=new),
        dict(rope_scaling=LONG | {"original_max_position_embeddings": 32}),  # the top wins
        dict(rope_scaling=LONG | {"short_mscale": 1.5, "long_mscale": 2.0}),  # phi3 has no such fields
        dict(rope_scaling=LONG | {"factor": 4.0}),
    ):
        assert read(**long, **same) == plain, same
    assert read(**long, rope_scaling=..., rope_parameters=new | {"rope_theta": 5e5}).rope_base == 5e5
    for field, value, factor in (
        ("attention_factor", 1.25, 1.25),
        ("factor", 2.0, math.sqrt(1 + math.log(2) / math.log(16))),
        ("factor", 0.5, 1.0),
    ):
        rope = read(**long, rope_scaling=LONG | {field: value}).longrope
        assert rope.short_mscale == rope.long_mscale == factor
    beyond = read(max_position_embeddings=64, original_max_position_embeddings=128, rope_scaling=LONG).longrope
    assert beyond.original_context == 128
    assert read(original_max_position_embeddings=..., rope_scaling=LONG).longrope.original_context == 4096


def test_mscales_are_those_of_the_members_that_read_them() -> None:
    four = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    lengths = {"original_max_position_embeddings": 16, "short_mscale": 1.1, "long_mscale": 1.3}
    for kind in ("moe", "small"):
        rope = read(kind, original_max_position_embeddings=..., rope_scaling=four | lengths).longrope
        assert (rope.original_context, rope.short_mscale, rope.long_mscale) == (16, 1.1, 1.3)
        refused(
            lambda kind=kind: read(kind, original_max_position_embeddings=8, rope_scaling=four | lengths),
            "make them equal",
        )
    refused(lambda: read("small", rope_scaling=four | {"factor": 3.0}), "factor=3.0", "short_mscale")


def test_an_export_states_a_factor_of_its_own() -> None:
    long = dict(max_position_embeddings=64, original_max_position_embeddings=16)
    cfg = read(**long, rope_scaling=LONG | {"attention_factor": 1.25}, head_dim=16)
    stated = hf_config.to_config(cfg, "float32")
    assert stated["rope_scaling"]["attention_factor"] == 1.25 and "short_mscale" not in stated["rope_scaling"]
    assert hf_config.from_config(stated, cfg.name) == cfg
    assert "attention_factor" not in hf_config.to_config(read(**long, rope_scaling=LONG), "float32")["rope_scaling"]
    moe = hf_config.to_config(phi3_jax.published("moe", "128k"), "float32")["rope_scaling"]
    assert moe["short_mscale"] == moe["long_mscale"] == pytest.approx(1.243163121016122)


NUMBER = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
RELEASED = {
    "mini-4k": dict(sliding_window=2047),
    "mini-128k": dict(max_position_embeddings=131072, sliding_window=262144, rope_scaling=NUMBER | {"type": "su"}),
    "3.5-mini": dict(max_position_embeddings=131072, sliding_window=262144, rope_scaling=NUMBER, attention_bias=False),
    "transformers 5": dict(
        max_position_embeddings=131072, sliding_window=262144, rope_scaling=..., rope_theta=..., torch_dtype=...,
        dtype="bfloat16", transformers_version="5.0.0",
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                         "original_max_position_embeddings": 4096, **NUMBER, "type": "longrope"},
    ),
    "medium-4k": dict(
        hidden_size=5120, num_attention_heads=40, num_key_value_heads=10, intermediate_size=17920,
        num_hidden_layers=40, sliding_window=2047, attention_bias=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_files_are_read(name: str) -> None:
    """With every field of the 2024 files; those of small and MoE are the goldens'."""
    mini = dict(
        _name_or_path="Phi-3-mini-4k-instruct", architectures=["Phi3ForCausalLM"], attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000,
        hidden_act="silu", hidden_size=3072, initializer_range=0.02, intermediate_size=8192,
        max_position_embeddings=4096, model_type="phi3", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
        transformers_version="4.40.2", use_cache=True, vocab_size=32064,
    )  # fmt: skip
    config = {k: v for k, v in (mini | RELEASED[name]).items() if v is not ...}
    cfg = hf_config.from_config(config, "m")
    assert (cfg.longrope is not None) == (cfg.context > 4096) and cfg.window_keys == config["sliding_window"]


# ------------------------------------------------------------------------------------------------ what fine-tunes have


@pytest.mark.parametrize(("heads", "kv", "head_dim"), [(2, 1, 24), (4, 2, 4), (3, 3, 16)])
def test_heads_unlike_the_width(heads: int, kv: int, head_dim: int, tmp_path: Path) -> None:
    fields = dict(num_attention_heads=heads, num_key_value_heads=kv, head_dim=head_dim)
    source = random_folder(tmp_path / "source", "mini_window", np.float32, **fields)
    cfg = loading.folder_config(source)
    assert cfg.inner == heads * head_dim != cfg.embed
    assert tensors_in(source)["model.layers.0.self_attn.o_proj.weight"].shape == (32, cfg.inner)
    assert count_params(cfg) == flops.all_params(cfg) == sum(x.size for x in tensors_in(source).values())
    convert.import_folder(source, tmp_path / "run")
    convert.export_run(tmp_path / "run", tmp_path / "back")
    there, back = tensors_in(source), tensors_in(tmp_path / "back")
    assert all(there[k].tobytes() == back[k].tobytes() for k in there)
    logits = phi3_jax.load(f"hf:{source}").logits([[1, 2, 3]])
    assert np.isfinite(logits).all() and np.array_equal(logits, phi3_jax.load(tmp_path / "run").logits([[1, 2, 3]]))
    assert hf_config.from_config(hf_config.to_config(cfg, "float32"), cfg.name).head_dim == head_dim
    refused(lambda: gguf._check(cfg, "f16"), f"heads x head_dim = {cfg.inner}", "--to hf:FOLDER")
    words = ["--model", str(tmp_path / "run"), "--out", str(tmp_path / "q8"), "--format", "q8_0", "--tokens", "0"]
    assert main(["quantize", *words]) == 0
    rounded = phi3_jax.load(tmp_path / "q8").logits([[1, 2, 3]])
    assert np.abs(rounded - logits).max() < 0.1 * np.abs(logits).max()


def test_dtypes_are_widened_with_a_note(tmp_path: Path, capsys) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float16)
    tensors = tensors_in(source)
    want = phi3_jax.load(f"hf:{source}", dtype=np.float32).logits([[1, 2, 3]])
    capsys.readouterr()
    name = "model.layers.1.mlp.down_proj.weight"
    for dtypes, note in (({name: np.float32}, "blocks.down.weight"), (dict.fromkeys(tensors, np.float64), "float64")):
        (source / "model.safetensors").unlink()
        write_tensors(source, {k: x.astype(dtypes.get(k, x.dtype)) for k, x in tensors.items()})
        model = phi3_jax.load(f"hf:{source}", dtype=np.float32)
        assert note in capsys.readouterr().err
        assert model.params["blocks"]["down"]["weight"].dtype == np.float32
        assert np.array_equal(model.logits([[1, 2, 3]]), want)  # wider, and as before
    (source / "model.safetensors").unlink()
    write_tensors(source, tensors | {name: np.full(tensors[name].shape, 1e300)})
    refused(lambda: phi3_jax.load(f"hf:{source}"), name, "infinite")


def test_a_tied_folder_may_store_either_name(tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32, tie_word_embeddings=True)
    want, tensors = phi3_jax.load(f"hf:{source}").logits([[1, 2]]), tensors_in(source)
    (source / "model.safetensors").unlink()
    write_tensors(source, {k.replace("model.embed_tokens", "lm_head"): x for k, x in tensors.items()})
    assert np.array_equal(phi3_jax.load(f"hf:{source}").logits([[1, 2]]), want)


def test_an_adapter_is_not_weights(tmp_path: Path, capsys) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    want = phi3_jax.load(f"hf:{source}").logits([[1, 2]])
    (source / "adapter_model.safetensors").write_bytes(b"anything")
    (source / "adapter_config.json").write_text("{}")
    assert np.array_equal(phi3_jax.load(f"hf:{source}").logits([[1, 2]]), want)
    assert "adapter_model.safetensors" in capsys.readouterr().err
    convert.import_folder(source, tmp_path / "run")
    assert not list((tmp_path / "run" / KEPT).glob("adapter*"))
    (source / "model.safetensors").unlink()
    refused(lambda: phi3_jax.load(f"hf:{source}"), "adapter_model.safetensors", "merge it")


# ------------------------------------------------------------------------------------------------ safetensors


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict:
    as_list = lambda x: list(x) if isinstance(x, tuple) else x  # noqa: E731
    return {"dtype": dtype, "shape": as_list(shape), "data_offsets": as_list(offsets)}


def write_header(path: Path, header: object, size: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


HEADERS = {
    "a list": [1], "a number": 7, "an entry that is a list": {"a": [1]}, "an entry of null": {"a": None},
    "no dtype": {"a": {"shape": [2, 3], "data_offsets": [0, 24]}}, "unknown dtype": {"a": entry("F33")},
    "a dtype of null": {"a": entry(None)}, "a shape of text": {"a": entry(shape="23")},
    "a negative size": {"a": entry(shape=(-2, -3))}, "a fraction of a size": {"a": entry(shape=(2.0, 3))},
    "a boolean size": {"a": entry(shape=(True, 6))}, "one offset": {"a": entry(offsets=(24,))},
    "backwards": {"a": entry(offsets=(24, 0))}, "text offsets": {"a": entry(offsets=("0", "24"))},
    "beyond the file": {"a": entry(offsets=(8, 32))}, "offsets of 10**30": {"a": entry(offsets=(10**30, 10**30 + 24))},
    "a gap before": {"a": entry(shape=(4,), offsets=(8, 24))}, "a boolean offset": {"a": entry(offsets=(False, 24))},
    "an overlap": {"a": entry(shape=(4,), offsets=(0, 16)), "b": entry(shape=(4,), offsets=(8, 24))},
    "the same bytes twice": {"a": entry(), "b": entry()}, "too few bytes": {"a": entry(shape=(2, 4))},
    "a gap between": {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(2,), offsets=(16, 24))},
    "cut short": b'{"a": {"dtype": ', "no UTF-8": b'{"\xff": 1}', "empty": b"", "zeros": bytes(16),
    "deep": b"[" * 100_000, "deep objects": b'{"a":' * 30_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_refused(name: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", HEADERS[name])
    refused(lambda: safetensors.header(path), "x.safetensors")


def test_a_whole_header_is_read(tmp_path: Path) -> None:
    header = {
        "b": entry(shape=(4,), offsets=(8, 24)),
        "a": entry(shape=(2,), offsets=(0, 8)),
        "e": entry(shape=(0, 5), offsets=(8, 8)),
    }
    found = safetensors.header(write_header(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}} | header))
    first = found["a"].offset
    assert [found[k].offset - first for k in "abe"] == [0, 8, 8] and found["e"].shape == (0, 5)


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ([], "index.json"), ({}, "weight_map"), ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 1}}, "weight_map.a"),
        ({"weight_map": {"a": "../model.safetensors"}}, "../model.safetensors"), ("", "index.json"),
        ({"weight_map": {"a": None}}, "weight_map.a"), ("{", "index.json"), ("[" * 100_000, "index.json"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_refused(index: object, word: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / safetensors.INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    refused(lambda: safetensors.find(tmp_path), "index.json", word)


def test_files_hold_no_descriptor_and_serve_threads(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full(1000, i, np.float32) for i in range(40)}
    for name, array in arrays.items():
        (tmp_path / name).mkdir()
        write_tensors(tmp_path / name, {name: array})
    entries = {name: safetensors.find(tmp_path / name)[name] for name in arrays}
    before, found = len(list(Path("/proc/self/fd").iterdir())), {n: np.empty(1000, np.float32) for n in arrays}
    with safetensors.Files({e.path for e in entries.values()}) as files:
        threads = [
            threading.Thread(target=files.read_into, args=(e.path, e.offset, found[n])) for n, e in entries.items()
        ]
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(np.array_equal(found[n], arrays[n]) for n in arrays)


# ------------------------------------------------------------------------------------------------ tokenizers


def tokenizer_folder(folder: Path, spec: object = None, config: bytes | None = None) -> Path:
    pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "a": 1, "</s>": 2}
    whole = {
        "version": "1.0", "added_tokens": [{"id": 2, "content": "</s>", "special": True, "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False}], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    content = spec if isinstance(spec, bytes) else json.dumps(whole | (spec or {})).encode()
    (folder / "tokenizer.json").write_bytes(content)
    if config is not None:
        (folder / "tokenizer_config.json").write_bytes(config)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        b"[]", b"7", b"", b"\0\0\0", b'{"eos_token": 2}', b'{"eos_token": ["</s>"]}', b'{"eos_token": true}', b"\xff\xfe{}",
        b'{"eos_token": {"content": 2}}', b'{"eos_token": {"text": "</s>"}}', b'{"eos_token": "</s>"', b"[" * 100_000,
        b'{"eos_token": "</end>"}',
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_config_is_refused(config: bytes, tmp_path: Path) -> None:
    refused(lambda: tokenizers.load(tokenizer_folder(tmp_path, config=config)), "tokenizer_config.json")


@pytest.mark.parametrize(
    "spec",
    [
        {"added_tokens": {}}, {"added_tokens": [1]}, {"added_tokens": [{"id": 2, "special": True}]},
        {"added_tokens": [{"id": "2", "content": "</s>", "special": True}]}, {"added_tokens": "x"},
        {"added_tokens": [{"id": 2, "content": "</s>", "special": "yes"}]}, b'{"a', b'{"a": \xff}', {"model": 3},
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused(spec: object, tmp_path: Path) -> None:
    refused(lambda: tokenizers.load(tokenizer_folder(tmp_path, spec)), "tokenizer.json")


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    plain = tokenizers.load(tokenizer_folder(tmp_path / "a", config=b'{"eos_token": {"content": "</s>"}}'))
    content = b"\xef\xbb\xbf" + (tmp_path / "a" / "tokenizer.json").read_bytes()
    marked = tokenizers.load(tokenizer_folder(tmp_path / "b", content, b'\xef\xbb\xbf{"eos_token": "</s>"}'))
    assert marked.fingerprint == plain.fingerprint and plain.eos_id == 2


# ------------------------------------------------------------------------------------------------ finite weights

ODD = [math.nan, -math.nan, math.inf, -math.inf]
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_finite_agrees_with_numpy_on_every_kind_of_float(dtype: type) -> None:
    info = ml_dtypes.finfo(dtype)
    edges = [0.0, -0.0, info.max, -info.max, info.tiny, -info.smallest_subnormal, 1.0, -1.0]
    assert finite.is_finite(np.array(edges * 300_000, dtype))  # several blocks; their sum is infinite
    for odd in ODD:
        for at in (0, 7, 2_000_000, -1):
            array = np.array(edges * 300_000, dtype)
            array[at] = odd
            assert not finite.is_finite(array) and finite.count_odd(array) == 1
    if np.dtype(dtype).itemsize == 2:  # every value there is
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):
            sound = np.isfinite(every.astype(np.float64))
        assert finite.is_finite(every[sound]) and finite.count_odd(every) == (~sound).sum()
        assert not any(finite.is_finite(every[i : i + 1]) for i in np.flatnonzero(~sound))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("kind", "name"), [
    ("mini_window", "model.embed_tokens.weight"), ("mini_window", "model.layers.1.self_attn.qkv_proj.weight"),
    ("mini_window", "model.norm.weight"), ("mini_window", "lm_head.weight"),
    ("small", "model.layers.0.mlp.up_proj.bias"), ("moe", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
])  # fmt: skip
def test_weights_that_are_not_numbers_are_refused(kind: str, name: str, dtype: type, tmp_path: Path) -> None:
    source = random_folder(tmp_path / "source", kind, dtype)
    phi3_jax.load(f"hf:{source}")  # positive control
    tensors = tensors_in(source)
    tensors[name].reshape(-1)[[0, -1]] = math.nan, -math.inf
    (source / "model.safetensors").unlink()
    write_tensors(source, tensors)
    words = (name, f"2 of {tensors[name].size}", "model.safetensors", "fetch or save")
    refused(lambda: phi3_jax.load(f"hf:{source}"), *words)
    refused(lambda: convert.import_folder(source, tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_run_with_weights_that_are_not_numbers_is_refused(tmp_path: Path, monkeypatch) -> None:
    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    tensors = tensors_in(source)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = math.inf
    (source / "model.safetensors").unlink()
    write_tensors(source, tensors)
    with monkeypatch.context() as patch:  # a run from before the check
        patch.setattr(finite, "is_finite", lambda _: True)
        convert.import_folder(source, tmp_path / "run")
    refused(lambda: phi3_jax.load(tmp_path / "run"), "blocks.down.weight", "NaN or infinite", "checkpoints/0")
    refused(lambda: convert.export_run(tmp_path / "run", tmp_path / "out"), "blocks.down.weight[1]")
    assert not (tmp_path / "out").exists()
    reader = streaming.Reader(tmp_path / "run" / "checkpoints", "params.")
    assert reader.read("blocks.down.weight", 0).shape  # the other layer is sound


# ------------------------------------------------------------------------------------------------ own configs


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True, "0.1", None])
@pytest.mark.parametrize(
    "name",
    ["peak_lr", "b1", "b2", "eps", "weight_decay", "clip", "warmup", "decay", "final_lr", "z_loss", "spike_factor"],
)
def test_optimiser_settings_are_finite_and_in_range(name: str, value: object) -> None:
    refused(lambda: configs.OptimConfig(**{name: value}), f"optim.{name}={value!r}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_base", 0.0), ("rope_base", math.nan), ("norm_eps", math.inf), ("init_std", -0.1), ("layers", True),
        ("sliding_window", 0), ("sliding_window", 2.5), ("embed_multiplier", math.nan), ("logit_divisor", 0.0),
        ("longrope", configs.LongRope(1)), ("embed", 32.0),
    ],
)  # fmt: skip
def test_a_model_s_numbers_are_finite_and_in_range(name: str, value: object) -> None:
    refused(lambda: dataclasses.replace(read(), **{name: value}), name)
