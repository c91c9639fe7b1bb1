"""config.json of the published models, to and from `ModelConfig`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from phi3_jax.configs import LAYOUTS, BlockSparse, Experts, LongRope, ModelConfig, Vision
from phi3_jax.errors import UserError, nearest
from phi3_jax.family import member_of, published
from phi3_jax.foreign import SIZE, Fields, shown
from phi3_jax.models.rotary import attention_factor
from phi3_jax.units import divisors

# Fields that change what a model computes, by their names; the published code and transformers have no others.
_CHANGES = re.compile(
    r"rope|rotary|mscale|theta|factor|alibi|position|bias|norm|scal|multipl|mup|quant|softcap|logit|window|chunk|sink"
    r"|layer|atten|attn|head|expert|moe|rout|adapter|lora|emb|hidden|intermediate|(^|_)(act|ff|tie|gate|qk|kv|clip|mlp)"
    r"|activation|sparse|width|depth|dim|residual|vision|img|image|audio|dummy"
)
# Of those, what acts in training only, or says how to compute and not what.
_HARMLESS = re.compile(
    r".*(dropout|pdrop|flash).*|_?attn_implementation.*|output_.*|chunk_size_feed_forward|router_aux_loss_coef"
    r"|input_jitter_noise|gegelu_pad_to_256|blocksparse_triton_kernel_block_size|reorder_and_upcast_attn"
    r"|pad_sequence_to_multiple_of_64"
)
_LAYERS = 4096  # more are a slip of the pen, and would take minutes to refuse


def from_config(
    config: Mapping[str, Any], name: str, window_rule: str = "transformers", crops: int | None = None
) -> ModelConfig:
    """The model of a published config.json.

    Where the released code and today's transformers differ, transformers is followed, but for `window_rule`.

    Args:
      config: the JSON object.
      name: what to call the model.
      window_rule: how many keys `sliding_window` = w means: "transformers" (today's library) w, "released" (the 2024
        code) w + 1.
      crops: num_crops of preprocessor_config.json, where there is one.

    Raises:
      UserError: unknown model_type; a field that is missing, of another type, out of range, inconsistent or not supported;
        or one that changes the model and is not read here.
    """
    fields = Fields(config, f"{name}/config.json")
    kind = fields.raw("model_type")
    if kind not in LAYOUTS:
        raise UserError(f"{fields.where}: unknown model_type {shown(kind)}{nearest(str(kind), LAYOUTS)}")
    small, moe = kind == "phi3small", kind == "phimoe"
    embed, heads = fields.whole("hidden_size", low=1), fields.whole("num_attention_heads", low=1)
    head_dim = _head_dim(fields, embed, heads, small)
    kv_heads = fields.whole("num_key_value_heads", heads, low=1)
    if heads % kv_heads:
        raise UserError(
            f"{fields.where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; use "
            f"{divisors(heads)}"
        )
    most = {"phi3": 4096, "phi3small": 8192, "phimoe": 131072, "phi3_v": 4096}[kind]
    context = fields.whole("max_position_embeddings", most, low=1)
    base, longrope = _rope(fields, kind, context, head_dim)
    shared = dict(
        name=name, member="", layout=kind, scale="full", ladder="family", embed=embed,
        vocab=fields.whole("vocab_size", low=1), layers=fields.whole("num_hidden_layers", low=1, high=_LAYERS),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, context=context, window_rule=window_rule, rope_base=base,
        longrope=longrope, init_std=fields.number("initializer_range", 0.02, low=0),
    )  # fmt: skip
    if small:
        model = _small(fields, shared)
    else:
        fields.text("hidden_act", "silu", valid=("silu", "swish"))  # two names of one function
        shared |= dict(
            mlp=fields.whole("intermediate_size", low=1), norm_eps=fields.number("rms_norm_eps", 1e-5, low=0),
            sliding_window=_window(fields), tied=fields.flag("tie_word_embeddings", False),
        )  # fmt: skip
        bias = fields.flag(
            "attention_bias", False
        )  # transformers' Phi3 does not read it: biases are refused as tensors
        if moe:
            model = ModelConfig(**shared, norm="layer", bias=bias, experts=_experts(fields))
        else:
            model = ModelConfig(**shared, vision=_vision(fields, crops) if kind == "phi3_v" else None)
    _check_layer_types(fields, model)
    fields.refuse_unread(_CHANGES, _HARMLESS)
    return dataclasses.replace(model, member=member_of(model))


def _head_dim(fields: Fields, embed: int, heads: int, small: bool) -> int:
    given = fields.whole("head_dim", None, low=1)
    if (given is None and embed % heads) or (small and given and given * heads != embed):
        raise UserError(
            f"{fields.where}: num_attention_heads={heads} and hidden_size={embed} do not fit"
            f"{f' head_dim={given}' if given else ''}; heads x head_dim must be hidden_size"
            f"{'' if small else ', or head_dim stated'}"
        )
    head_dim = given or embed // heads
    if head_dim % 2:
        raise UserError(f"{fields.where}: head_dim={head_dim} must be even, for RoPE rotates pairs")
    return head_dim


def _window(fields: Fields) -> int | None:
    window = fields.whole("sliding_window", None, low=-SIZE, high=SIZE - 1)
    if window is not None and window < 1:
        raise fields.refuse("sliding_window", "must be a positive number of tokens, or null for no window")
    return window


def _experts(fields: Fields) -> Experts:
    fields.whole("num_experts_per_tok", 2, low=2, high=2)
    return Experts(
        fields.whole("num_local_experts", 16, low=2, high=_LAYERS), 2,
        fields.number("router_jitter_noise", 0.01, low=0), fields.flag("lm_head_bias", False),
    )  # fmt: skip


# What the released phi-3-vision folders say of their eyes, by the objects of config.json that say it; nothing else is
# built, here or there.
_EYES: dict[str, dict[str, Any]] = {
    "embd_layer": {
        "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model", "num_img_tokens": 144,
        "layer_idx": -2, "type_feature": "patch",
    },
}  # fmt: skip
_NEUTRAL_EYES = {"layer_idx", "type_feature"}  # may be missing: they then have these values


def _vision(fields: Fields, crops: int | None) -> Vision:
    """The tower, whose shape config.json does not say: that of CLIP ViT-L/14-336, or of a `clip_config` in it."""
    for name, valid in _EYES.items():
        inside = fields.inside(name)
        if inside is None:
            raise UserError(f"{fields.where}: {name} is missing; take the released config.json of phi-3-vision")
        for key, value in valid.items():
            if isinstance(value, bool):
                found = inside.flag(key, None)
            elif isinstance(value, int):
                found = inside.whole(key, None, low=-SIZE)
            else:
                found = inside.text(key, None)
            if found != value and not (found is None and key in _NEUTRAL_EYES):
                raise inside.refuse(key, f"is not supported; valid: {value}")
        if name == "img_processor":
            width = inside.whole("image_dim_out", 1024, low=1)
        inside.refuse_unread(re.compile(""), re.compile("(?!)"))
    tower = fields.inside("clip_config")
    if tower is None:
        eyes = Vision()
    else:
        tower.text("hidden_act", "quick_gelu", valid=("quick_gelu",))
        tower.whole("num_channels", 3, low=3, high=3)
        eyes = Vision(
            tower.whole("hidden_size", low=1), tower.whole("num_hidden_layers", low=2, high=_LAYERS),
            tower.whole("num_attention_heads", low=1), tower.whole("intermediate_size", low=1),
            tower.whole("image_size", 336, low=1), tower.whole("patch_size", 14, low=1),
            tower.number("layer_norm_eps", 1e-5, low=0),
        )  # fmt: skip
    if width != eyes.embed:
        raise UserError(
            f"{fields.where}: img_processor.image_dim_out={width} is not the tower's width of {eyes.embed}; correct it"
        )
    if eyes.side != 12:
        raise UserError(f"{fields.where}: tiles of {eyes.side**2} tokens; the released code takes 144 of every tile")
    return dataclasses.replace(eyes, crops=crops or eyes.crops)


def _check_layer_types(fields: Fields, model: ModelConfig) -> None:
    """layer_types may say again what sliding_window says: the same attention in every layer."""
    types = fields.raw("layer_types")
    kind = "full_attention" if model.sliding_window is None else "sliding_attention"
    if types not in (None, [], [kind] * model.layers):
        raise fields.refuse("layer_types", f"must be {kind} in each of {model.layers} layers, as sliding_window says")


def _small(fields: Fields, shared: dict[str, Any]) -> ModelConfig:
    """phi-3-small (configuration_phi3_small.py)."""
    fields.text("hidden_act", "gegelu", valid=("gegelu",))
    if fields.raw("ff_dim_multiplier") is not None:
        raise fields.refuse("ff_dim_multiplier", "is not supported; valid: null")
    mup = fields.flag("mup_use_scaling", True)
    attention = fields.number("mup_attn_multiplier", 1.0)
    return ModelConfig(
        **shared, mlp=fields.whole("ff_intermediate_size", low=1), norm="layer", bias=True,
        tied=fields.flag("tie_word_embeddings", True), norm_eps=fields.number("layer_norm_epsilon", 1e-5, low=0),
        activation="gegelu", gegelu_limit=fields.number("gegelu_limit", None, above=0),
        blocksparse=BlockSparse(
            fields.whole("blocksparse_block_size", 64, low=1), fields.whole("blocksparse_num_local_blocks", 16),
            fields.whole("blocksparse_vert_stride", 8, low=1), fields.flag("blocksparse_homo_head_pattern", False),
            fields.whole("dense_attention_every_n_layers", 0),
        ),
        embed_multiplier=fields.number("mup_embedding_multiplier", 0.0, low=0) or 1.0,
        logit_divisor=fields.number("mup_width_multiplier", 0.0, low=0) or 1.0,
        attention_divisor="linear" if mup else "sqrt", attention_multiplier=attention if mup else 1.0,
        dummy_tokens=_dummies(fields, shared["vocab"]),
    )  # fmt: skip


def _dummies(fields: Fields, vocab: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of the ids that are never said; the published ones where the file lists none."""
    small = published("small")
    ids = fields.wholes("dummy_token_indices", None, high=vocab - 1)
    if ids is None:
        return small.dummy_tokens if vocab == small.vocab else ()
    runs = itertools.groupby(enumerate(sorted(set(ids))), lambda pair: pair[1] - pair[0])
    return tuple((group[0][1], group[-1][1] + 1) for _, group in ((k, list(g)) for k, g in runs))


