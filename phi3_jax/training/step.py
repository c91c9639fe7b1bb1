"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import RunConfig
from phi3_jax.errors import UserError
from phi3_jax.family import MEMBERS
from phi3_jax.models import decoder
from phi3_jax.models.layout import per_device
from phi3_jax.models.spec import init_params, param_specs
from phi3_jax.sharding import rules
from phi3_jax.training import losses
from phi3_jax.training.optimizer import adamw

Batch = dict[str, jax.Array]
WARM_STEPS = 50  # applied steps before the spike test has a mean to compare with


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `skipped` counts steps left out, `streak` those in a row up to now."""

    step: jax.Array
    params: Any
    opt: Any
    grad_norm_mean: jax.Array
    skipped: jax.Array
    streak: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the loss of a batch is made of: the names of its domains, and whether each weighs the same."""

    domains: tuple[str, ...]
    domain_mean: bool
    capacity: int | None = None  # upper bound of loss positions a batch and data shard; None = no gathering


def init_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Fresh state, created sharded."""
    shardings = rules.param_shardings(param_specs(run.model), run.strategy, mesh)
    params = jax.jit(lambda: init_params(run.model, run.seed), out_shardings=shardings)()

    return jax.jit(functools.partial(_fresh, run))(params)


def abstract_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making any of it; for compiling ahead of time and restoring."""
    shardings = rules.param_shardings(param_specs(run.model), run.strategy, mesh)
    state = jax.eval_shape(lambda: _fresh(run, init_params(run.model, run.seed)))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, shardings)
    return jax.eval_shape(functools.partial(_fresh, run), params)


def _fresh(run: RunConfig, params: Any) -> TrainState:
    zero = jnp.int32(0)
    return TrainState(zero, params, adamw(run.optim, run.model).init(params), jnp.float32(0), zero, zero)


def _hidden(params: Any, batch: Batch, run: RunConfig) -> jax.Array:
    return decoder.hidden_states(
        params, batch["tokens"], run.model, positions=batch["positions"], segments=batch["segments"],
        dtype=jnp.dtype(run.dtype), remat=run.remat, unroll=run.unroll, attention=run.attention,
        layout=rules.layout_of(run.strategy),
    )  # fmt: skip


def loss_index(domains: np.ndarray, shards: int, capacity: int) -> np.ndarray:
    """(shards, capacity) positions with a loss in each data shard's flattened rows, ascending, then out of range."""
    flat = domains.reshape(shards, -1)
    index = flat.shape[1] + np.broadcast_to(np.arange(capacity, dtype=np.int32), (shards, capacity)).copy()
    for i in range(shards):
        found = np.flatnonzero(flat[i])
        index[i, : found.size] = found
    return index


