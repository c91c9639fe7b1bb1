"""The Phi-3 family as data: the published shapes, their contexts, and shape-preserving proxies.

Published values: config.json of each release (phi-3-mini-4k/128k, -small-8k/128k, -medium-4k/128k) and Microsoft's
phi-3-small code. Token budgets and hardware: model cards of April/May 2024 and arXiv:2404.14219v4.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from phi3_jax.configs import BlockSparse, Experts, LongRope, ModelConfig, Mup, OptimConfig, Vision
from phi3_jax.errors import UserError, nearest

# phi-3-small: ids of 100256..100351 that are neither used nor generated (Microsoft's tokenizer): logits masked.
_SMALL_DUMMY = ((100256, 100257), (100258, 100261), (100264, 100266), (100267, 100352))


@dataclasses.dataclass(frozen=True)
class Member:
    """One released model, as data.

    Attributes:
      shape: fields of its `ModelConfig` that no context changes.
      contexts: {name: (tokens, published sliding window)}, the short one first.
      longrope: its LongRoPE beyond the original context; the lists are in longrope_factors.json, under the member's name.
      template: its chat template, of `data.chat`.
      name: of the checkpoint at a context.
      tokens: it was trained on (model cards; mini: the April 2024 release, the report's mini column); 0: not published.
      params: exactly, or None where no file says.
      rounded: its parameters as the report rounds them.
    """

    shape: Mapping[str, Any]
    contexts: Mapping[str, tuple[int, int | None]]
    longrope: LongRope
    template: str
    name: str
    tokens: float = 0.0
    params: int | None = None
    rounded: str = ""


@dataclasses.dataclass(frozen=True)
class Size:
    """The proxy of one size: widths are multiples of a scale's k, which is 1024 in the released models.

    Attributes:
      width, layers: on the ladders "clean" and "family"; layers before the depth factor of the scale.
      alone: its width on the ladder "width", or None where it is not on that.
      mlp: mlp over embed on the ladder "clean".
    """

    width: float
    layers: int
    alone: int | None = None
    mlp: Fraction = Fraction(3)


# A further member is an entry here and one in SIZES; its lists of LongRoPE stand in longrope_factors.json, or in the entry.
MEMBERS = {
    "mini": Member(
        dict(vocab=32064, embed=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192),
        {"4k": (4096, 2047), "128k": (131072, None)},  # the 128k variants set the window above their context, i.e. none
        LongRope(4096), "mini", "phi-3-mini-{context}", 3.3e12, 3_821_079_552, "3.8B",
    ),
    "small": Member(
        dict(
            layout="phi3small", vocab=100352, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336,
            norm="layer", activation="gegelu", gegelu_limit=20.0, bias=True, tied=True, rope_base=1e6,
            blocksparse=BlockSparse(), embed_multiplier=10.0, logit_divisor=8.0, attention_divisor="linear",
            dummy_tokens=_SMALL_DUMMY,
        ),
        {"8k": (8192, None), "128k": (131072, None)},
        LongRope(8192, mscale_when_short=False), "small", "phi-3-small-{context}", 4.8e12, 7_392_272_384, "7B",
    ),
    "medium": Member(
        dict(vocab=32064, embed=5120, layers=40, heads=40, kv_heads=10, head_dim=128, mlp=17920),
        {"4k": (4096, 2047), "128k": (131072, None)},
        LongRope(4096), "medium", "phi-3-medium-{context}", 4.8e12, 13_960_238_080, "14B",
    ),
}  # fmt: skip
# These are no sizes of a study. phi-3.5-MoE's lists come with the checkpoint.
_VISION = {**MEMBERS["mini"].shape, "layout": "phi3_v"}
_OTHERS = {
    "moe": Member(
        dict(
            layout="phimoe", vocab=32064, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=6400,
            norm="layer", bias=True, experts=Experts(),
        ),
        {"128k": (131072, 131072)},
        LongRope(4096, short_mscale=1.243163121016122, long_mscale=1.243163121016122), "moe", "phi-3.5-moe",
    ),
    "vision": Member(
        _VISION | {"vision": Vision(crops=16)}, {"128k": (131072, 131072)}, LongRope(4096), "vision",
        "phi-3-vision-{context}", 5e11, 4_146_621_440, "4.2B",
    ),
    "vision-3.5": Member(
        _VISION | {"vision": Vision(crops=4)}, {"128k": (131072, 262144)}, LongRope(4096), "vision",
        "phi-3.5-vision", 5e11, 4_146_621_440, "4.2B",
    ),
}  # fmt: skip
RELEASED: Mapping[str, Member] = ChainMap(_OTHERS, MEMBERS)
# Smallest first. Those that are no member are further sizes for fits.
SIZES = {
    "below": Size(2.0, 4, alone=2),
    "mini": Size(3.0, 4, alone=3, mlp=Fraction(8, 3)),
    "mini-small": Size(3.5, 4),
    "small": Size(4.0, 4, alone=4),
    "small-medium": Size(4.5, 5, alone=5),
    "medium": Size(5.0, 5, alone=6),
    "above": Size(6.0, 5, alone=7),
}
TRIO = ("mini", "small", "medium")  # the three of the Phi-3 report, whose two steps in size are compared

WIDTHS = tuple(name for name, size in SIZES.items() if size.alone)  # one depth, one mlp ratio, whole heads of 16
CONTEXTS = {name: tuple(member.contexts) for name, member in RELEASED.items()}
ROUNDED = {name: RELEASED[name].rounded for name in TRIO}
MATCHED_TOKENS = 4.8e12
SCALES = ("pico", "nano", "micro", "femto", "milli", "centi", "deci")
GIVEN = "given"  # the scale, and the size, of a study whose model is that of the weights it starts from
LADDERS = ("clean", "family", "width")
_K = {"femto": 8, "pico": 16, "nano": 32, "micro": 64, "milli": 128, "centi": 256, "deci": 512}
_DEPTH = {"femto": 1, "pico": 1, "nano": 1, "micro": 2, "milli": 2, "centi": 2, "deci": 4}
# What a proxy's full budget stands for: 4.8T tokens of the released models (about 10 to 40 tokens per parameter).
REFERENCE_TOKENS = {
    "femto": 1_000_000, "pico": 4_000_000, "nano": 16_000_000, "micro": 128_000_000, "milli": 512_000_000,
    "centi": 2_000_000_000, "deci": 16_000_000_000,
}  # fmt: skip


@cache
def _longrope_lists() -> dict[str, dict[str, list[float] | None]]:
    import json  # the help of a command, which needs the names of this file, does without

    return json.loads(Path(__file__).with_name("longrope_factors.json").read_text("utf-8"))


def _longrope(name: str) -> LongRope:
    rope, lists = RELEASED[name].longrope, _longrope_lists().get(name, {})
    short, long = (tuple(lists.get(which) or ()) for which in ("short", "long"))
    return dataclasses.replace(rope, short=short or rope.short, long=long or rope.long)


def published(member: str, context: str | None = None) -> ModelConfig:
    """The released architecture of one member.

    Args:
      member: "mini", "small", "medium", "vision", "vision-3.5", or "moe" (phi-3.5-MoE, which is not trained here).
      context: "4k" ("8k" for small) or "128k"; default: the shortest there is.

    Raises:
      UserError: unknown member or context, naming the nearest valid ones.
    """
    if member not in RELEASED:
        raise UserError(f"unknown family member {member!r}{nearest(member, RELEASED)}")
    released = RELEASED[member]
    context = context or next(iter(released.contexts))
    if context not in released.contexts:
        raise UserError(f"phi-3-{member} has no {context!r} variant; valid: {', '.join(released.contexts)}")
    tokens, window = released.contexts[context]
    return ModelConfig(
        name=released.name.format(context=context), member=member, scale="full", ladder="family", context=tokens,
        longrope=_longrope(member) if tokens > released.longrope.original_context else None, sliding_window=window,
        **released.shape,
    )  # fmt: skip


def member_of(model: ModelConfig) -> str:
    """The released member whose shape a full-size model has, "" for none.

    LongRoPE's lists tell members of one shape apart. A vocabulary may have grown: fine-tuned models add tokens.
    """
    fields = ("layout", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp")
    shape = [getattr(model, field) for field in fields]
    alike = [name for name in RELEASED if [getattr(published(name), field) for field in fields] == shape]
    lists = lambda rope: (rope.short, rope.long) if rope else None  # noqa: E731
    longest = lambda name: published(name, [*RELEASED[name].contexts][-1])  # noqa: E731
    same = [name for name in alike if lists(model.longrope) == lists(longest(name).longrope)]
    return next(iter(same or alike), "")


def _proxy_mup(scale: str) -> Mup:
    return Mup(base_embed=48, base_layers=4 * _DEPTH[scale], base_head_dim=16)


def _clean(name: str, scale: str, ladder: str, vocab: int, context: int) -> ModelConfig:
    size = SIZES[name]
    width, layers, mlp = (size.alone or 0, 4, Fraction(3)) if ladder == "width" else (size.width, size.layers, size.mlp)
    embed = int(width * _K[scale])
    head_dim = max(16, _K[scale] // 4) if embed % 16 == 0 else 8
    heads = embed // head_dim
    return ModelConfig(
        name=f"{name}-{ladder}-{scale}", member=name, scale=scale, ladder=ladder, vocab=vocab, embed=embed,
        layers=layers * _DEPTH[scale], heads=heads, kv_heads=heads, head_dim=head_dim, mlp=int(embed * mlp),
        context=context, mup=_proxy_mup(scale),
    )  # fmt: skip


def _family(member: str, scale: str, vocab: int, context: int) -> ModelConfig:
    size, full = SIZES[member], published(member)
    embed, groups = int(size.width * _K[scale]), full.queries_per_kv
    head_dim = 8 if scale in ("nano", "femto") else max(16, _K[scale] // 4)
    if groups > 1 and scale in ("pico", "femto"):  # one kv head keeps the ratio exactly
        head_dim = embed // groups
    heads = embed // head_dim
    return dataclasses.replace(
        full, name=f"{member}-family-{scale}", scale=scale, vocab=vocab, context=context, embed=embed,
        layers=size.layers * _DEPTH[scale], heads=heads, kv_heads=heads // groups, head_dim=head_dim,
        mlp=embed * full.mlp // full.embed, dummy_tokens=(), logit_divisor=1.0, mup=_proxy_mup(scale),
    )  # fmt: skip


def proxy(
    size: str, scale: str = "pico", ladder: str = "clean", *, vocab: int = 320, context: int = 4096
) -> ModelConfig:
    """A small stand-in that keeps the family's shape: non-embedding matrices 1 : 1.93 : 3.76.

    Args:
      size: "mini", "small", "medium", or on the clean ladder also "below", "mini-small", "small-medium", "above".
      scale: "femto" (k=8), "pico" (16), "nano" (32), "micro" (64), "milli" (128), "centi" (256) or "deci" (512): widths
        3k/4k/5k, depths 4:4:5 (doubled from micro on, and again at deci).
      ladder: "clean" (one recipe for all sizes: RMSNorm, SwiGLU, full multi-head attention), "family" (each
        keeps its member's own architecture: grouped-query heads, phi-3-small's norm, activation and sparsity), or
        "width" (clean, and widths 2k to 7k at one depth and one mlp ratio, so that nothing but the width differs).
      vocab: entries of the embedding table, given by the data.
      context: longest input in tokens.

    phi-3-small's block-sparse layers keep the published 64/16/8 pattern, so inputs up to 1,024 tokens are dense in
    the proxy exactly as they are in the released model. Its logit divisor is muP's width ratio.
    """
    if scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}{nearest(scale, SCALES)}")
    if ladder not in LADDERS:
        raise UserError(f"unknown ladder {ladder!r}{nearest(ladder, LADDERS)}")
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}{nearest(size, SIZES)}")
    if ladder == "width" and size not in WIDTHS:
        raise UserError(f"size {size!r} is not on the width ladder; its sizes are {', '.join(WIDTHS)}")
    if ladder != "family":
        return _clean(size, scale, ladder, vocab, context)
    if size not in MEMBERS:
        raise UserError(f"size {size!r} exists on the clean ladder only; with ladder=family use {', '.join(MEMBERS)}")
    return _family(size, scale, vocab, context)


def seeing(model: ModelConfig, eyes: Vision) -> ModelConfig:
    """A proxy with eyes, which are the same beside every size."""
    return dataclasses.replace(model, name=f"{model.name}-seeing", layout="phi3_v", vision=eyes)


def published_params(member: str) -> int | None:
    """Exact parameters of the released model a size stands for, or None for the in-between sizes."""
    return RELEASED[member].params if member in RELEASED else None


def published_tokens(size: str) -> float:
    """Tokens that the released model was trained on which a size stands for; of sizes in between, the largest's."""
    return MEMBERS[size if size in MEMBERS else TRIO[-1]].tokens


# Recipes; sources in experiments/scaling.py.
PROXY_OPTIM = OptimConfig()


FULL_OPTIM = OptimConfig(
    peak_lr=1.5e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, warmup=0.02, decay=0.2, spike_factor=10.0
)


def trained(model: ModelConfig) -> ModelConfig:
    """A released model as a full-size run trains it: phi-3-small's block pattern counts from each row's start.

    So counts the released kernel, which knows no documents, and so can the kernels for TPU and GPU, whose tiles are fixed
    when the program is traced.
    """
    if model.blocksparse is None:
        return model
    return dataclasses.replace(model, blocksparse=dataclasses.replace(model.blocksparse, per_document=False))
