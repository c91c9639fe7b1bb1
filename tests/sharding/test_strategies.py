"""Every strategy computes what one device computes, and splits what it says it splits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import LOSS, WAYS, loss_and_grads, make_run, on_devices

from phi3_jax import UserError, family
from phi3_jax.configs import LongRope, RunConfig
from phi3_jax.family import MEMBERS
from phi3_jax.models import masks
from phi3_jax.models.spec import param_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh, mesh_of
from phi3_jax.training import step

WARNING = "nvoluntary full rematerialization"


@functools.cache
def alone(member: str) -> tuple:
    return loss_and_grads(make_run(member), 1)


@pytest.mark.parametrize("strategy", WAYS)
@pytest.mark.parametrize("member", MEMBERS)
def test_loss_gradients_and_evaluation_are_those_of_one_device(member: str, strategy: str) -> None:
    loss, grads, nll = loss_and_grads(make_run(member, strategy, **WAYS[strategy]), 8)
    exact, exact_grads, exact_nll = alone(member)
    assert loss == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(nll, exact_nll, rtol=1e-5, atol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def with_lists(run: RunConfig) -> RunConfig:
    """With LongRoPE's border among the documents of `tiny.batch`: 20 tokens, 9, 3."""
    half = run.model.head_dim // 2
    rope = LongRope(9, (1.0,) * half, tuple(np.linspace(2, 9, half)))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, longrope=rope))


@functools.cache
def with_lists_alone() -> tuple:
    """Of one device: loss, gradients, nll of each document in a batch of its own, nll of rows as one document."""
    run = with_lists(make_run("medium"))
    state, data, mesh = on_devices(run, 1)
    with jax.set_mesh(mesh):
        nll = jax.jit(lambda b: step.eval_step(state.params, b, run)["nll"])
        separate = [nll({k: x[:, a:b] for k, x in data.items()}) for a, b in ((0, 20), (20, 29), (29, 32))]
        whole = nll(data | {"segments": jnp.ones_like(data["segments"])})
    return *loss_and_grads(run, 1)[:2], np.concatenate(separate, axis=1), np.asarray(whole)


@pytest.mark.parametrize("strategy", WAYS)
def test_each_document_keeps_its_own_longrope_list_when_devices_share_it(strategy: str) -> None:
    loss, grads, nll = loss_and_grads(with_lists(make_run("medium", strategy, **WAYS[strategy])), 8)
    exact, exact_grads, separate, whole = with_lists_alone()
    assert loss == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(nll, separate, rtol=1e-5, atol=1e-5)
    assert np.abs(nll - whole)[:, 20:].max() > 1e-3, "control: documents show"
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_the_comparison_sees_heads_counted_from_each_devices_first(monkeypatch: pytest.MonkeyPatch) -> None:
    real = masks.blocksparse_allowed

    def from_own_first(pattern, q_pos, k_pos, heads, first=0, total=0):
        return real(pattern, q_pos, k_pos, heads, 0, total)

    monkeypatch.setattr(masks, "blocksparse_allowed", from_own_first)
    got = loss_and_grads(make_run("small", "fsdp_tp", tensor_parallel=2), 8)[2]
    assert np.abs(got - alone("small")[2]).max() > 1e-3


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tp", "fsdp_cp", "multislice"])
def test_each_device_holds_its_share_of_every_matrix(strategy: str) -> None:
    run = make_run("medium", strategy, **WAYS[strategy])
    state, _, mesh = on_devices(run, 8)
    shares = 4 if strategy == "multislice" else 8
    for part in ("qkv", "out", "gate_up", "down"):
        for leaf in (state.params["blocks"][part]["weight"], state.opt[1].mu["blocks"][part]["weight"]):
            assert leaf.addressable_shards[0].data.size * shares == leaf.size
    assert mesh.size == 8


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tp", "fsdp_cp", "multislice"])
def test_nothing_is_gathered_whole_for_want_of_a_better_way(strategy: str, capfd: pytest.CaptureFixture) -> None:
    run = make_run("small", strategy, **WAYS[strategy])
    state, data, mesh = on_devices(run, 8)
    with jax.set_mesh(mesh):
        step.compile_steps(run, LOSS)[0].lower(state, data, jnp.float32(1)).compile()
    assert WARNING not in capfd.readouterr().err


@pytest.mark.usefixtures("compiled_anew")
def test_the_partitioners_warning_would_be_seen(capfd: pytest.CaptureFixture) -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))  # noqa: E731

    def turn(x: jax.Array) -> jax.Array:
        return put(put(x, "b", None, "a").transpose(1, 0, 2) + 1, ("b", "a"), None, None)

    jax.jit(turn).lower(jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)).compile()
    assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(strategy="fsdp_tp", tensor_parallel=3),
            "tensor=3 = 3 does not divide 8 devices; use divisors of 1, 2, 4, 8",
        ),
        (dict(strategy="fsdp", tensor_parallel=2), "has no tensor axis .tensor=2.; use strategy=fsdp_tp"),
        (dict(strategy="fsdp_tp", context_parallel=2), "has no context axis .*use strategy=fsdp_cp"),
        (dict(strategy="multislice"), "needs 2 slices or more"),
        (dict(strategy="fsdp_cp", context_parallel=0), "context=0 must be an integer, 1 to"),
        (dict(strategy="fsdp", batch_windows=12), "does not divide batch_windows=12; use 1, 2, 3, 4, 6, 12"),
        (dict(strategy="fsdp_tpp"), "did you mean 'fsdp_tp'"),
    ],
)
def test_meshes_that_cannot_be_say_what_can(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mesh_of(make_run("mini", **changes))


def test_kv_heads_that_do_not_divide_are_named() -> None:
    mesh = make_mesh(jax.devices()[:4], "fsdp_tp", tensor=4)
    with pytest.raises(UserError, match="'tensor'=4 does not divide kv_heads=10; use 1, 2, 5, 10"):
        rules.param_shardings(param_specs(family.published("medium")), "fsdp_tp", mesh)


def test_two_dimensions_on_one_axis_collide() -> None:
    spec = dataclasses.replace(param_specs(family.published("mini"))["embedding"], axes=("embed", "embed"))
    with pytest.raises(UserError, match="two dimensions map to mesh axis"):
        rules.resolve(spec, rules.rules_of("fsdp"), make_mesh(strategy="fsdp").shape)
