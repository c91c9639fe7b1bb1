"""The training step: sharding, accumulation and gathering change nothing; bad steps change nothing but a counter."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import UserError, family
from phi3_jax.configs import DataConfig, OptimConfig, RunConfig, decay_start
from phi3_jax.models.spec import param_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import step
from phi3_jax.training.schedule import learning_rate

ROWS, TIME = 16, 24
LOSS = step.Loss(("knowledge", "reasoning"), True)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    domains = np.where(np.arange(ROWS)[:, None] % 4 == 0, 1, 2) * (rng.random((ROWS, TIME)) < 0.4)
    out = {
        "tokens": rng.integers(0, 320, (ROWS, TIME)), "targets": rng.integers(0, 320, (ROWS, TIME)),
        "segments": np.repeat([[1] * 8 + [2] * 8 + [3] * 8], ROWS, 0), "domains": domains,
        "positions": np.tile(np.arange(8), (ROWS, 3)),
    }  # fmt: skip
    return {k: v.astype(np.int32) for k, v in out.items()}


def make_run(member: str = "mini", ladder: str = "clean", **changes: object) -> RunConfig:
    data = DataConfig("facts", "", "", TIME, 320)
    model = dataclasses.replace(family.proxy(member, "pico", ladder), layers=2)
    run = RunConfig("x", model, OptimConfig(), data, ROWS, 100, unroll=False)
    return dataclasses.replace(run, **changes)


def train(run: RunConfig, devices: int, data: dict | None = None, loss: step.Loss = LOSS, steps: int = 3) -> tuple:
    mesh = make_mesh(jax.devices()[:devices])
    data = data or batch()
    if loss.capacity:
        data = data | {"loss_index": step.loss_index(data["domains"], devices, loss.capacity)}
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
        on_device = jax.device_put(data, rules.batch_sharding(run.strategy, mesh))
        train_step, _ = step.compile_steps(run, loss)
        metrics = {}
        for _ in range(steps):
            state, metrics = train_step(state, on_device, jnp.float32(1e-3))
        return jax.tree.map(np.asarray, state), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize("member,ladder", [("small", "family"), ("medium", "family")])
def test_devices_strategies_accumulation_and_gathering_agree(member: str, ladder: str) -> None:
    base_state, base = train(make_run(member, ladder), 1)
    variants = [(dict(strategy="dp"), 8, LOSS), (dict(strategy="fsdp", unroll=False, accumulation=2), 8, LOSS)]
    variants += [(dict(accumulation=4), 1, LOSS), (dict(strategy="dp"), 2, dataclasses.replace(LOSS, capacity=120))]
    for changes, devices, loss in variants:
        state, metrics = train(make_run(member, ladder, **changes), devices, loss=loss)
        for key, value in base.items():
            assert metrics[key] == pytest.approx(value, rel=1e-5), (changes, key)
        # Adam's first steps divide gradients by their own size: compare what they moved, not round-off.
        for a, b in zip(jax.tree.leaves(base_state.opt), jax.tree.leaves(state.opt), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_fsdp_really_shards() -> None:
    run, mesh = make_run(strategy="fsdp"), make_mesh()
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
        weight = state.params["blocks"]["qkv"]["weight"]
        assert weight.addressable_shards[0].data.size * 8 == weight.size
        assert state.opt[1].mu["blocks"]["qkv"]["weight"].sharding == weight.sharding


def test_indivisible_and_unknown_strategies() -> None:
    mesh = make_mesh(jax.devices()[:5])
    with pytest.raises(UserError, match="'data'=5 does not divide embed=48; use 1, 2, 3, 4"):
        rules.param_shardings(param_specs(family.proxy("mini")), "fsdp", mesh)
    with pytest.raises(UserError, match="did you mean 'fsdp'"):
        rules.rules_of("fsdq")


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(UserError, match="phi-3.5-moe cannot be trained here.*mini, small, medium"):
        step.compile_steps(dataclasses.replace(make_run(), model=family.published("moe")), LOSS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls(dtype: str) -> None:
    run = make_run(dtype=dtype)
    assert train(run, 1, steps=40)[1]["loss"] < 5.5  # ln 320 = 5.77 at the start


def test_a_nan_step_changes_nothing_but_the_counters() -> None:
    run, mesh = make_run(), make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
        train_step, _ = step.compile_steps(run, LOSS)
        before = jax.tree.map(np.array, state)
        broken = dataclasses.replace(before, params=before.params | {"embedding": before.params["embedding"] * np.nan})
        after, metrics = train_step(jax.device_put(broken), batch(), jnp.float32(1e-3))
        assert int(after.skipped) == int(after.streak) == 1 and int(after.step) == 1
        assert np.isnan(float(metrics["loss"]))
        for a, b in zip(jax.tree.leaves(broken.opt), jax.tree.leaves(after.opt), strict=True):
            np.testing.assert_array_equal(a, b)
        healed, _ = train_step(jax.device_put(before), batch(), jnp.float32(1e-3))
        assert int(healed.skipped) == 0  # the control: the same step without the nan is applied


def test_spikes_are_skipped_after_the_warm_steps() -> None:
    run, mesh = make_run(optim=OptimConfig(spike_factor=3.0)), make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
        train_step, _ = step.compile_steps(run, LOSS)
        for applied, expected in ((10, 0), (step.WARM_STEPS, 1)):
            calm = jax.tree.map(np.array, state)
            calm = dataclasses.replace(calm, step=np.int32(applied), grad_norm_mean=np.float32(1e-3))
            after, _ = train_step(jax.device_put(calm), batch(), jnp.float32(1e-3))
            assert int(after.skipped) == expected


def test_clipping_bounds_the_update() -> None:
    free, _ = train(make_run(), 1, steps=1)
    tight, _ = train(make_run(optim=OptimConfig(clip=1e-3)), 1, steps=1)
    norm = lambda s: np.sqrt(sum(float((m**2).sum()) for m in jax.tree.leaves(s.opt[1].mu)))  # noqa: E731
    assert norm(tight) == pytest.approx(0.1 * 1e-3, rel=1e-3) and norm(free) > norm(tight)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_schedules(schedule: str) -> None:
    run = make_run(steps=1000, optim=OptimConfig(schedule=schedule, peak_lr=2.0, final_lr=0.0))
    rates = [learning_rate(run, s) for s in range(1000)]
    assert rates[0] == pytest.approx(2.0 / 20) and max(rates) == 2.0 and rates[-1] == pytest.approx(0, abs=1e-4)
    assert all(a <= b for a, b in itertools.pairwise(rates[:20]))
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
    if schedule == "wsd":
        assert rates[decay_start(1000, 0.3) - 1] == 2.0 > rates[decay_start(1000, 0.3)]


def test_forks_share_the_trunk_until_their_decay() -> None:
    trunk = make_run(steps=1000, trunk_steps=1000)
    fork = make_run(steps=250, trunk_steps=1000, start_step=175, parent="trunk")
    assert all(learning_rate(trunk, s) == learning_rate(fork, s) for s in range(175))
    assert learning_rate(fork, 175) < learning_rate(trunk, 175)
