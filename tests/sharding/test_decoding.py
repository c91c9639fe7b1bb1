"""Prefill and steps on eight devices give one device's logits, under every strategy of training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import WAYS, make_run

from phi3_jax.configs import LongRope
from phi3_jax.family import MEMBERS
from phi3_jax.inference import decode
from phi3_jax.inference.engine import Engine
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params, param_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import mesh_of

ROWS, PROMPT, MORE = 8, 16, 4


def tokens() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 320, (ROWS, PROMPT + MORE)).astype(np.int32), rng.integers(1, PROMPT, ROWS).astype(np.int32)


def logits(member: str, strategy: str, devices: int, border: int = 0) -> np.ndarray:
    """(steps, rows, vocab) of a prompt's last token and of four more; `border` is LongRoPE's, if any."""
    run = make_run(member, strategy, **(WAYS[strategy] if devices > 1 else {}))
    if border:
        half = run.model.head_dim // 2
        rope = LongRope(border, (1.0,) * half, tuple(np.linspace(2, 9, half)))
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, longrope=rope))
    mesh, layout = mesh_of(run, jax.devices()[:devices]), rules.layout_of(strategy).decoding()
    ids, lengths = tokens()
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("replica", "data")))
        params = jax.device_put(
            init_params(run.model, 0), rules.param_shardings(param_specs(run.model), strategy, mesh)
        )
        params = jax.jit(decode.unstack)(params)
        put = lambda x: jax.device_put(x, rows)  # noqa: E731
        start = jax.jit(functools.partial(decode.prefill, cfg=run.model, capacity=24, layout=layout))
        one = jax.jit(functools.partial(decode.step, cfg=run.model, extent=24, layout=layout))
        out, cache = start(params, put(ids[:, :PROMPT]), put(lengths))
        found = [np.asarray(out)]
        for i in range(MORE):
            out, cache = one(params, put(ids[:, PROMPT + i]), cache)
            found.append(np.asarray(out))
        if strategy == "fsdp_tp":
            assert cache.keys[0].addressable_shards[0].data.shape[:2] == (2, 1), "its rows and heads"
    return np.stack(found)


@functools.cache
def alone(member: str, border: int) -> np.ndarray:
    return logits(member, "dp", 1, border)


@pytest.mark.parametrize("strategy", WAYS)
@pytest.mark.parametrize(("member", "border"), [*((member, 0) for member in MEMBERS), ("medium", 8)])
def test_logits_are_those_of_one_device(member: str, border: int, strategy: str) -> None:
    exact, found = alone(member, border), logits(member, strategy, 8, border)
    kept = exact > np.finfo(np.float32).min / 2
    assert kept.any() and np.ptp(exact[kept]) > 0.1
    np.testing.assert_allclose(found[kept], exact[kept], atol=1e-4 * np.abs(exact[kept]).max(), rtol=0)
    assert np.abs(jnp.diff(exact, axis=0)).max() > 1e-2, "control: the steps differ"


@pytest.mark.parametrize("strategy", ["fsdp"])
def test_scores_are_those_of_one_device(strategy: str) -> None:
    """`Engine.score` with its parameters spread over a mesh."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 320, 20).tolist(), rng.integers(0, 320, 3).tolist()) for _ in range(11)]
    pairs += [(pairs[0][0], rng.integers(0, 320, 5).tolist()) for _ in range(5)]
    run = make_run("mini", strategy, **WAYS[strategy])
    params = init_params(run.model, 0)
    model = Model(params, run.model, None, jnp.float32, stop_ids=())
    one = Engine(model, batch=8).score(pairs)
    mesh = mesh_of(run, jax.devices()[:8])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, rules.param_shardings(param_specs(run.model), strategy, mesh))
        layout = rules.layout_of(strategy).decoding()
        found = Engine(dataclasses.replace(model, params=spread), batch=8, layout=layout).score(pairs)
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in one], rtol=0, atol=1e-5)
