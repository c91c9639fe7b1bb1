"""Lion (arXiv:2302.06675): the sign of an interpolated momentum; of Adam's size, at a rate three to ten times smaller."""

from __future__ import annotations

import optax

from phi3_jax.configs import ModelConfig, OptimConfig
from phi3_jax.models.spec import Tree
from phi3_jax.training.optimizers.rule import Optimizer, under_mup


def _make(optim: OptimConfig, model: ModelConfig, specs: Tree | None = None) -> optax.GradientTransformation:
    return under_mup(optax.scale_by_lion(b1=optim.b1, b2=optim.b2), optim, model, specs=specs)


OPTIMIZER = Optimizer(_make, state_bytes=lambda spec: 4, about="fp32 momentum")
