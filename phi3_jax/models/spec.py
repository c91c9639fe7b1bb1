"""Declare a parameter once: shape, logical axes, initialiser, role.

Everything else about a parameter is derived from its `ParamSpec`: initial value, abstract state, sharding, counts,
muP multipliers for learning rate, weight decay and Adam's epsilon, and the weight-decay mask.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.configs import ModelConfig, Vision

Tree = Any


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One tensor. `axes` names every dimension; `role` picks its muP rule and whether it decays.

    Attributes:
      shape: sizes; stacked layers are axis 0.
      axes: logical names, e.g. ("layers", "embed", "kv_heads", "qkv", "head_dim"); None = never sharded.
      role: "embedding", "hidden", "norm", "bias", "unembedding", "adapter" (`models.lora`) or "picture" (what is not a
        gain or bias of a tower and its projector).
      init: "normal", "uniform", "ones" or "zeros".
      std: standard deviation of "normal", half width of "uniform".
      hf: name in the published checkpoints; "{layer}" and "{expert}" stand for the numbers of those along the stacked
        dimensions. `interop.huggingface` knows the layouts.
      published: its shape there, where the name's layout does not say it; of one layer.
      inputs: of a matrix, the dimensions that a product sums over.
      parts: sizes along the first unnamed dimension of the matrices that are stored side by side; () where it is one.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    role: str
    init: str = "normal"
    std: float = 0.0
    hf: str = ""
    published: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[int, ...]:
        """Of a hidden matrix, the dimensions of its result."""
        return tuple(
            i for i, axis in enumerate(self.axes) if i not in self.inputs and axis not in ("layers", "experts")
        )

    @property
    def parts_axis(self) -> int:
        """The dimension along which matrices are stored side by side."""
        return self.axes.index(None)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layers(self) -> Sequence[int | None]:
        """Numbers of the stacked layers; None alone where nothing is stacked."""
        return range(self.shape[0]) if self.axes[0] == "layers" else (None,)

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
    if residual_output and cfg.layout == "phi3small" and fan_in == cfg.mlp:
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
    parts: tuple[int, ...] = (),
) -> dict[str, ParamSpec]:
    """A stacked linear map whose first `inputs` dimensions contract; its bias has the others."""
    fan_in = math.prod(shape[:inputs])
    hf, std = f"model.layers.{{layer}}.{hf}", _hidden_std(cfg, fan_in, residual_output)
    weight = ParamSpec(
        (cfg.layers, *shape), ("layers", *axes), "hidden", std=std, hf=f"{hf}.weight",
        inputs=tuple(range(1, inputs + 1)), parts=parts,
    )  # fmt: skip
    if not cfg.bias:
        return {"weight": weight}
    # PyTorch's default, which Microsoft's initialiser leaves untouched; muP starts biases at zero.
    init, std = ("zeros", 0.0) if cfg.mup else ("uniform", fan_in**-0.5)
    bias = ParamSpec((cfg.layers, *shape[inputs:]), ("layers", *axes[inputs:]), "bias", init, std, f"{hf}.bias")
    return {"weight": weight, "bias": bias}


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """Tree of `ParamSpec` for one model; the only place that knows the shapes.

    Projections are stored fused, in the layouts that shard: `qkv` (embed, kv_heads, queries_per_kv + 2, head_dim)
    holds each kv head's queries, then its key, then its value (phi-3-small's published order; for mini and medium a
    permutation of theirs); `gate_up` (embed, 2, mlp) the gate, then the linear part.
    """
    d, g, r, k = cfg.embed, cfg.kv_heads, cfg.queries_per_kv, cfg.head_dim
    embed_std = (cfg.mup.embed_std if not cfg.tied else cfg.init_std) if cfg.mup else cfg.init_std
    small = cfg.layout == "phi3small"
    qkv, out = ("query_key_value", "dense") if small else ("qkv_proj", "o_proj")
    if cfg.layout == "phimoe":
        qkv = "{q,k,v}_proj"
    layer = "model.layers.{layer}"
    specs: dict[str, Any] = {
        "embedding": ParamSpec(
            (cfg.vocab, d), ("vocab", "embed"), "embedding", std=embed_std, hf="model.embed_tokens.weight"
        ),
        "blocks": {
            "attention_norm": _norm_specs(cfg, f"{layer}.input_layernorm"),
            "qkv": _linear_specs(
                cfg, (d, g, r + 2, k), ("embed", "kv_heads", None, "head_dim"), 1, f"self_attn.{qkv}", parts=(r, 1, 1)
            ),
            "out": _linear_specs(
                cfg, (g, r, k, d), ("kv_heads", None, "head_dim", "embed"), 3, f"self_attn.{out}", residual_output=True
            ),
            "mlp_norm": _norm_specs(cfg, f"{layer}.post_attention_layernorm"),
            **(_expert_specs(cfg, cfg.experts.count) if cfg.experts else _mlp_specs(cfg)),
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
    if cfg.vision:
        specs["vision"] = _vision_specs(cfg.vision, d, None if cfg.mup else cfg.init_std)
    return specs


def _mlp_specs(cfg: ModelConfig) -> dict[str, Any]:
    d, f, gate_up = cfg.embed, cfg.mlp, "mlp.up_proj" if cfg.layout == "phi3small" else "mlp.gate_up_proj"
    return {
        "gate_up": _linear_specs(cfg, (d, 2, f), ("embed", None, "mlp"), 1, gate_up, parts=(1, 1)),
        "down": _linear_specs(cfg, (f, d), ("mlp", "embed"), 1, "mlp.down_proj", residual_output=True),
    }


def _expert_specs(cfg: ModelConfig, count: int) -> dict[str, Any]:
    """Router and `count` experts of phi-3.5-MoE; none of them has a bias."""
    d, f, hf = cfg.embed, cfg.mlp, "model.layers.{layer}.block_sparse_moe"

    def weight(
        shape: tuple[int, ...], axes: tuple[str | None, ...], name: str, summed: int, parts: tuple[int, ...] = ()
    ) -> dict[str, ParamSpec]:
        shape, axes = (cfg.layers, *shape), ("layers", *axes)
        std, hf_name = _hidden_std(cfg, shape[summed], name.endswith("w2")), f"{hf}.{name}.weight"
        return {"weight": ParamSpec(shape, axes, "hidden", std=std, hf=hf_name, inputs=(summed,), parts=parts)}

    return {
        "router": weight((d, count), ("embed", None), "gate", 1),
        "gate_up": weight((count, d, 2, f), ("experts", "embed", None, "mlp"), "experts.{expert}.{w1,w3}", 2, (1, 1)),
        "down": weight((count, f, d), ("experts", "mlp", "embed"), "experts.{expert}.w2", 2),
    }


def _vision_specs(eyes: Vision, width: int, std: float | None) -> dict[str, Any]:
    """phi-3-vision's tower, separators and projector to `width`; the tower's last layer, which never runs, under "unused".

    Matrices have the standard deviation `std`, or fan_in^-1/2; what is no matrix has `std`, or .02.

    The published tower has queries, keys and values apart; they lie fused here, as `qkv` of a layer.
    """
    d, k, parts = eyes.embed, eyes.embed // eyes.heads, "model.vision_embed_tokens"
    tower = f"{parts}.img_processor.vision_model"

    def picture(shape: tuple[int, ...], axes: tuple[str | None, ...], hf: str, **more: Any) -> ParamSpec:
        fan_in = math.prod(shape[i] for i in more.get("inputs", ()))
        own = 0.02 if "inputs" not in more else fan_in**-0.5
        return ParamSpec(shape, axes, "picture", std=own if std is None else std, hf=hf, **more)

    def gains(hf: str, count: int | None) -> dict[str, ParamSpec]:
        shape, axes = ((d,), ("embed",)) if count is None else ((count, d), ("layers", "embed"))
        return {
            "scale": ParamSpec(shape, axes, "norm", init="ones", hf=f"{hf}.weight"),
            "bias": ParamSpec(shape, axes, "bias", "zeros", hf=f"{hf}.bias"),
        }

    def linear(
        shape: tuple[int, ...], axes: tuple[str | None, ...], inputs: int, hf: str, count: int | None = None
    ) -> dict[str, ParamSpec]:
        lead, names, first = ((), (), 0) if count is None else ((count,), ("layers",), 1)
        summed = tuple(range(first, first + inputs))
        return {
            "weight": picture((*lead, *shape), (*names, *axes), f"{hf}.weight", inputs=summed),
            "bias": ParamSpec((*lead, *shape[inputs:]), (*names, *axes[inputs:]), "bias", "zeros", hf=f"{hf}.bias"),
        }

    def layers(number: str, count: int | None) -> dict[str, Any]:
        hf = f"{tower}.encoder.layers.{number}"
        heads = ("embed", "kv_heads", None, "head_dim")
        return {
            "attention_norm": gains(f"{hf}.layer_norm1", count),
            "qkv": linear((d, eyes.heads, 3, k), heads, 1, f"{hf}.self_attn.{{q,k,v}}_proj", count),
            "out": linear((eyes.heads, 1, k, d), (*heads[1:], "embed"), 3, f"{hf}.self_attn.out_proj", count),
            "mlp_norm": gains(f"{hf}.layer_norm2", count),
            "up": linear((d, eyes.mlp), ("embed", "mlp"), 1, f"{hf}.mlp.fc1", count),
            "down": linear((eyes.mlp, d), ("mlp", "embed"), 1, f"{hf}.mlp.fc2", count),
        }

    pixels, merged = 3 * eyes.patch**2, eyes.width
    return {
        "class": picture((d,), ("embed",), f"{tower}.embeddings.class_embedding"),
        "patches": picture(
            (pixels, d), (None, "embed"), f"{tower}.embeddings.patch_embedding.weight", inputs=(0,),
            published=(d, 3, eyes.patch, eyes.patch),
        ),
        "positions": picture(
            (eyes.patches + 1, d), (None, "embed"), f"{tower}.embeddings.position_embedding.weight"
        ),
        "norm": gains(f"{tower}.pre_layrnorm", None),
        "blocks": layers("{layer}", eyes.layers - 1),
        "unused": {
            "block": layers(str(eyes.layers - 1), None),
            "norm": gains(f"{tower}.post_layernorm", None),
        },
        "whole_end": picture((merged,), (None,), f"{parts}.glb_GN", published=(1, 1, merged)),
        "row_end": picture((merged,), (None,), f"{parts}.sub_GN", published=(1, 1, 1, merged)),
        "in": linear((merged, width), (None, "embed"), 1, f"{parts}.img_projection.0"),
        "out": linear((width, width), (None, "embed"), 1, f"{parts}.img_projection.2"),
    }  # fmt: skip


def map_specs(fn: Callable[[ParamSpec], Any], specs: Tree) -> Tree:
    """Applies `fn` to every ParamSpec of a tree."""
    return jax.tree.map(fn, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def named_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """{"blocks.qkv.weight": its ParamSpec, ..} of every parameter, in the order of jax's leaves (sorted at each level).

    These names are the only ones: checkpoints, exports, plans and messages use them.
    """
    return named(param_specs(cfg), is_leaf=lambda x: isinstance(x, ParamSpec))


def named(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{name: leaf} of a tree that is shaped like the parameters, by the names of `named_specs`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def name_of(path: Any) -> str:
    """The name of the parameter at a path of jax's."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def count_params(cfg: ModelConfig, role: str | None = None) -> int:
    """Exact number of parameters (of one role), without allocating any."""
    return sum(spec.size for spec in named_specs(cfg).values() if role in (None, spec.role))


