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
from phi3_jax.models import decoder
from phi3_jax.models.attention import Mask, allowed
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
    ok = np.asarray(allowed(Mask(window=3), 8, 1))[0, 0]
    assert [int(row.sum()) for row in ok] == [1, 2, 3, 3, 3, 3, 3, 3]


def test_blocksparse_mask_matches_a_scalar_reading_of_the_rule() -> None:
    pattern, heads, time = BlockSparse(4, 2, 3), 4, 40
    ok = np.asarray(allowed(Mask(blocksparse=pattern), time, heads))[0]
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


def test_unknown_remat_policy() -> None:
    cfg = CONFIGS["mini-clean"]
    with pytest.raises(UserError, match="did you mean 'full'"):
        decoder.forward(init_params(cfg, 0), tokens(1, 4), cfg, remat="ful")
