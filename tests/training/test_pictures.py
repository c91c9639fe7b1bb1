"""Training on pictures: parts that stay as they are, loss and gradients of every layout, adapters of the eyes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_lora import plain_run

from phi3_jax import family
from phi3_jax.configs import LongRope, LoraConfig, RunConfig, Vision, fingerprint, run_from_dict
from phi3_jax.data import images
from phi3_jax.errors import UserError
from phi3_jax.keys import rates_of
from phi3_jax.models import decoder, lora, parts, spec, vision
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import objectives, step

EYES = Vision(embed=32, layers=2, heads=4, mlp=32, tile=28, patch=14, crops=2)
CFG = dataclasses.replace(
    family.published("vision"), name="tiny", vocab=96, embed=32, layers=1, heads=4, kv_heads=4, head_dim=8, mlp=32,
    context=512, vision=EYES, sliding_window=None, longrope=LongRope(16, (1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0)),
)  # fmt: skip
LOSS = objectives.Loss(("text",), False)
ROWS, TIME, ROOM = 8, 32, 3
LORA = LoraConfig(2, 4.0, targets=tuple(lora.projections(CFG)))


def run_of(devices: int = 1, how: LoraConfig | None = None, **changes: Any) -> RunConfig:
    return plain_run(CFG, how, strategy="fsdp" if devices > 1 else "dp", **changes)


def batch_of(units: int = 1, micros: int = 1) -> dict[str, np.ndarray]:
    """Eight packed rows of two documents, half of which begin with a picture, cut into units as the loader does."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab, (ROWS, TIME + 1)).astype(np.int32)
    segments = np.repeat(np.arange(1, 3, dtype=np.int32), TIME // 2)[None].repeat(ROWS, 0)
    positions = np.tile(np.arange(TIME // 2, dtype=np.int32), 2)[None].repeat(ROWS, 0)
    each, grid = ROWS // units, images.Grid(False, (56, 28), 0, 1, 2)
    pixels = rng.standard_normal((ROWS, ROOM, 3, 28, 28)).astype(np.float32)  # of each row its own
    index = np.zeros((ROWS, TIME), np.int32)
    room, tiles = ROOM * each // micros, np.zeros((units, ROOM * each // micros, micros, 3, 28, 28), np.float32)
    for row in range(ROWS):
        unit, place = divmod(row, each)
        micro, at = place % micros, place // micros * ROOM
        tiles[unit, at : at + ROOM, micro] = pixels[row]
        shown = [images.Shown(grid, at, 1)] + [images.Shown(grid, at, TIME // 2 + 2)] * (row % 2)
        index[row] = images.index_of([shown], (1, TIME), room, EYES.side)[0]
    domains = ((rng.random((ROWS, TIME)) < 0.5) & (np.roll(index, -1, 1) < 0)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions,
        "domains": domains, "index": index, "tiles": tiles.reshape(-1, 3, 28, 28),
        "tile_count": np.full(units * micros, room, np.int32),
    }  # fmt: skip


def begun(run: RunConfig, mesh: Any) -> tuple[step.TrainState, Any]:
    """A state, and the frozen weights of a run of adapters; adapters that are not 0."""
    shardings = rules.param_shardings(spec.param_specs(CFG), run.strategy, mesh)
    whole = jax.jit(lambda: jax.tree.map(lambda w: 4 * w, spec.init_params(CFG, 1)), out_shardings=shardings)()
    state = step.init_state(run, mesh)
    if run.lora:
        some = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size).reshape(x.shape)), state.params)
        where = rules.param_shardings(step.specs_of(run), run.strategy, mesh)
        return dataclasses.replace(state, params=jax.device_put(some, where)), whole
    return dataclasses.replace(state, params=whole), None


def placed(batch: dict[str, np.ndarray], run: RunConfig, mesh: Any) -> dict[str, jax.Array]:
    two = rules.batch_sharding(run.strategy, mesh)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(two.spec[0]))
    return {k: jax.device_put(v, one if k.startswith("tile") else two) for k, v in batch.items()}


def trained(
    run: RunConfig, devices: int = 1, micros: int = 1, steps: int = 1, slopes: bool = True
) -> tuple[list[float], Any, Any, Any]:
    """Losses and gradient norms of steps; the state before and after; gradients of the first, where they are asked for."""
    mesh = make_mesh(jax.devices()[:devices], run.strategy)
    with jax.set_mesh(mesh):
        state, frozen = begun(run, mesh)
        first = jax.tree.map(np.asarray, state)
        batch = placed(batch_of(devices, micros), run, mesh)
        seen, grads = [], None
        if slopes:
            old, rest = step.trained(state.params, run), frozen if run.lora else state.params
            total, _, grads = jax.jit(lambda p, b: step.loss_and_grads(p, b, run, LOSS, rest))(old, batch)
            seen += [float(total), float(optax.global_norm(grads))]
        go = jax.jit(lambda s, b, lr: step.train_step(s, b, lr, run, LOSS, frozen))
        for _ in range(steps):
            state, metrics = go(state, batch, np.float32(1e-2))
            seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
            assert int(metrics["tiles"]) == ROWS * ROOM == int(metrics["tiles_padded"])
        return seen, first, jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, grads)


