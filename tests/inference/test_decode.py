"""Token by token equals the full forward: every golden, every member, windows, patterns, LongRoPE, several devices."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import BlockSparse, LongRope, ModelConfig
from phi3_jax.family import published
from phi3_jax.inference.cache import SPARE, KVCache, bytes_per_token, cache_bytes, slots_of
from phi3_jax.inference.decode import prefill, step, unstack
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from reference import load_golden, text_models


def decoded(params, cfg: ModelConfig, tokens: np.ndarray, first: int, *, long="short", steps: int | None = None):
    """Logits (batch, time - first + 1, vocab) from position first - 1 on: a prefill, then token after token."""
    capacity = -(-tokens.shape[1] // 8) * 8
    lengths = jnp.full(len(tokens), first)
    start = jax.jit(partial(prefill, cfg=cfg, capacity=capacity, long=long))
    one = jax.jit(partial(step, cfg=cfg, extent=capacity, long=long))
    logits, cache = start(unstack(params), jnp.asarray(tokens[:, :first]), lengths)
    found = [logits]
    for i in range(first, first + (steps or tokens.shape[1] - first)):
        logits, cache = one(unstack(params), jnp.asarray(tokens[:, i]), cache)
        found.append(logits)
    return jnp.stack(found, axis=1)


def assert_same(ours, theirs, tolerance: float = 1e-4) -> None:
    kept = theirs > jnp.finfo(jnp.float32).min / 2  # masked ids hold the least number
    scale = float(jnp.abs(jnp.where(kept, theirs, 0)).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("name", text_models())
def test_every_golden(name: str, tmp_path: Path) -> None:
    _, t, model = load_golden(name, tmp_path)
    tokens = np.asarray(t["input_ids"])[:, :600]  # the longest would take a minute
    if "segment_ids" in t:
        tokens = tokens[
            :, : int(np.argmin(np.asarray(t["segment_ids"])[0] == np.asarray(t["segment_ids"])[0, 0])) or None
        ]
    first = max(1, tokens.shape[1] - 24)
    regime = "short"
    if model.config.longrope and tokens.shape[1] > model.config.longrope.original_context:
        regime = "long"
    full = decoder.forward(model.params, jnp.asarray(tokens), model.config)
    assert_same(decoded(model.params, model.config, tokens, first, long=regime), full[:, first - 1 :])


def tiny(member: str, **changes) -> ModelConfig:
    base = published(member)
    changes = dict(vocab=97, embed=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=96, context=4096) | changes
    return dataclasses.replace(base, name="tiny", **{"dummy_tokens": ()} | changes)


MEMBERS = {
    "mini": tiny("mini", sliding_window=20, kv_heads=4),
    "medium": tiny("medium", sliding_window=31),
    "small": tiny("small", blocksparse=BlockSparse(block=4, local_blocks=3, vert_stride=4), layers=4),
    "small_wide": tiny("small", blocksparse=BlockSparse(block=4, local_blocks=2, vert_stride=8), heads=8, head_dim=8),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_from_the_first_token_far_beyond_window_and_pattern(name: str) -> None:
    cfg = MEMBERS[name]
    params, tokens = init_params(cfg, 0), np.random.default_rng(0).integers(0, 97, (2, 104))
    full = decoder.forward(params, jnp.asarray(tokens), cfg, attention="reference")
    for first in (1, 50):  # a prompt shorter and one longer than what a query sees
        assert_same(decoded(params, cfg, tokens, first), full[:, first - 1 :])
    narrower = dataclasses.replace(cfg, sliding_window=cfg.sliding_window and cfg.sliding_window - 1)
    if cfg.blocksparse:
        narrower = dataclasses.replace(cfg, blocksparse=dataclasses.replace(cfg.blocksparse, local_blocks=1))
    with pytest.raises(AssertionError):  # control: what a query sees shows in the logits
        assert_same(decoded(params, narrower, tokens, 50), full[:, 49:])


def test_rows_of_different_lengths_do_not_see_one_another() -> None:
    cfg = MEMBERS["mini"]
    params, tokens = unstack(init_params(cfg, 0)), np.random.default_rng(1).integers(0, 97, (3, 60))
    lengths, more = np.array([1, 17, 40]), 15
    padded = np.where(np.arange(40) < lengths[:, None], tokens[:, :40], 96)
    alone = [decoder.forward(params, jnp.asarray(tokens[[row], : n + more]), cfg)[0] for row, n in enumerate(lengths)]
    logits, cache = prefill(params, jnp.asarray(padded), jnp.asarray(lengths), cfg, 64)
    for i in range(more):
        for row, n in enumerate(lengths):
            assert_same(logits[row], alone[row][n + i - 1])
        token = jnp.asarray([tokens[row, n + i] for row, n in enumerate(lengths)])
        logits, cache = step(params, token, cache, cfg, 64)
    np.testing.assert_array_equal(cache.lengths, lengths + more)


@pytest.mark.parametrize("name", MEMBERS)
def test_each_prompt_chooses_its_longrope_list_by_its_own_length(name: str) -> None:
    """Padding does not count, and a reply that crosses the border goes on with the list of its prompt."""
    rope = LongRope(16, (1.0,) * (half := MEMBERS[name].head_dim // 2), tuple(np.linspace(2, 9, half)))
    cfg = dataclasses.replace(MEMBERS[name], longrope=rope)
    params, tokens = init_params(cfg, 0), np.random.default_rng(1).integers(0, 97, (5, 70))
    params = jax.tree.map(lambda w: 10 * w if w.ndim > 2 else w, params)  # so that positions matter
    lengths, more = np.array([1, 5, 16, 17, 30]), 18
    full = [
        decoder.forward(params, tokens[[i], : n + more], cfg, rope_regime="long" if n > 16 else "short")[0]
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    start = jax.jit(partial(prefill, cfg=cfg, capacity=64), static_argnames="every")
    one = jax.jit(partial(step, cfg=cfg, extent=64))
    every, _ = start(unstack(params), tokens[:, :60], lengths, every=True)
    logits, cache = start(unstack(params), tokens[:, :60], lengths)
    for row, n in enumerate(lengths):
        assert_same(every[row, :n], full[row][:n])
    for i in range(more):
        for row, n in enumerate(lengths):
            assert_same(logits[row], full[row][n + i - 1])
        logits, cache = one(unstack(params), tokens[np.arange(5), lengths + i], cache)
    np.testing.assert_array_equal(cache.long, lengths > 16)
    other = decoder.forward(params, tokens[[1], :23], cfg, rope_regime="long")[0]
    assert float(jnp.abs(full[1] - other).max()) > 1e-2, "control: the lists differ"


@pytest.mark.parametrize("member", ["mini", "medium"])
@pytest.mark.parametrize("regime", ["short", "long"])
def test_longrope_across_its_boundary_in_each_regime(member: str, regime: str) -> None:
    rng = np.random.default_rng(0)
    rope = LongRope(32, tuple(1 + rng.random(8)), tuple(2 + 9 * rng.random(8)))
    cfg = tiny(member, longrope=rope, sliding_window=None, context=128)
    params = jax.tree.map(lambda w: 3 * w if w.ndim > 2 else w, init_params(cfg, 0))  # so that positions matter
    tokens = rng.integers(0, 97, (2, 48))
    full = decoder.forward(params, jnp.asarray(tokens), cfg, rope_regime=regime)
    assert_same(decoded(params, cfg, tokens, 24, long=regime), full[:, 23:])
    other = decoder.forward(params, jnp.asarray(tokens), cfg, rope_regime={"short": "long", "long": "short"}[regime])
    assert float(jnp.abs(full - other).max()) > 1e-2
    # Rows of one batch in different regimes.
    mixed = jnp.array([regime == "long", regime != "long"])
    both = decoded(params, cfg, tokens, 24, long=mixed)
    assert_same(both[0], full[0, 23:])
    assert_same(both[1], other[1, 23:])


def test_cache_has_the_size_of_what_queries_see() -> None:
    mini, small = published("mini"), published("small")
    assert slots_of(mini, 0, 4096) == 2048 and slots_of(mini, 0, 512) == 512
    assert slots_of(published("mini", "128k"), 0, 131072) == 131072
    assert bytes_per_token(mini) == 393_216 and bytes_per_token(small) == 131_072
    assert bytes_per_token(published("medium")) == 204_800
    assert cache_bytes(mini, 4096) == 2048 * 393_216
    _, cache = prefill(
        unstack(init_params(MEMBERS["mini"], 0)), jnp.zeros((2, 8), int), jnp.array([8, 8]), MEMBERS["mini"], 64
    )
    assert cache.keys[0].shape == (2, 4, 21 + SPARE, 16)
    assert (
        sum(x.nbytes for x in cache.keys + cache.values)
        == 2 * cache_bytes(MEMBERS["mini"], 64, "float32") * (21 + SPARE) // 21
    )


def test_block_sparse_layers_read_only_the_blocks_they_attend() -> None:
    """Garbage in every block that no head attends changes nothing; in one that a head attends, it does."""
    cfg = dataclasses.replace(MEMBERS["small"], layers=1)
    params, tokens = unstack(init_params(cfg, 0)), np.random.default_rng(0).integers(0, 97, (1, 128))
    _, cache = prefill(params, jnp.asarray(tokens), jnp.array([127]), cfg, 128)
    pattern, seen = cfg.blocksparse, np.zeros(32, bool)
    for head in range(4):  # the query is in block 31
        for block in range(32):
            step_ = max(1, pattern.vert_stride // 4)
            seen[block] |= 31 - block < pattern.local_blocks or (block + head * step_ + 1) % pattern.vert_stride == 0

    def logits(block: int) -> jax.Array:
        where = slice(4 * block, 4 * block + 4)
        keys = [k.at[:, :, where].set(jnp.nan) for k in cache.keys]
        values = [v.at[:, :, where].set(jnp.nan) for v in cache.values]
        return step(params, jnp.asarray(tokens[:, 127]), KVCache(keys, values, cache.lengths), cfg, 128)[0]

    assert seen.all(), "with 4 heads and stride 4 each block belongs to some head"
    assert bool(jnp.isnan(logits(31)).all())
    alone = dataclasses.replace(cfg, blocksparse=dataclasses.replace(pattern, homo_head=True))
    untouched = [b for b in range(29) if (b + 1) % 4]
    for block in untouched[::5]:
        where = slice(4 * block, 4 * block + 4)
        keys = [k.at[:, :, where].set(jnp.nan) for k in cache.keys]
        values = [v.at[:, :, where].set(jnp.nan) for v in cache.values]
        out = step(params, jnp.asarray(tokens[:, 127]), KVCache(keys, values, cache.lengths), alone, 128)[0]
        assert not bool(jnp.isnan(out).any()), f"block {block} is attended by no head"


def test_one_step_serves_every_length() -> None:
    """A step is compiled once a batch and extent, not once a length."""
    cfg, count = MEMBERS["mini"], 0
    params = unstack(init_params(cfg, 0))

    def counting(*args):
        nonlocal count
        count += 1
        return step(*args, cfg, 64)

    one = jax.jit(counting)
    _, cache = prefill(params, jnp.zeros((1, 4), int), jnp.array([4]), cfg, 64)
    for _ in range(20):
        _, cache = one(params, jnp.array([1]), cache)
    assert count == 1
