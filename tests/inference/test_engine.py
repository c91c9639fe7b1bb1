"""Engine: batches, sampling, stops, streaming, scores, and how few programs it compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from phi3_jax.configs import LongRope
from phi3_jax.data.tokenizers import ByteTokenizer
from phi3_jax.errors import UserError
from phi3_jax.family import published
from phi3_jax.inference.engine import Engine, bucket, part_of
from phi3_jax.inference.sampling import Sampling, choose
from phi3_jax.interop.loading import Model
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params

CFG = dataclasses.replace(
    published("mini"), name="tiny", vocab=259, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, context=256,
    sliding_window=40,
)  # fmt: skip


def model(cfg=CFG, seed: int = 0, scale: float = 4.0) -> Model:
    """Random weights, large enough that replies differ from one another."""
    params = jax.tree.map(lambda w: scale * w if w.ndim > 1 else w, init_params(cfg, seed))
    return Model(params, cfg, ByteTokenizer(), jnp.float32)


FORWARD = jax.jit(lambda params, tokens: decoder.forward(params, tokens, CFG))


def padded(ids: list[int]) -> np.ndarray:
    return np.array([ids + [0] * (128 - len(ids))])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model(), batch=4)


PROMPTS = ["a", "hello there", "x" * 70, "Explain RoPE.", "zz", "0123456789" * 9, "é"]


def test_greedy_is_the_argmax_of_the_full_forward_whatever_the_batch(engine: Engine) -> None:
    together = engine.generate(PROMPTS, 12, stop_ids=())
    alone = [engine.generate([p], 12, stop_ids=())[0] for p in PROMPTS]
    for prompt, a, b in zip(PROMPTS, together, alone, strict=True):
        ids, n = list(prompt.encode()) + a.ids, len(prompt.encode())
        logits = FORWARD(engine._params, padded(ids))[0, n - 1 : len(ids) - 1]
        assert a.ids == jnp.argmax(logits, -1).tolist()
        chosen = jax.nn.log_softmax(logits)[np.arange(12), np.array(a.ids)]
        np.testing.assert_allclose(a.logprobs, chosen, atol=1e-4)
        assert (a.ids, a.finish, a.prompt_tokens) == (b.ids, "length", n) and len(a.ids) == 12
        assert a.text == ByteTokenizer().decode(a.ids)


def test_seeds_and_rows_have_their_own_streams(engine: Engine) -> None:
    hot = Sampling(temperature=1.5, seed=7)
    a, b = (engine.generate(PROMPTS, 10, hot, stop_ids=()) for _ in range(2))
    assert [c.ids for c in a] == [c.ids for c in b]
    assert [c.ids for c in a[:3]] == [c.ids for c in engine.generate(PROMPTS[:3], 10, hot, stop_ids=())]
    assert [c.ids for c in a] != [
        c.ids for c in engine.generate(PROMPTS, 10, dataclasses.replace(hot, seed=8), stop_ids=())
    ]
    same = engine.generate(["hello"] * 4, 10, hot, stop_ids=())
    assert len({tuple(c.ids) for c in same}) == 4


def draws(logits: np.ndarray, sampling: Sampling, n: int = 4000, seen=None) -> np.ndarray:
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), many.shape)
    token, _ = choose(many, jax.random.split(jax.random.key(0), n), sampling.kind, sampling.numbers(), seen)
    return np.bincount(np.asarray(token), minlength=len(logits))


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(temperature=0.5), np.square([0.4, 0.3, 0.15, 0.1, 0.05])),
        (Sampling(temperature=1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.7001), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.6), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.3), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(temperature=1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=1.0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1), [0.4, 0.3, 0, 0, 0]),
        (Sampling(), [1, 0, 0, 0, 0]),
    ],
)
def test_distributions(sampling: Sampling, expected) -> None:
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        counts = draws(LOGITS[order], sampling)
        share = np.asarray(expected, float)[order] / np.sum(expected)
        assert (counts[share == 0] == 0).all()
        if (share > 0).sum() > 1:
            assert stats.chisquare(counts[share > 0], share[share > 0] * counts.sum()).pvalue > 1e-4


def test_repetition_penalty_falls_on_prompt_and_reply() -> None:
    logits = np.array([2.0, 1.5, -0.1, -1.0])
    assert draws(logits, Sampling(repetition_penalty=2.0), 8, [True, False, False, False])[1] == 8
    assert (
        draws(logits - 2.1, Sampling(repetition_penalty=9.0), 8, [True, False, False, False])[1] == 8
    )  # negative ones too
    assert draws(logits, Sampling(repetition_penalty=2.0), 8, [False] * 4)[0] == 8
    plain, punished = (
        Engine(model()).generate(["abab"], 40, Sampling(repetition_penalty=p), stop_ids=())[0].ids for p in (1.0, 1e6)
    )
    assert len(set(plain)) < 40 == len(set(punished)) and not set(punished) & set(b"ab")


def test_stops(engine: Engine) -> None:
    whole = engine.generate(["hello there"], 24, stop_ids=())[0]
    third = next(i for i in range(3, 24) if whole.ids[i] not in whole.ids[:i])
    stopped = engine.generate(["hello there"], 24, stop_ids=[whole.ids[third]])[0]
    assert (stopped.ids, stopped.finish) == (whole.ids[:third], "stop")
    text = whole.text
    cut = engine.generate(["hello there"], 24, stop=["never there", text[5:8]], stop_ids=())[0]
    assert cut.text == text[: text.index(text[5:8])] and cut.finish == "stop" and len(cut.ids) < 24


def test_streaming_gives_the_text_in_pieces_and_never_a_part_of_a_stop(engine: Engine) -> None:
    for stop in ([], ["no such"], None):
        texts = engine.generate(PROMPTS, 40, stop_ids=())
        stops = [texts[1].text[20:26]] if stop is None else stop
        pieces: dict[int, list[str]] = {}
        say = lambda i, t, to=pieces: to.setdefault(i, []).append(t)  # noqa: E731
        replies = engine.generate(PROMPTS, 40, stop=stops, stop_ids=(), on_text=say)
        assert ["".join(pieces.get(i, [])) for i in range(len(PROMPTS))] == [r.text for r in replies]
        assert max(map(len, pieces.values())) > 5, "in pieces, not at the end"
    assert replies[1].finish == "stop" and stops[0] not in replies[1].text


def test_characters_of_several_bytes_come_whole() -> None:
    from phi3_jax.inference.reply import Reply

    said: list[str] = []
    reply = Reply(0, [97], ByteTokenizer(), ("END",), frozenset(), lambda _, text: said.append(text))
    text = "naïve — 日本語 🙂 " * 5 + "ENDE"
    for byte in text.encode():
        if not reply.take(byte, 0.0):
            break
    done = reply.finished()
    assert "".join(said) == done.text == text.removesuffix("ENDE") and done.finish == "stop"
    assert not any("\ufffd" in piece or "E" in piece for piece in said)


def test_scores_are_sums_of_the_full_forward(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (30, 4), (70, 1), (9, 33)]
    pairs = [(rng.integers(0, 259, n).tolist(), rng.integers(0, 259, m).tolist()) for n, m in sizes]
    pairs += [(pairs[1][0], [c]) for c in (5, 6, 7)] + [(pairs[1][0], [8, c]) for c in (1, 2)]
    scores = engine.score(pairs)
    assert [engine.score([pair])[0].logprob for pair in pairs[:3]] == pytest.approx([s.logprob for s in scores[:3]])
    for (context, continuation), score in zip(pairs, scores, strict=True):
        logits = FORWARD(engine._params, padded(context + continuation))[0]
        logits = jax.nn.log_softmax(logits)[len(context) - 1 : len(context + continuation) - 1]
        expected = float(sum(logits[i, t] for i, t in enumerate(continuation)))
        assert score.logprob == pytest.approx(expected, abs=1e-3) and score.tokens == len(continuation)
        assert score.greedy == (jnp.argmax(logits, -1).tolist() == continuation)
    context = pairs[1][0]
    best = engine.generate([context], 3, stop_ids=())[0]
    assert engine.score([(context, best.ids)])[0].greedy
    assert engine.score([(context, best.ids)])[0].logprob == pytest.approx(sum(best.logprobs), abs=1e-3)


def test_few_programs(engine: Engine) -> None:
    fresh = Engine(model(), batch=2)
    fresh.generate(["a" * 20, "b" * 9], 100, stop_ids=())
    first = fresh.compilations
    assert first == 2, "a prefill and a step"
    for n in (3, 17, 25, 30):
        fresh.generate(["c" * n, "d" * (n - 1)], 60, Sampling(temperature=0.5, top_k=n, seed=n), stop_ids=())
    assert fresh.compilations == first
    fresh.generate(["c" * 20, "d"], 180, stop_ids=())  # beyond 128 positions
    assert first < fresh.compilations <= first + 3


def test_longrope_is_decided_before_the_first_token() -> None:
    rng = np.random.default_rng(0)
    rope = LongRope(64, tuple(1 + rng.random(8)), tuple(4 + 30 * rng.random(8)))
    cfg = dataclasses.replace(CFG, longrope=rope, sliding_window=None)
    one, prompts = model(cfg, scale=5.0), ["ab" * 10, "q" * 30]
    engine = Engine(one)
    for more, regime in ((20, "short"), (60, "long")):
        fixed = Engine(one, rope_regime=regime).generate(prompts[:1], more, stop_ids=())[0]
        assert engine.generate(prompts[:1], more, stop_ids=())[0].ids == fixed.ids
        ids = list(prompts[0].encode()) + fixed.ids
        logits = decoder.forward(engine._params, jnp.asarray([ids]), cfg, rope_regime=regime)[0]
        assert jnp.argmax(logits, -1).tolist()[19:-1] == fixed.ids
    both = engine.generate(prompts, 40, stop_ids=())  # 60 and 70 tokens: one row in each regime
    alone = [Engine(one, rope_regime=r).generate([p], 40, stop_ids=())[0] for p, r in zip(prompts, ("short", "long"))]
    assert [b.ids for b in both] == [a.ids for a in alone]


@pytest.mark.parametrize(("more", "regime"), [(45, "short"), (46, "long")])
def test_the_border_is_what_is_read(more: int, regime: str) -> None:
    """A reply's last token is never read: 20 tokens and 45 new ones read the 64 of the original context."""
    rng = np.random.default_rng(0)
    rope = LongRope(64, tuple(1 + rng.random(8)), tuple(4 + 30 * rng.random(8)))
    one = model(dataclasses.replace(CFG, longrope=rope, sliding_window=None), scale=5.0)
    found = Engine(one).generate(["ab" * 10], more, stop_ids=())[0]
    ids = list(b"ab" * 10) + found.ids
    lists = {r: Engine(one, rope_regime=r) for r in ("short", "long")}
    replies = {r: e.generate(["ab" * 10], more, stop_ids=())[0].ids for r, e in lists.items()}
    assert replies[regime] == found.ids and replies["short"] != replies["long"]
    logits = jax.nn.log_softmax(one.logits([ids[:-1]])[0])  # "auto" of the full forward over what is read
    np.testing.assert_allclose(found.logprobs, logits[np.arange(19, 19 + more), ids[20:]], atol=1e-3)
    pair = [(ids[:20], ids[20:])]
    scores = {r: e.score(pair)[0].logprob for r, e in lists.items()}
    assert Engine(one).score(pair)[0].logprob == pytest.approx(scores[regime], abs=1e-3)
    assert abs(scores["short"] - scores["long"]) > 0.1


