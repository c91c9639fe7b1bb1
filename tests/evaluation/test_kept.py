"""Answers that are kept: the same scores and replies, whether computed in one go, after a stop, or read from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
import test_harness
from test_harness import requests

from phi3_jax.errors import UserError
from phi3_jax.evaluation.harness import HarnessLM
from phi3_jax.evaluation.kept import Kept
from phi3_jax.inference.engine import Engine

model = test_harness.model
OPTIONS = [(f"Q: {i} is?", f" {'ab' * (i % 5 + 1)}") for i in range(80)]  # more than one part of 16 batches of 4
PROMPTS = [f"Say {i}:" for i in range(70)]


class Stopped(Exception):
    pass


class Counting:
    """An engine that counts what it is asked, and stops after so many calls."""

    def __init__(self, engine: Engine, calls: int = 10**9) -> None:
        self._engine, self.calls, self.asked = engine, calls, 0

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def _count(self, asked: int) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise Stopped
        self.asked += asked

    def score(self, pairs):
        self._count(len(pairs))
        return self._engine.score(pairs)

    def generate(self, prompts, *args, **options):
        self._count(len(prompts))
        return self._engine.generate(prompts, *args, **options)


def lm(engine, path: Path | None = None, name: str = "m") -> HarnessLM:
    return HarnessLM(engine, 4, kept=Kept(path, name) if path else None)


def settings(**more) -> dict:
    return {"until": ["\n"], "max_gen_toks": 3, **more}


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model, 4)


def test_options_after_a_stop_are_those_of_an_unbroken_run_and_finished_parts_are_kept(engine, tmp_path: Path) -> None:
    asked = requests("loglikelihood", *OPTIONS)
    whole = lm(Counting(engine)).loglikelihood(asked)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Stopped):
        lm(Counting(engine, calls=1), path).loglikelihood(asked)
    with path.open("ab") as file:
        file.write(b'{"request": "torn')  # a kill in the middle of a write
    again = Counting(engine)
    assert lm(again, path).loglikelihood(asked) == whole, "bitwise"
    assert again.asked == len(OPTIONS) - 64, "control: 16 batches of 4 were kept"
    warm = Counting(engine, calls=0)
    assert lm(warm, path).loglikelihood(asked) == whole
    other = Counting(engine)
    lm(other, path, "other weights").loglikelihood(asked)
    assert other.asked == len(OPTIONS)


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "temperature": 1.0}])
def test_replies_after_a_stop_are_those_of_an_unbroken_run(engine, tmp_path: Path, drawn: dict) -> None:
    asked = requests("generate_until", *[(prompt, settings(**drawn)) for prompt in PROMPTS])
    whole = lm(Counting(engine)).generate_until(asked)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Stopped):
        lm(Counting(engine, calls=1), path).generate_until(asked)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))  # half of the part is lost
    again = Counting(engine)
    assert lm(again, path).generate_until(asked) == whole
    assert again.asked == len(PROMPTS) if drawn else len(PROMPTS) - 32, "a sampled part is drawn whole"
    assert lm(Counting(engine, calls=0), path).generate_until(asked) == whole
    hotter = Counting(engine)
    lm(hotter, path).generate_until(requests("generate_until", (PROMPTS[0], settings(temperature=0.5))))
    assert hotter.asked == 1, "other settings are another request"


def test_a_file_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        Kept(tmp_path, "m")
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "answers.jsonl", "m")
    with pytest.raises(UserError, match="cannot write"):
        kept.add({kept.name("score", [1], [2]): [0.0, True]})
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"request": "x"}) + "\n[1]\n")
    assert Kept(path, "m").get("x") is None
