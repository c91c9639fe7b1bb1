"""config.json of the published models, to and from `ModelConfig`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from phi3_jax.configs import BlockSparse, Experts, LongRope, ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.family import published

MODEL_TYPES = ("phi3", "phi3small", "phimoe")


class _Fields:
    """Reads fields with their types; errors name field, value and file."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self._config.get(name)
        if value is None:
            if default is ...:
                raise UserError(f"{self._where}: {name} is missing; every {kind.__name__} size of the model is needed")
            return default
        number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (isinstance(value, kind) or (number and value == kind(value))):
            raise UserError(f"{self._where}: {name}={value!r} must be of type {kind.__name__}")
        return kind(value) if number else value

    def must_be(self, name: str, *valid: Any) -> None:
        """Refuses what the published code can do but no published member does."""
        if self._config.get(name) not in (None, *valid):
            raise UserError(f"{self._where}: {name}={self._config[name]!r} is not supported; valid: {valid[0]!r}")


def from_config(config: Mapping[str, Any], name: str, window_rule: str = "transformers") -> ModelConfig:
    """The model of a published config.json.

    Args:
      config: the JSON object.
      name: what to call the model.
      window_rule: how many keys `sliding_window` = w means: "transformers" (today's library) w, "released" (the 2024
        code) w + 1.

    Raises:
      UserError: unknown model_type, a field that is missing, of another type, inconsistent, or not supported.
    """
    where = f"{name}/config.json"
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"{where}: unknown model_type {kind!r}{nearest(str(kind), MODEL_TYPES)}")
    fields = _Fields(config, where)
    embed, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    head_dim = fields.get("head_dim", int, None)
    if heads <= 0 or embed % heads or (head_dim or embed // heads) * heads != embed:
        raise UserError(
            f"{where}: num_attention_heads={heads} and hidden_size={embed} do not fit"
            f"{f' head_dim={head_dim}' if head_dim else ''}; heads x head_dim must be hidden_size"
        )
    small, moe = kind == "phi3small", kind == "phimoe"
    kv_heads = fields.get("num_key_value_heads", int, heads)
    if kv_heads <= 0 or heads % kv_heads:
        valid = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise UserError(
            f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; use {valid}"
        )
    context = fields.get("max_position_embeddings", int, 8192 if small else 4096)
    shared = dict(
        name=name, scale="full", ladder="family", vocab=fields.get("vocab_size", int), embed=embed,
        layers=fields.get("num_hidden_layers", int), heads=heads, kv_heads=kv_heads, head_dim=embed // heads,
        context=context, window_rule=window_rule, init_std=fields.get("initializer_range", float, 0.02),
    )  # fmt: skip
    rope = _rope_fields(config)
    shared["longrope"] = _longrope(rope, context, embed // heads, where, small)
    if small:
        return _small(fields, config, shared)
    fields.must_be("hidden_act", "silu")
    for field in ("partial_rotary_factor", "rope_position_scale"):
        fields.must_be(field, 1.0)
    shared |= dict(
        mlp=fields.get("intermediate_size", int), norm_eps=fields.get("rms_norm_eps", float, 1e-5),
        rope_base=float(rope.get("rope_theta") or fields.get("rope_theta", float, 10000.0)),
        sliding_window=fields.get("sliding_window", int, None), tied=fields.get("tie_word_embeddings", bool, False),
    )  # fmt: skip
    if not moe:
        fields.must_be("attention_bias", False)
        return ModelConfig(**shared, member="mini" if heads == kv_heads else "medium")
    fields.must_be("num_experts_per_tok", 2)
    experts = Experts(
        fields.get("num_local_experts", int, 16), 2, fields.get("router_jitter_noise", float, 0.01),
        fields.get("lm_head_bias", bool, False),
    )  # fmt: skip
    return ModelConfig(
        **shared, member="moe", norm="layer", bias=fields.get("attention_bias", bool, False), experts=experts
    )


def _small(fields: _Fields, config: Mapping[str, Any], shared: dict[str, Any]) -> ModelConfig:
    """phi-3-small (configuration_phi3_small.py)."""
    fields.must_be("hidden_act", "gegelu")
    fields.must_be("ff_dim_multiplier", None)
    fields.must_be("rope_position_scale", 1.0)
    mup = fields.get("mup_use_scaling", bool, True)
    every = fields.get("dense_attention_every_n_layers", int, 0)
    dummy = config.get("dummy_token_indices")
    return ModelConfig(
        **shared, member="small", mlp=fields.get("ff_intermediate_size", int), norm="layer", bias=True,
        tied=fields.get("tie_word_embeddings", bool, True), norm_eps=fields.get("layer_norm_epsilon", float, 1e-5),
        activation="gegelu", gegelu_limit=fields.get("gegelu_limit", float, None),
        rope_base=fields.get("rope_embedding_base", float, 1e6),
        blocksparse=BlockSparse(
            fields.get("blocksparse_block_size", int, 64), fields.get("blocksparse_num_local_blocks", int, 16),
            fields.get("blocksparse_vert_stride", int, 8), fields.get("blocksparse_homo_head_pattern", bool, False),
            every,
        ),
        embed_multiplier=fields.get("mup_embedding_multiplier", float, 0.0) or 1.0,
        logit_divisor=fields.get("mup_width_multiplier", float, 0.0) or 1.0,
        attention_divisor="linear" if mup else "sqrt",
        attention_multiplier=fields.get("mup_attn_multiplier", float, 1.0) if mup else 1.0,
        dummy_tokens=_ranges(dummy) if dummy is not None else _published_dummies(shared["vocab"]),
    )  # fmt: skip


def _published_dummies(vocab: int) -> tuple[tuple[int, int], ...]:
    small = published("small")
    return small.dummy_tokens if vocab == small.vocab else ()


def _ranges(ids: list[int]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of consecutive ids."""
    runs = itertools.groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0])
    return tuple((group[0][1], group[-1][1] + 1) for _, group in ((k, list(g)) for k, g in runs))


def _rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` (2024) and `rope_parameters` (transformers 5) as one dictionary."""
    fields = dict(config.get("rope_parameters") or {}) | dict(config.get("rope_scaling") or {})
    fields.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return fields


def _longrope(rope: Mapping[str, Any], context: int, head_dim: int, where: str, small: bool) -> LongRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("longrope", "su"):
        raise UserError(f"{where}: rope_scaling type {kind!r} is not supported; valid: longrope, su, default")
    original = rope["original_max_position_embeddings"] or (8192 if small else 4096)
    lists = {}
    for which in ("short", "long"):
        factors = rope.get(f"{which}_factor")
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            count = len(factors) if isinstance(factors, list) else 0
            raise UserError(
                f"{where}: rope_scaling.{which}_factor has {count} factors; head_dim={head_dim} needs {head_dim // 2}"
            )
        if not all(isinstance(f, (int, float)) and f > 0 for f in factors):
            raise UserError(f"{where}: rope_scaling.{which}_factor holds a value that is no positive number")
        lists[which] = tuple(float(f) for f in factors)
    if not isinstance(original, int) or original <= 1 or original > context:
        raise UserError(
            f"{where}: original_max_position_embeddings={original!r} must be from 2 to max_position_embeddings={context}"
        )
    factor = rope.get("attention_factor")
    return LongRope(
        original, lists["short"], lists["long"], rope.get("short_mscale") or factor, rope.get("long_mscale") or factor,
        mscale_when_short=not small,
    )  # fmt: skip


def to_config(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """A config.json for a model trained here, with muP's multipliers folded into its weights (`huggingface.folding`).

    The window is stated by today's rule (`sliding_window` keys). phi-3-small's needs the published modelling code.
    """
    shared: dict[str, Any] = {
        "vocab_size": cfg.vocab, "hidden_size": cfg.embed, "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "max_position_embeddings": cfg.context,
        "initializer_range": cfg.init_std, "torch_dtype": dtype, "tie_word_embeddings": cfg.tied,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": True,
    }  # fmt: skip
    rope = cfg.longrope
    scaling = None
    if rope:
        scaling = {
            "type": "longrope", "short_factor": list(rope.short or ()), "long_factor": list(rope.long or ()),
            "original_max_position_embeddings": rope.original_context,
        }  # fmt: skip
        mscales = {"short_mscale": rope.short_mscale, "long_mscale": rope.long_mscale}
        scaling |= {k: v for k, v in mscales.items() if v is not None}
        shared["original_max_position_embeddings"] = rope.original_context
    shared["rope_scaling"] = scaling
    if cfg.activation == "gegelu":
        sparse = cfg.blocksparse or BlockSparse(dense_every=1)
        return shared | {
            "architectures": ["Phi3SmallForCausalLM"], "model_type": "phi3small", "hidden_act": "gegelu",
            "gegelu_limit": cfg.gegelu_limit, "gegelu_pad_to_256": True, "ff_dim_multiplier": None,
            "ff_intermediate_size": cfg.mlp, "layer_norm_epsilon": cfg.norm_eps, "rope_embedding_base": cfg.rope_base,
            "rope_position_scale": 1.0, "blocksparse_block_size": sparse.block,
            "blocksparse_num_local_blocks": sparse.local_blocks, "blocksparse_vert_stride": sparse.vert_stride,
            "blocksparse_homo_head_pattern": sparse.homo_head, "blocksparse_triton_kernel_block_size": 64,
            "dense_attention_every_n_layers": sparse.dense_every or None, "mup_use_scaling": True,
            "mup_width_multiplier": cfg.logit_divisor * cfg.width_ratio, "mup_attn_multiplier": cfg.attention_multiplier,
            "mup_embedding_multiplier": cfg.embed_multiplier,
            "dummy_token_indices": [i for a, b in cfg.dummy_tokens for i in range(a, b)],
        }  # fmt: skip
    window = cfg.window_keys if cfg.window_keys is not None and cfg.window_keys < cfg.context else None
    shared |= {
        "hidden_act": "silu", "intermediate_size": cfg.mlp, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_base,
        "sliding_window": window, "attention_dropout": 0.0,
    }  # fmt: skip
    if not cfg.experts:
        return shared | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    return shared | {
        "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "attention_bias": cfg.bias,
        "lm_head_bias": cfg.experts.head_bias, "num_local_experts": cfg.experts.count, "num_experts_per_tok": 2,
        "router_jitter_noise": cfg.experts.jitter,
    }  # fmt: skip
