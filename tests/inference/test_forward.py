"""Losses under lists: those of transformers, with their gradients, and the same on any number of devices."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import family
from phi3_jax.data import long_rows as rows
from phi3_jax.extension import lists
from phi3_jax.inference import decode, forward
from phi3_jax.interop import loading
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params, param_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from reference import read_golden, write_folder

CFG = family.proxy("mini", "pico", "clean", vocab=40)
TASK = lists.Task(16, 10000.0, 16, 4.0)


def noisy() -> dict:
    params = init_params(CFG, 0)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def judge(strategy: str, devices: int) -> forward.Judge:
    mesh = make_mesh(jax.devices()[:devices], strategy)
    placed = jax.device_put(noisy(), rules.param_shardings(param_specs(CFG), strategy, mesh))
    return forward.Judge(placed, CFG, mesh, strategy)


def some_rows(count: int = 5, length: int = 64) -> rows.Rows:
    ids = np.random.default_rng(0).integers(0, 40, (count, length + 1)).astype(np.int32)
    return rows.of_ids(ids, 16)


def test_any_number_of_devices_gives_the_same_and_it_is_the_forward_pass() -> None:
    given, factors = some_rows(), lists.yarn(TASK)
    nll, hit = judge("dp", 1)(given, factors, 1.1)
    assert nll.shape == hit.shape == (5, 48)
    for strategy, devices in (("dp", 4), ("fsdp", 8)):
        other, same = judge(strategy, devices)(given, factors, 1.1)
        np.testing.assert_allclose(other, nll, atol=2e-5)
        assert (same == hit).all()
    table = rotary_table(given, factors, 1.1)
    logits = decoder.forward(noisy(), jnp.asarray(given.tokens), CFG, rope=table)
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), given.targets[..., None], -1)[..., 0][:, 16:]
    np.testing.assert_allclose(nll, want, atol=2e-5)
    assert np.abs(judge("dp", 1)(given, lists.pi(TASK), 1.1)[0] - nll).max() > 1e-3


@pytest.mark.parametrize("piece", [12, 64, 16])  # five pieces and a rest, one piece, whole pieces
def test_feed_forward_layers_take_long_rows_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, factors = some_rows(), lists.yarn(TASK)
    whole, _ = judge("dp", 1)(given, factors, 1.1)
    params, ids = decode.unstack(noisy()), jnp.asarray(given.tokens)

    def read(ids: jax.Array) -> tuple[jax.Array, object]:
        return decode.prefill(params, ids, jnp.full(len(ids), 60), CFG, 80)

    def goes_in_pieces() -> bool:
        return "scan" in str(jax.make_jaxpr(lambda ids: read(ids))(ids))

    logits, cache = read(ids)
    assert not goes_in_pieces()
    for module in (decoder, decode):
        monkeypatch.setattr(module, "PIECE", piece)
    assert goes_in_pieces() == (piece < 64), "control"
    again, kept = read(ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), (again, kept), (logits, cache))
    for strategy, devices in (("dp", 1), ("fsdp", 8)):
        np.testing.assert_allclose(judge(strategy, devices)(given, factors, 1.1)[0], whole, atol=2e-5)


def rotary_table(given: rows.Rows, factors: np.ndarray, scale: float) -> jax.Array:
    from phi3_jax.models.rotary import table_of

    positions = jnp.broadcast_to(jnp.arange(given.tokens.shape[1]), given.tokens.shape)
    return table_of(positions, CFG, jnp.asarray(factors, jnp.float32), jnp.float32(scale))


@pytest.mark.shared("goldens/longcontext")
def test_losses_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    meta, tensors = read_golden("longcontext/fitness")
    model = loading.load(f"hf:{write_folder(tmp_path / 'hf', meta['config'] | {'model_type': 'phi3'}, tensors)}")
    original, ids = meta["config"]["original_max_position_embeddings"], tensors["input_ids"]
    every = rows.of_ids(ids, 0)
    positions = np.broadcast_to(np.arange(ids.shape[1] - 1), every.tokens.shape)

    def means(factors: jax.Array, scale: float, params: object) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        arrays = map(jnp.asarray, (every.tokens, every.targets, every.index, positions))
        nll, _ = forward.scores(
            params, *arrays, factors, jnp.asarray(scale, factors.dtype), model.config, factors.dtype
        )
        return jnp.mean(nll[:, original:]), (jnp.mean(nll[:, -8:]), nll)

    for name, case in meta["lists"].items():
        long, (needle, nll) = means(jnp.asarray(case["factors"], jnp.float32), case["attention_factor"], model.params)
        np.testing.assert_allclose(nll, tensors[f"nll_{name}_f64"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(nll, tensors[f"nll_{name}"], atol=1e-5)
        assert long == pytest.approx(case["mean_nll_beyond_original"], abs=1e-5)
        assert needle == pytest.approx(case["needle_nll"], abs=1e-5)
        with jax.enable_x64(True):
            params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params)
            factors, scale = jnp.asarray(case["factors"]), case["attention_factor"]
            for which, key in ((lambda out: out[0], "long"), (lambda out: out[1][0], "needle")):
                grad = jax.grad(lambda f, which=which: which(means(f, scale, params)))(factors)  # noqa: B023
                np.testing.assert_allclose(grad, tensors[f"grad_{key}_{name}_f64"], atol=1e-5 * np.abs(grad).max())