def test_whole_numbers_of_numpy_are_taken(engine: Engine) -> None:
    want = engine.generate([[97, 98]], 3, stop_ids=())[0].ids
    for ids in (np.array([97, 98]), np.array([97, 98], np.uint8), [np.int64(97), 98], jnp.array([97, 98]), (97, 98)):
        assert engine.generate([ids], np.int32(3), stop_ids=())[0].ids == want
    many = (
        Sampling(temperature=1.0, top_k=np.int64(5)),
        Sampling(temperature=1, top_k=3 * 10**9),
        Sampling(top_k=10**400),
    )
    assert [s.numbers().top_k for s in many] == [5, 2**30, 2**30]


def test_scores_that_are_not_finite_never_leave() -> None:
    one = model()
    one.params["unembedding"] = one.params["unembedding"].at[3].set(jnp.nan)
    for call in (lambda e: e.generate(["ab"], 3), lambda e: e.score([([1, 2], [3, 4])])):
        with pytest.raises(UserError, match="tiny computes a log-probability of nan: its weights") as error:
            call(Engine(one))
        assert "\n" not in str(error.value)


def test_listed_ids_end_a_reply(engine: Engine) -> None:
    whole = engine.generate(["hello there"], 24, stop_ids=())[0].ids
    third = next(i for i in range(3, 24) if whole[i] not in whole[:i])
    listed = Engine(dataclasses.replace(model(), stop_ids=(whole[third],)), batch=4)
    reply = listed.generate(["hello there"], 24)[0]
    assert (reply.ids, reply.finish) == (whole[:third], "stop")
    assert model().stop_ids == (257,) and dataclasses.replace(model(), tokenizer=None, stop_ids=None).stop_ids == ()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.generate([""]), "the prompt is empty"),
        (lambda e: e.generate(["a", []]), "the prompt is empty"),
        (lambda e: e.generate(["a" * 200], 100), "exceed the context of 256 by 44"),
        (lambda e: e.generate([[999]]), "token id 999 is outside the vocabulary: 0 to 258"),
        (lambda e: e.generate(["a"], 0), "max_new_tokens=0"),
        (lambda e: e.generate(["a"], 4, stop=[""]), "stop string is empty"),
        (lambda e: Sampling(top_p=0), "top_p=0 must be above 0"),
        (lambda e: Sampling(temperature=-1), "temperature=-1"),
        (lambda e: e.score([([1], [])]), "is empty"),
        (lambda e: e.score([([1] * 200, [2] * 60)]), "exceed the context of 256 by 3"),
        (lambda e: Engine(dataclasses.replace(model(), tokenizer=None)).generate(["a"]), "without a tokenizer"),
        (lambda e: Engine(model(), batch=0), "batch=0"),
        (lambda e: Engine(model(), batch=2.5), "batch=2.5 is a float"),
        (lambda e: Engine(model(), batch=True), "batch=True is a bool"),
        (lambda e: e.generate([]), "give a list with one prompt at least"),
        (lambda e: e.generate("ab"), "give a list with one prompt at least"),
        (lambda e: e.generate([[1.5, 2.0]]), "token ids of type float64"),
        (lambda e: e.generate([["1", "2"]]), "token ids of type text"),
        (lambda e: e.generate([[True, 1]]), "token ids of type bool"),
        (lambda e: e.generate([[[1, 2], [3]]]), "ragged"),
        (lambda e: e.generate([[[1, 2], [3, 4]]]), r"a prompt of shape \(2, 2\)"),
        (lambda e: e.generate([[2**40]]), "token id 1099511627776 is outside"),
        (lambda e: e.generate([[2**70]]), "is outside the vocabulary"),
        (lambda e: e.generate([[10**400]]), "of 401 digits is outside"),
        (lambda e: e.generate([[-1]]), "token id -1 is outside"),
        (lambda e: e.generate([None]), "token ids of type object"),
        (lambda e: e.generate(["a"], 4.0), "max_new_tokens=4.0 is a float"),
        (lambda e: e.generate(["a"], "4"), "max_new_tokens='4' is a str"),
        (lambda e: e.generate(["a"], 4, stop="x"), "stop='x'"),
        (lambda e: e.generate(["a"], 4, stop_ids=[1.0]), "token ids of type float64"),
        (lambda e: e.score([([1.0], [2])]), "token ids of type float64"),
        (lambda e: Sampling(temperature=float("nan")), "temperature=nan"),
        (lambda e: Sampling(temperature=float("inf")), "temperature=inf"),
        (lambda e: Sampling(temperature=10**400), "temperature=inf"),
        (lambda e: Sampling(temperature="1"), "temperature='1' is a str"),
        (lambda e: Sampling(temperature=1e-310), "1e-30 to 1e30"),
        (lambda e: Sampling(top_p=float("nan")), "top_p=nan"),
        (lambda e: Sampling(min_p=None), "min_p=None"),
        (lambda e: Sampling(repetition_penalty=float("inf")), "repetition_penalty=inf"),
        (lambda e: Sampling(top_k=4.0), "top_k=4.0 is a float"),
        (lambda e: Sampling(top_k=-1), "top_k=-1 must be 0 or more"),
        (lambda e: Sampling(seed=2**64), "seed=18446744073709551616 must be 0 to 9223372036854775807"),
        (lambda e: Sampling(seed=1.5), "seed=1.5 is a float"),
        (lambda e: model().logits([[1, 2], [3]]), "ragged"),
        (lambda e: model().logits([[1.0, 2.0]]), "token ids of type float64"),
        (lambda e: model().logits([["a"]]), "token ids of type text"),
        (lambda e: model().logits([[1, 2]], positions=[[0, 2**40]]), "position 1099511627776 is outside 0 to"),
        (lambda e: model().logits([[1, 2]], positions=[[0.0, 1.0]]), "positions of type float64"),
        (lambda e: model().logits([[1, 2]], positions=[[0, 1, 2]]), "positions of shape"),
        (lambda e: model().logits([[1, 2]], positions=[[-1, 0]]), "position -1 is outside"),
        (lambda e: model().logits([[1, 2]], segment_ids=[[0, 2**40]]), "segment_id 1099511627776"),
    ],
)
def test_bad_input(engine: Engine, call, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(engine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [CFG.vocab, CFG.vocab + 1, -1])
def test_ids_end_before_the_size_of_the_vocabulary(engine: Engine, bad: int) -> None:
    for call in (
        lambda i: engine.generate([[1, i]], 1),
        lambda i: engine.score([([1, i], [1])]),
        lambda i: engine.score([([1], [i])]),
    ):
        with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary: 0 to {CFG.vocab - 1}"):
            call(bad)
    assert engine.generate([[CFG.vocab - 1, 0]], 1)[0].prompt_tokens == 2
    assert engine.score([([0], [CFG.vocab - 1])])[0].tokens == 1


def test_the_context_is_filled_to_its_last_token(engine: Engine) -> None:
    full = engine.generate([[1] * 250], 6, stop_ids=())[0]
    assert len(full.ids) == 6
    with pytest.raises(UserError, match="exceed the context of 256 by 1"):
        engine.generate([[1] * 250], 7)
    assert engine.score([([1] * 200, [2] * 57)])[0].tokens == 57  # the last token is not read
    with pytest.raises(UserError, match="exceed the context of 256 by 1"):
        engine.score([([1] * 200, [2] * 58)])


def test_a_step_reads_a_quarter_of_quarters_that_holds() -> None:
    assert [part_of(2048, n) for n in (1, 128, 129, 512, 513, 2048)] == [128, 128, 512, 512, 2048, 2048]
    assert [part_of(n, 5) for n in (128, 256, 384, 768, 1536)] == [128, 256, 384, 192, 384]


def test_buckets_are_the_first_power_that_holds() -> None:
    assert [bucket(n, 12) for n in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]
