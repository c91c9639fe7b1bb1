"""Declare a parameter once: shape, logical axes, initialiser, role.

Everything else about a parameter is derived from its `ParamSpec`: initial value, abstract state, sharding, counts,
muP multipliers for learning rate, weight decay and Adam's epsilon, and the weight-decay mask.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.configs import ModelConfig

Tree = Any


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One tensor. `axes` names every dimension; `role` picks its muP rule and whether it decays.

    Attributes:
      shape: sizes; stacked layers are axis 0.
      axes: logical names, e.g. ("layers", "embed", "kv_heads", "qkv", "head_dim"); None = never sharded.
      role: "embedding", "hidden", "norm", "bias" or "unembedding".
      init: "normal", "uniform", "ones" or "zeros".
      std: standard deviation of "normal", half width of "uniform".
      hf: name in the published checkpoints; "{layer}" and "{expert}" stand for the numbers of those along the stacked
        dimensions. `interop.huggingface` knows the layouts.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str
    init: str = "normal"
    std: float = 0.0
    hf: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def initialise(self, key: jax.Array) -> jax.Array:
        if self.init == "normal":
            return self.std * jax.random.normal(key, self.shape, jnp.float32)
        if self.init == "uniform":
            return jax.random.uniform(key, self.shape, jnp.float32, -self.std, self.std)
        return jnp.full(self.shape, 1.0 if self.init == "ones" else 0.0, jnp.float32)


def _hidden_std(cfg: ModelConfig, fan_in: int, residual_output: bool) -> float:
    """Standard deviation of a hidden matrix.

    Standard parametrisation: the published initializer_range (phi-3-small divides its down projection by
    sqrt(2 layers), as Microsoft's code does). muP: fan_in^-1/2, and (2 base_layers)^-1/2 more on the two
    matrices that write to the residual stream; depth enters only through the residual multiplier (CompleteP).
    """
    if cfg.mup:
        return fan_in**-0.5 * ((2 * cfg.mup.base_layers) ** -0.5 if residual_output else 1.0)
    if residual_output and cfg.activation == "gegelu" and fan_in == cfg.mlp:
        return cfg.init_std / math.sqrt(2 * cfg.layers)
    return cfg.init_std


def _norm_specs(cfg: ModelConfig, hf: str) -> dict[str, ParamSpec]:
    """Gain, and bias of a LayerNorm; stacked over layers where the published name has a layer number."""
    stacked = "{layer}" in hf
    shape, axes = ((cfg.layers, cfg.embed), ("layers", "embed")) if stacked else ((cfg.embed,), ("embed",))
    specs = {"scale": ParamSpec(shape, axes, "norm", "ones", hf=f"{hf}.weight")}
    if cfg.norm == "layer":
        specs["bias"] = ParamSpec(shape, axes, "bias", "zeros", hf=f"{hf}.bias")
    return specs


def _linear_specs(
    cfg: ModelConfig,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    inputs: int,
    hf: str,
    residual_output: bool = False,
) -> dict[str, ParamSpec]:
    """A stacked linear map whose first `inputs` dimensions contract; its bias has the others."""
    fan_in = math.prod(shape[:inputs])
    hf, std = f"model.layers.{{layer}}.{hf}", _hidden_std(cfg, fan_in, residual_output)
    weight = ParamSpec((cfg.layers, *shape), ("layers", *axes), "hidden", std=std, hf=f"{hf}.weight")
    if not cfg.bias:
        return {"weight": weight}
    # PyTorch's default, which Microsoft's initialiser leaves untouched; muP starts biases at zero.
    init = ("zeros", 0.0) if cfg.mup else ("uniform", fan_in**-0.5)
    bias = ParamSpec((cfg.layers, *shape[inputs:]), ("layers", *axes[inputs:]), "bias", *init, hf=f"{hf}.bias")
    return {"weight": weight, "bias": bias}


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """Tree of `ParamSpec` for one model; the only place that knows the shapes.

    Projections are stored fused, in the layouts that shard: `qkv` (embed, kv_heads, queries_per_kv + 2, head_dim)
    holds each kv head's queries, then its key, then its value (phi-3-small's published order; for mini and medium a
    permutation of theirs); `gate_up` (embed, 2, mlp) the gate, then the linear part.
    """
    d, g, r, k = cfg.embed, cfg.kv_heads, cfg.queries_per_kv, cfg.head_dim
    embed_std = (cfg.mup.embed_std if not cfg.tied else cfg.init_std) if cfg.mup else cfg.init_std
    small = cfg.activation == "gegelu"
    qkv, out = ("query_key_value", "dense") if small else ("qkv_proj", "o_proj")
    if cfg.experts:
        qkv = "{q,k,v}_proj"
    layer = "model.layers.{layer}"
    specs: dict[str, Any] = {
        "embedding": ParamSpec(
            (cfg.vocab, d), ("vocab", "embed"), "embedding", std=embed_std, hf="model.embed_tokens.weight"
        ),
        "blocks": {
            "attention_norm": _norm_specs(cfg, f"{layer}.input_layernorm"),
            "qkv": _linear_specs(cfg, (d, g, r + 2, k), ("embed", "kv_heads", None, "head_dim"), 1, f"self_attn.{qkv}"),
            "out": _linear_specs(
                cfg, (g, r, k, d), ("kv_heads", None, "head_dim", "embed"), 3, f"self_attn.{out}", residual_output=True
            ),
            "mlp_norm": _norm_specs(cfg, f"{layer}.post_attention_layernorm"),
            **(_expert_specs(cfg) if cfg.experts else _mlp_specs(cfg)),
        },
        "final_norm": _norm_specs(cfg, "model.final_layernorm" if small else "model.norm"),
    }
    if not cfg.tied:
        zero = cfg.mup is not None and cfg.mup.head_zero_init
        init = "zeros" if zero else "normal"
        specs["unembedding"] = ParamSpec(
            (d, cfg.vocab), ("embed", "vocab"), "unembedding", init, cfg.init_std, "lm_head.weight"
        )
    if cfg.experts and cfg.experts.head_bias:
        specs["unembedding_bias"] = ParamSpec((cfg.vocab,), ("vocab",), "bias", "zeros", hf="lm_head.bias")
    return specs


def _mlp_specs(cfg: ModelConfig) -> dict[str, Any]:
    d, f, gate_up = cfg.embed, cfg.mlp, "mlp.up_proj" if cfg.activation == "gegelu" else "mlp.gate_up_proj"
    return {
        "gate_up": _linear_specs(cfg, (d, 2, f), ("embed", None, "mlp"), 1, gate_up),
        "down": _linear_specs(cfg, (f, d), ("mlp", "embed"), 1, "mlp.down_proj", residual_output=True),
    }


def _expert_specs(cfg: ModelConfig) -> dict[str, Any]:
    """Router and experts of phi-3.5-MoE; none of them has a bias."""
    count, d, f, hf = cfg.experts.count, cfg.embed, cfg.mlp, "model.layers.{layer}.block_sparse_moe"

    def weight(shape: tuple[int, ...], axes: tuple[str | None, ...], name: str, fan_in: int) -> dict[str, ParamSpec]:
        axes, std = ("layers", *axes), _hidden_std(cfg, fan_in, name.endswith("w2"))
        return {"weight": ParamSpec((cfg.layers, *shape), axes, "hidden", std=std, hf=f"{hf}.{name}.weight")}

    return {
        "router": weight((d, count), ("embed", None), "gate", d),
        "gate_up": weight((count, d, 2, f), ("experts", "embed", None, "mlp"), "experts.{expert}.{w1,w3}", d),
        "down": weight((count, f, d), ("experts", "mlp", "embed"), "experts.{expert}.w2", f),
    }


def map_specs(fn: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """Applies `fn` to every ParamSpec of a tree."""
    return jax.tree.map(fn, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def count_params(cfg: ModelConfig) -> int:
    """Exact number of parameters, without allocating any."""
    return sum(s.size for s in jax.tree.leaves(map_specs(lambda s: s, param_specs(cfg)), is_leaf=_is_spec))


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def init_params(cfg: ModelConfig, seed: int) -> Tree:
    """Initial fp32 parameters; each tensor's values depend on the seed and its own path only."""
    root = jax.random.key(seed)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(param_specs(cfg), is_leaf=_is_spec)
    values = []
    for path, spec in leaves:
        name = jax.tree_util.keystr(path)
        salt = zlib.crc32(name.encode()) & 0x7FFFFFFF
        values.append(spec.initialise(jax.random.fold_in(root, salt)))
    return jax.tree.unflatten(treedef, values)


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """muP factors of one tensor on the base learning rate, weight decay and Adam's epsilon."""

    lr: float
    weight_decay: float
    eps: float


