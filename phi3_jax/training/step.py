"""One training step and one evaluation step, as pure functions."""

from __future__ import annotations

import functools
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
from phi3_jax.models import decoder, lora, parts, vision
from phi3_jax.models.layout import explicit, per_device
from phi3_jax.models.spec import Tree, init_params, param_specs
from phi3_jax.sharding import rules
from phi3_jax.training import losses
from phi3_jax.training.objectives import Head, Loss
from phi3_jax.training.optimizers import optimizer

Batch = dict[str, jax.Array]
# XLA's options by platform. On TPUs collectives run beside other work, which on v5p and v6e they do not by themselves, and
# v5p's torus gathers weights, where it would add up what is mostly zeros (analysis/results/aot_matrix.md).
COMPILER: dict[str, dict[str, bool | str]] = {
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
        "xla_enable_all_gather_3d_emitter": True,
        "xla_tpu_enable_net_router_in_all_gather": False,
    }
}
WARM_STEPS = 50  # applied steps before the spike test has a mean to compare with


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `params` are what is trained: the model's, or adapters of it; `skipped` counts steps left
    out, `streak` those in a row up to now."""

    step: jax.Array
    params: Any
    opt: Any
    grad_norm_mean: jax.Array
    skipped: jax.Array
    streak: jax.Array


def specs_of(run: RunConfig) -> Tree:
    """Tree of `ParamSpec` of what a run trains."""
    return lora.adapter_specs(run.model, run.lora) if run.lora else param_specs(run.model)


def trained(tree: Tree, run: RunConfig) -> Tree:
    """What a run changes of a tree like its `params`: all of it, or some parts of a phi-3-vision (`models.parts`)."""
    return tree if run.lora else parts.taken(tree, run.parts)


def _first_params(run: RunConfig) -> Tree:
    return lora.init_adapters(run.model, run.lora, run.seed) if run.lora else init_params(run.model, run.seed)


def whole_params(params: Tree, frozen: Tree | None, run: RunConfig) -> Tree:
    """The model's parameters: of those that are trained, and of `frozen`, the others or, with adapters, all of them."""
    if run.lora:
        return lora.joined(frozen, params, run.model, run.lora)
    return params if frozen is None else parts.filled(frozen, params)


def init_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Fresh state, created sharded."""
    shardings = rules.param_shardings(specs_of(run), run.strategy, mesh)
    params = jax.jit(lambda: _first_params(run), out_shardings=shardings)()

    return jax.jit(functools.partial(_fresh, run))(params)


def abstract_state(run: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making any of it; for compiling ahead of time and restoring."""
    shardings = rules.param_shardings(specs_of(run), run.strategy, mesh)
    state = jax.eval_shape(lambda: _fresh(run, _first_params(run)))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, shardings)
    return jax.eval_shape(functools.partial(_fresh, run), params)


def _fresh(run: RunConfig, params: Any) -> TrainState:
    zero = jnp.int32(0)
    return TrainState(zero, params, _rule(run).init(trained(params, run)), jnp.float32(0), zero, zero)


def _rule(run: RunConfig) -> optax.GradientTransformation:
    some = specs_of(run) if run.lora else trained(param_specs(run.model), run) if run.model.vision else None
    return optimizer(run.optim.name).make(run.optim, run.model, some)


def _hidden(params: Any, batch: Batch, run: RunConfig) -> jax.Array:
    layout, dtype, pictures = rules.layout_of(run.strategy), jnp.dtype(run.dtype), None
    if "tiles" in batch:
        again = run.remat != "none"
        pictures = vision.rows_of(params, batch["tiles"], run.model, dtype, layout, again, run.unroll), batch["index"]
    return decoder.hidden_states(
        params, batch["tokens"], run.model, positions=batch["positions"], segments=batch["segments"],
        dtype=dtype, remat=run.remat, unroll=run.unroll, attention=run.attention, layout=layout, pictures=pictures,
    )  # fmt: skip


def loss_index(domains: np.ndarray, shards: int, capacity: int) -> np.ndarray:
    """(shards, capacity) positions with a loss in each data shard's flattened rows, ascending, then out of range."""
    flat = domains.reshape(shards, -1)
    index = flat.shape[1] + np.broadcast_to(np.arange(capacity, dtype=np.int32), (shards, capacity)).copy()
    for i in range(shards):
        found = np.flatnonzero(flat[i])
        index[i, : found.size] = found
    return index


