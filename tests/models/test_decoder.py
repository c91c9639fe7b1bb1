"""Invariances of the forward pass: scan, remat, packing, causality, windows and block sparsity."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import UserError, family
from phi3_jax.configs import BlockSparse, LongRope, ModelConfig
from phi3_jax.interop import loading
from phi3_jax.models import decoder
from phi3_jax.models.layers import activate
from phi3_jax.models.masks import Mask, seen
from phi3_jax.models.rotary import attention_factor, rope_table
from phi3_jax.models.spec import init_params

CONFIGS = {f"{m}-{ladder}": family.proxy(m, "pico", ladder) for m in family.MEMBERS for ladder in family.LADDERS}


def random_params(cfg: ModelConfig, seed: int = 0) -> dict:
    """Initial values with noise everywhere, so that zero heads and unit gains hide nothing."""
    params = init_params(cfg, seed)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def tokens(rows: int, time: int, vocab: int = 320) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (rows, time), 0, vocab)


@pytest.mark.parametrize("name", ["mini-clean", "small-family"])
def test_scan_unroll_and_remat_agree(name: str) -> None:
    cfg, ids = CONFIGS[name], tokens(2, 24)
    params = random_params(cfg)

    def loss(params: dict, **options: object) -> jax.Array:
        return jnp.sum(jnp.sin(decoder.forward(params, ids, cfg, **options)))

    base = jax.jit(jax.value_and_grad(loss))(params)
    for options in (dict(unroll=True), dict(remat="full"), dict(remat="names")):
        other = jax.jit(jax.value_and_grad(functools.partial(loss, **options)))(params)
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_the_same_documents_alone(name: str) -> None:
    cfg = CONFIGS[name]
    if cfg.blocksparse:  # short blocks, so that the pattern bites
        cfg = dataclasses.replace(cfg, blocksparse=BlockSparse(4, 1, 3))
    params, ids = random_params(cfg), tokens(1, 40)
    segments = jnp.asarray([[1] * 17 + [2] * 23])
    packed = decoder.forward(params, ids, cfg, segments=segments)
    alone = [decoder.forward(params, part, cfg) for part in (ids[:, :17], ids[:, 17:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-4)
    joined = decoder.forward(params, ids, cfg)
    assert float(jnp.abs(packed - joined)[:, 17:].max()) > 1e-2  # packing without segments would show


@pytest.mark.parametrize("name", CONFIGS)
def test_later_tokens_change_nothing_earlier(name: str) -> None:
    cfg, ids = CONFIGS[name], tokens(1, 24)
    params = random_params(cfg)
    changed = decoder.forward(params, ids.at[0, 12].set((ids[0, 12] + 1) % 320), cfg)
    difference = jnp.abs(changed - decoder.forward(params, ids, cfg)).max(axis=(0, 2))
    assert float(difference[:12].max()) == 0 and float(difference[12:].min()) > 0


def test_window_rules() -> None:
    mini = family.published("mini")
    assert mini.window_keys == 2048
    assert dataclasses.replace(mini, window_rule="transformers").window_keys == 2047
    ok = np.asarray(seen(Mask(window=3), slice(0, 8), slice(0, 8), (1, 1)))
    assert [int(row.sum()) for row in ok] == [1, 2, 3, 3, 3, 3, 3, 3]


def test_blocksparse_mask_matches_a_scalar_reading_of_the_rule() -> None:
    pattern, heads, time = BlockSparse(4, 2, 3), 4, 40
    every = slice(0, time)
    ok = np.asarray(seen(Mask(blocksparse=pattern), every, every, (1, heads)))[0]
    step = max(1, pattern.vert_stride // heads)
    for h in range(heads):
        for q in range(time):
            for k in range(time):
                kept = q // 4 - k // 4 < 2 or (k // 4 + h * step + 1) % 3 == 0
                assert ok[h, q, k] == (k <= q and kept)
    assert len({ok[h].tobytes() for h in range(3)}) == 3  # heads differ


def test_longrope_regimes() -> None:
    cfg = family.published("mini", "128k")
    assert attention_factor(cfg.longrope, cfg.context, False) == pytest.approx(1.1902380714238083)
    at = lambda last: rope_table(jnp.asarray([[0, last]]), cfg)  # noqa: E731
    short, long = (rope_table(jnp.asarray([[0, 4095]]), cfg, r) for r in ("short", "long"))
    np.testing.assert_array_equal(at(4095), short)
    assert not np.allclose(short, long)
    np.testing.assert_array_equal(at(4096), rope_table(jnp.asarray([[0, 4096]]), cfg, "long"))
    small = LongRope(8192, (1.0,) * 64, (2.0,) * 64, mscale_when_short=False)
    assert attention_factor(small, 131072, False) == 1.0
    assert attention_factor(small, 131072, True) == pytest.approx(1.1435437497937313)


def test_unknown_factors_are_an_error_not_a_guess() -> None:
    cfg = family.published("small", "128k")
    with pytest.raises(UserError, match="LongRoPE list"):
        rope_table(jnp.zeros((1, 4), jnp.int32), cfg)


def test_dummy_tokens_never_win() -> None:
    cfg = dataclasses.replace(CONFIGS["small-family"], dummy_tokens=((300, 320),))
    logits = decoder.forward(random_params(cfg), tokens(1, 8), cfg)
    assert float(logits[..., 300:].max()) == float(jnp.finfo(jnp.float32).min)
    assert float(logits[..., :300].min()) > -1e6


def test_gegelu_clips_the_gate_above_and_the_linear_part_on_both_sides() -> None:
    cfg = family.published("small")
    gate, up = jnp.asarray([25.0, 20.0, -25.0, jnp.inf, 1.0]), jnp.asarray([25.0, -25.0, 1.0, 1.0, jnp.inf])
    a = np.asarray([20.0, 20.0, -25.0, np.inf, 1.0])
    expected = a / (1 + np.exp(-1.702 * a)) * (np.asarray([20.0, -20.0, 1.0, 1.0, np.inf]) + 1)
    np.testing.assert_allclose(activate(gate, up, cfg), expected, rtol=1e-6)


def test_tied_embeddings_read_and_write_one_table() -> None:
    cfg = CONFIGS["small-family"]
    params = random_params(cfg)
    assert cfg.tied and "unembedding" not in params
    grad = jax.grad(lambda p: decoder.forward(p, tokens(1, 8), cfg)[..., 7].sum())(params)["embedding"]
    assert float(jnp.abs(grad[7]).max()) > 0  # as an output, whether or not 7 was read
    untied = dataclasses.replace(cfg, tied=False)
    same = decoder.forward(params | {"unembedding": params["embedding"].T}, tokens(1, 8), untied)
    np.testing.assert_array_equal(decoder.forward(params, tokens(1, 8), cfg), same)


def test_a_forced_rope_regime_reaches_the_logits() -> None:
    rope = LongRope(16, (1.0,) * 8, (3.0,) * 8)
    cfg = dataclasses.replace(CONFIGS["mini-family"], longrope=rope, context=64)
    model = loading.Model(random_params(cfg), cfg, None, jnp.float32)
    short, long = (np.asarray(tokens(1, n)) for n in (16, 17))
    logits = {r: model.logits(short, rope_regime=r) for r in ("auto", "short", "long")}
    np.testing.assert_array_equal(logits["auto"], logits["short"])
    assert float(jnp.abs(logits["long"] - logits["short"]).max()) > 1e-3
    np.testing.assert_array_equal(model.logits(long), model.logits(long, rope_regime="long"))


def test_unknown_remat_policy() -> None:
    cfg = CONFIGS["mini-clean"]
    with pytest.raises(UserError, match="did you mean 'full'"):
        decoder.forward(init_params(cfg, 0), tokens(1, 4), cfg, remat="ful")
