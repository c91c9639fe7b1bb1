"""Constants, signs and borders of the training recipe, against optax and float64 written out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phi3_jax import family
from phi3_jax.configs import DataConfig, Mup, OptimConfig, RunConfig, decay_start
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import step
from phi3_jax.training.optimizers import optimizer
from phi3_jax.training.schedule import learning_rate
from phi3_jax.training.train import _eval_steps

RECIPE = OptimConfig(b1=0.8, b2=0.95, eps=1e-2, weight_decay=0.3)
STEPS = 3


def small_like(**changes: Any) -> Any:
    """phi-3-small's recipe (tied, biases, LayerNorm, embedding multiplier 10) in a few hundred numbers."""
    cfg = family.proxy("small", "pico", "family", vocab=12)
    return dataclasses.replace(cfg, embed=8, layers=2, heads=4, kv_heads=1, head_dim=2, mlp=12, **changes)


def mini_like(**changes: Any) -> Any:
    cfg = family.proxy("mini", "pico", vocab=12)
    return dataclasses.replace(cfg, embed=8, layers=4, heads=4, kv_heads=4, head_dim=2, mlp=12, **changes)


def parameters(cfg: Any) -> Any:
    """Numbers of size 1 in the place of every tensor, so that none is 0 or 1 by its initial value."""
    return random_like(jax.eval_shape(lambda: init_params(cfg, 0)), 1)


def random_like(tree: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


def updates_of(cfg: Any, optim: OptimConfig) -> tuple[Any, list[Any], list[Any]]:
    """Fixed parameters, a few gradients, and what the optimiser makes of each."""
    params = parameters(cfg)
    rule = optimizer(optim.name).make(optim, cfg)
    state, grads, updates, apply = rule.init(params), [], [], jax.jit(rule.update)
    for i in range(STEPS):
        grads.append(random_like(params, 10 + i))
        update, state = apply(grads[-1], state, params)
        updates.append(update)
    return params, grads, updates


@pytest.mark.parametrize("cfg", [small_like(mup=None), mini_like(mup=None)], ids=["small", "mini"])
def test_without_mup_it_is_optax_adamw_with_decay_of_matrices_alone(cfg: Any) -> None:
    params, grads, ours = updates_of(cfg, RECIPE)
    decays = jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path) and "bias" not in jax.tree_util.keystr(path), params
    )
    theirs = optax.adamw(0.01, b1=0.8, b2=0.95, eps=1e-2, weight_decay=0.3, mask=decays)
    state, apply = theirs.init(params), jax.jit(theirs.update)
    for grad, update in zip(grads, ours, strict=True):
        expected, state = apply(grad, state, params)
        for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(-0.01 * a, b, rtol=2e-5, atol=1e-7)


def factors(name: str, width: float, depth: float, alpha: float, embed_multiplier: float) -> tuple[float, float, float]:
    """(learning rate, weight decay, epsilon) of arXiv:2505.01618, table 1, read off the name of a tensor."""
    in_block = "blocks" in name
    lr, eps = (depth ** (alpha - 1), depth**-alpha) if in_block else (1.0, 1.0)
    if "norm" in name or "bias" in name:
        return lr, 0.0, eps / width
    if name == "['embedding']":
        return 1 / embed_multiplier, 1.0, 1 / width
    if name == "['unembedding']":
        return 1.0, 1.0, 1.0
    return lr / width, width, eps / width


