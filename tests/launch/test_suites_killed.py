"""kill -9 of the suites safety and calibration at random moments: one batch at most is asked again, results are equal."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
sys.path.append(str(Path(__file__).resolve().parent))
from test_evaluate import boolq, make_run, trivia, write_lines
from test_evaluate_killed import Forks, texts

from phi3_jax.records import rows

BATCH, ITEMS = 1, 8


def write_data(folder: Path, suite: str) -> None:
    if suite == "safety":
        for i, name in enumerate(("xstest/prompts", "advbench/behaviours")):
            some = [{"id": k, "prompt": f"{i} asks {k}?", "type": "t", "safe": k % 2 == 0} for k in range(ITEMS)]
            write_lines(folder / f"{name}.jsonl", some)
        return
    for name, make in (("boolq", boolq), ("triviaqa", trivia)):
        write_lines(folder / name / "test.jsonl", [make(i) for i in range(ITEMS)])
        write_lines(folder / name / "fewshot.jsonl", [make(i) for i in range(20, 26)])


def killed(place: Path, suite: str, kills: int) -> None:
    write_data(place / "data", suite)
    words = ["--model", make_run(place / "run"), "--suite", suite, "--data_dir", place / "data", "--batch", BATCH]
    forks = Forks(place / "cache")
    for _ in range(2):  # the first compiles
        begin = time.monotonic()
        forks.start("as-ever", *words, "--out", place / "whole")
        assert forks.over() == 0
        span = time.monotonic() - begin
    cache, rng, counts = place / "answers.jsonl", random.Random(kills), [0]
    words += ["--use_cache", cache, "--out", place / "broken"]  # a cache stays after the end, to be looked at
    for turn in range(kills):
        child = forks.start("as-ever", *words)
        if turn:
            time.sleep(rng.uniform(0, span))
        else:  # the control: one kill that is known to come in the middle
            until = time.monotonic() + 600
            while not (cache.is_file() and cache.stat().st_size) and time.monotonic() < until:
                time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, signal.SIGKILL)
        forks.over()
        counts.append(len(rows.read(cache)[0]))
    assert 0 < counts[1] < 2 * ITEMS, "control: killed in the middle"
    assert counts == sorted(counts), "what was kept is kept"
    forks.start("as-ever", *words)
    assert forks.over() == 0
    forks.close()
    asked = [row["request"] for row in rows.read(cache)[0]]
    assert len(asked) == len(set(asked)) == 2 * ITEMS, "no batch that was kept is asked again"
    assert texts(place / "broken") == texts(place / "whole") and len(texts(place / "whole")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["safety", "calibration"])
def test_killed_at_a_few_moments(tmp_path: Path, suite: str) -> None:
    killed(tmp_path, suite, 3)


@pytest.mark.kills
@pytest.mark.parametrize("suite", ["safety", "calibration"])
def test_killed_at_twenty_moments(tmp_path: Path, suite: str) -> None:
    killed(tmp_path, suite, 20)
