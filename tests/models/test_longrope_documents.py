"""Each document takes the LongRoPE list of its own last position, whatever lies beside it in its row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import family
from phi3_jax.configs import BlockSparse, Experts, LongRope, ModelConfig
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import loading
from phi3_jax.interop.nnx import Phi3
from phi3_jax.models import decoder
from phi3_jax.models.rotary import reaches_beyond, rope_table
from phi3_jax.models.spec import init_params

ORIGINAL, TIME = 16, 64
MINI = family.proxy("mini", "pico", "family")
SMALL = family.proxy("small", "pico", "family")


def with_lists(cfg: ModelConfig, **changes: object) -> ModelConfig:
    half = cfg.head_dim // 2
    rope = LongRope(ORIGINAL, tuple(np.linspace(1, 1.5, half)), tuple(np.linspace(2, 9, half)))
    if cfg.member == "small":
        rope = dataclasses.replace(rope, mscale_when_short=False)
    return dataclasses.replace(cfg, longrope=rope, context=4 * TIME, **changes)


CONFIGS = {
    "mini": with_lists(MINI, sliding_window=11),
    "medium": with_lists(family.proxy("medium", "pico", "family"), sliding_window=None),
    "small": with_lists(SMALL, blocksparse=BlockSparse(4, 2, 3)),
    "moe": with_lists(MINI, layout="phimoe", experts=Experts(4, head_bias=True), mup=None, sliding_window=None),
}
PAD = 0
# Rows of (number, tokens): documents on both sides of the original context, padding in front, between and behind.
ROWS = {
    "short beside long": ((1, 5), (2, 30), (PAD, 29)),
    "long beside short": ((1, 30), (2, 5), (PAD, 29)),
    "the border": ((1, 15), (2, 16), (3, 17), (PAD, 16)),
    "the border from the other side, no padding": ((7, 17), (9, 16), (8, 16), (3, 15)),
    "padded far": ((1, 5), (PAD, 59)),
    "padded far at the border": ((1, 16), (PAD, 48)),
    "padded far above the border": ((1, 17), (PAD, 47)),
    "padding in front": ((PAD, 47), (1, 17)),
    "padding in front of a short one": ((PAD, 48), (1, 16)),
    "padding between": ((1, 16), (PAD, 20), (2, 5), (PAD, 3), (3, 17), (PAD, 3)),
    "full": ((1, 64),),
}
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS.values()], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 256, SEGMENTS.shape).astype(np.int32)


@functools.cache
def params_of(name: str) -> dict:
    params = init_params(CONFIGS[name], 0)
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def documents() -> Iterator[tuple[int, slice]]:
    """(row, place) of every document."""
    for i, row in enumerate(ROWS.values()):
        start = 0
        for number, length in row:
            if number != PAD:
                yield i, slice(start, start + length)
            start += length


@functools.cache
def alone(name: str) -> list[np.ndarray]:
    """Logits of each document, computed without any other or padding."""
    forward = jax.jit(functools.partial(decoder.forward, cfg=CONFIGS[name]))
    return [np.asarray(forward(params_of(name), TOKENS[i : i + 1, place]))[0] for i, place in documents()]


def assert_documents(logits: jax.Array, name: str) -> None:
    exact = alone(name)
    scale = max(np.abs(x[x > np.finfo(np.float32).min / 2]).max() for x in exact)
    for (i, place), want in zip(documents(), exact, strict=True):
        np.testing.assert_allclose(logits[i, place], want, rtol=0, atol=2e-5 * scale, err_msg=f"row {i}, {place}")


@pytest.mark.parametrize("attention", ["reference", "chunked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_padded_rows_equal_their_documents_alone(name: str, attention: str) -> None:
    forward = jax.jit(functools.partial(decoder.forward, cfg=CONFIGS[name], attention=attention))
    assert_documents(forward(params_of(name), TOKENS, segments=SEGMENTS), name)


@pytest.mark.parametrize("regime", ["short", "long"])
def test_the_comparison_sees_one_list_for_a_row(regime: str) -> None:
    logits = decoder.forward(params_of("mini"), TOKENS, CONFIGS["mini"], segments=SEGMENTS, rope_regime=regime)
    with pytest.raises(AssertionError, match="row"):
        assert_documents(logits, "mini")


@pytest.mark.parametrize("pad", [-1, 255, 2**31 - 1, -(2**31)])
def test_padding_may_have_any_number_of_its_own(pad: int) -> None:
    model = loading.Model(params_of("medium"), CONFIGS["medium"], None, jnp.float32)
    segments = np.where(SEGMENTS == PAD, pad, SEGMENTS)
    assert_documents(model.logits(TOKENS, segment_ids=segments), "medium")
    # Positions of padding count as little as padding does, be they those of the row or far away.
    positions = np.asarray(decoder.default_positions(TOKENS, SEGMENTS))
    for far in (np.arange(TIME), 10**6):
        given = np.where(SEGMENTS == PAD, far, positions)
        assert_documents(model.logits(TOKENS, positions=given, segment_ids=segments), "medium")


def test_documents_whose_tokens_take_turns() -> None:
    """What attention keeps together is one document, also where another one lies in between."""
    cfg, params = CONFIGS["medium"], params_of("medium")
    numbers = np.array([[1, 2] * 12 + [1] * 6], np.int32)  # 18 and 12 tokens
    positions = np.where(numbers == 1, np.cumsum(numbers == 1), np.cumsum(numbers == 2)) - 1
    ids = TOKENS[:1, :30]
    logits = decoder.forward(params, ids, cfg, positions=positions, segments=numbers)
    for number in (1, 2):
        want = decoder.forward(params, ids[numbers == number][None], cfg)[0]
        np.testing.assert_allclose(logits[0, numbers[0] == number], want, atol=1e-3)


@pytest.mark.parametrize("context", [1, 7, 30, 2**31 - 1])
def test_a_documents_end_is_found_among_any_numbers(context: int) -> None:
    rng = np.random.default_rng(context)
    numbers = rng.choice([-(2**31), -5, 0, 1, 2, 255, 2**31 - 1], (9, 40)).astype(np.int32)
    positions = rng.integers(0, 40, numbers.shape).astype(np.int32)
    same = numbers[:, :, None] == numbers[:, None]
    want = np.where(same, positions[:, None], -1).max(axis=-1) >= context
    np.testing.assert_array_equal(reaches_beyond(jnp.asarray(positions), jnp.asarray(numbers), context), want)
    whole = reaches_beyond(jnp.asarray(positions), None, context)
    np.testing.assert_array_equal(whole, positions.max(axis=1, keepdims=True) >= context)


def test_a_choice_per_token_or_per_row_is_taken_as_given() -> None:
    cfg, positions = CONFIGS["mini"], jnp.tile(jnp.arange(20), (2, 1))
    short, long = (rope_table(positions, cfg, regime) for regime in ("short", "long"))
    rows = rope_table(positions, cfg, jnp.array([True, False]))
    np.testing.assert_array_equal(rows, jnp.stack([long[0], short[1]]))
    which = np.random.default_rng(0).random((2, 20)) < 0.5
    tokens = rope_table(positions, cfg, jnp.asarray(which))
    np.testing.assert_array_equal(tokens, jnp.where(which[..., None, None], long, short))


@pytest.mark.parametrize("name", ["mini", "medium", "small"])
def test_gradients_of_a_row_are_the_sum_of_its_documents_gradients(name: str) -> None:
    cfg, params = CONFIGS[name], params_of(name)
    weights = np.random.default_rng(1).normal(size=(*TOKENS.shape, cfg.embed)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(params: dict, ids: np.ndarray, weight: np.ndarray, segments=None, remat="none") -> dict:
        def loss(params: dict) -> jax.Array:
            hidden = decoder.hidden_states(params, ids, cfg, segments=segments, remat=remat)
            return jnp.sum(jnp.sin(hidden) * weight)

        return jax.grad(loss)(params)

    for row in (0, 2, 6):
        packed = (SEGMENTS[row] != PAD)[:, None] * weights[row]
        found = gradient(params, TOKENS[[row]], packed[None], SEGMENTS[[row]], remat="full")
        parts = [
            gradient(params, TOKENS[[i], place], weights[[i], place]) for i, place in documents() if i == row
        ]  # fmt: skip
        total = jax.tree.map(lambda *x: sum(x), *parts)
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(total), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_nnx_module_does_the_same(name: str) -> None:
    assert_documents(Phi3(params_of(name), CONFIGS[name])(TOKENS, segments=SEGMENTS), name)


def test_scores_of_rows_of_other_lengths_in_one_batch() -> None:
    """A row is padded to the longest of its batch; what is read of it ends before its last token."""
    model = loading.Model(params_of("mini"), CONFIGS["mini"], None, jnp.float32)
    rows = [TOKENS[10, :n].tolist() for n in (6, 16, 17, 18, 60)]
    scores = Engine(model, batch=8).score([(row[:3], row[3:]) for row in rows])
    for row, score in zip(rows, scores, strict=True):
        logprobs = jax.nn.log_softmax(model.logits([row[:-1]])[0, 2:])
        want = np.take_along_axis(np.asarray(logprobs), np.array(row[3:])[:, None], axis=1).sum()
        np.testing.assert_allclose(score.logprob, want, rtol=1e-5)