# ------------------------------------------------------------------------------------------------ rope


def _rope(fields: Fields, kind: str, context: int, head_dim: int) -> tuple[float, LongRope | None]:
    """(base, LongRoPE), from the top of the file and `rope_scaling` (2024) or `rope_parameters` (transformers 5)."""
    if kind == "phi3small":
        base = fields.number("rope_embedding_base", 1e6, above=0)
    else:
        base = fields.number("rope_theta", 1e6 if kind == "phimoe" else 1e4, above=0)
    original = fields.whole("original_max_position_embeddings", None, low=1)
    for name in ("partial_rotary_factor", "rope_position_scale"):
        _must_be_one(fields, name)
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        if (rope := fields.inside(name)) is not None:
            longrope = _longrope(rope, kind, original, context, head_dim)
            found[name] = (rope.number("rope_theta", base, above=0), longrope)
            _must_be_one(rope, "partial_rotary_factor")
            rope.refuse_unread(re.compile(""), re.compile("(?!)"))
    first, *others = found.values() or [(base, None)]
    if any(other != first for other in others):
        raise UserError(f"{fields.where}: rope_scaling and rope_parameters differ; keep the one that is right")
    return first


def _must_be_one(fields: Fields, name: str) -> None:
    if fields.number(name, 1.0) != 1.0:
        raise fields.refuse(name, "is not supported; valid: 1.0")


