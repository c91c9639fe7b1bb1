"""Forward passes against the original implementations' tensors, where the reference files are at hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import BlockSparse, LongRope, ModelConfig
from phi3_jax.models import decoder

GOLDENS = Path(__file__).resolve().parents[2].parent / "shared" / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the reference tensors (shared/goldens) are not here")
DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "U8": np.uint8}


def read_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    raw = (GOLDENS / f"{name}.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        data = np.frombuffer(raw[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])
        tensors[key] = data.reshape(entry["shape"])
    return json.loads((GOLDENS / f"{name}.json").read_text()), tensors


def model_config(config: dict, window_rule: str = "transformers") -> ModelConfig:
    small = "ff_intermediate_size" in config or "mup_width_multiplier" in config
    heads, width = config["num_attention_heads"], config["hidden_size"]
    scaling, longrope = config.get("rope_scaling"), None
    context = config["max_position_embeddings"]
    if scaling:
        longrope = LongRope(
            scaling.get("original_max_position_embeddings") or config["original_max_position_embeddings"],
            tuple(scaling["short_factor"]), tuple(scaling["long_factor"]),
            scaling.get("short_mscale"), scaling.get("long_mscale"), mscale_when_short=not small,
        )  # fmt: skip
    shared = dict(
        name="golden", member="small" if small else "mini", scale="full", ladder="family", vocab=config["vocab_size"],
        embed=width, layers=config["num_hidden_layers"], heads=heads, kv_heads=config["num_key_value_heads"],
        head_dim=width // heads, context=context, longrope=longrope,
        tied=config.get("tie_word_embeddings", False) or small,
    )  # fmt: skip
    if not small:
        return ModelConfig(
            **shared, mlp=config["intermediate_size"], norm_eps=config["rms_norm_eps"],
            rope_base=config.get("rope_theta", 10000.0), sliding_window=config.get("sliding_window"),
            window_rule=window_rule,
        )  # fmt: skip
    dummy = tuple((i, i + 1) for i in config.get("dummy_token_indices") or ())
    return ModelConfig(
        **shared, mlp=config["ff_intermediate_size"], norm="layer", norm_eps=config["layer_norm_epsilon"],
        activation="gegelu", gegelu_limit=config["gegelu_limit"], bias=True, rope_base=config["rope_embedding_base"],
        blocksparse=BlockSparse(
            config["blocksparse_block_size"], config["blocksparse_num_local_blocks"], config["blocksparse_vert_stride"],
            config["blocksparse_homo_head_pattern"], config["dense_attention_every_n_layers"] or 0,
        ),
        embed_multiplier=config["mup_embedding_multiplier"], logit_divisor=config["mup_width_multiplier"],
        attention_divisor="linear", dummy_tokens=dummy,
    )  # fmt: skip


def load_params(t: dict[str, np.ndarray], cfg: ModelConfig) -> dict:
    """Hugging Face names and layouts to ours."""
    d, g, r, k, f = cfg.embed, cfg.kv_heads, cfg.queries_per_kv, cfg.head_dim, cfg.mlp
    small = cfg.norm == "layer"

    def qkv(w: np.ndarray) -> np.ndarray:  # (out, ...) -> (g, r + 2, k, ...)
        if small:
            return w.reshape(g, r + 2, k, *w.shape[1:])
        q, key, value = np.split(w, [g * r * k, g * r * k + g * k])
        parts = q.reshape(g, r, k, -1), key.reshape(g, 1, k, -1), value.reshape(g, 1, k, -1)
        return np.concatenate(parts, axis=1)

    def gate_up(w: np.ndarray) -> np.ndarray:  # (2f, ...) -> (2, f, ...)
        return np.moveaxis(w.reshape(f, 2, *w.shape[1:]), 1, 0) if small else w.reshape(2, f, *w.shape[1:])

    names = {
        "qkv": ("self_attn.query_key_value" if small else "self_attn.qkv_proj", qkv, (3, 0, 1, 2)),
        "out": ("self_attn.dense" if small else "self_attn.o_proj", lambda w: w, (1, 0)),
        "gate_up": ("mlp.up_proj" if small else "mlp.gate_up_proj", gate_up, (2, 0, 1)),
        "down": ("mlp.down_proj", lambda w: w, (1, 0)),
    }
    layers = []
    for i in range(cfg.layers):
        p, block = f"model.layers.{i}.", {}
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            block[ours] = {"scale": t[f"{p}{theirs}.weight"]} | ({"bias": t[f"{p}{theirs}.bias"]} if small else {})
        for ours, (theirs, split, order) in names.items():
            block[ours] = {"weight": split(t[f"{p}{theirs}.weight"]).transpose(order)}
            if small:
                block[ours]["bias"] = split(t[f"{p}{theirs}.bias"])
        block["out"]["weight"] = block["out"]["weight"].reshape(g, r, k, d)
        layers.append(block)
    final = "model.final_layernorm" if small else "model.norm"
    params = {
        "embedding": t["model.embed_tokens.weight"],
        "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers),
        "final_norm": {"scale": t[f"{final}.weight"]} | ({"bias": t[f"{final}.bias"]} if small else {}),
    }
    if not cfg.tied:
        params["unembedding"] = t["lm_head.weight"].T
    return jax.tree.map(jnp.asarray, params)


def check(actual: jax.Array, expected: np.ndarray, meta: dict, key: str) -> None:
    tolerance = meta["tolerance"][key]["suggested_atol"]
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


DENSE = ["mini_mha", "medium_gqa", "mini_tied", "mini_sliding_window", "small_dense", "small_blocksparse_512"]


@pytest.mark.parametrize("name", [*DENSE, "small_blocksparse_2048"])
@pytest.mark.parametrize("unroll", [True, False])
def test_logits(name: str, unroll: bool) -> None:
    meta, t = read_golden(name)
    cfg = model_config(meta["config"])
    logits = decoder.forward(load_params(t, cfg), jnp.asarray(t["input_ids"]), cfg, unroll=unroll)
    check(logits, t["logits"], meta, "logits")


def test_released_window_sees_one_key_more() -> None:
    meta, t = read_golden("mini_sliding_window")
    cfg = model_config(meta["config"], "released")
    logits = decoder.forward(load_params(t, cfg), jnp.asarray(t["input_ids"]), cfg)
    check(logits, t["logits_window_plus_one"], meta, "logits_window_plus_one")
    assert float(jnp.abs(logits - t["logits"]).max()) > 1e-2  # the two rules are told apart


def test_packed_documents() -> None:
    meta, t = read_golden("mini_packed")
    cfg = model_config(meta["config"])
    segments = jnp.asarray(t["segment_ids"])
    logits = decoder.forward(load_params(t, cfg), jnp.asarray(t["input_ids"]), cfg, segments=segments)
    check(logits, t["logits"], meta, "logits")


@pytest.mark.parametrize("name", ["mini_longrope", "mini_longrope_real"])
def test_longrope(name: str) -> None:
    meta, t = read_golden(name)
    cfg = model_config(meta["config"])
    cases = [k.removeprefix("position_ids_") for k in t if k.startswith("position_ids_")]
    assert len(cases) >= 3
    for case in cases:
        positions = np.atleast_2d(t[f"position_ids_{case}"])
        ids = t["input_ids"][:, : positions.shape[1]]
        positions = jnp.broadcast_to(jnp.asarray(positions), ids.shape)
        logits = decoder.forward(load_params(t, cfg), jnp.asarray(ids), cfg, positions=positions)
        check(logits, t[f"logits_{case}"], meta, f"logits_{case}")


@pytest.mark.parametrize("suffix", ["", "_no_mscale"])
@pytest.mark.parametrize("length", [64, 65, 160])
def test_small_longrope(length: int, suffix: str) -> None:
    meta, t = read_golden("small_longrope")
    cfg = model_config(meta["config_without_mscale" if suffix else "config"])
    logits = decoder.forward(load_params(t, cfg), jnp.asarray(t["input_ids"][:, :length]), cfg)
    check(logits, t[f"logits_{length}{suffix}"], meta, f"logits_{length}{suffix}")


@pytest.mark.parametrize("name", ["mini_mha", "mini_tied", "small_dense", "small_blocksparse_512"])
def test_training_loss_and_gradients(name: str) -> None:
    """Mean next-token cross-entropy and the norm of its gradient over all parameters."""
    meta, t = read_golden(name)
    cfg = model_config(meta["config"])
    ids = jnp.asarray(t["input_ids"])

    def loss(params: dict) -> jax.Array:
        logits = decoder.forward(params, ids, cfg, unroll=True, remat="full")[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1).mean()

    value, grads = jax.value_and_grad(loss)(load_params(t, cfg))
    np.testing.assert_allclose(value, meta["training"]["loss_float64"], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    expected = np.sqrt(sum(v**2 for v in meta["training"]["gradient_norms"].values()))
    np.testing.assert_allclose(norm, expected, rtol=1e-4)