def init_params(cfg: ModelConfig, seed: int) -> Tree:
    """Initial fp32 parameters of a model."""
    return initial(param_specs(cfg), seed)


def initial(specs: Tree, seed: int) -> Tree:
    """Initial fp32 values of a tree of ParamSpec; each tensor's depend on the seed and its own path only."""
    root = jax.random.key(seed)

    def one(path: Any, spec: ParamSpec) -> jax.Array:
        # Initial values hang on this spelling, ['blocks']['qkv']['weight'], which was once jax's own: it stays.
        spelt = "".join(f"['{part}']" for part in name_of(path).split("."))
        return spec.initialise(jax.random.fold_in(root, zlib.crc32(spelt.encode()) & 0x7FFFFFFF))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def named_tree(cfg: ModelConfig, values: Mapping[str, Any]) -> Tree:
    """The tree of the parameters with the values of these names: the inverse of `named`."""
    return shaped(param_specs(cfg), values)


def shaped(specs: Tree, values: Mapping[str, Any]) -> Tree:
    """A tree shaped like `specs` with the values of these names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values[name_of(path)], specs, is_leaf=lambda x: isinstance(x, ParamSpec)
    )


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
    every factor is 1. Norm gains and biases never decay. Adapters and the eyes have no factor under muP either: adapters
    learn as PEFT's, and the eyes' shape is the same beside every language model.
    """
    decays = 0.0 if spec.role in ("norm", "bias") else 1.0
    if cfg.mup is None or spec.role in ("adapter", "picture"):
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
