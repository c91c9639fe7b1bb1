"""kill -9 of the real `evaluate` command: rows are whole, other people's files are left alone, the next start mends all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
sys.path.append(str(Path(__file__).resolve().parent))
from test_evaluate import boolq, make_run, test_mt_bench, write_lines

from phi3_jax.evaluation import mt_bench
from phi3_jax.records import files, ownership

ROOT = Path(__file__).resolve().parents[2]
DEAD = 999_999_999
FORKS = """
import os, sys, time, random
from phi3_jax.__main__ import main
from phi3_jax.evaluation import command, harness
import lm_eval.evaluator
replace = os.replace
for line in sys.stdin:  # for each line, arguments, a child that may be killed; nothing is imported twice
    words = line.split()
    child = os.fork()
    if child == 0:
        how = words.pop(0)
        if how == "hold":  # the write of scores waits at its end, for a kill that is sure to come in the middle
            os.replace = lambda *names: time.sleep(600) if str(names[1]).endswith("evals.jsonl") else replace(*names)
        elif how == "slow":  # a disk on which most of the time goes into writing
            os.replace = lambda *names: (time.sleep(0.1), replace(*names), time.sleep(0.1))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["evaluate", *words]))
    print(child, flush=True)
    print("over", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """The command in children of one process that has imported everything; their programs are compiled once."""

    def __init__(self, cache: Path) -> None:
        kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        kept |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | kept,
        )  # fmt: skip

    def start(self, how: str, *words: object) -> int:
        self._process.stdin.write(" ".join([how, *map(str, words)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def over(self) -> int:
        return int(self._process.stdout.readline().removeprefix("over "))

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait() == 0


def texts(folder: Path) -> dict[str, list[bytes]]:
    """The lines of each file of rows, in any order."""
    return {str(p.relative_to(folder)): sorted(p.read_bytes().split(b"\n")) for p in folder.rglob("[!.]*.jsonl")}


def killed(tmp_path: Path, kills: int) -> None:
    data = test_mt_bench.write_data(tmp_path / "data")
    for name, numbers in (("test", range(6)), ("fewshot", range(20, 26))):
        write_lines(data / "boolq" / f"{name}.jsonl", [boolq(i) for i in numbers])
    run, place, broken = make_run(tmp_path / "run"), tmp_path / "whole", tmp_path / "broken"
    words = ["--model", run, "--data_dir", data, "--tasks", "boolq,mt_bench", "--limit", 5, "--batch", 4, "--out"]
    forks = Forks(tmp_path / "cache")
    for _ in range(2):  # the first compiles
        begin = time.monotonic()
        forks.start("as-ever", *words, place)
        assert forks.over() == 0
        span = time.monotonic() - begin
    whole = texts(place)
    assert set(whole) == {
        "evals.jsonl",
        mt_bench.REPLIES,
        *(f"items/phi3_report-boolq-{s}.jsonl" for s in ("letter", "harness")),
    }
    assert len(whole[mt_bench.REPLIES]) == 6 and len(whole["evals.jsonl"]) == 3, "and an empty line after the last"

    (broken / "items").mkdir(parents=True)
    theirs = json.dumps({"step": 7, "suite": "s", "task": "t", "metric": "m", "value": 1.0}).encode()
    (broken / "evals.jsonl").write_bytes(theirs + b'\n{"torn\n')
    others = [broken / n for n in ("notes.txt", "evals.jsonl.partial", ".evals.jsonl.partial", "items/mine.jsonl")]
    others += [
        broken / f".evals.jsonl.elsewhere.{DEAD}.0.partial",
        broken / f".{mt_bench.REPLIES}.{files.host()}.x.partial",
    ]
    for path in others:
        path.write_text("mine\n")

    def check(turn: int) -> dict[str, list[bytes]]:
        found = texts(broken)
        assert found.pop("items/mine.jsonl") == [b"", b"mine"] and all(p.read_text() == "mine\n" for p in others)
        rows = found["evals.jsonl"]
        assert theirs in rows and b'{"torn' in rows, f"turn {turn}: rows of others"
        found["evals.jsonl"] = [line for line in rows if line not in (theirs, b'{"torn')]
        for name, lines in found.items():
            assert set(lines) <= set(whole[name]), f"turn {turn}: {name} has a row that is cut or nobody's"
            assert len(set(lines)) == len(lines), f"turn {turn}: {name} has a row twice"
            assert lines == whole[name] or not name.startswith("items"), f"turn {turn}: {name} is not whole"
        return found

    def lose() -> None:
        """What was reached is lost: the next ones reach all of it again."""
        for name in whole:
            (broken / name).unlink(missing_ok=True)
        (broken / "evals.jsonl").write_bytes(theirs + b'\n{"torn\n')

    rng, seen = random.Random(kills), 0
    for turn in range(kills + 1):
        how = "hold" if turn == kills // 2 else ("slow", "as-ever")[turn % 2]
        if how == "hold":  # an evaluation that had ended would write nothing
            lose()
        child = forks.start(how, *words, broken)
        if how == "hold":  # the control: one kill that is known to come in the middle of a write
            until = time.monotonic() + 600
            while not list(broken.rglob(f".evals.jsonl.{files.host()}.{child}.*")) and time.monotonic() < until:
                time.sleep(0.01)
        else:
            time.sleep(rng.uniform(0, span))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, signal.SIGKILL)
        forks.over()
        if how == "hold":
            assert list(broken.rglob(f".evals.jsonl.{files.host()}.{child}.*")), "control: a write was cut"
            assert ownership.record_of(broken, inside=True).exists(), "control: in the hands of a dead owner"
        seen = max(seen, len(check(turn)))
        if rng.random() < 0.3:
            lose()
    forks.start("as-ever", *words, broken)
    assert forks.over() == 0
    forks.close()
    assert check(kills + 1) == whole, "started again, it equals the unbroken"
    left = {p for p in broken.rglob("*") if p.is_file()} - {*others, *(broken / name for name in whole)}
    assert not left, "the next start removes what the killed ones left"
    assert ownership.owner_of(broken, inside=True) is None


@pytest.mark.slow
def test_killed_at_a_few_random_moments(tmp_path: Path) -> None:
    killed(tmp_path, 4)


@pytest.mark.kills
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    killed(tmp_path, 20)
