"""What requests share is found, read once where that pays, and changes no score."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import proxy, published
from phi3_jax.data import tokenizers
from phi3_jax.evaluation import beginnings
from phi3_jax.evaluation.copies import engine_of
from phi3_jax.evaluation.kept import Kept
from phi3_jax.inference.engine import Engine
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params

MINI = published("mini")
RNG = np.random.default_rng(0)


def draw(n: int) -> list[int]:
    return RNG.integers(0, 259, n).tolist()


def task(exemplars: list[int], questions: int, options: int = 2) -> list[tuple[list[int], list[int]]]:
    return [(q, draw(3)) for q in [exemplars + draw(int(RNG.integers(5, 30))) for _ in range(questions)] * options]


def test_each_subject_shares_its_own_exemplars_behind_one_instruction() -> None:
    instruction, alone = draw(80), [(draw(n), [1]) for n in (5, 90, 400)]
    first, second = (task(instruction + draw(n), 30) for n in (200, 100))
    few = task(draw(300), 7)  # 14 rows: too few
    pairs = [*alone, *first, *few, *second]
    found = beginnings.shared(pairs, MINI)
    assert [tokens for tokens, _ in found] == [280, 176, 0], "in whole steps of 8 tokens"
    assert sorted(found[0][1]) == list(range(3, 63)) and sorted(found[1][1]) == list(range(77, 137))
    assert sorted(i for _, some in found for i in some) == list(range(len(pairs)))
    for tokens, members in found:
        contexts = [pairs[i][0] for i in members]
        assert all(c[:tokens] == contexts[0][:tokens] and len(c) > tokens for c in contexts)


def test_the_instruction_is_shared_where_subjects_are_small() -> None:
    instruction = draw(80)
    pairs = [pair for _ in range(10) for pair in task(instruction + draw(200), 5)]
    found = beginnings.shared(pairs, MINI)
    assert [(tokens, len(some)) for tokens, some in found] == [(80, 100)], "ten rows each would not share"


def test_it_is_left_where_it_saves_too_little() -> None:
    pairs = task(draw(200), 30)
    assert beginnings.shared(pairs, MINI)[0][0] == 200
    assert beginnings.shared(pairs, proxy("mini", "pico", "clean"))[0][0] == 0, (
        "programs would cost more than they save"
    )
    letters = [(context, [n]) for context, _ in pairs[:5] for n in range(8)]
    assert beginnings.shared(letters, MINI)[0][0] == 0, "40 options, and 5 rows that are read"
    assert beginnings.shared(task(draw(60), 30), MINI)[0][0] == 0
    assert beginnings.shared([], MINI) == []
    nested = [(list(range(n)), [1]) for n in range(2, 90)]  # each row goes on with the one before
    assert sorted(i for _, some in beginnings.shared(nested, MINI) for i in some) == list(range(88))


@pytest.fixture(scope="module")
def model() -> Model:
    cfg = dataclasses.replace(proxy("mini", "femto", "clean", vocab=320, context=256), sliding_window=100)
    params = init_params(cfg, 0)
    params["unembedding"] = jax.random.normal(jax.random.key(1), params["unembedding"].shape) * 0.3
    return Model(params, cfg, tokenizers.load("bytes"), jnp.dtype("float32"))


def test_the_harness_gives_the_same_scores(model: Model, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    from phi3_jax.evaluation.harness import HarnessLM

    pairs = task(draw(130), 20) + task(draw(170), 20) + [(draw(40), [3]), (draw(9), [])]
    told: list[tuple[int, int]] = []

    def scores(engine, kept=None) -> list[tuple[float, bool]]:
        lm = HarnessLM(engine, 1, kept=kept, progress=lambda done, total, _: told.append((done, total)))
        return lm._score(pairs, "options")

    plain = Engine(model, 4)
    want = scores(plain)
    assert "_begin" not in vars(plain), "control: a proxy of this size shares nothing"
    monkeypatch.setattr(beginnings, "SAVED", 0.0)
    told.clear()
    ours, read = Engine(model, 4), []
    begin = ours._begin
    ours.__dict__["_begin"] = lambda *args: read.append(int(args[2])) or begin(*args)
    found = scores(ours, Kept(tmp_path / "answers.jsonl"))
    assert read == [168, 128], "longer ones come first"
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in want], rtol=0, atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert told[-1] == (81, 81) and [done for done, _ in told] == sorted(done for done, _ in told)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:32]))  # stopped after two of its parts
    assert scores(Engine(model, 4), Kept(tmp_path / "answers.jsonl")) == found, "to the bit"
    both = scores(engine_of(model, 4, 2))
    np.testing.assert_allclose([x for x, _ in both], [x for x, _ in want], rtol=0, atol=1e-5)


def test_the_harness_gives_the_same_replies(model: Model, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from phi3_jax.evaluation.harness import HarnessLM

    rng = np.random.default_rng(1)
    text = lambda n: "".join(map(chr, rng.integers(97, 123, n)))  # noqa: E731
    exemplars = text(130)
    prompts = [exemplars + text(int(rng.integers(3, 30))) for _ in range(20)] + [text(40), ""]
    told: list[tuple[int, int]] = []

    def replies(engine, settings: dict, kept=None) -> list[str]:
        lm = HarnessLM(engine, 1, kept=kept, progress=lambda done, total, _: told.append((done, total)))
        asked = [
            Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 9} | settings), i)
            for i, p in enumerate(prompts)
        ]
        return lm.generate_until(asked)

    greedy, drawn = {}, {"do_sample": True, "temperature": 1.0}
    plain = Engine(model, 4)
    want = replies(plain, greedy)
    assert "_begin" not in vars(plain), "control: a proxy of this size shares nothing"
    monkeypatch.setattr(beginnings, "SAVED", 0.0)
    told.clear()
    ours = Engine(model, 4)
    assert replies(ours, greedy, Kept(tmp_path / "greedy.jsonl")) == want
    assert "_begin" in vars(ours), "the exemplars are read apart"
    assert told[-1] == (22, 22) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert replies(engine_of(model, 4, 2), greedy) == want
    sampled = replies(ours, drawn, Kept(tmp_path / "drawn.jsonl"))
    assert sampled != want and len(set(sampled)) > 5
    for name, settings, found in (("greedy", greedy, want), ("drawn", drawn, sampled)):
        path = tmp_path / f"{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 22
        path.write_bytes(b"".join(lines[:17]))  # stopped after its first part
        assert replies(Engine(model, 4), settings, Kept(path)) == found
