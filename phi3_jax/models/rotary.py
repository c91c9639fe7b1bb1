"""Rotary position embedding, with LongRoPE's two factor lists.

Rotate-half ("neox") over the whole head_dim. Rules per member: facts of the released code, config.json of each.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import LongRope, ModelConfig
from phi3_jax.errors import UserError

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


def _table(
    positions: jax.Array, cfg: ModelConfig, factors: tuple[float, ...] | None, scale: float, dtype: jnp.dtype
) -> jax.Array:
    """cos and sin (batch, time, 2, head_dim/2) for one factor list."""
    half = cfg.head_dim // 2
    inverse = 1.0 / cfg.rope_base ** (np.arange(half, dtype=np.float64) * 2 / cfg.head_dim)
    if factors is not None:
        inverse = inverse / np.asarray(factors, np.float64)
    angles = positions.astype(dtype)[..., None] * jnp.asarray(inverse, dtype)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-2) * scale


def rope_table(
    positions: jax.Array, cfg: ModelConfig, regime: str | jax.Array = "auto", dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """cos and sin for every position: (batch, time, 2, head_dim/2).

    Args:
      positions: (batch, time) integers.
      regime: which LongRoPE list; "auto" decides per sequence: long when max(position) + 1 exceeds the original
        context. Or (batch,) booleans, true for long: decoding decides before it knows the last position. Ignored without
        LongRoPE.
      dtype: compute dtype of the model; the table is in float32 or wider.
    """
    given = not isinstance(regime, str)
    if not given and regime not in REGIMES:
        raise UserError(f"rope_regime={regime!r}; valid: {', '.join(REGIMES)}")
    dtype = jnp.promote_types(dtype, jnp.float32)
    rope = cfg.longrope
    if rope is None:
        return _table(positions, cfg, None, 1.0, dtype)
    tables = {}
    for which in ("short", "long") if given or regime == "auto" else (regime,):
        factors = getattr(rope, which)
        if factors is None:
            raise UserError(
                f"{cfg.name}: the {which} LongRoPE list is in no public source; take it from the checkpoint's "
                f"config.json, or ask for rope_regime={'long' if which == 'short' else 'short'!r}"
            )
        tables[which] = _table(positions, cfg, factors, attention_factor(rope, cfg.context, which == "long"), dtype)
    if not given and regime != "auto":
        return tables[regime]
    is_long = regime if given else jnp.max(positions, axis=-1) + 1 > rope.original_context
    return jnp.where(is_long[:, None, None, None], tables["long"], tables["short"])


@jax.custom_vjp
def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates x (batch, time, groups, heads, head_dim) by a table of `rope_table`; float32 or wider inside.

    No gradient flows to the table. The gradient of x is the opposite rotation, written out because the
    automatic one pads and adds both halves.
    """
    return _rotation(x, table, 1.0)


def _rotation(x: jax.Array, table: jax.Array, sign: float) -> jax.Array:
    cos, sin = (table[:, :, None, None, i, :] for i in (0, 1))
    sin = sin * sign
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotate_backward(table: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return _rotation(cotangent, table, -1.0), None


rotate.defvjp(lambda x, table: (_rotation(x, table, 1.0), table), _rotate_backward)