def _select(hidden: jax.Array, batch: Batch, fields: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """Hidden states and fields of a batch at the positions that carry a loss.

    `loss_index` (shards, capacity) points into each data shard's flattened positions; slots past a shard's targets
    point past the end and come out with weight 0.
    """
    index = batch.get("loss_index")
    arrays = (hidden, *(batch[name] for name in fields))
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


def batch_loss(
    params: Any, batch: Batch, run: RunConfig, loss: Loss
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """The sum to minimise of a (micro)batch that carries the objective's weights; the nll sum of each domain, and the
    objective's further sums."""
    model, layout, objective = run.model, rules.layout_of(run.strategy), loss.objective
    hidden, domains, *fields = _select(_hidden(params, batch, run), batch, ("domains", *objective.fields))
    output: jax.Array = decoder.output_matrix(params, model)  # type: ignore[assignment]  # quantised ones are not trained
    matrix = layout.gather(output.astype(hidden.dtype), whole=True)
    head = Head(matrix, decoder.dummy_mask(model), decoder.logit_scale(model))
    total, nll, extra = objective.loss(hidden, head, dict(zip(objective.fields, fields, strict=True)), run.optim)
    members = domains[..., None] == jnp.arange(1, len(loss.domains) + 1)
    sums = jnp.sum(jnp.where(members, jax.lax.stop_gradient(nll)[..., None], 0.0), axis=(0, 1))
    return total, (sums, dict(extra))


def _strided(x: jax.Array, parts: int) -> jax.Array:
    """(rows, ...) -> (parts, rows / parts, ...), the rows split over devices as they were."""
    rows, *others = jax.typeof(x).sharding.spec.partitions if explicit(x) else [None] * x.ndim
    spec = P(rows, None, *others) if explicit(x) else None
    return jnp.moveaxis(jax.lax.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:]), out_sharding=spec), 1, 0)


def loss_and_grads(
    params: Any, batch: Batch, run: RunConfig, loss: Loss, frozen: Any = None
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Loss, metrics (loss/<domain>, its mean nll, and the objective's own) and gradients of a global batch, over
    `run.accumulation` microbatches. `frozen` are the parameters that a run of adapters does not train, or of which
    `params` are some.

    Weights are set by the whole batch before it is cut, so that accumulation changes nothing but memory.

    Raises:
      UserError: the batch has not all fields that the objective reads.
    """
    count, in_step = len(loss.domains), loss.objective.reference == "frozen"
    batch = batch | loss.objective.weigh(batch, loss)
    made = {"reference"} if in_step else set()
    if missing := [name for name in loss.objective.fields if name not in batch and name not in made]:
        raise UserError(
            f"the objective {loss.objective.name} reads {', '.join(missing)}, which the data lack (they have "
            f"{', '.join(sorted(batch))}); train on a data set that brings them"
        )
    sizes = jnp.sum(batch["domains"][..., None] == jnp.arange(1, count + 1), axis=(0, 1))

    def of_trained(params: Any, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        if in_step:
            nll = eval_step(frozen, batch, run)["nll"]
            batch = batch | {"reference": jnp.where(batch["domains"] > 0, -nll, 0.0)}
        return batch_loss(whole_params(params, frozen, run), batch, run, loss)

    grad_fn = jax.value_and_grad(of_trained, has_aux=True)
    micros = run.accumulation

    def named(sums: jax.Array, extra: dict[str, jax.Array]) -> dict[str, jax.Array]:
        means = sums / sizes
        return {f"loss/{name}": means[i] for i, name in enumerate(loss.domains)} | extra

    if micros == 1:
        (total, aux), grads = grad_fn(params, batch)
        return total, named(*aux), grads
    # Row i of every stride goes to microbatch i: rows stay on the device that holds them.
    cut = {k: _strided(x, micros) for k, x in batch.items()}

    def add(carry: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad_fn(params, micro)), None

    shapes = jax.eval_shape(lambda p, b: grad_fn(p, {k: x[0] for k, x in b.items()})[0], params, cut)
    zeros = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.tree.map(jnp.zeros_like, params))
    ((total, aux), grads), _ = jax.lax.scan(add, zeros, cut)
    return total, named(*aux), grads


def train_step(
    state: TrainState, batch: Batch, lr: jax.Array, run: RunConfig, loss: Loss, frozen: Any = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. A step whose loss or gradient is not finite, or whose gradient norm exceeds `spike_factor` times
    its running mean, changes nothing but the counters and that mean.

    Of a step that is skipped for its norm the mean takes the largest norm that it allows: by some 40 % at a factor of 20. A
    batch that is odd is left out, and gradients that stay large, which the parameters cause and no other batch mends, are
    clipped and applied after a few steps.

    Args:
      state: donated by `compile_steps`.
      batch: global batch of (batch, time) arrays: tokens, targets, segments, positions, domains; with pictures also index,
        and the tiles and tile_count of `data.gallery.Sight`.
      lr: scalar learning rate.
      frozen: the model's parameters where adapters of it are trained.

    Returns:
      New state; metrics: loss (weighted, nats), grad_norm, skipped, and those of `loss_and_grads`.
    """
    old = trained(state.params, run)
    total, means, grads = loss_and_grads(old, batch, run, loss, frozen if run.lora else state.params)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    applied = state.step - state.skipped
    allowed = run.optim.spike_factor * state.grad_norm_mean
    calm = (applied < WARM_STEPS) | (norm <= allowed)
    ok = finite & (calm if run.optim.spike_factor else True)
    if run.optim.clip:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, run.optim.clip / norm), grads)
    updates, opt = _rule(run).update(grads, state.opt, old)
    params = jax.tree.map(lambda p, u: p - lr * u, old, parts.scaled(updates, run.parts))
    mean = jnp.where(applied == 0, norm, 0.98 * state.grad_norm_mean + 0.02 * jnp.where(ok, norm, allowed))
    keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
    new = TrainState(
        step=state.step + 1,
        params=parts.filled(state.params, jax.tree.map(keep, params, old)),
        opt=jax.tree.map(keep, opt, state.opt),
        grad_norm_mean=jnp.where(finite, mean, state.grad_norm_mean),
        skipped=state.skipped + jnp.where(ok, 0, 1),
        streak=jnp.where(ok, 0, state.streak + 1),
    )
    metrics = {"loss": total, "grad_norm": norm, "skipped": new.skipped, "streak": new.streak}
    if "tiles" in batch:
        metrics |= {"tiles": jnp.sum(batch["tile_count"]), "tiles_padded": jnp.int32(batch["tiles"].shape[0])}
    return new, metrics | means