def _longrope(rope: Fields, kind: str, top: int | None, context: int, head_dim: int) -> LongRope | None:
    """LongRoPE of one object, by the rules of transformers (phi3, phimoe) and of the released code (phi3small).

    Args:
      rope: the object.
      kind: model_type.
      top: original_max_position_embeddings of the whole file. In phi3 it is the only one that counts.
    """
    types = {rope.text(name, None) for name in ("rope_type", "type")} - {None}
    types = {"longrope" if t == "su" else t for t in types} or {"default"}
    nested = rope.whole("original_max_position_embeddings", None, low=1)
    if types == {"default"}:
        for name in ("short_factor", "long_factor"):
            if rope.raw(name) is not None:
                raise rope.refuse(name, 'needs a type; add "type": "longrope"')
        return None
    if types != {"longrope"}:
        raise rope.refuse(
            "rope_type" if rope.raw("rope_type") else "type", "is not supported; valid: longrope, su, default"
        )
    if kind in ("phi3", "phi3_v") and top is None and nested not in (None, 4096):
        raise rope.refuse(
            "original_max_position_embeddings", f"is not read there for {kind}; put it at the top of config.json"
        )
    if kind not in ("phi3", "phi3_v") and None not in (top, nested) and top != nested:
        raise rope.refuse("original_max_position_embeddings", f"differs from the {top} at the top; make them equal")
    default = {"phi3": 4096, "phi3small": 8192, "phimoe": context, "phi3_v": 4096}[kind]
    original = (top if kind in ("phi3", "phi3_v") else nested or top) or default
    if original < 2:
        raise UserError(f"{rope.where}: original_max_position_embeddings={original} must be at least 2")
    lists = []
    for name in ("short_factor", "long_factor"):
        lists.append(rope.numbers(name, (), above=0))
        if len(lists[-1]) != head_dim // 2:
            raise UserError(
                f"{rope.where}: rope_scaling.{name} has {len(lists[-1])} factors; head_dim={head_dim} needs "
                f"{head_dim // 2}"
            )
    short, long = lists
    scales = _attention_factors(rope, kind, original, context)
    return LongRope(original, short, long, *scales, mscale_when_short=kind != "phi3small")


