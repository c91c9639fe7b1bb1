"""What an optimiser is to this package, and how muP and weight decay go around any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from phi3_jax.configs import ModelConfig, OptimConfig
from phi3_jax.models.spec import Multipliers, ParamSpec, Tree, map_specs, multipliers, param_specs


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One optimiser, as the step and the memory plan ask for it.

    Attributes:
      make: make(optim, model, specs) gives the transformation from gradients to update directions, which the step
        multiplies by -learning rate; `specs` of what is trained, where that is not all of the model.
      state_bytes: bytes of its state per parameter of a tensor.
      about: that state in words, for a plan.
      update_bytes: bytes that live while directions are made, per parameter of a tensor that a device stores.
      layer_bytes: the same, per parameter of one layer, whole.
    """

    make: Callable[..., optax.GradientTransformation]
    state_bytes: Callable[[ParamSpec], int]
    about: str
    update_bytes: Callable[[ParamSpec], int] = lambda spec: 0
    layer_bytes: int = 0


def under_mup(
    inner: optax.GradientTransformation,
    optim: OptimConfig,
    model: ModelConfig,
    factors_of: Callable[[ModelConfig, ParamSpec], Multipliers] = multipliers,
    specs: Tree | None = None,
) -> optax.GradientTransformation:
    """`inner` with decoupled weight decay, and with the factors of each tensor under muP/CompleteP.

    A tensor's epsilon multiplier c is applied by dividing its gradient by c: m/c / (sqrt(v)/c + eps) equals
    m / (sqrt(v) + c eps).
    """
    specs = param_specs(model) if specs is None else specs

    def factors(name: str) -> Any:
        return map_specs(lambda spec: getattr(factors_of(model, spec), name), specs)

    rates, decays, epsilons = map(factors, ("lr", "weight_decay", "eps"))

    def scale_gradients(grads: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda g, c: g / c if c != 1 else g, grads, epsilons)

    def decay_and_scale(updates: Any, params: Any) -> Any:
        def one(u: jax.Array, p: jax.Array, wd: float, lr: float) -> jax.Array:
            decay = optim.weight_decay * wd
            return (u + decay * p if decay else u) * lr

        return jax.tree.map(one, updates, params, decays, rates)

    return optax.chain(optax.stateless(scale_gradients), inner, optax.stateless(decay_and_scale))
