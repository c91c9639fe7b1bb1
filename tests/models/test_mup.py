"""muP in width and CompleteP in depth: the table, and coordinate checks whose positive control must fail.

Coordinate check: train a few Adam steps at a large learning rate; the change of every activation from its initial value
must not grow or shrink with width (depth). The slope of log2(change) against log2(size) is the measure.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import family
from phi3_jax.configs import DataConfig, ModelConfig, OptimConfig, RunConfig
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params, multipliers, param_specs
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import step
from phi3_jax.training.optimizers import muon

BASE = family.proxy("mini", "pico")
TIME, ROWS = 16, 16


def sized(width: int, layers: int, mup: bool) -> ModelConfig:
    heads = width // 16
    return dataclasses.replace(
        BASE, embed=width, layers=layers, heads=heads, kv_heads=heads, head_dim=16, mlp=2 * width,
        mup=BASE.mup if mup else None,
    )  # fmt: skip


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (ROWS, TIME + 1)).astype(np.int32)
    ones = np.ones((ROWS, TIME), np.int32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), (ROWS, TIME)).copy()
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": positions,
        "domains": ones,
    }


def of_few(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with 16 different tokens.

    Muon changes hidden states less in these steps than AdamW. The logits of tokens that never meet then change by sums of
    random signs, width^-1/2 of the others, which the smallest width shows most.
    """
    return data | {name: data[name] % 16 for name in ("tokens", "targets")}


def activations(params: dict, cfg: ModelConfig, data: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Residual stream after every block, last norm and logits."""
    hidden = decoder.hidden_states(params, data["tokens"], cfg, unroll=True)
    shallow = dataclasses.replace(cfg, layers=1)
    first = {k: v for k, v in params.items() if k != "blocks"} | {
        "blocks": jax.tree.map(lambda w: w[:1], params["blocks"])
    }
    return {
        "first block": decoder.hidden_states(first, data["tokens"], shallow, unroll=True),
        "hidden": hidden,
        "logits": decoder.logits_of(hidden, params, cfg),
    }


def changes(cfg: ModelConfig, lr: float, name: str = "adamw", steps: int = 6) -> dict[str, float]:
    """Mean absolute change of each activation after a few steps."""
    optim = OptimConfig(peak_lr=lr, spike_factor=0.0, name=name)
    run = RunConfig("x", cfg, optim, DataConfig("f", "", "", TIME, 320), ROWS, 100)
    data, mesh = batch() if name == "adamw" else of_few(batch()), make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        train, _ = step.compile_steps(run, step.Loss(("x",), False))
        state = step.init_state(run, mesh)
        look = jax.jit(lambda p: activations(p, cfg, data))
        before = look(state.params)
        for _ in range(steps):
            state, _ = train(state, data, jnp.float32(lr))
        after = look(state.params)
    return {k: float(jnp.mean(jnp.abs(after[k] - before[k]))) for k in before}


def slopes(configs: list[ModelConfig], sizes: list[int], lr: float, name: str = "adamw") -> dict[str, float]:
    rows = [changes(cfg, lr, name) for cfg in configs]
    return {k: float(np.polyfit(np.log2(sizes), np.log2([r[k] for r in rows]), 1)[0]) for k in rows[0]}


def test_width_coordinate_check() -> None:
    widths = [48, 96, 192, 384]
    found = slopes([sized(w, 2, mup=True) for w in widths], widths, 3e-3)
    assert all(abs(s) <= 0.15 for s in found.values()), found


def test_width_coordinate_check_fails_without_mup() -> None:
    widths = [48, 96, 192, 384]
    found = slopes([sized(w, 2, mup=False) for w in widths], widths, 3e-3)
    assert found["logits"] >= 0.5, found


def test_depth_coordinate_check() -> None:
    depths = [2, 4, 8, 16]
    found = slopes([sized(48, n, mup=True) for n in depths], depths, 3e-3)
    assert all(abs(s) <= 0.15 for s in found.values()), found


@pytest.mark.slow
def test_depth_coordinate_check_fails_without_completep() -> None:
    """With alpha = 0 each block learns less the deeper the model is."""
    depths = [2, 4, 8, 16]
    flat = dataclasses.replace(BASE.mup, alpha=0.0)
    found = slopes([dataclasses.replace(sized(48, n, mup=True), mup=flat) for n in depths], depths, 3e-3)
    assert found["first block"] <= -0.5, found


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["width", "depth"])
def test_coordinate_check_with_muon(vary: str) -> None:
    sizes = [48, 96, 192, 384] if vary == "width" else [2, 4, 8, 16]
    configs = [sized(n, 2, mup=True) if vary == "width" else sized(48, n, mup=True) for n in sizes]
    found = slopes(configs, sizes, 3e-3, "muon")
    assert all(abs(s) <= 0.15 for s in found.values()), found


def test_width_coordinate_check_with_muon_fails_without_mup() -> None:
    widths = [48, 192]
    found = slopes([sized(w, 2, mup=False) for w in widths], widths, 3e-3, "muon")
    assert found["logits"] >= 0.5, found


def test_width_coordinate_check_with_muon_fails_with_adams_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_factors", multipliers)
    widths = [48, 192]
    found = slopes([sized(w, 2, mup=True) for w in widths], widths, 3e-3, "muon")
    assert found["hidden"] <= -0.4, found


def test_multiplier_table() -> None:
    """arXiv:2505.01618 table 1 at twice the width and twice the depth, alpha = 1."""
    cfg = sized(96, 8, mup=True)
    specs = param_specs(cfg)
    got = {
        name: dataclasses.astuple(multipliers(cfg, spec))
        for name, spec in {
            "embedding": specs["embedding"],
            "gain": specs["blocks"]["mlp_norm"]["scale"],
            "hidden": specs["blocks"]["down"]["weight"],
            "final": specs["final_norm"]["scale"],
            "unembedding": specs["unembedding"],
        }.items()
    }
    # (learning rate, weight decay, epsilon)
    assert got["embedding"] == (1.0, 1.0, 0.5)
    assert got["gain"] == (1.0, 0.0, 0.25)
    assert got["hidden"] == (0.5, 2.0, 0.25)
    assert got["final"] == (1.0, 0.0, 0.5)
    assert got["unembedding"] == (1.0, 1.0, 1.0)
    assert cfg.residual_multiplier == 0.5 and decoder.logit_scale(cfg) == 0.5


@pytest.mark.parametrize("member", ["mini", "medium"])
def test_published_models_have_no_mup(member: str) -> None:
    cfg = family.published(member)
    specs = param_specs(cfg)
    assert dataclasses.astuple(multipliers(cfg, specs["blocks"]["qkv"]["weight"])) == (1.0, 1.0, 1.0)
    assert decoder.logit_scale(cfg) == 1.0 and cfg.residual_multiplier == 1.0
    assert cfg.softmax_scale == pytest.approx(cfg.head_dim**-0.5)


def test_small_has_its_published_multipliers() -> None:
    cfg = family.published("small")
    assert (cfg.embed_multiplier, decoder.logit_scale(cfg), cfg.softmax_scale) == (10.0, 1 / 8, 1 / 128)


def test_initial_values_do_not_depend_on_other_tensors() -> None:
    small, deep = init_params(sized(48, 2, True), 3), init_params(sized(48, 4, True), 3)
    np.testing.assert_array_equal(small["embedding"], deep["embedding"])
    assert not np.array_equal(small["embedding"], init_params(sized(48, 2, True), 4)["embedding"])