@pytest.fixture(scope="module")
def everything() -> tuple[list[float], Any, Any, Any]:
    return trained(run_of())


def close(a: Any, b: Any, most: float = 1e-4) -> None:
    a, b = spec.named(a), spec.named(b)
    assert a.keys() == b.keys()
    for name in a:
        scale = max(float(np.abs(b[name]).max()), 1e-3)
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=most * scale, err_msg=name)


def test_the_gradients_are_those_of_the_model_and_the_unused_layer_has_no_state(everything: Any) -> None:
    losses, first, after, grads = everything
    batch = batch_of()

    def loss(tree: Any) -> jax.Array:
        seen = vision.rows_of(tree, jnp.asarray(batch["tiles"]), CFG), jnp.asarray(batch["index"])
        logits = decoder.forward(
            tree, jnp.asarray(batch["tokens"]), CFG, positions=batch["positions"], segments=jnp.asarray(batch["segments"]),
            pictures=seen,
        )  # fmt: skip
        picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * batch["domains"]) / batch["domains"].sum()

    value, whole = jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, first.params))
    assert losses[0] == pytest.approx(float(value), rel=1e-5)
    assert not any(map(np.any, jax.tree.leaves(whole["vision"]["unused"])))
    assert all(map(np.any, (grads["vision"]["blocks"]["qkv"]["weight"], grads["vision"]["row_end"])))
    close(grads, parts.taken(whole, ()))
    assert "unused" not in grads["vision"]
    states = jax.tree.leaves(after.opt)
    assert sum(x.size for x in states if x.ndim) == 2 * sum(x.size for x in jax.tree.leaves(grads))
    for old, new in zip(
        *map(jax.tree.leaves, (first.params["vision"]["unused"], after.params["vision"]["unused"])), strict=True
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("words", [("projector@0.5",), pytest.param(("tower", "lm@0.1"), marks=pytest.mark.slow)])
def test_parts_that_are_left_out_stay_bitwise_and_take_no_memory(words: tuple[str, ...], everything: Any) -> None:
    losses, first, after, _ = trained(run_of(parts=words), slopes=False)
    assert losses[0] == pytest.approx(everything[0][0], rel=1e-6)
    old, new, all_grads = map(spec.named, (first.params, after.params, everything[3]))
    rates = rates_of(words)
    for name in old:
        change = np.abs(new[name] - old[name]).max()
        if parts.part_of(name) not in rates:
            assert change == 0, name
        elif np.any(all_grads[name]):  # Adam's first step is the rate, where a gradient is far above its epsilon
            assert change == pytest.approx(1e-2 * rates[parts.part_of(name)], rel=1e-2), name
    norm = np.sqrt(sum(float((g**2).sum()) for name, g in all_grads.items() if parts.part_of(name) in rates))
    assert losses[1] == pytest.approx(norm, rel=1e-4)
    moments = sum(x.nbytes for x in jax.tree.leaves(after.opt) if x.ndim)
    assert moments == 8 * sum(one.size for name, one in spec.named_specs(CFG).items() if parts.part_of(name) in rates)


def test_a_part_learns_at_its_own_rate() -> None:
    updates = jax.tree.map(lambda w: np.ones(w.shape), spec.init_params(CFG, 0))
    some = parts.taken(updates, ("lm", "tower@0.5"))
    for name, value in spec.named(parts.scaled(some, ("lm", "tower@0.5"))).items():
        assert (value == (0.5 if parts.part_of(name) == "tower" else 1.0)).all()
    assert parts.scaled(some, ("lm", "tower")) is some
    assert fingerprint(run_of(parts=("lm", "tower"))) != fingerprint(run_of(parts=("lm", "tower@0.5")))
    assert fingerprint(run_of()) == fingerprint(run_of(parts=()))
    run = run_of(parts=("lm", "tower@0.5"))
    assert run_from_dict(dataclasses.asdict(run)).parts == run.parts


@pytest.mark.parametrize("how", [None, pytest.param(LORA, marks=pytest.mark.slow)], ids=["weights", "adapters"])
def test_eight_devices_give_what_one_gives(how: LoraConfig | None, everything: Any) -> None:
    one = everything if how is None else trained(run_of(how=how), steps=0)
    eight = trained(run_of(8, how=how), 8, steps=0)
    np.testing.assert_allclose(eight[0], one[0][:2], rtol=1e-4)
    close(eight[3], one[3], 2e-4)


def test_microbatches_give_what_the_batch_gives(everything: Any) -> None:
    found = trained(run_of(2, accumulation=2), 2, 2, steps=0)
    np.testing.assert_allclose(found[0], everything[0][:2], rtol=1e-4)
    close(found[3], everything[3], 2e-4)


def test_adapters_stand_beside_tower_and_projector_and_merge() -> None:
    kinds = lora.projections(CFG)
    assert {"qkv", "tower.qkv", "tower.down", "projector.in", "projector.out"} <= {*kinds}
    run = run_of(how=LORA)
    _, first, _, grads = trained(run, steps=0)
    found = spec.named(grads)
    assert all(np.any(found[f"{'.'.join(lora.path_of(kind))}.lora_b"]) for kind in kinds)
    base = jax.tree.map(lambda w: 4 * w, spec.init_params(CFG, 1))
    beside = lora.joined(base, jax.tree.map(jnp.asarray, first.params), CFG, LORA)
    values = dict(spec.named(base))
    adapters = spec.named(first.params)
    for kind, one in kinds.items():
        leaf, where = lora.leaf_of(kind), ".".join(lora.path_of(kind))
        a, b, scales = adapters[f"{where}.lora_a"], adapters[f"{where}.lora_b"], lora.scales(CFG, LORA, kind)
        layers = [lora.delta(one, x, y, s) for x, y, s in zip(a, b, scales, strict=True)] if lora.stacked(one) else None
        values[leaf] = values[leaf] + (lora.delta(one, a, b, scales[0]) if layers is None else np.stack(layers))
    merged = spec.named_tree(CFG, values)
    batch = batch_of()

    def logits(tree: Any) -> np.ndarray:
        seen = vision.rows_of(tree, jnp.asarray(batch["tiles"]), CFG), jnp.asarray(batch["index"])
        return decoder.forward(tree, jnp.asarray(batch["tokens"]), CFG, segments=batch["segments"], pictures=seen)

    want = logits(merged)
    assert float(jnp.abs(want - logits(base)).max()) > 1e-2
    np.testing.assert_allclose(logits(beside), want, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))
    assert "unused" not in step.specs_of(run)["vision"]


def test_targets_name_parts_and_what_is_wrong_is_one_line() -> None:
    assert lora.targets_of(("lm",), CFG) == ("qkv", "out", "gate_up", "down")
    assert lora.targets_of(("projector", "tower.qkv"), CFG) == ("tower.qkv", "projector.in", "projector.out")
    assert lora.targets_of(("all-linear",), CFG) == tuple(lora.projections(CFG))
    with pytest.raises(UserError, match="no projection 'towr'.*tower"):
        lora.targets_of(("towr",), CFG)
    with pytest.raises(UserError, match="'lmm' is no part of a model"):
        rates_of(("lmm",))
    with pytest.raises(UserError, match="names lm twice"):
        rates_of(("lm", "lm@2"))
    with pytest.raises(UserError, match="the factor 'x' must be a number"):
        rates_of(("tower@x",))
    with pytest.raises(UserError, match="are both given"):
        run_of(how=LORA, parts=("lm",))
    with pytest.raises(UserError, match="are of a phi-3-vision, and .* is none"):
        plain_run(family.proxy("mini", vocab=96), None, parts=("lm",))
