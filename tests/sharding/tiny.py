"""Small members with every feature on (window, block pattern, packed documents, grouped queries), for all strategies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from phi3_jax import family
from phi3_jax.configs import BlockSparse, DataConfig, OptimConfig, RunConfig
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.training import step

ROWS, TIME = 8, 32
LOSS = step.Loss(("knowledge", "reasoning"), True)
# What eight devices do under each strategy; remat and accumulation in turn, so that each meets some.
WAYS: dict[str, dict[str, Any]] = {
    "dp": dict(accumulation=1),
    "fsdp": dict(remat="full"),
    "fsdp_tp": dict(tensor_parallel=2, remat="names", accumulation=2),
    "fsdp_cp": dict(context_parallel=4, remat="dots"),
    "multislice": dict(slices=2, remat="full"),
}


def make_run(member: str, strategy: str = "dp", **changes: Any) -> RunConfig:
    model = family.proxy(member, "pico", "family")
    small = member == "small"
    model = dataclasses.replace(
        model, layers=3, heads=4, kv_heads=2, head_dim=model.embed // 4, sliding_window=None if small else 7,
        blocksparse=BlockSparse(4, 2, 3) if small else None, mup=dataclasses.replace(model.mup, head_zero_init=False),
    )  # fmt: skip
    data = DataConfig("facts", "", "", TIME, model.vocab)
    run = RunConfig("x", model, OptimConfig(), data, ROWS, 100, unroll=False, strategy=strategy)
    return dataclasses.replace(run, **changes)


def batch() -> dict[str, np.ndarray]:
    """Rows of three documents each."""
    random, lengths = np.random.default_rng(0), (20, 9, 3)
    numbers = np.repeat(np.arange(1, 4), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    kinds = np.where(np.arange(ROWS)[:, None] % 4 == 0, 1, 2)
    arrays = {
        "tokens": random.integers(0, 320, (ROWS, TIME)),
        "targets": random.integers(0, 320, (ROWS, TIME)),
        "segments": np.tile(numbers, (ROWS, 1)),
        "positions": np.tile(positions, (ROWS, 1)),
        "domains": kinds * (random.random((ROWS, TIME)) < 0.4),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def on_devices(run: RunConfig, devices: int) -> tuple[Any, dict[str, jax.Array], jax.sharding.Mesh]:
    """(state, batch, mesh) of a run on some of the fake devices."""
    mesh = mesh_of(run, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = step.init_state(run, mesh)
    return state, jax.device_put(batch(), rules.batch_sharding(run.strategy, mesh)), mesh


def loss_and_grads(run: RunConfig, devices: int) -> tuple[float, Any, Any]:
    """(loss, gradients, negative log-likelihoods of an evaluation) as numpy."""
    state, data, mesh = on_devices(run, devices)
    with jax.set_mesh(mesh):
        loss, _, grads = jax.jit(lambda p, b: step.loss_and_grads(p, b, run, LOSS))(state.params, data)
        nll = jax.jit(lambda p, b: step.eval_step(p, b, run))(state.params, data)["nll"]
    return float(loss), jax.tree.map(np.asarray, grads), np.asarray(nll)