def eval_step(params: Any, batch: Batch, run: RunConfig) -> dict[str, jax.Array]:
    """Per position (batch, time) the nll (nats), what is said (the id of the largest logit) and its probability `sure`, and
    whether it is the target.
    """
    model, layout = run.model, rules.layout_of(run.strategy)
    hidden = _hidden(params, batch, run)
    params = layout.gather({k: v for k, v in params.items() if k != "blocks"}, whole=True)

    def part(hidden: jax.Array, targets: jax.Array, params: Any) -> tuple[jax.Array, ...]:
        def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
            logits = decoder.logits_of(xs[0], params, model)
            picked = jnp.take_along_axis(logits, xs[1][..., None], axis=-1)[..., 0]
            total = jax.nn.logsumexp(logits, axis=-1)
            return None, (total - picked, jnp.argmax(logits, axis=-1), jnp.exp(logits.max(axis=-1) - total))

        return losses.over_chunks(chunk, None, (hidden, targets), model.vocab)[1]

    whole, rows, _ = losses.specs(hidden)
    nll, said, sure = per_device(part, (whole, rows, P()), (rows, rows, rows), hidden, batch["targets"], params)
    return {"nll": nll, "hit": said == batch["targets"], "said": said, "sure": sure}


def compile_steps(
    run: RunConfig, loss: Loss, platform: str | None = None
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Jitted (train_step(state, batch, lr), eval_step(params, batch)); the training state is donated.

    In a run of adapters both take the model's parameters as one argument more. `platform` is that of the devices, without
    it jax's default.

    Raises:
      UserError: a mixture of experts, whose released routing is for inference (no gradient of the router, no jitter).
    """
    if run.model.experts:
        raise UserError(
            f"{run.model.name} cannot be trained here: its routing is inference's; take {', '.join(MEMBERS)}"
        )

    def train(
        state: TrainState, batch: Batch, lr: jax.Array, frozen: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(state, batch, lr, run, loss, frozen)

    def evaluate(params: Any, batch: Batch, frozen: Any = None) -> dict[str, jax.Array]:
        return eval_step(whole_params(params, frozen, run), batch, run)

    options = COMPILER.get(platform or jax.default_backend())
    return jax.jit(train, donate_argnums=0, compiler_options=options), jax.jit(evaluate)