@pytest.mark.parametrize("make", [small_like, mini_like])
def test_under_mup_it_is_float64_by_hand(make: Any) -> None:
    """Four times the base width, twice the base depth, half of the way to CompleteP: no factor is by chance 1."""
    cfg = make(mup=Mup(base_embed=2, base_layers=make().layers // 2, base_head_dim=2, alpha=0.5))
    params, grads, ours = updates_of(cfg, RECIPE)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    weights = [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]
    for name, p, i in zip(paths, weights, range(len(paths)), strict=True):
        lr, decay, eps = factors(name, 4.0, 2.0, 0.5, cfg.embed_multiplier)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in range(STEPS):
            g = np.asarray(jax.tree.leaves(grads[t])[i], np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            adam = m / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-2 * eps)
            expected = lr * (adam + 0.3 * decay * p)
            np.testing.assert_allclose(jax.tree.leaves(ours[t])[i], expected, rtol=3e-5, atol=1e-6, err_msg=name)


# ------------------------------------------------------------------------------------------------ schedules


def run_of(steps: int, optim: OptimConfig, **changes: Any) -> RunConfig:
    data = DataConfig("facts", "", "", 8, 12)
    return RunConfig("x", mini_like(), optim, data, 4, steps, **changes)


def test_every_rate_of_both_schedules_is_that_of_optax() -> None:
    shape = dict(peak_lr=2.0, warmup=0.1, decay=0.3, final_lr=0.1)
    warm = optax.linear_schedule(0.0, 2.0, 10)
    cosine = optax.cosine_decay_schedule(2.0, 90, alpha=0.1)
    linear = optax.linear_schedule(2.0, 0.2, 30)
    for i in range(100):
        wsd = learning_rate(run_of(100, OptimConfig(schedule="wsd", **shape)), i)
        cos = learning_rate(run_of(100, OptimConfig(schedule="cosine", **shape)), i)
        first = float(warm(i + 1))  # the first update already moves, the tenth is at the peak
        assert cos == pytest.approx(first if i < 10 else float(cosine(i - 10)), rel=1e-5)
        # The last 30 updates fall, the first of them already below the peak, the last one to the floor.
        assert wsd == pytest.approx(first if i < 10 else 2.0 if i < 70 else float(linear(i - 69)), rel=1e-5)


def test_the_ends_of_a_schedule() -> None:
    optim = OptimConfig(peak_lr=2.0, warmup=0.0, decay=0.0, final_lr=0.25)
    rates = [learning_rate(run_of(5, optim), i) for i in range(5)]
    assert rates == [2.0, 2.0, 2.0, 2.0, 0.5]  # no warm-up: the peak at once; no decay: one step to the floor
    assert [decay_start(s, d) for s, d in ((1000, 0.3), (10, 0.25), (7, 0.3), (7, 1.0))] == [700, 8, 5, 0]
    # The trunk's warm-up, whatever the fork's length; a run without a trunk warms up over its own.
    fork, alone = (run_of(40, OptimConfig(peak_lr=1.0, warmup=0.1), trunk_steps=n) for n in (200, 0))
    assert [learning_rate(fork, i) for i in (0, 9, 19)] == pytest.approx([1 / 20, 1 / 2, 1.0])
    assert [learning_rate(alone, i) for i in (0, 3)] == pytest.approx([1 / 4, 1.0])


@pytest.mark.parametrize(
    ("steps", "start", "points", "expected"),
    [(100, 0, 4, (25, 50, 75, 100)), (100, 60, 4, (70, 80, 90, 100)), (3, 0, 9, (0, 1, 2, 3)), (10, 0, 0, (10,))],
)
def test_a_run_is_evaluated_at_even_shares_of_its_own_steps(steps: int, start: int, points: int, expected: Any) -> None:
    found = _eval_steps(run_of(steps, OptimConfig(), start_step=start, eval_points=points))
    assert found == expected


# ------------------------------------------------------------------------------------------------ a step

LOSS = step.Loss(("knowledge", "reasoning"), True)
ROWS, TIME = 4, 8


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    domains = rng.integers(0, 3, (ROWS, TIME))
    domains[0, :6] = 1  # the domains differ in size
    out = {"tokens": rng.integers(0, 12, (ROWS, TIME)), "targets": rng.integers(0, 12, (ROWS, TIME))}
    out |= {"segments": np.repeat([[1] * 4 + [2] * 4], ROWS, 0), "positions": np.tile(np.arange(4), (ROWS, 2))}
    return {k: v.astype(np.int32) for k, v in (out | {"domains": domains}).items()}


class Stepper:
    """Compiled steps of a tiny model and states made up by hand."""

    def __init__(self, **optim: Any) -> None:
        base = OptimConfig(spike_factor=3.0, weight_decay=0.1)
        self.run = run_of(1000, dataclasses.replace(base, **optim), unroll=False)
        self.mesh = make_mesh(jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.step, _ = step.compile_steps(self.run, LOSS)
            state = step.init_state(self.run, self.mesh)
            self.fresh = jax.tree.map(np.array, dataclasses.replace(state, params=random_like(state.params, 3)))

    def __call__(self, data: dict[str, np.ndarray] | None = None, **fields: Any) -> tuple[Any, dict[str, float]]:
        """One step from the fresh state with some fields changed."""
        return self.after(dataclasses.replace(self.fresh, **fields), data)

    def after(self, state: Any, data: dict[str, np.ndarray] | None = None) -> tuple[Any, dict[str, float]]:
        with jax.set_mesh(self.mesh):
            new, metrics = self.step(jax.device_put(state), data or batch(), jnp.float32(1e-2))
            return jax.tree.map(np.array, new), {k: float(v) for k, v in metrics.items()}


@pytest.fixture(scope="module")
def stepper() -> Stepper:
    return Stepper()


def counts(steps: int, skipped: int = 0, mean: float = 1.0) -> dict[str, Any]:
    return dict(step=np.int32(steps), skipped=np.int32(skipped), grad_norm_mean=np.float32(mean))


def test_the_spike_test_waits_for_applied_steps_not_for_steps(stepper: Stepper) -> None:
    assert step.WARM_STEPS == 50
    for steps, skipped, expected in ((49, 0, 0), (50, 0, 1), (56, 7, 0), (57, 7, 1)):
        after, _ = stepper(**counts(steps, skipped, 1e-3))
        assert int(after.skipped) - skipped == expected, (steps, skipped)


def test_a_spike_is_a_norm_above_the_factor_times_the_mean(stepper: Stepper) -> None:
    norm = stepper()[1]["grad_norm"]
    for factor, expected in ((1.01, 0), (0.99, 1)):
        after, metrics = stepper(**counts(80, mean=factor * norm / 3))
        assert int(after.skipped) == int(after.streak) == metrics["streak"] == expected
        moved = any(
            (a != b).any() for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(stepper.fresh.params))
        )
        assert moved == (expected == 0)


def test_gradients_that_stay_large_are_applied_after_a_few_steps(stepper: Stepper) -> None:
    """Each step that is skipped raises what is allowed by 2 % of (3 - 1); 1.1 times what is allowed takes three."""
    norm = stepper()[1]["grad_norm"]
    state, streaks = dataclasses.replace(stepper.fresh, **counts(80, mean=norm / 3 / 1.1)), []
    for _ in range(4):
        state, metrics = stepper.after(state)
        streaks.append(metrics["streak"])
    assert streaks == [1, 2, 3, 0] and (int(state.skipped), int(state.step)) == (3, 84)


def test_the_mean_norm_starts_with_the_first_applied_step_and_follows_at_a_fiftieth(stepper: Stepper) -> None:
    one, first = stepper(step=np.int32(3), skipped=np.int32(3))  # three skipped: still none applied
    assert float(one.grad_norm_mean) == pytest.approx(first["grad_norm"], rel=1e-6)
    two, second = stepper.after(one)
    expected = 0.98 * first["grad_norm"] + 0.02 * second["grad_norm"]
    assert float(two.grad_norm_mean) == pytest.approx(expected, rel=1e-6)
    broken = jax.tree.map(lambda x: x * np.nan, one.params)
    skipped, _ = stepper.after(dataclasses.replace(one, params=broken))
    assert float(skipped.grad_norm_mean) == float(one.grad_norm_mean)


def test_clipping_leaves_a_gradient_below_the_limit_alone(stepper: Stepper) -> None:
    free, metrics = stepper()
    norm = metrics["grad_norm"]
    clipped, told = Stepper(clip=1.5 * norm)()
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-6)
    for a, b in zip(jax.tree.leaves(clipped.opt[1].mu), jax.tree.leaves(free.opt[1].mu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12)


def test_the_parameters_move_against_the_update_by_the_rate(stepper: Stepper) -> None:
    after, _ = stepper()
    mu, nu = after.opt[1].mu, after.opt[1].nu
    name = ("blocks", "down", "weight")
    old, new, m, v = (np.asarray(t[name[0]][name[1]][name[2]], np.float64) for t in
                      (stepper.fresh.params, after.params, mu, nu))  # fmt: skip
    cfg, optim = stepper.run.model, stepper.run.optim
    width = cfg.embed / cfg.mup.base_embed
    adam = (m / (1 - optim.b1)) / (np.sqrt(v / (1 - optim.b2)) + optim.eps)
    expected = old - 1e-2 * (adam / width + optim.weight_decay * old)
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("domain_mean", [True, False])
def test_the_loss_of_a_batch_is_the_weighted_sum_written_out(domain_mean: bool) -> None:
    data, cfg = batch(), mini_like()
    run = run_of(10, OptimConfig(z_loss=0.05), unroll=False)
    loss = dataclasses.replace(LOSS, domain_mean=domain_mean)
    params = parameters(cfg)
    with jax.set_mesh(make_mesh(jax.devices()[:1])):
        runs = [dataclasses.replace(run, accumulation=parts) for parts in (1, 2)]
        found = [jax.jit(lambda p, d, run=run: step.loss_and_grads(p, d, run, loss)[:2])(params, data) for run in runs]
        judged = jax.jit(lambda p, d: step.eval_step(p, d, run))(params, data)
        places = {key: data[key] for key in ("positions", "segments")}
        forward = jax.jit(lambda p, tokens, places: decoder.forward(p, tokens, cfg, **places))
        logits = np.asarray(forward(params, data["tokens"], places), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    sizes = [(data["domains"] == d).sum() for d in (1, 2)]
    assert sizes[0] != sizes[1]
    of_domain = [1 / (2 * n) for n in sizes] if domain_mean else [1 / sum(sizes)] * 2
    weights = np.select([data["domains"] == 1, data["domains"] == 2], of_domain, 0.0)
    for total, means in found:
        assert float(total) == pytest.approx((weights * (nll + 0.05 * log_z**2)).sum(), rel=1e-5)
        each = [nll[data["domains"] == d].mean() for d in (1, 2)]
        np.testing.assert_allclose([means[f"loss/{name}"] for name in loss.domains], each, rtol=1e-5)
    np.testing.assert_allclose(judged["nll"], nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(judged["hit"], logits.argmax(-1) == data["targets"])


def test_positions_with_a_loss_are_listed_by_shard() -> None:
    domains = np.array([[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0], [2, 2, 0, 1]])
    found = step.loss_index(domains, 2, 4)
    assert found[0].tolist()[:3] == [1, 3, 4] and found[1].tolist()[:3] == [4, 5, 7]
    assert (found[:, 3] >= 8).all()  # out of range: no loss
