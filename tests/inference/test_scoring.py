"""A beginning that rows share is read once, and every score is that of the whole row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import BlockSparse, LongRope, ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.family import published
from phi3_jax.inference.engine import Engine
from phi3_jax.inference.sampling import Sampling
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params

SHARED = 75


def tiny(member: str, **changes) -> ModelConfig:
    base = dict(vocab=97, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, context=512, dummy_tokens=())
    return dataclasses.replace(published(member), name="tiny", **base | changes)


ROPE = LongRope(110, tuple(np.linspace(1, 2, 8)), tuple(np.linspace(4, 30, 8)))
SHAPES = {
    "dense": tiny("mini", sliding_window=None),
    "window": tiny("mini", sliding_window=40),
    "window within what follows": tiny("medium", sliding_window=9),
    "blocks": tiny("small", blocksparse=BlockSparse(block=4, local_blocks=3, vert_stride=4), layers=3),
    "two lists": tiny("mini", sliding_window=None, longrope=ROPE),
}


def engine_of(cfg: ModelConfig, batch: int = 4, **options) -> Engine:
    """Random weights, large enough that scores differ from one another."""
    params = jax.tree.map(lambda w: 3 * w if w.ndim > 1 else w, init_params(cfg, 0))
    return Engine(Model(params, cfg, None, jnp.float32, stop_ids=()), batch=batch, **options)


def few_shot(cfg: ModelConfig, seed: int = 0, shared: int = SHARED) -> list[tuple[list[int], list[int]]]:
    """Questions of many lengths behind the same exemplars; the longest rows are beyond `ROPE`'s original context."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, cfg.vocab, n).tolist()  # noqa: E731
    exemplars = draw(shared)
    pairs = [(exemplars + draw(n), draw(m)) for n, m in ((1, 1), (9, 4), (34, 1), (35, 1), (36, 1), (60, 12), (20, 3))]
    return pairs + [(pairs[1][0], [5]), (pairs[1][0], [6])]  # lettered options


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_whole_rows(shape: str) -> None:
    engine = engine_of(SHAPES[shape])
    pairs = few_shot(engine.config)
    plain, shared = engine.score(pairs), engine.score(pairs, SHARED)
    np.testing.assert_allclose([s.logprob for s in shared], [s.logprob for s in plain], rtol=0, atol=1e-5)
    assert [(s.greedy, s.tokens) for s in shared] == [(s.greedy, s.tokens) for s in plain]
    other = engine.score([([*context[: SHARED - 1], 1, *context[SHARED:]], rest) for context, rest in pairs])
    assert max(abs(a.logprob - b.logprob) for a, b in zip(plain, other, strict=True)) > 1e-3, "control: it is read"
    asked = pairs[0][0]
    best = engine.generate([asked], 3, stop_ids=())[0].ids
    assert engine.score([(asked, best)], SHARED)[0].greedy


def test_each_of_longropes_lists_has_a_beginning_of_its_own() -> None:
    engine = engine_of(SHAPES["two lists"])
    pairs = few_shot(engine.config)
    engine.score(pairs, SHARED)
    assert sorted(chosen for _, chosen in engine._kept_before) == [False, True]
    for regime in ("short", "long"):
        fixed = engine_of(SHAPES["two lists"], rope_regime=regime)
        found, want = fixed.score(pairs, SHARED), fixed.score(pairs)
        np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in want], rtol=0, atol=1e-5)
    keys = [one.keys[-1] for one in engine._kept_before.values()]
    assert float(jnp.abs(keys[0] - keys[1]).max()) > 0.1, "control: the lists differ"


def test_it_is_read_once_and_programs_are_few() -> None:
    engine = engine_of(SHAPES["dense"])
    read = []
    begin = engine._begin
    engine.__dict__["_begin"] = lambda *args: read.append(int(args[2])) or begin(*args)
    pairs = few_shot(engine.config)
    parts = [pairs[:4], pairs[4:], pairs[:2]]
    for part in parts:
        engine.score(part, SHARED)
    assert read == [SHARED], "once for all calls that begin alike"
    engine.score(few_shot(engine.config, 1), SHARED)
    assert read == [SHARED] * 2 and len(engine._kept_before) == 1, "other exemplars take the place of the first"
    engine.score(pairs[:1])
    assert not engine._kept_before, "rows that share nothing do not pay for what others shared"
    first = engine.compilations
    for seed, shared in ((2, 75), (3, 100), (4, 128)):  # exemplars of about as many tokens
        others = few_shot(engine.config, seed, shared)
        for part in (others[:4], others[4:], others[:2]):
            engine.score(part, shared)
    assert engine.compilations == first, "other exemplars, other lengths, and no program more"


@pytest.mark.parametrize("shape", SHAPES)
def test_replies_are_those_of_whole_prompts(shape: str) -> None:
    engine = engine_of(SHAPES[shape])
    prompts = [context for context, _ in few_shot(engine.config)]
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3), Sampling(repetition_penalty=1.3)):
        plain = engine.generate(prompts, 40, sampling, stop_ids=())  # beyond the windows, and the lists' border
        found = engine.generate(prompts, 40, sampling, stop_ids=(), shared=SHARED)
        assert [r.ids for r in found] == [r.ids for r in plain]
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-5)
            assert a.prompt_tokens == b.prompt_tokens
    assert engine._kept_before, "control: it was read apart"
    others = [[*one[: SHARED - 1], 1, *one[SHARED:]] for one in prompts]
    plain, other = (engine.generate(some, 3, stop_ids=()) for some in (prompts, others))
    seen = max(abs(a.logprobs[2] - b.logprobs[2]) for a, b in zip(other, plain, strict=True))
    assert seen > 1e-4, "control: what is shared is seen after the first token"


def test_long_prompts_after_what_is_shared_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(SHAPES["dense"])
    prompts = [context for context, _ in few_shot(engine.config)]
    plain = engine.generate(prompts, 5, stop_ids=())
    monkeypatch.setattr("phi3_jax.inference.engine.WRITTEN", 40 * (40 + 128))
    given, run = [], engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: given.append((len(args[0]), args[-1] is None)) or run(*args))
    assert [r.ids for r in engine.generate(prompts, 5, stop_ids=(), shared=SHARED)] == [r.ids for r in plain]
    assert given == [(4, True), (4, False), (1, False)]


def test_what_is_not_shared_is_one_line() -> None:
    engine = engine_of(SHAPES["dense"])
    pairs = few_shot(engine.config)
    with pytest.raises(UserError, match="do not begin with the same 76 tokens and one more"):
        engine.score(pairs, SHARED + 1)
    with pytest.raises(UserError, match="do not begin with the same 75 tokens and one more"):
        engine.score([(pairs[0][0][:SHARED], [1])], SHARED)
    with pytest.raises(UserError, match="do not begin with the same 75 tokens and one more"):
        engine.generate([pairs[0][0][:SHARED]], 3, shared=SHARED)
