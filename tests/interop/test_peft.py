"""Adapters of PEFT: bit for bit in and out, parts of fused projections apart, merging, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import random_folder, tensors_in

import phi3_jax
from phi3_jax.errors import UserError
from phi3_jax.interop import convert, loading, peft, safetensors
from phi3_jax.records import files

PARTS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """An adapter folder."""
    folder.mkdir()
    forms = {k: (safetensors.NAMES[v.dtype], v.shape) for k, v in tensors.items()}
    entries = safetensors.plan(forms, folder, single=peft.WEIGHTS)
    with safetensors.Files([folder / peft.WEIGHTS], write=True) as opened:
        for name, entry in entries.items():
            opened.write_at(entry.path, entry.offset, tensors[name])
    made = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base", "bias": "none"}
    (folder / peft.CONFIG).write_text(json.dumps(made | config))
    return folder


def matrices(folder: Path, rank: dict[str, int] | int = 4, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random adapters of all projections of a model's folder, by PEFT's names."""
    random, found = np.random.default_rng(1), {}
    for name, weight in tensors_in(folder).items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and ".layers." in name:
            r = rank if isinstance(rank, int) else rank[module.rpartition(".")[2]]
            for which, shape in (("A", (r, weight.shape[1])), ("B", (weight.shape[0], r))):
                drawn = random.standard_normal(shape) * 0.2
                found[f"base_model.model.{module}.lora_{which}.weight"] = drawn.astype(dtype)
    return found


def read(folder: Path) -> dict[str, np.ndarray]:
    entries = safetensors.header(folder / peft.WEIGHTS)
    arrays = {name: np.empty(entry.shape, safetensors.READ[entry.dtype]) for name, entry in entries.items()}
    with safetensors.Files([folder / peft.WEIGHTS]) as opened:
        for name, entry in entries.items():
            opened.read_into(entry.path, entry.offset, arrays[name])
    return arrays


@pytest.mark.parametrize(
    "kind,dtype", [("mini_window", np.float32), ("mini_tied", ml_dtypes.bfloat16), ("small", np.float16)]
)
def test_a_folder_goes_in_and_out_bit_for_bit_and_merges_exactly(tmp_path: Path, kind: str, dtype: Any) -> None:
    base = random_folder(tmp_path / "base", kind, np.float32)
    ranks = {
        "qkv_proj": 4,
        "o_proj": 2,
        "gate_up_proj": 4,
        "down_proj": 3,
        "query_key_value": 4,
        "dense": 2,
        "up_proj": 4,
    }
    there = matrices(base, ranks, dtype)
    layer = min(name for name in there if ".layers.1." in name).rpartition(".lora_")[0]
    there = {name: x for name, x in there.items() if not name.startswith(layer)}  # one module has none
    config = {
        "rank_pattern": {k: r for k, r in ranks.items() if r != 4},
        "alpha_pattern": {"layers.0.mlp.down_proj": 5},
    }
    source = write(tmp_path / "peft", there, use_rslora=True, **config)
    convert.command(flags(source, tmp_path / "a", base=f"hf:{base}"))
    convert.command(flags(tmp_path / "a", tmp_path / "out", to="peft:"))
    back = read(tmp_path / "out")
    assert back.keys() == there.keys()
    for name, value in there.items():
        assert back[name].dtype == value.dtype and np.array_equal(back[name], value), name
    assert files.read_json(tmp_path / "out" / peft.CONFIG) == files.read_json(source / peft.CONFIG)

    convert.command(flags(tmp_path / "a", tmp_path / "merged", to="hf:", merge=True))
    merged = tensors_in(tmp_path / "merged")
    for name, weight in tensors_in(base).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        change = np.zeros((), np.float64)
        if f"{module}.lora_A.weight" in there:
            a, b = (there[f"{module}.lora_{which}.weight"].astype(np.float64) for which in "AB")
            alpha = 5 if module.endswith("layers.0.mlp.down_proj") else 8
            change = alpha / math.sqrt(len(a)) * (b @ a)
            assert np.abs(change).max() > 0.1
        np.testing.assert_allclose(merged[name], weight + change, rtol=0, atol=2e-6, err_msg=name)
    ids = np.arange(12)[None]
    applied = loading.load(f"hf:{base}", adapter=str(tmp_path / "a")).logits(ids)
    np.testing.assert_allclose(applied, phi3_jax.load(f"hf:{tmp_path / 'merged'}").logits(ids), atol=2e-5)
    assert np.abs(applied - phi3_jax.load(f"hf:{base}").logits(ids)).max() > 0.1


def flags(source: Path, target: Path, to: str = "", merge: bool = False, **more: Any) -> dict[str, Any]:
    given = {"base": None, "adapter": None, "window_rule": None, "merge": merge} | more
    return {
        "from": f"peft:{source}" if (source / peft.WEIGHTS).exists() else str(source),
        "to": f"{to}{target}",
    } | given