def multipliers(cfg: ModelConfig, spec: ParamSpec) -> Multipliers:
    """muP/CompleteP factors for AdamW with decoupled decay lr * wd (arXiv:2505.01618 table 1; epsilon rows as in
    arXiv:2512.22382).

    With m_N = width ratio, m_L = depth ratio, a = alpha: hidden matrices learn at m_N^-1 m_L^(a-1) and decay with
    m_N, so that lr * wd does not depend on width. Gains and biases inside blocks learn at m_L^(a-1). Without muP
    every factor is 1. Norm gains and biases never decay.
    """
    decays = 0.0 if spec.role in ("norm", "bias") else 1.0
    if cfg.mup is None:
        return Multipliers(1.0, decays, 1.0)
    width, depth, alpha = cfg.width_ratio, cfg.depth_ratio, cfg.mup.alpha
    in_block = spec.axes[0] == "layers"
    block_lr = depth ** (alpha - 1) if in_block else 1.0
    block_eps = depth**-alpha if in_block else 1.0
    if spec.role == "hidden":
        return Multipliers(block_lr / width, width, block_eps / width)
    if spec.role == "unembedding":
        return Multipliers(1.0, decays, 1.0)
    if spec.role == "embedding":
        # A forward multiplier scales the update's effect too; the tied table also is the output matrix.
        return Multipliers(1.0 / cfg.embed_multiplier, decays, 1.0 / width)
    return Multipliers(block_lr, decays, block_eps / width)
