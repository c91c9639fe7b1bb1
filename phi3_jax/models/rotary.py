"""Rotary position embedding, with LongRoPE's two factor lists.

Rotate-half ("neox") over the whole head_dim. The rules of each member are those of its released code and config.json.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import LongRope, ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.models.layout import explicit, join, per_device, spec_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

REGIMES = ("auto", "short", "long")


def attention_factor(longrope: LongRope, context: int, long: bool) -> float:
    """Factor on cos and sin: sqrt(1 + ln(context/original)/ln(original)), or phi-3-small's mscales.

    A config's own short_mscale (up to the original context) or long_mscale (beyond) is taken where it is set and > 0:
    phi-3-small, phi-3.5-MoE. Otherwise mini and medium use the formula at every length, phi-3-small beyond the original
    context only (1 before).
    """
    derived = 1.0
    if context > longrope.original_context:
        derived = math.sqrt(1 + math.log(context / longrope.original_context) / math.log(longrope.original_context))
    given = longrope.long_mscale if long else longrope.short_mscale
    if given and given > 0:
        return given
    return derived if long or longrope.mscale_when_short else 1.0


def reaches_beyond(
    positions: Int[jax.Array, "b t"], segments: Int[jax.Array, "b t"] | None, context: int
) -> Bool[jax.Array, "b t"] | Bool[jax.Array, "b 1"]:
    """Whether the last position of each token's own document is `context` or more.

    A document is what attention keeps together: the tokens of a row that have one number. So padding, which has a number
    of its own, counts for no document.

    Args:
      segments: document numbers, any integers; None: each row is one document, and the result one column.
      context: in tokens.
    """
    if segments is None:
        return jnp.max(positions, axis=-1, keepdims=True) >= context

    def part(positions: jax.Array, segments: jax.Array) -> jax.Array:
        # The last entry with a token's number, in the order of (number, position), is its document's end.
        numbers, ordered = jax.lax.sort((segments, positions), dimension=1, num_keys=2)
        after = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(numbers, segments)
        return jnp.take_along_axis(ordered, after - 1, axis=1) >= context

    batch, time = map(join, spec_of(positions))
    rows = P(batch, None)  # whole rows on each device: a document may lie on several
    found = per_device(part, (rows, rows), rows, positions, segments)
    return jax.reshard(found, P(batch, time)) if explicit(found) else found


def _frequencies(cfg: ModelConfig, which: str | None) -> tuple[np.ndarray, float]:
    """Radians per position (head_dim/2,), float64, and the factor on cos and sin, of one LongRoPE list or none."""
    half = cfg.head_dim // 2
    inverse = 1.0 / cfg.rope_base ** (np.arange(half, dtype=np.float64) * 2 / cfg.head_dim)
    if cfg.longrope is None or which is None:
        return inverse, 1.0
    factors = getattr(cfg.longrope, which)
    if factors is None:
        raise UserError(
            f"{cfg.name}: the {which} LongRoPE list is in no public source; take it from the checkpoint's "
            f"config.json, or ask for rope_regime={'long' if which == 'short' else 'short'!r}"
        )
    scale = attention_factor(cfg.longrope, cfg.context, which == "long")
    return inverse / np.asarray(factors, np.float64), scale


def rope_table(
    positions: Int[jax.Array, "b t"],
    cfg: ModelConfig,
    regime: str | Bool[jax.Array, " b"] | Bool[jax.Array, "b t"] = "auto",
    dtype: jnp.dtype = jnp.float32,
    segments: Int[jax.Array, "b t"] | None = None,
) -> Float[jax.Array, "b t 2 k/2"]:
    """cos and sin for every position.

    Args:
      regime: which LongRoPE list; "auto" decides per document: long when its last position + 1 exceeds the original
        context. Or booleans, true for long: decoding decides before it knows the last position. Ignored without LongRoPE.
      dtype: compute dtype of the model; the table is in float32 or wider.
      segments: document numbers, for "auto"; None: each row is one document.
    """
    if isinstance(regime, str) and regime not in REGIMES:
        raise UserError(f"rope_regime={regime!r}; valid: {', '.join(REGIMES)}")
    dtype = jnp.promote_types(dtype, jnp.float32)
    one_list = regime if isinstance(regime, str) and regime != "auto" else None
    scale: float | jax.Array
    if cfg.longrope is None or one_list:
        frequencies, scale = _frequencies(cfg, one_list)
        inverse = jnp.asarray(frequencies, dtype)
    else:
        long, short = _frequencies(cfg, "long"), _frequencies(cfg, "short")
        if isinstance(regime, str):
            regime = reaches_beyond(positions, segments, cfg.longrope.original_context)
        is_long = regime[..., None] if regime.ndim == 2 else regime[:, None, None]
        inverse = jnp.where(is_long, jnp.asarray(long[0], dtype), jnp.asarray(short[0], dtype))
        scale = jnp.where(is_long, jnp.asarray(long[1], dtype), jnp.asarray(short[1], dtype))[..., None]
    return _table(positions, inverse, scale)


def table_of(
    positions: Int[jax.Array, "b t"],
    cfg: ModelConfig,
    factors: Float[jax.Array, " k/2"],
    scale: Float[jax.Array, ""],
) -> Float[jax.Array, "b t 2 k/2"]:
    """As `rope_table`, of one list at every position that is an argument of the program and has a gradient.

    Args:
      cfg: of which head_dim and rope_base count.
      factors: by which the frequencies are divided; the table is in their dtype.
      scale: on cos and sin.
    """
    return _table(positions, jnp.asarray(_frequencies(cfg, None)[0], factors.dtype) / factors, scale)


def _table(positions: jax.Array, inverse: jax.Array, scale: float | jax.Array) -> jax.Array:
    angles = positions.astype(inverse.dtype)[..., None] * inverse
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-2) * scale


@jax.custom_vjp
def rotate(x: Float[jax.Array, "b t g r k"], table: Float[jax.Array, "b t 2 k/2"]) -> Float[jax.Array, "b t g r k"]:
    """Rotates by a table of `rope_table`; float32 or wider inside.

    The gradient of x is the opposite rotation, written out because the automatic one pads and adds both halves. x is kept
    for the table's gradient only where that is asked for, which training does not.
    """
    return _rotation(x, table, 1.0)


def _rotation(x: jax.Array, table: jax.Array, sign: float) -> jax.Array:
    cos, sin = (table[:, :, None, None, i, :] for i in (0, 1))
    sin = sin * sign
    first, second = _halves(x)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _halves(x: jax.Array) -> list[jax.Array]:
    return jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)


def _rotate_forward(x: Any, table: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return _rotation(x.value, table.value, 1.0), (table.value, x.value if table.perturbed else None)


def _rotate_backward(
    kept: tuple[jax.Array, jax.Array | None], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    table, x = kept
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, cotangent.dtype)
    of_table = None
    if x is not None:
        (first, second), (up, down) = _halves(x), _halves(cotangent)
        parts = [up * first + down * second, down * first - up * second]
        of_table = jnp.stack([part.sum((2, 3)) for part in parts], axis=2).astype(table.dtype)
    return _rotation(cotangent, table, -1.0), of_table


rotate.defvjp(_rotate_forward, _rotate_backward, symbolic_zeros=True)
