"""Makes the reference tensors of this folder: `python tests/goldens/make.py` (needs torch and transformers).

Tiny models with random weights run through transformers' own code in float32 and float64: phi-3-mini (window, two
documents), -medium (grouped queries, LongRoPE beyond its original context) and phi-3.5-MoE, each with the tensors of
their published layout. phi-3-small is not in transformers: its reference here is a plain float64 NumPy forward written
from Microsoft's code, apart from the JAX model. Each golden is NAME.safetensors and NAME.json with config, versions and
tolerance (ten times the float32 error of the reference itself, at least 2e-6 of the logits' scale).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def save(name: str, config: dict[str, Any], tensors: dict[str, np.ndarray], error: float, source: str) -> None:
    """Writes one golden."""
    from phi3_jax.interop import safetensors

    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    header, body = {}, b""
    kinds = {**safetensors.NAMES, np.dtype(np.int32): "I32"}
    for key, value in tensors.items():
        offsets = [len(body), len(body) + value.nbytes]
        header[key] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        body += value.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (HERE / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    scale = float(np.abs(tensors["logits"][tensors["logits"] > -1e30]).max())
    atol = min(1e-4 * scale, max(10 * error, 2e-6 * scale))
    meta = {
        "name": name, "produced_by": source, "config": config,
        "tolerance": {"logits": {"max_abs": scale, "max_abs_diff_float32_vs_float64": error, "suggested_atol": atol}},
        "tensors": {k: [kinds[v.dtype], list(v.shape)] for k, v in tensors.items() if "." not in k},
    }  # fmt: skip
    (HERE / f"{name}.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{name}: logits to {scale:.3g}, float32 error {error:.1e}, tolerance {atol:.1e}")


def from_transformers(name: str, config: dict[str, Any], ids: np.ndarray, segments: np.ndarray | None = None) -> None:
    """Random weights through transformers, eager attention."""
    import torch
    import transformers

    torch.manual_seed(len(name))
    known = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    settings = transformers.AutoConfig.for_model(
        config["model_type"], attn_implementation="eager", experts_implementation="eager", **known
    )
    model = transformers.AutoModelForCausalLM.from_config(settings).float().eval()
    for key, value in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(value.shape) * (0.3 if value.ndim == 1 else 1.5 * value.shape[-1] ** -0.5)
            value.copy_(noise + (1 if "norm" in key and key.endswith("weight") else 0))
    inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    if segments is not None:
        time = np.arange(ids.shape[1])
        same = (segments[:, :, None] == segments[:, None, :]) & (time[:, None] >= time[None])
        start = np.array([[np.argmax(row == s) for s in row] for row in segments])
        inputs["position_ids"] = torch.tensor(time[None] - start)
        inputs["attention_mask"] = torch.where(torch.tensor(same)[:, None], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
        model = model.double()
        if segments is not None:
            inputs["attention_mask"] = inputs["attention_mask"].double()
        exact = model(**inputs).logits.numpy()
    weights = {k: v.detach().float().numpy() for k, v in model.named_parameters()}
    if "num_local_experts" in config:
        weights = published_moe_names(weights)
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    inputs = {"input_ids": ids} if segments is None else {"input_ids": ids, "segment_ids": segments}
    error = float(np.abs(logits - exact).max())
    source = f"transformers {transformers.__version__} {type(model).__name__}, eager, torch {torch.__version__}"
    save(name, config, weights | inputs | {"logits": logits}, error, source)


def published_moe_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers 5 fuses the experts; the published checkpoints keep them apart."""
    named = {}
    for key, value in weights.items():
        base = key.replace(".mlp.", ".block_sparse_moe.")
        if key.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = np.split(both, 2)
                stem = base.replace("gate_up_proj", str(e))
                named |= {f"{stem}.w1.weight": gate, f"{stem}.w3.weight": up}
        elif key.endswith("experts.down_proj"):
            named |= {f"{base.replace('down_proj', str(e))}.w2.weight": w for e, w in enumerate(value)}
        else:
            named[base.replace(".router.", ".gate.")] = value
    return named


def small(name: str, config: dict[str, Any], ids: np.ndarray) -> None:
    """phi-3-small in NumPy, from Microsoft's modelling code: block-sparse heads, gegelu, its multipliers."""
    random = np.random.default_rng(7)
    d, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    k, f = d // heads, config["ff_intermediate_size"]
    weights = {"model.embed_tokens.weight": random.standard_normal((config["vocab_size"], d)) * 0.2}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        shapes = {
            "self_attn.query_key_value": (d + 2 * kv * k, d), "self_attn.dense": (d, d), "mlp.up_proj": (2 * f, d),
            "mlp.down_proj": (d, f),
        }  # fmt: skip
        for key, shape in shapes.items():
            gain = 6.0 if "up_proj" in key else 2.0
            weights[f"{p}.{key}.weight"] = random.standard_normal(shape) * gain * shape[1] ** -0.5
            weights[f"{p}.{key}.bias"] = random.standard_normal(shape[0]) * 0.3
        for key in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{p}.{key}.weight"] = 1 + 0.3 * random.standard_normal(d)
            weights[f"{p}.{key}.bias"] = 0.3 * random.standard_normal(d)
    weights["model.final_layernorm.weight"] = 1 + 0.3 * random.standard_normal(d)
    weights["model.final_layernorm.bias"] = 0.3 * random.standard_normal(d)
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    wide = small_forward({a: w.astype(np.float64) for a, w in weights.items()}, config, ids)
    narrow = small_forward(weights, config, ids)
    real = wide > -1e30
    error = float(np.abs(wide - narrow)[real].max())
    tensors = weights | {"input_ids": ids, "logits": wide.astype(np.float32)}
    save(name, config, tensors, error, f"tests/goldens/make.py small_forward in float64, numpy {np.__version__}")


