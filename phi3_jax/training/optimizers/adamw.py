"""AdamW (arXiv:1711.05101)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phi3_jax.configs import ModelConfig, OptimConfig
from phi3_jax.models.spec import Tree
from phi3_jax.training.optimizers.rule import Optimizer, under_mup


def adam(optim: OptimConfig) -> optax.GradientTransformation:
    """Adam's directions of a config, without decay and muP."""
    return optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps)


def _adam_of_adapters(optim: OptimConfig) -> optax.GradientTransformation:
    """`adam` with bias corrections that float32 does not round.

    1 - b^t is off by 1e-5 of itself there while t is small, which five steps of an adapter make visible beside torch's
    float64. Runs of whole models keep the rounded one, bit for bit.
    """
    inner, logs = adam(optim), [math.log(b) if b else -math.inf for b in (optim.b1, optim.b2)]

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        new = inner.update(grads, state, params)[1]
        first, second = (-jnp.expm1(new.count.astype(jnp.float32) * log) for log in logs)

        def one(m: jax.Array, v: jax.Array) -> jax.Array:
            return (m / first) / (jnp.sqrt(v / second) + optim.eps)

        return jax.tree.map(one, new.mu, new.nu), new

    return optax.GradientTransformation(inner.init, update)


def _make(optim: OptimConfig, model: ModelConfig, specs: Tree | None = None) -> optax.GradientTransformation:
    rule = adam(optim) if specs is None else _adam_of_adapters(optim)
    return under_mup(rule, optim, model, specs=specs)


OPTIMIZER = Optimizer(_make, state_bytes=lambda spec: 8, about="two fp32 Adam moments")
