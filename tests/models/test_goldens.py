"""Forward passes against the original implementations' tensors, through the import that users take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import check, golden, load_golden, read_golden, text_models

from phi3_jax.configs import LongRope
from phi3_jax.family import published
from phi3_jax.models import decoder, experts, rotary

ALL = text_models()
assert len(ALL) >= 10, "the committed goldens are gone"


@pytest.mark.parametrize("name", ALL)
def test_logits(name: str, tmp_path: Path) -> None:
    meta, t, model = load_golden(name, tmp_path)
    assert meta["tolerance"]["logits"]["suggested_atol"] <= 1e-4 * meta["tolerance"]["logits"]["max_abs"]
    check(model.logits(t["input_ids"], segment_ids=t.get("segment_ids")), t["logits"], meta, "logits")
    if "final_norm" in t and "probe_positions" not in meta.get("tensors", {}):
        segments = jnp.asarray(t["segment_ids"]) if "segment_ids" in t else None
        hidden = decoder.hidden_states(model.params, jnp.asarray(t["input_ids"]), model.config, segments=segments)
        check(hidden, t["final_norm"], meta, "final_norm")


@pytest.mark.parametrize("name", ["mini_two_documents", "mini_window", "moe", "small", "small_longrope"])
def test_logits_by_unrolled_layers(name: str, tmp_path: Path) -> None:
    meta, t, model = load_golden(name, tmp_path)
    segments = jnp.asarray(t["segment_ids"]) if "segment_ids" in t else None
    options = dict(segments=segments, unroll=True)
    logits = decoder.forward(model.params, jnp.asarray(t["input_ids"]), model.config, **options)
    check(logits, t["logits"], meta, "logits")


def test_released_window_sees_one_key_more(tmp_path: Path) -> None:
    meta, t, model = load_golden("mini_sliding_window", tmp_path, window_rule="released")
    logits = model.logits(t["input_ids"])
    check(logits, t["logits_window_plus_one"], meta, "logits_window_plus_one")
    assert float(jnp.abs(logits - t["logits"]).max()) > 1e-2  # the two rules are told apart


def test_left_padding_as_segments(tmp_path: Path) -> None:
    meta, t, model = load_golden("mini_packed", tmp_path)
    mask = t["padded_attention_mask"]
    logits = model.logits(t["padded_input_ids"], positions=t["padded_position_ids"], segment_ids=mask)
    check(jnp.where(mask[..., None] == 1, logits, 0), t["padded_logits"], meta, "padded_logits")


@pytest.mark.parametrize("name", map(golden, ["mini_longrope", "mini_longrope_real"]))
def test_longrope(name: str, tmp_path: Path) -> None:
    meta, t, model = load_golden(name, tmp_path)
    cases = [k.removeprefix("position_ids_") for k in t if k.startswith("position_ids_")]
    assert len(cases) >= 3
    for case in cases:
        positions = np.atleast_2d(t[f"position_ids_{case}"])
        ids = t["input_ids"][:, : positions.shape[1]]
        check(model.logits(ids, positions=positions), t[f"logits_{case}"], meta, f"logits_{case}")


@pytest.mark.parametrize("suffix", ["", "_no_mscale"])
@pytest.mark.parametrize("length", [64, 65, 160])
def test_small_longrope(length: int, suffix: str, tmp_path: Path) -> None:
    config = "config_without_mscale" if suffix else "config"
    meta, t, model = load_golden("small_longrope", tmp_path, config=config)
    key = f"logits_{length}{suffix}"
    check(model.logits(t["input_ids"][:, :length]), t[key], meta, key)


def test_one_token_at_a_time_equals_the_full_forward(tmp_path: Path) -> None:
    """phi-3-small's decoding from a cache gives the rows of the full forward."""
    meta, t, model = load_golden("small_decode", tmp_path)
    first = meta["decode"]["prefill_length"] - 1
    rows = model.logits(t["input_ids"])[:, first : first + meta["decode"]["steps"] + 1]
    check(rows, t["logits_decode"], meta, "logits_decode")


def test_longrope_tables_of_the_published_lists() -> None:
    meta, t = read_golden("longrope_tables")
    lists = {name: entry for name, entry in meta["lists"].items() if "short_factor" in entry}
    assert len(lists) >= 3
    for name, entry in lists.items():
        factors = [tuple(entry[f"{which}_factor"]) for which in ("short", "long")]
        cfg = dataclasses.replace(published("mini", "128k"), longrope=LongRope(4096, *factors))
        for regime in ("short", "long"):
            positions = t[f"positions_{regime}"]
            table = np.asarray(rotary.rope_table(jnp.asarray(positions)[None], cfg)[0])
            for i, part in enumerate(("cos", "sin")):
                exact = t[f"{name}_{regime}_{part}_f64"][:, : table.shape[-1]]
                limit = 2e-6 + 1.5e-7 * positions[:, None]
                assert (np.abs(table[:, i] - exact) <= limit).all(), (name, regime, part)


def test_moe_long_regime_and_routing(tmp_path: Path) -> None:
    meta, t, model = load_golden("moe_tiny", tmp_path)
    check(model.logits(t["input_ids_long"]), t["logits_long"], meta, "logits_long")
    short = model.logits(t["input_ids_long"], rope_regime="short")
    assert float(jnp.abs(short - t["logits_long"]).max()) > 1e-2
    for layer in range(2):
        scores = jnp.asarray(t[f"router_logits_{layer}"]).reshape(-1, 8)
        chosen, weights = experts.route(scores, meta["config"]["router_jitter_noise"])
        np.testing.assert_array_equal(chosen, t[f"selected_experts_{layer}"].reshape(-1, 2))
        check(weights, t[f"routing_weights_{layer}"].reshape(-1, 2), meta, f"routing_weights_{layer}")


@pytest.mark.parametrize("name", map(golden, ["mini_mha", "mini_tied", "small_dense", "small_blocksparse_512"]))
def test_training_loss_and_gradients(name: str, tmp_path: Path) -> None:
    """Mean next-token cross-entropy and the norm of its gradient over all parameters."""
    meta, t, model = load_golden(name, tmp_path)
    ids = jnp.asarray(t["input_ids"])

    def loss(params: dict) -> jax.Array:
        logits = decoder.forward(params, ids, model.config, unroll=True, remat="full")[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1).mean()

    value, grads = jax.value_and_grad(loss)(model.params)
    np.testing.assert_allclose(value, meta["training"]["loss_float64"], rtol=1e-5)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    expected = np.sqrt(sum(v**2 for v in meta["training"]["gradient_norms"].values()))
    np.testing.assert_allclose(norm, expected, rtol=1e-4)
