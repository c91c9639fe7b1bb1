"""An objective is a value: the step takes any, gathers the fields it reads, and names a field that is not there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import UserError, family
from phi3_jax.configs import DataConfig, OptimConfig, RunConfig
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import objectives, step

ROWS, TIME = 4, 12


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(0, most, (ROWS, TIME)).astype(np.int32)  # noqa: E731
    domains = (rng.random((ROWS, TIME)) < 0.4).astype(np.int32)
    positions = np.tile(np.arange(TIME, dtype=np.int32), (ROWS, 1))
    return {
        "tokens": draw(320), "targets": draw(320), "other": draw(320), "domains": domains, "positions": positions,
        "segments": np.ones((ROWS, TIME), np.int32),
    }  # fmt: skip


def gradients(
    objective: objectives.Objective, data: dict[str, np.ndarray], accumulation: int = 1, gather: bool = False
):
    model = dataclasses.replace(family.proxy("mini", "pico"), layers=2)
    model = dataclasses.replace(model, mup=dataclasses.replace(model.mup, head_zero_init=False))
    run = RunConfig("x", model, OptimConfig(z_loss=1e-3), DataConfig("f", "", "", TIME, 320), ROWS, 100, unroll=False)
    run = dataclasses.replace(run, accumulation=accumulation)
    mesh = make_mesh(jax.devices()[:1])
    if gather:
        data = data | {"loss_index": step.loss_index(data["domains"], 1, TIME * ROWS)}
    with jax.set_mesh(mesh):
        params = step.init_state(run, mesh).params
        data = jax.device_put(data, rules.batch_sharding(run.strategy, mesh))
        loss = objectives.Loss(("x",), False, TIME * ROWS if gather else None, objective)
        return jax.tree.map(np.asarray, jax.jit(lambda p, b: step.loss_and_grads(p, b, run, loss))(params, data))


def likelihood_of_others(hidden, head, fields, optim):
    """Half the nll of another field, in whole logits: what `cross_entropy` is not."""
    logits = jnp.einsum("bpd,dv->bpv", hidden, head.matrix) * head.scale
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, fields["other"][..., None], axis=-1)[..., 0]
    return objectives.Terms(0.5 * jnp.sum(fields["weights"] * nll), jax.lax.stop_gradient(nll), {})


OTHER = objectives.Objective("other", ("other", "weights"), likelihood_of_others)


@pytest.mark.parametrize("accumulation,gather", [(1, False), (2, False), (1, True)])
def test_the_step_minimises_the_objective_it_is_given(accumulation: int, gather: bool) -> None:
    data = batch()
    swapped = data | {"targets": data["other"]}
    plain = dataclasses.replace(
        objectives.CROSS_ENTROPY,
        loss=lambda h, head, f, optim: objectives.CROSS_ENTROPY.loss(
            h, head, f, dataclasses.replace(optim, z_loss=0.0)
        ),
    )
    total, means, grads = gradients(OTHER, data, accumulation, gather)
    expected, nll, theirs = gradients(plain, swapped)
    np.testing.assert_allclose([2 * total, means["loss/x"]], [expected, nll["loss/x"]], rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, rtol=1e-3, atol=2e-6), grads, theirs)
    assert abs(gradients(objectives.CROSS_ENTROPY, data)[0] - expected) > 1e-3  # the fields differ, and z_loss counts


def test_a_field_that_the_batch_lacks_is_one_line() -> None:
    objective = objectives.Objective("preferred", ("targets", "rewards"), OTHER.loss)
    with pytest.raises(
        UserError, match=r"objective preferred reads rewards, which the data lack \(they have domains, .*"
    ):
        gradients(objective, batch())