def _attention_factors(rope: Fields, kind: str, original: int, context: int) -> tuple[float | None, float | None]:
    """The file's own factors on cos and sin, short and long; None: derive from the contexts (`models.rotary`)."""
    given, factor = rope.number("attention_factor", None, above=0), rope.number("factor", None, above=0)
    if factor is not None and given is None and factor != context / original:
        given = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
    mscales = [rope.number(f"{which}_mscale", None) for which in ("short", "long")]
    if kind in ("phi3", "phi3_v"):
        return given, given
    if kind == "phi3small" and given is not None:
        name = "factor" if rope.raw("attention_factor") is None else "attention_factor"
        raise rope.refuse(name, "is not read by phi-3-small; state short_mscale and long_mscale")
    return tuple(m if m is not None and m > 0 else given for m in mscales)


# ------------------------------------------------------------------------------------------------ export


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
        scaling |= _stated_factors(cfg, rope)
        shared["original_max_position_embeddings"] = rope.original_context
    shared["rope_scaling"] = scaling
    if cfg.layout == "phi3small":
        sparse = cfg.blocksparse or BlockSparse(dense_every=1)
        return shared | {
            "architectures": ["Phi3SmallForCausalLM"], "model_type": cfg.layout, "hidden_act": "gegelu",
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
    if cfg.heads * cfg.head_dim != cfg.embed:
        shared["head_dim"] = cfg.head_dim
    window = cfg.window_keys if cfg.window_keys is not None and cfg.window_keys < cfg.context else None
    shared |= {
        "hidden_act": "silu", "intermediate_size": cfg.mlp, "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_base,
        "sliding_window": window, "attention_dropout": 0.0,
    }  # fmt: skip
    if cfg.vision:
        return shared | {"architectures": ["Phi3VForCausalLM"], "model_type": cfg.layout} | _stated_eyes(cfg.vision)
    if cfg.experts is None:
        return shared | {"architectures": ["Phi3ForCausalLM"], "model_type": cfg.layout}
    return shared | {
        "architectures": ["PhiMoEForCausalLM"], "model_type": cfg.layout, "attention_bias": cfg.bias,
        "lm_head_bias": cfg.experts.head_bias, "num_local_experts": cfg.experts.count, "num_experts_per_tok": 2,
        "router_jitter_noise": cfg.experts.jitter,
    }  # fmt: skip


def _stated_eyes(eyes: Vision) -> dict[str, Any]:
    stated = {name: {k: v for k, v in keys.items() if k not in _NEUTRAL_EYES} for name, keys in _EYES.items()}
    stated["img_processor"]["image_dim_out"] = eyes.embed
    if dataclasses.replace(eyes, crops=Vision.crops) != Vision():
        stated["clip_config"] = {
            "hidden_size": eyes.embed, "num_hidden_layers": eyes.layers, "num_attention_heads": eyes.heads,
            "intermediate_size": eyes.mlp, "image_size": eyes.tile, "patch_size": eyes.patch,
            "layer_norm_eps": eyes.norm_eps, "hidden_act": "quick_gelu",
        }  # fmt: skip
    return stated


def _stated_factors(cfg: ModelConfig, rope: LongRope) -> dict[str, float]:
    """A model's own factors on cos and sin, in the fields that its code reads."""
    if cfg.layout == "phi3small":
        mscales = {"short_mscale": rope.short_mscale, "long_mscale": rope.long_mscale}
        return {k: v for k, v in mscales.items() if v is not None}
    short, long = (attention_factor(rope, cfg.context, which) for which in (False, True))
    if cfg.layout == "phimoe":  # transformers' phimoe derives none
        return {"short_mscale": short, "long_mscale": long}
    if short != long:
        raise UserError(
            f"{cfg.name} has attention factors of {short:g} for short and {long:g} for long inputs, and phi3 has one "
            "attention_factor; make short_mscale and long_mscale equal"
        )
    return {} if rope.short_mscale is None and rope.long_mscale is None else {"attention_factor": long}
