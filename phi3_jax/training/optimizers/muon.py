"""Muon (https://kellerjordan.github.io/posts/muon): hidden matrices learn along their orthogonalised momentum, the rest
(embeddings, head, gains, biases) by AdamW.

The direction of a matrix is O sqrt(fan_out / fan_in), where the singular values of O are near 1. A step of that spectral
norm changes activations alike at every width (arXiv:2310.17813), so that `optim.peak_lr` moves to another width without
muP's factor 1 / m_N on hidden matrices; CompleteP's factor of depth stays. It is not AdamW's rate: an entry of such a
direction is of size 1 / sqrt(embed), one of Adam's of size 1.

A stored tensor holds several matrices: one per layer, and `qkv` and `gate_up` theirs side by side. Each is orthogonalised
alone, as Muon's author advises for queries, keys and values, and as Megatron's `split_qkv` and `split_glu` do. The heads of
a projection stay together (so does arXiv:2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from phi3_jax.configs import ModelConfig, OptimConfig
from phi3_jax.errors import UserError
from phi3_jax.models.layout import explicit
from phi3_jax.models.spec import Multipliers, ParamSpec, Tree, map_specs, multipliers, param_specs
from phi3_jax.training.optimizers.adamw import adam
from phi3_jax.training.optimizers.rule import Optimizer, under_mup

MOMENTUM = 0.95  # with Nesterov's step ahead and five Newton-Schulz iterations: its author's, and optax's defaults


def split(spec: ParamSpec, x: jax.Array) -> tuple[jax.Array, ...]:
    """The matrices of a stored tensor, each stacked over layers."""
    return tuple(jnp.split(x, np.cumsum(spec.parts)[:-1], spec.parts_axis)) if spec.parts else (x,)


def _join(spec: ParamSpec, matrices: tuple[jax.Array, ...]) -> jax.Array:
    """The inverse of `split`, each matrix times sqrt(fan_out / fan_in)."""

    def scaled(x: jax.Array) -> jax.Array:
        fan_in, fan_out = (math.prod(x.shape[i] for i in dims) for dims in (spec.inputs, spec.outputs))
        return math.sqrt(fan_out / fan_in) * x

    found = [scaled(x) for x in matrices]
    return jnp.concatenate(found, spec.parts_axis) if spec.parts else found[0]


def orthogonal(model: ModelConfig) -> optax.GradientTransformation:
    """Scaled orthogonal directions of hidden matrices; the other tensors of the tree are masked."""
    specs = param_specs(model)

    def each(change: Callable[[ParamSpec, Any], Any], tree: Any) -> Any:
        one = lambda spec, x: x if isinstance(x, optax.MaskedNode) else change(spec, x)  # noqa: E731
        return jax.tree.map(one, specs, tree, is_leaf=lambda x: isinstance(x, ParamSpec))

    def numbers(spec: ParamSpec) -> Any:  # of a matrix without the dimension of layers
        one = MuonDimensionNumbers(*(tuple(i - 1 for i in dims) for dims in (spec.inputs, spec.outputs)))
        return (one,) * max(1, len(spec.parts)) if spec.role == "hidden" else optax.MaskedNode()

    inner = scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=map_specs(numbers, specs))

    def directions(grads: Any, state: MuonState) -> tuple[Any, MuonState]:
        def layer(one: tuple[Any, Any]) -> tuple[Any, Any]:
            found, new = inner.update(one[0], state._replace(mu=one[1]))
            return found, new.mu

        # One layer after the other: where matrices are sharded, no more than one layer's are whole at a time.
        found, momentum = jax.lax.map(layer, (each(split, grads), state.mu))
        return each(_join, found), state._replace(count=optax.safe_increment(state.count), mu=momentum)

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        first = jax.tree.leaves(grads)[0]
        if not explicit(first):
            return directions(grads, state)
        # A matrix times itself has one sharded dimension meet another; the compiler decides what moves.
        mesh = jax.typeof(first).sharding.mesh
        kept = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (grads, state))
        found: tuple[Any, MuonState] = jax.sharding.auto_axes(directions, out_sharding=kept)(grads, state)
        return found

    return optax.GradientTransformation(lambda params: inner.init(each(split, params)), update)


def _factors(model: ModelConfig, spec: ParamSpec) -> Multipliers:
    """As AdamW's, but for hidden matrices: no factor of width on the rate, and the same decay rate x lr."""
    found = multipliers(model, spec)
    if spec.role != "hidden":
        return found
    return Multipliers(found.lr * model.width_ratio, found.weight_decay / model.width_ratio, 1.0)


def _make(optim: OptimConfig, model: ModelConfig, specs: Tree | None = None) -> optax.GradientTransformation:
    if specs is not None:
        raise UserError("optim.name=muon learns whole matrices, not adapters; take optim.name=adamw")
    labels = map_specs(lambda spec: "muon" if spec.role == "hidden" else "adam", param_specs(model))
    both = optax.partition({"muon": orthogonal(model), "adam": adam(optim)}, labels)
    return under_mup(both, optim, model, _factors)


OPTIMIZER = Optimizer(
    _make,
    state_bytes=lambda spec: 4 if spec.role == "hidden" else 8,
    about="fp32 momentum of hidden matrices, two Adam moments of the rest",
    # Gradients, directions and momentum split into matrices, and the directions joined again; a layer's Newton-Schulz.
    update_bytes=lambda spec: 4 * 4 if spec.role == "hidden" else 0,
    layer_bytes=3 * 4,
)