def test_parts_of_a_fused_projection_apart_are_merged_exactly(tmp_path: Path) -> None:
    base = random_folder(tmp_path / "base", "mini_window", np.float32)
    cfg = phi3_jax.load(f"hf:{base}").config
    random, tensors, expected = np.random.default_rng(2), {}, {}
    for layer in range(cfg.layers):
        for module, names in PARTS.items():
            fused, rows = f"model.layers.{layer}.{module}", []
            for name, size in zip(names, peft.part_rows(cfg, "qkv" if "qkv" in module else "gate_up"), strict=True):
                where = f"base_model.model.model.layers.{layer}.{module.partition('.')[0]}.{name}"
                rank, alpha = (6, 8) if name == "v_proj" else (4, 2 if name == "up_proj" else 8)
                a, b = random.standard_normal((rank, cfg.embed)), random.standard_normal((size, rank))
                a, b = a.astype(np.float32), b.astype(np.float32)
                if name != "k_proj":  # as adapters of q and v alone
                    tensors |= {f"{where}.lora_A.weight": a, f"{where}.lora_B.weight": b}
                scale = alpha / rank * (name != "k_proj")
                rows.append(scale * (b.astype(np.float64) @ a))
            expected[f"{fused}.weight"] = np.concatenate(rows)
    source = write(
        tmp_path / "peft",
        tensors,
        rank_pattern={"v_proj": 6},
        alpha_pattern={"up_proj": 2},
        target_modules="all-linear",
    )
    convert.command(flags(source, tmp_path / "merged", to="hf:", merge=True, base=f"hf:{base}"))
    merged = tensors_in(tmp_path / "merged")
    for name, weight in tensors_in(base).items():
        change = expected.get(name, 0.0)
        np.testing.assert_allclose(merged[name], weight + change, rtol=0, atol=2e-5, err_msg=name)
    # As a run they are adapters of the fused projections, which PEFT's own names say on the way out.
    convert.command(flags(source, tmp_path / "a", base=f"hf:{base}"))
    convert.command(flags(tmp_path / "a", tmp_path / "out", to="peft:"))
    convert.command(flags(tmp_path / "out", tmp_path / "again", to="hf:", merge=True, base=f"hf:{base}"))
    for name, value in tensors_in(tmp_path / "again").items():
        np.testing.assert_allclose(value, merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config,more,message",
    [
        ({"use_dora": True}, {}, "use_dora=True"),
        ({"bias": "all"}, {}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, {}, "changes the base's weights"),
        ({"peft_type": "IA3"}, {}, "peft_type='IA3'"),
        ({"r": 0}, {}, "r=0"),
        ({"r": 5}, {}, "instead of [5, "),
        ({}, {"model.layers.0.mlp.down_proj.lora_magnitude_vector": (4,)}, "DoRA"),
        ({}, {"model.embed_tokens.lora_embedding_A": (4, 4)}, "embeddings"),
        ({}, {"lm_head.lora_A.weight": (4, 4)}, "lm_head"),
        ({}, {"model.layers.0.mlp.down_prj.lora_A.weight": (4, 4)}, "did you mean 'model.layers.0.mlp.down_proj'"),
        ({}, {"model.layers.9.mlp.down_proj.lora_A.weight": (4, 4)}, "for another base (base)"),
    ],
)
def test_what_is_more_than_low_rank_is_refused_whole(
    tmp_path: Path, config: dict[str, Any], more: dict[str, tuple[int, ...]], message: str
) -> None:
    base = random_folder(tmp_path / "base", "mini_window", np.float32)
    tensors = matrices(base) | {f"base_model.model.{k}": np.ones(shape, np.float32) for k, shape in more.items()}
    source = write(tmp_path / "peft", tensors, **config)
    with pytest.raises(UserError, match=".") as error:
        convert.command(flags(source, tmp_path / "a", base=f"hf:{base}"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_other_weights_is_named(tmp_path: Path) -> None:
    base, other = (random_folder(tmp_path / name, "mini_window", np.float32) for name in ("base", "other"))
    convert.command(flags(write(tmp_path / "peft", matrices(base)), tmp_path / "a", base=f"hf:{base}"))
    loading.load(f"hf:{other}", adapter=str(tmp_path / "a"))  # the same weights elsewhere are the same weights
    changed = tensors_in(other)
    changed["model.norm.weight"] = changed["model.norm.weight"] + np.float32(1)
    entries = safetensors.find(other)
    with safetensors.Files({e.path for e in entries.values()}, write=True) as opened:
        entry = entries["model.norm.weight"]
        opened.write_at(entry.path, entry.offset, changed["model.norm.weight"])
    with pytest.raises(UserError, match=f"is an adapter for other weights than hf:{other}.*hf:{base}"):
        loading.load(f"hf:{other}", adapter=str(tmp_path / "a"))
    with pytest.raises(UserError, match="holds a model, no adapter"):
        convert.import_folder(base, tmp_path / "run")
        loading.load(f"hf:{base}", adapter=str(tmp_path / "run"))


PEER = """
import sys, json, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    np.save(out, model(torch.arange(12)[None]).logits.numpy())
"""


@pytest.mark.peer
def test_torch_peft_loads_an_exported_adapter_and_gives_our_logits(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    base = random_folder(tmp_path / "base", "mini_window", np.float32)
    convert.command(flags(write(tmp_path / "peft", matrices(base)), tmp_path / "a", base=f"hf:{base}"))
    (tmp_path / "a" / peft.CONFIG).unlink()  # as if trained here: ours is written
    convert.command(flags(tmp_path / "a", tmp_path / "out", to="peft:"))
    words = [str(base), str(tmp_path / "out"), str(tmp_path / "logits.npy")]
    done = subprocess.run([sys.executable, "-c", PEER, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = loading.load(f"hf:{base}", adapter=str(tmp_path / "a")).logits(np.arange(12)[None])
    np.testing.assert_allclose(ours, np.load(tmp_path / "logits.npy"), atol=3e-5 * np.abs(ours).max())
