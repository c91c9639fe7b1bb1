"""Every optimiser of the table: its state, on one device, on eight and after a resume; Muon's update matrix by matrix."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from test_recipes import mini_like, random_like, updates_of

from phi3_jax import UserError, family
from phi3_jax.configs import DataConfig, Mup, OptimConfig, RunConfig
from phi3_jax.keys import OPTIMIZERS
from phi3_jax.models.spec import ParamSpec, param_specs
from phi3_jax.records.checkpoint import Checkpointer, Keep, restore
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.training import step
from phi3_jax.training.optimizers import muon, optimizer

LOSS = step.Loss(("knowledge", "reasoning"), True)


def leaves(model: Any, tree: Any) -> list[tuple[str, ParamSpec, Any]]:
    """(name, spec, value) of every parameter."""
    specs = jax.tree_util.tree_leaves_with_path(param_specs(model), is_leaf=lambda x: isinstance(x, ParamSpec))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in specs]
    return list(zip(names, (spec for _, spec in specs), jax.tree.leaves(tree), strict=True))


def matrices(spec: ParamSpec, x: Any) -> list[np.ndarray]:
    """Every (fan_in, fan_out) matrix of a stored tensor, layer by layer and part by part, as a product uses it."""
    found = []
    for part in muon.split(spec, jnp.asarray(x)):
        for layer in np.asarray(part):
            fan_in = math.prod(layer.shape[i - 1] for i in spec.inputs)
            assert tuple(i - 1 for i in spec.inputs) == tuple(range(len(spec.inputs))), "inputs come first"
            found.append(layer.reshape(fan_in, -1))
    return found


def singular(x: np.ndarray) -> np.ndarray:
    """Singular values times sqrt(fan_in / fan_out)."""
    return np.linalg.svd(x, compute_uv=False) * math.sqrt(x.shape[0] / x.shape[1])


def grouped(**changes: Any) -> Any:
    """Grouped queries, biases, LayerNorm; no two sizes of a matrix are alike."""
    model = family.proxy("small", "pico", "family", vocab=12)
    sizes = dict(embed=24, layers=3, heads=4, kv_heads=2, head_dim=10, mlp=56)
    return dataclasses.replace(model, **sizes, **changes)


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_state_are_those_of_the_state(name: str) -> None:
    model = grouped()
    params = {k: spec.size for k, spec, _ in leaves(model, param_specs(model))}
    rule = optimizer(name)
    state = jax.eval_shape(rule.make(OptimConfig(name=name), model).init, random_like(_abstract(model), 0))
    counted = sum(rule.state_bytes(spec) * spec.size for _, spec, _ in leaves(model, param_specs(model)))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert counted <= held <= counted + 32 and sum(params.values()) > 1000  # counts of steps


def _abstract(model: Any) -> Any:
    return jax.eval_shape(lambda: step.init_params(model, 0))


def test_a_misspelt_optimizer_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'muon'"):
        OptimConfig(name="moun")
    with pytest.raises(UserError, match="did you mean 'muon'"):
        optimizer("moun")


# ------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("mup", [None, Mup(base_embed=12, base_layers=1, base_head_dim=5)], ids=["plain", "mup"])
def test_muons_update_of_every_matrix_of_every_layer_is_orthogonal(mup: Mup | None) -> None:
    """CompleteP at alpha = 1 has no factor of depth, and Muon none of width."""
    model = grouped(mup=mup)
    _, grads, updates = updates_of(model, OptimConfig(name="muon"))
    counts = []
    for (name, spec, update), grad in zip(leaves(model, updates[-1]), jax.tree.leaves(grads[-1]), strict=True):
        if spec.role == "hidden":
            found = [singular(x) for x in matrices(spec, update)]
            assert all(s.min() > 0.6 and s.max() < 1.3 for s in found), (name, found)
            plain = [s / s.max() for s in map(singular, matrices(spec, grad))]
            assert min(s.min() for s in plain) < 0.3, f"control: a gradient of {name} is not orthogonal"
            counts.append(len(found))
    assert counts == [3, 6, 3, 9]  # 3 layers of down, gate and up, out, q and k and v


@pytest.mark.parametrize(("name", "axis"), [("qkv", 3), ("gate_up", 2)])
def test_a_matrix_does_not_learn_less_for_the_larger_gradients_beside_it(name: str, axis: int) -> None:
    """Queries, keys and values (gate and linear part) are orthogonalised apart; as one they would share their norm."""
    model = grouped(mup=None)
    params, grads, (update, *_) = updates_of(model, OptimConfig(name="muon"))
    spec = param_specs(model)["blocks"][name]["weight"]
    last = jnp.arange(sum(spec.parts)) == sum(spec.parts) - 1
    weaker = jnp.where(last.reshape(-1, *[1] * (len(spec.shape) - axis - 1)), 1e-3, 1.0)
    grad = grads[0]["blocks"][name]["weight"] * weaker
    changed = grads[0] | {"blocks": grads[0]["blocks"] | {name: grads[0]["blocks"][name] | {"weight": grad}}}
    rule = optimizer("muon").make(OptimConfig(name="muon"), model)
    found = rule.update(changed, rule.init(params), params)[0]["blocks"][name]["weight"]
    np.testing.assert_allclose(found, update["blocks"][name]["weight"], rtol=1e-3, atol=1e-4)
    as_one = scale_by_muon(weight_dimension_numbers=MuonDimensionNumbers(spec.inputs, spec.outputs))
    whole = as_one.update(grad, as_one.init(grad))[0]
    assert np.abs(muon.split(spec, whole)[-1]).max() < 0.2 * np.abs(whole).max(), "control: as stored"


def test_the_rest_learns_by_adamw() -> None:
    model = grouped(mup=Mup(base_embed=12, base_layers=1, base_head_dim=5))
    recipe = OptimConfig(b1=0.8, eps=1e-2, weight_decay=0.3)
    ours, theirs = (updates_of(model, dataclasses.replace(recipe, name=name))[2] for name in ("muon", "adamw"))
    for (name, spec, a), (_, _, b) in zip(leaves(model, ours[-1]), leaves(model, theirs[-1]), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7) == (spec.role != "hidden"), name


def test_hidden_matrices_decay_as_fast_as_under_adamw_at_every_width() -> None:
    for width in (2, 8):
        model = mini_like(mup=Mup(base_embed=width, base_layers=2, base_head_dim=2, alpha=0.5))
        decays = []
        for name in ("adamw", "muon"):
            with_, without = (updates_of(model, OptimConfig(name=name, weight_decay=wd)) for wd in (0.5, 0.0))
            params = with_[0]
            part = lambda tree: np.asarray(tree["blocks"]["down"]["weight"])  # noqa: E731
            decays.append((part(with_[2][0]) - part(without[2][0])) / part(params))
        np.testing.assert_allclose(decays[0], decays[1], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ where it runs


def run_of(name: str, strategy: str = "dp", **changes: Any) -> RunConfig:
    model = family.proxy("medium", "pico", "family")
    model = dataclasses.replace(
        model, layers=3, heads=4, kv_heads=2, head_dim=model.embed // 4,
        mup=dataclasses.replace(model.mup, head_zero_init=False),
    )  # fmt: skip
    data = DataConfig("facts", "", "", 32, model.vocab)
    run = RunConfig("x", model, OptimConfig(name=name), data, 8, 100, unroll=False, strategy=strategy)
    return dataclasses.replace(run, **changes)


def batch(number: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    arrays = {name: rng.integers(0, 320, (8, 32)) for name in ("tokens", "targets")}
    arrays |= {"segments": np.ones((8, 32)), "positions": np.tile(np.arange(32), (8, 1))}
    arrays["domains"] = np.where(np.arange(8)[:, None] % 2, 1, 2) * np.ones((8, 32))
    return {k: x.astype(np.int32) for k, x in arrays.items()}


def sharded_update(run: RunConfig, devices: int) -> tuple[Any, Any, Any]:
    """(state, update and new state for fixed gradients) of a run on some of the fake devices."""
    mesh = mesh_of(run, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
        grads = jax.tree.map(
            lambda g, p: jax.device_put(g, p.sharding), random_like(_abstract(run.model), 3), state.params
        )
        rule = optimizer(run.optim.name).make(run.optim, run.model)
        update, opt = jax.jit(rule.update)(grads, state.opt, state.params)
    return state, update, opt


WAYS: dict[str, dict[str, Any]] = {"fsdp": {}, "fsdp_tp": dict(tensor_parallel=2)}


@pytest.mark.parametrize("strategy", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_update_as_one_and_each_holds_its_share(
    name: str, strategy: str, capfd: pytest.CaptureFixture
) -> None:
    state, *many = sharded_update(run_of(name, strategy, **WAYS[strategy]), 8)
    _, *one = sharded_update(run_of(name), 1)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(b).max()), rtol=0)
    specs = param_specs(run_of(name).model)["blocks"]
    for opt in (state.opt, many[1]):
        big = [x for x in jax.tree.leaves(opt) if x.ndim > 2]
        assert len(big) >= len([s for s in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))]) - 2
        assert all(x.addressable_shards[0].data.size * 8 == x.size for x in big)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bitwise(name: str, tmp_path: Path) -> None:
    run = run_of(name, "fsdp")
    mesh = mesh_of(run, jax.devices())
    with jax.set_mesh(mesh):
        train, _ = step.compile_steps(run, LOSS)
        state = step.init_state(run, mesh)
        for i in range(2):
            state, _ = train(state, batch(i), jnp.float32(1e-2))
        saver = Checkpointer(tmp_path, Keep(1))
        saver.save(2, state, {})
        saver.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        found = restore(tmp_path, abstract)
        ends = [train(s, batch(2), jnp.float32(1e-2)) for s in (found.state, state)]
    assert found.step == 2 and float(ends[0][1]["loss"]) == float(ends[1][1]["loss"])
    for a, b in zip(jax.tree.leaves(ends[0][0]), jax.tree.leaves(ends[1][0]), strict=True):
        np.testing.assert_array_equal(a, b)