def _select(hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Hidden states, targets, weights, domains at the positions that carry a loss.

    `loss_index` (shards, capacity) points into each data shard's flattened positions; slots past a shard's targets
    point past the end and come out with weight 0.
    """
    index = batch.get("loss_index")
    arrays = (hidden, batch["targets"], batch["weights"], batch["domains"])
    if index is None:
        return arrays
    shards = index.shape[0]
    picked = []
    for x in arrays:
        spec = jax.typeof(batch["tokens"]).sharding.spec
        flat = (shards, x.shape[0] * x.shape[1] // shards, *x.shape[2:])
        x = jax.lax.reshape(x, flat, out_sharding=P(spec[0], *[None] * (len(flat) - 1)))
        picked.append(
            jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True))(
                x, index
            )
        )
    return tuple(picked)


def batch_loss(params: Any, batch: Batch, run: RunConfig, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """Weighted loss of a (micro)batch that carries `weights`, and the weighted nll sum of each domain."""
    model, layout = run.model, rules.layout_of(run.strategy)
    hidden, targets, weights, domains = _select(_hidden(params, batch, run), batch)
    matrix = layout.gather(decoder.output_matrix(params, model).astype(hidden.dtype), whole=True)
    mask, scale = decoder.dummy_mask(model), decoder.logit_scale(model)
    total, nll = losses.weighted_cross_entropy(hidden, matrix, targets, weights, mask, scale, run.optim.z_loss)
    members = domains[..., None] == jnp.arange(1, len(loss.domains) + 1)
    sums = jnp.sum(jnp.where(members, jax.lax.stop_gradient(nll)[..., None], 0.0), axis=(0, 1))
    return total, sums


def loss_and_grads(params: Any, batch: Batch, run: RunConfig, loss: Loss) -> tuple[jax.Array, jax.Array, Any]:
    """(loss, mean nll of each domain, gradients) of a global batch, over `run.accumulation` microbatches.

    Weights are set by the whole batch before it is cut, so that accumulation changes nothing but memory.
    """
    count = len(loss.domains)
    batch = batch | {"weights": losses.target_weights(batch["domains"], count, loss.domain_mean)}
    sizes = jnp.sum(batch["domains"][..., None] == jnp.arange(1, count + 1), axis=(0, 1))
    grad_fn = jax.value_and_grad(batch_loss, has_aux=True)
    parts = run.accumulation
    if parts == 1:
        (total, sums), grads = grad_fn(params, batch, run, loss)
        return total, sums / sizes, grads
    # Row i of every stride goes to microbatch i: rows stay on the device that holds them.
    cut = {k: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0) for k, x in batch.items()}

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        (total, sums), grads = grad_fn(params, micro, run, loss)
        return jax.tree.map(jnp.add, carry, (total, sums, grads)), None

    zeros = (jnp.float32(0), jnp.zeros(count), jax.tree.map(jnp.zeros_like, params))
    (total, sums, grads), _ = jax.lax.scan(add, zeros, cut)
    return total, sums / sizes, grads


def train_step(
    state: TrainState, batch: Batch, lr: jax.Array, run: RunConfig, loss: Loss
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A step whose loss or gradient is not finite, or whose gradient norm exceeds `spike_factor` times
    its running mean, changes nothing but the counters.

    Args:
      state: donated by `compile_steps`.
      batch: global batch of (batch, time) arrays: tokens, targets, segments, positions, domains.
      lr: scalar learning rate.

    Returns:
      New state; metrics: loss (weighted, nats), loss/<domain> (mean nll, nats a target), grad_norm, skipped.
    """
    total, means, grads = loss_and_grads(state.params, batch, run, loss)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    applied = state.step - state.skipped
    calm = (applied < WARM_STEPS) | (norm <= run.optim.spike_factor * state.grad_norm_mean)
    ok = finite & (calm if run.optim.spike_factor else True)
    if run.optim.clip:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, run.optim.clip / norm), grads)
    updates, opt = adamw(run.optim, run.model).update(grads, state.opt, state.params)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
    mean = jnp.where(applied == 0, norm, 0.98 * state.grad_norm_mean + 0.02 * norm)
    keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
    new = TrainState(
        step=state.step + 1,
        params=jax.tree.map(keep, params, state.params),
        opt=jax.tree.map(keep, opt, state.opt),
        grad_norm_mean=keep(mean, state.grad_norm_mean),
        skipped=state.skipped + jnp.where(ok, 0, 1),
        streak=jnp.where(ok, 0, state.streak + 1),
    )
    metrics = {"loss": total, "grad_norm": norm, "skipped": new.skipped, "streak": new.streak}
    return new, metrics | {f"loss/{name}": means[i] for i, name in enumerate(loss.domains)}


def eval_step(params: Any, batch: Batch, run: RunConfig) -> dict[str, jax.Array]:
    """Per-position nll (nats) and whether the largest logit is the target; both (batch, time)."""
    model, layout = run.model, rules.layout_of(run.strategy)
    hidden = _hidden(params, batch, run)
    params = layout.gather({k: v for k, v in params.items() if k != "blocks"}, whole=True)

    def part(hidden: jax.Array, targets: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            logits = decoder.logits_of(xs[0], params, model)
            picked = jnp.take_along_axis(logits, xs[1][..., None], axis=-1)[..., 0]
            return None, (jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == xs[1])

        return losses.over_chunks(chunk, None, (hidden, targets), model.vocab)[1]

    whole, rows, _ = losses.specs(hidden)
    nll, hit = per_device(part, (whole, rows, P()), (rows, rows), hidden, batch["targets"], params)
    return {"nll": nll, "hit": hit}


def compile_steps(run: RunConfig, loss: Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Jitted (train_step(state, batch, lr), eval_step(params, batch)); the training state is donated.

    Raises:
      UserError: a mixture of experts, whose released routing is for inference (no gradient of the router, no jitter).
    """
    if run.model.experts:
        raise UserError(
            f"{run.model.name} cannot be trained here: its routing is inference's; take {', '.join(MEMBERS)}"
        )

    def train(state: TrainState, batch: Batch, lr: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(state, batch, lr, run, loss)

    return jax.jit(train, donate_argnums=0), jax.jit(lambda params, batch: eval_step(params, batch, run))
