"""AdamW with muP multipliers per tensor, and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from phi3_jax.configs import ModelConfig, OptimConfig, RunConfig
from phi3_jax.models.spec import map_specs, multipliers, param_specs


def adamw(optim: OptimConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Update directions (to be multiplied by -learning rate) of AdamW under muP/CompleteP.

    A tensor's epsilon multiplier c is applied by dividing its gradient by c: m/c / (sqrt(v)/c + eps) equals
    m / (sqrt(v) + c eps).
    """
    specs = param_specs(model)
    factors = {
        key: map_specs(lambda s, key=key: getattr(multipliers(model, s), key), specs)
        for key in ("lr", "weight_decay", "eps")
    }

    def scale_gradients(grads: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda g, c: g / c if c != 1 else g, grads, factors["eps"])

    def decay_and_scale(updates: Any, params: Any) -> Any:
        def one(u: jax.Array, p: jax.Array, wd: float, lr: float) -> jax.Array:
            decay = optim.weight_decay * wd
            return (u + decay * p if decay else u) * lr

        return jax.tree.map(one, updates, params, factors["weight_decay"], factors["lr"])

    return optax.chain(
        optax.stateless(scale_gradients),
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.stateless(decay_and_scale),
    )


def learning_rate(run: RunConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then WSD or cosine.

    WSD: constant until the last `decay` fraction of the run, then linear to `final_lr` times the peak
    (MiniCPM arXiv:2404.06395; Haegele et al. arXiv:2405.18392). The warm-up is a fraction of the trunk's
    steps, so that all forks share it. Cosine: over the whole run, to the same floor.
    """
    optim = run.optim
    warmup = max(1, round(optim.warmup * (run.trunk_steps or run.steps)))
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    floor = optim.final_lr
    if optim.schedule == "cosine":
        progress = (step - warmup) / max(1, run.steps - warmup)
        return optim.peak_lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    start = decay_start(run.steps, optim.decay)
    if step < start:
        return optim.peak_lr
    return optim.peak_lr * (1 - (1 - floor) * (step - start + 1) / (run.steps - start))


def decay_start(steps: int, decay: float) -> int:
    """First step of the final decay of a WSD run; forks leave the trunk here."""
    return steps - max(1, round(decay * steps))