def small_forward(w: dict[str, np.ndarray], c: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """Logits (batch, time, vocab) of phi-3-small, loops and plain formulas."""
    dtype = w["model.embed_tokens.weight"].dtype
    d, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    k, group, (batch, time) = d // heads, heads // kv, ids.shape
    angle = np.arange(time)[:, None] / c["rope_embedding_base"] ** (np.arange(0, k, 2) / k)
    cos, sin = (np.concatenate([g(angle)] * 2, axis=-1).astype(dtype) for g in (np.cos, np.sin))

    def norm(x: np.ndarray, p: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + dtype.type(c["layer_norm_epsilon"]))
        return x * w[f"{p}.weight"] + w[f"{p}.bias"]

    def rotate(x: np.ndarray) -> np.ndarray:
        return x * cos + np.concatenate([-x[..., k // 2 :], x[..., : k // 2]], axis=-1) * sin

    def linear(x: np.ndarray, p: str) -> np.ndarray:
        return x @ w[f"{p}.weight"].T + w[f"{p}.bias"]

    x = w["model.embed_tokens.weight"][ids] * dtype.type(c["mup_embedding_multiplier"])
    block, local, stride = (c[f"blocksparse_{n}"] for n in ("block_size", "num_local_blocks", "vert_stride"))
    row, column = np.arange(time)[:, None], np.arange(time)[None]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        qkv = linear(norm(x, f"{p}.input_layernorm"), f"{p}.self_attn.query_key_value")
        qkv = qkv.reshape(batch, time, kv, group + 2, k)
        out = np.zeros((batch, time, heads, k), dtype)
        for h in range(heads):
            g, j = divmod(h, group)
            q, key, value = (rotate(qkv[:, :, g, j]), rotate(qkv[:, :, g, group]), qkv[:, :, g, group + 1])
            seen = column <= row
            if (i + 1) % c["dense_attention_every_n_layers"]:
                near = row // block - column // block < local
                step = max(1, stride // heads)
                seen = seen & (near | ((column // block + h * step + 1) % stride == 0))
            s = np.where(seen, q @ key.swapaxes(1, 2) * dtype.type(c["mup_attn_multiplier"] / k), -np.inf)
            s = np.exp(s - s.max(-1, keepdims=True))
            out[:, :, h] = (s / s.sum(-1, keepdims=True)) @ value
        x = x + linear(out.reshape(batch, time, d), f"{p}.self_attn.dense")
        up = linear(norm(x, f"{p}.post_attention_layernorm"), f"{p}.mlp.up_proj")
        a, b, limit = up[..., ::2], up[..., 1::2], dtype.type(c["gegelu_limit"])
        a, b = np.minimum(a, limit), np.clip(b, -limit, limit)
        x = x + linear(a / (1 + np.exp(-dtype.type(1.702) * a)) * (b + 1), f"{p}.mlp.down_proj")
    logits = norm(x, "model.final_layernorm") @ w["model.embed_tokens.weight"].T
    logits = logits / dtype.type(c["mup_width_multiplier"])
    logits[..., c["dummy_token_indices"]] = np.finfo(np.float32).min
    return logits


def main() -> None:
    """All goldens of the folder."""
    random = np.random.default_rng(11)

    def ids(batch: int, time: int, vocab: int) -> np.ndarray:
        return random.integers(0, vocab, (batch, time)).astype(np.int32)

    shared = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "initializer_range": 0.02, "tie_word_embeddings": False, "sliding_window": None, "rope_scaling": None,
    }  # fmt: skip
    mini = shared | {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "original_max_position_embeddings": 64, "sliding_window": 5,
    }  # fmt: skip
    from_transformers("mini_window", mini, ids(2, 17, 48))
    segments = np.repeat([[1, 2]], [9, 12], axis=1).astype(np.int32)
    from_transformers("mini_two_documents", mini | {"sliding_window": None}, ids(1, 21, 48), segments)
    lists = {
        f"{n}_factor": [round(float(x), 3) for x in random.uniform(1, m, 4)] for n, m in (("short", 2), ("long", 9))
    }
    longrope = {"max_position_embeddings": 128, "original_max_position_embeddings": 16}
    medium = mini | longrope | {
        "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": None,
        "rope_scaling": {"type": "longrope", **lists},
    }  # fmt: skip
    from_transformers("medium_longrope", medium, ids(2, 19, 48))
    moe = shared | {
        "model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"], "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.01,
        "attention_bias": True, "lm_head_bias": True, "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    from_transformers("moe", moe, ids(2, 15, 48))
    small_config = {
        "model_type": "phi3small", "architectures": ["Phi3SmallForCausalLM"], "vocab_size": 40, "hidden_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "ff_intermediate_size": 24,
        "hidden_act": "gegelu", "gegelu_limit": 6.0, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 256,
        "rope_embedding_base": 1000000, "rope_position_scale": 1.0, "rope_scaling": None, "tie_word_embeddings": True,
        "blocksparse_block_size": 4, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 5,
        "blocksparse_homo_head_pattern": False, "dense_attention_every_n_layers": 2, "mup_use_scaling": True,
        "mup_width_multiplier": 8.0, "mup_embedding_multiplier": 10.0, "mup_attn_multiplier": 1.5,
        "dummy_token_indices": [3, 38, 39],
    }  # fmt: skip
    small("small", small_config, ids(1, 61, 38))


if __name__ == "__main__":
    main()
