"""Free-running evaluation beside word by word decoding of the same model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import statistics
from phi3_jax.configs import DataConfig, OptimConfig, RunConfig
from phi3_jax.data import export, loader
from phi3_jax.data.corpora import facts
from phi3_jax.family import proxy
from phi3_jax.models import decoder
from phi3_jax.sharding import feed, rules
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.training import step, train

PERSONS = 31  # no multiple of three: the last window is half empty
STRANGERS = 9


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[loader.Dataset, RunConfig, Any, Any]:
    """Data, run, mesh and parameters of a model that has learned some of its facts: some answers are right, some wrong."""
    out = tmp_path_factory.mktemp("data") / "d"
    manifest = export.export(out, "facts", tokens=24_000, facts=20, universe=PERSONS, share=0.5, strangers=STRANGERS)
    model = proxy("mini", "femto", vocab=manifest["vocab"], context=64)
    data = DataConfig("facts", str(out), manifest["fingerprint"], manifest["window"], manifest["vocab"])
    run = RunConfig("r", model, OptimConfig(), data, batch_windows=48, steps=30)
    mesh = mesh_of(run)
    with jax.set_mesh(mesh):
        ds = loader.open_dataset(out)
        loss = train.loss_of(ds, run, mesh)
        state, (update, _) = step.init_state(run, mesh), step.compile_steps(run, loss)
        batches = train.batches(ds, run, mesh, loss, out)
        for number in range(12):
            state, _ = update(state, batches(number), jnp.float32(5e-3))
    return ds, run, mesh, state.params


def _decoded(params: Any, run: RunConfig, universe: facts.Universe) -> tuple[np.ndarray, np.ndarray]:
    """What the model says of each person (persons, 6), one value after the other, each of them read as the next input; and
    the probability of each.
    """
    said, sure = np.zeros((universe.persons, 0), int), np.zeros((universe.persons, 0))
    names = np.concatenate([np.full((universe.persons, 1), universe.pool), universe.names], axis=1)
    for _ in range(facts.ATTRIBUTES):
        hidden = decoder.hidden_states(params, jnp.asarray(np.concatenate([names, said], axis=1)), run.model)
        logits = decoder.logits_of(hidden, params, run.model)[:, -1]
        said = np.concatenate([said, np.asarray(logits.argmax(-1))[:, None]], axis=1)
        sure = np.concatenate([sure, np.asarray(jax.nn.softmax(logits).max(-1))[:, None]], axis=1)
    return said, sure


def test_it_is_word_by_word_decoding(parts: tuple[loader.Dataset, RunConfig, Any, Any]) -> None:
    ds, run, mesh, params = parts
    universe = facts.Universe(PERSONS, 20)
    with jax.set_mesh(mesh):
        batch, _ = next(loader.eval_batches(ds, "knowledge", 16))
        rows, sharding = np.arange(16), rules.batch_sharding(run.strategy, mesh)
        ask, calls = jax.jit(lambda p, b: step.eval_step(p, b, run)), []

        def forward(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            calls.append(given["tokens"])
            return feed.gather(ask(params, {k: feed.place(v, rows, 16, sharding) for k, v in given.items()}))

        forced = forward(batch)
        free = train.free_running(forward, batch, forced, rows)
    decoded, sure = _decoded(jax.tree.map(jnp.asarray, jax.device_get(params)), run, universe)
    where = batch["domains"] > 0
    np.testing.assert_allclose(free["sure"][where].reshape(-1, facts.ATTRIBUTES), sure, rtol=1e-4)
    assert np.ptp(sure) > 0.01 and not np.allclose(free["sure"], forced["sure"])
    np.testing.assert_array_equal(free["said"][where].reshape(-1, facts.ATTRIBUTES), decoded)
    right = decoded == universe.values
    assert free["hit"][where].mean() == right.mean()
    assert (
        0 < right.mean() < forced["hit"][where].mean() < 1
    )  # positive control: the two differ, and neither is trivial
    assert 2 <= len(calls) <= 1 + facts.ATTRIBUTES


def test_recall_of_a_run_is_the_decoded_one(parts: tuple[loader.Dataset, RunConfig, Any, Any]) -> None:
    ds, run, mesh, params = parts
    universe = facts.Universe(PERSONS, 20)
    decoded, sure = _decoded(jax.tree.map(jnp.asarray, jax.device_get(params)), run, universe)
    right = decoded == universe.values
    with jax.set_mesh(mesh):
        ask = jax.jit(lambda p, b: step.eval_step(p, b, run))
        rows = {(r["task"], r["metric"]): r for r in train.evaluate(ds, run, mesh, ask, params) if r}
        early = {(r["task"], r["metric"]) for r in train.evaluate(ds, run, mesh, ask, params, last=False) if r}
    assert rows["universe", "recall"]["value"] == pytest.approx(right.mean())
    assert rows["corpus", "recall"]["value"] == pytest.approx(right[:20].mean())
    assert rows["universe", "recall_name_only"]["value"] == pytest.approx(right[:, 0].mean())
    assert rows["corpus", "recall"]["scorer"] == 2
    ended = {("universe", "recall"), ("corpus", "recall"), ("outside", "recall_control")}
    ways = {(task, metric) for task, metric in rows if rows[task, metric]["suite"] == "abstention"}
    assert set(rows) - early == ended | ways and {task for task, _ in ways} == {"free", "first", "forced"}
    odd = np.arange(PERSONS) % 2 == 1  # who is measured
    error = statistics.calibration_error(right[odd].ravel(), sure[odd].ravel())
    assert rows["free", "ece"]["value"] == pytest.approx(error, rel=1e-3)
    assert rows["free", "unknown"]["value"] == pytest.approx(
        1 - (right[odd] & (np.arange(PERSONS) < 20)[odd, None]).mean()
    )
    assert rows["free", "invented_at_half"]["n"] == STRANGERS * facts.ATTRIBUTES
