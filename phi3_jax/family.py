"""The Phi-3 family as data: the published shapes, their contexts, and shape-preserving proxies.

Published values: config.json of each release (phi-3-mini-4k/128k, -small-8k/128k, -medium-4k/128k) and Microsoft's
phi-3-small code. Token budgets and hardware: model cards of April/May 2024 and arXiv:2404.14219v4.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from importlib import resources

from phi3_jax.configs import BlockSparse, Experts, LongRope, ModelConfig, Mup
from phi3_jax.errors import UserError, nearest

MEMBERS = ("mini", "small", "medium")
SCALES = ("pico", "nano", "micro")
LADDERS = ("clean", "family", "width")
# Tokens each member was trained on (model cards; mini: the April 2024 release, the report's mini column).
PUBLISHED_TOKENS = {"mini": 3.3e12, "small": 4.8e12, "medium": 4.8e12}
MATCHED_TOKENS = 4.8e12
CONTEXTS = {"mini": ("4k", "128k"), "small": ("8k", "128k"), "medium": ("4k", "128k"), "moe": ("128k",)}

# Widths are 3k : 4k : 5k and depths 4 : 4 : 5 with k = 1024 in the released models; proxies take a smaller k.
_K = {"pico": 16, "nano": 32, "micro": 64}
_DEPTH = {"pico": 1, "nano": 1, "micro": 2}
# Further clean sizes for fits: width in k, layers (before the depth factor of the scale).
_BETWEEN = {"below": (2.0, 4), "mini-small": (3.5, 4), "small-medium": (4.5, 5), "above": (6.0, 5)}
# One depth, one mlp ratio and whole heads of 16: size is width alone. Widths in k.
_WIDTHS = {"below": 2, "mini": 3, "small": 4, "small-medium": 5, "medium": 6, "above": 7}
SIZES = ("below", "mini", "mini-small", "small", "small-medium", "medium", "above")
# What a proxy's full budget stands for: 4.8T tokens of the released models (about 10 to 40 tokens a parameter).
REFERENCE_TOKENS = {"pico": 4_000_000, "nano": 16_000_000, "micro": 128_000_000}

# phi-3-small: ids of 100256..100351 that are neither used nor generated (Microsoft's tokenizer): logits masked.
_SMALL_DUMMY = ((100256, 100257), (100258, 100261), (100264, 100266), (100267, 100352))


@cache
def _longrope_lists() -> dict[str, dict[str, list[float] | None]]:
    return json.loads(resources.files("phi3_jax").joinpath("longrope_factors.json").read_text())


def _longrope(member: str) -> LongRope:
    if member == "moe":  # the lists come with the checkpoint; the mscales are its config.json's
        return LongRope(4096, short_mscale=1.243163121016122, long_mscale=1.243163121016122)
    lists = _longrope_lists()[member]
    short, long = (tuple(lists[k]) if lists[k] else None for k in ("short", "long"))
    return LongRope(
        original_context=8192 if member == "small" else 4096,
        short=short,
        long=long,
        mscale_when_short=member != "small",
    )


def published(member: str, context: str | None = None) -> ModelConfig:
    """The released architecture of one member.

    Args:
      member: "mini", "small", "medium", or "moe" (phi-3.5-MoE, which is not trained here).
      context: "4k" ("8k" for small) or "128k"; default: the short one.

    Raises:
      UserError: unknown member or context, naming the nearest valid ones.
    """
    if member not in CONTEXTS:
        raise UserError(f"unknown family member {member!r}{nearest(member, CONTEXTS)}")
    context = context or CONTEXTS[member][0]
    if context not in CONTEXTS[member]:
        raise UserError(f"phi-3-{member} has no {context!r} variant; valid: {', '.join(CONTEXTS[member])}")
    long = context == "128k"
    shared = dict(
        name=f"phi-3-{member}-{context}" if member != "moe" else "phi-3.5-moe",
        member=member,
        scale="full",
        ladder="family",
        context=131072 if long else {"mini": 4096, "small": 8192, "medium": 4096}[member],
        longrope=_longrope(member) if long else None,
    )
    if member == "small":
        return ModelConfig(
            **shared, vocab=100352, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, norm="layer",
            activation="gegelu", gegelu_limit=20.0, bias=True, tied=True, rope_base=1e6, blocksparse=BlockSparse(),
            embed_multiplier=10.0, logit_divisor=8.0, attention_divisor="linear", dummy_tokens=_SMALL_DUMMY,
        )  # fmt: skip
    if member == "moe":
        return ModelConfig(
            **shared, vocab=32064, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=6400, norm="layer",
            bias=True, sliding_window=131072, experts=Experts(),
        )  # fmt: skip
    # The 128k variants set the window above their context, i.e. none.
    window = None if long else 2047
    if member == "mini":
        return ModelConfig(
            **shared, vocab=32064, embed=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192,
            sliding_window=window,
        )  # fmt: skip
    return ModelConfig(
        **shared, vocab=32064, embed=5120, layers=40, heads=40, kv_heads=10, head_dim=128, mlp=17920,
        sliding_window=window,
    )  # fmt: skip


def _proxy_mup(scale: str) -> Mup:
    return Mup(base_embed=48, base_layers=4 * _DEPTH[scale], base_head_dim=16)


def _clean(size: str, scale: str, ladder: str, vocab: int, context: int) -> ModelConfig:
    k = _K[scale]
    if ladder == "width":
        width, layers = _WIDTHS[size], 4
    else:
        width, layers = _BETWEEN.get(size) or {"mini": (3, 4), "small": (4, 4), "medium": (5, 5)}[size]
    embed = int(width * k)
    head_dim = 16 if embed % 16 == 0 else 8
    heads = embed // head_dim
    return ModelConfig(
        name=f"{size}-{ladder}-{scale}", member=size, scale=scale, ladder=ladder, vocab=vocab, embed=embed,
        layers=layers * _DEPTH[scale], heads=heads, kv_heads=heads, head_dim=head_dim,
        mlp=embed * 8 // 3 if size == "mini" and ladder == "clean" else 3 * embed, context=context, mup=_proxy_mup(scale),
    )  # fmt: skip


def _family(member: str, scale: str, vocab: int, context: int) -> ModelConfig:
    k, full = _K[scale], published(member)
    embed = {"mini": 3, "small": 4, "medium": 5}[member] * k
    if member == "mini":
        head_dim = 8 if scale == "nano" else 16
        heads = kv_heads = embed // head_dim
    elif scale == "pico":  # one kv head keeps the 4 : 1 ratio exactly
        heads, kv_heads, head_dim = 4, 1, embed // 4
    else:
        head_dim = 8 if scale == "nano" else 16
        heads = embed // head_dim
        kv_heads = heads // 4
    return dataclasses.replace(
        full, name=f"{member}-family-{scale}", scale=scale, vocab=vocab, context=context, embed=embed,
        layers={"mini": 4, "small": 4, "medium": 5}[member] * _DEPTH[scale], heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, mlp=embed * 8 // 3 if member == "mini" else embed * 7 // 2, dummy_tokens=(),
        logit_divisor=1.0, mup=_proxy_mup(scale),
    )  # fmt: skip


def proxy(
    size: str, scale: str = "pico", ladder: str = "clean", *, vocab: int = 320, context: int = 4096
) -> ModelConfig:
    """A small stand-in that keeps the family's shape: non-embedding matrices 1 : 1.93 : 3.76.

    Args:
      size: "mini", "small", "medium", or on the clean ladder also "below", "mini-small", "small-medium", "above".
      scale: "pico" (k=16), "nano" (k=32) or "micro" (k=64): widths 3k/4k/5k, depths 4:4:5 (doubled at micro).
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
    if ladder == "width" and size not in _WIDTHS:
        raise UserError(f"size {size!r} is not on the width ladder; its sizes are {', '.join(_WIDTHS)}")
    if ladder != "family":
        return _clean(size, scale, ladder, vocab, context)
    if size not in MEMBERS:
        raise UserError(f"size {size!r} exists on the clean ladder only; with ladder=family use {', '.join(MEMBERS)}")
    return _family(size, scale, vocab, context)


def published_params(member: str) -> int | None:
    """Exact parameters of the released model a size stands for, or None for the in-between sizes."""
    return {"mini": 3_821_079_552, "small": 7_392_272_384, "medium": 13_960_238_080}.get(member)
