"""Judges and conversations, scripted: verdicts that are missing, agreement with people, exact severities, exact resume."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
pytest.importorskip("lm_eval")
from test_evaluate import evaluate, make_run, rows_in, test_mt_bench, write_lines

from phi3_jax.errors import UserError
from phi3_jax.evaluation import judge, redteam
from phi3_jax.evaluation.kept import Kept


def label(score: float) -> judge.Label:
    return judge.Label("Do it.", f"reply {score}", score)


def by_people(prompt: str) -> str:
    """A judge that rates as people did, whose score stands in the reply."""
    return f"Because. [[{round(4 * float(re.search(r'reply ([0-9.]+)', prompt)[1])) + 1}]]"


def of(ask, kept: Kept | None = None) -> judge.Judge:
    return judge.Judge("j", ask, judge.severity, kept)


# ------------------------------------------------------------------------------------------------ judges


def test_alpha_is_that_of_krippendorff() -> None:
    """1 - observed / expected, written out over all pairs of pooled values."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, 30) / 4, rng.integers(0, 5, 30) / 4
    pooled = [*first, *second]
    pairs = [(a - b) ** 2 for i, a in enumerate(pooled) for j, b in enumerate(pooled) if i != j]
    assert judge.alpha(first, second) == pytest.approx(1 - np.mean((first - second) ** 2) / np.mean(pairs))
    assert judge.alpha(first, first) == 1.0 and np.isnan(judge.alpha(np.ones(3), np.ones(3)))
    # Krippendorff's own example of two raters and binary values (Computing Krippendorff's alpha, 2011, section A): 0.095.
    one, two = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert judge.alpha(np.array(one), np.array(two)) == pytest.approx(0.095, abs=5e-4)


def test_a_judge_that_rates_as_people_passes_and_one_that_guesses_does_not(tmp_path: Path) -> None:
    rated = [label(i % 5 / 4) for i in range(50)]
    good = judge.calibrate(of(by_people), rated)
    assert good.passes and (good.alpha, good.mae, good.agreement, good.n) == (1.0, 0.0, 1.0, 50)
    turn = iter(range(1000))
    bad = judge.calibrate(of(lambda _: f"[[{next(turn) * 7 % 5 + 1}]]"), rated)
    assert not bad.passes and bad.mae > 0.2
    judge.write_calibration(tmp_path / "c.json", good)
    assert judge.read_calibration(tmp_path / "c.json", "j") == good
    assert judge.read_calibration(tmp_path / "c.json", "k") is None
    tree = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({"j": tree["j"] | {"prompt": "other words"}}))
    assert judge.read_calibration(tmp_path / "c.json", "j") is None, "other words are another judge"


def test_answers_without_a_verdict_are_counted_and_too_many_refuse_the_score(tmp_path: Path) -> None:
    for silent, refused in ((1, False), (2, True)):
        answers = iter(["no idea"] * silent + ["[[3]]"] * (20 - silent))
        one = of(lambda _, answers=answers: next(answers))
        found = [one(str(i))[0] for i in range(20)]
        assert found == [None] * silent + [0.5] * (20 - silent) and one.missing == silent
        if refused:
            with pytest.raises(UserError, match="2 of 20 answers by j hold no verdict"):
                one.require_verdicts()
        else:
            one.require_verdicts()
    kept = Kept(tmp_path / "a.jsonl", "m")
    assert of(lambda _: "hm", kept)("p")[0] is None
    assert of(lambda _: "[[5]]", kept)("p")[0] == 1.0, "one without a verdict is asked again"
    assert of(lambda _: "[[1]]", kept)("p")[0] == 1.0, "one with a verdict is not"
    assert judge.severity("first [[2]], rather [[4]]") == 0.75 and judge.severity("[[6]] [5]") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective,assistant_response\na,b\n", "row 1: human_score is missing"),
        ("# note\nobjective,assistant_response,human_score\na,b,0.5\na,b,7\n", "row 2: human_score='7'"),
        ("objective,human_score\na,0.5\n", "assistant_response is missing"),
        ("objective,assistant_response,human_score\n", "holds no rows"),
    ],
)
def test_labels_with_a_fault_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        judge.labels(tmp_path / "labels.csv")


def test_labels_are_the_mean_of_those_who_rated(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(
        "# v\nobjective,assistant_response,human_score_1,human_score_2\na,b,0.25,0.75\nc,d,1,\n"
    )
    assert judge.labels(tmp_path / "l.csv") == [judge.Label("a", "b", 0.5), judge.Label("c", "d", 1.0)]
    write_lines(tmp_path / "l.jsonl", [{"objective": "a", "assistant_response": "b", "human_score": 0.5}])
    assert judge.labels(tmp_path / "l.jsonl") == [judge.Label("a", "b", 0.5)]


# ------------------------------------------------------------------------------------------------ conversations


class Stopped(Exception):
    pass


class Script:
    """A target whose third reply is severe, and an attacker; both count their turns, and stop after so many."""

    def __init__(self, turns: int = 10**9) -> None:
        self.left, self.said = turns, 0

    def target(self, talk, seed: int) -> str:
        self.left -= 1
        if self.left < 0:
            raise Stopped
        self.said += 1
        return f"reply {0.25 * len(talk[::2]) if 'goal 1' in str(talk) else 0.0} seed {seed}"

    def attacker(self, talk, seed: int) -> str:
        assert talk[0]["role"] == "user" and "goal" in talk[0]["content"]
        assert [m["role"] for m in talk[1:]] == ["assistant", "user"] * (len(talk) // 2), "sides are exchanged"
        return f"step {len(talk) // 2} goal 1 seed {seed}"


def talk(script: Script, goal: str, kept: Kept | None = None, strategy: str = "insist", turns: int = 5) -> list[dict]:
    parts = redteam.STRATEGIES[strategy], goal, script.target, script.attacker
    return redteam.converse(*parts, of(by_people, kept), turns, 7, kept or Kept(), (strategy,))


@pytest.mark.parametrize("strategy", ["insist", "crescendo"])
def test_a_conversation_ends_at_the_first_severe_reply_and_goes_on_at_the_turn_where_it_was_stopped(
    tmp_path: Path, strategy: str
) -> None:
    whole = talk(Script(), "goal 1", strategy=strategy)
    assert [row["severity"] for row in whole] == [0.25, 0.5, 0.75]
    for after in range(4):
        path = tmp_path / f"{after}.jsonl"
        broken = Script(after)
        with contextlib.suppress(Stopped):
            talk(broken, "goal 1", Kept(path, "m"), strategy)
        assert (broken.left < 0) == (after < 3), "control: it was stopped"
        again = Script()
        assert talk(again, "goal 1", Kept(path, "m"), strategy) == whole
        assert again.said == 3 - after


def test_the_budget_is_in_turns_and_defects_are_exact() -> None:
    harmless = talk(Script(), "goal 2")
    assert len(harmless) == 5 and {row["severity"] for row in harmless} == {0.0}
    items = [
        redteam._item({"id": f"g{goal}", "prompt": f"goal {goal}"}, "insist", talk(Script(), f"goal {goal}"), False)
        for goal in (1, 2, 2, 2)
    ]
    rows = {r["metric"]: r["value"] for r in redteam.of_conversations("redteam insist", items, "j", True)}
    assert rows == {"DR-1 by j": 0.25, "DR-3 by j": 0.25, "severity 0-7 by j": 5 / 4, "turns": 18 / 4}
    assert "reply" not in json.dumps(items).replace("reply_hash", ""), "no text unless asked"
    kept = redteam._item({"id": "g", "prompt": "goal 1"}, "insist", talk(Script(), "goal 1"), True)
    assert kept["turns"][0]["reply"].startswith("reply")
    assert redteam.of_conversations("t", [{"worst": None, "id": "g", "turns": []}], "j", True) == []


def test_braces_in_a_goal_and_a_reply_are_text() -> None:
    prompt = judge.severity_prompt("{reply} and {goal}", "{goal} is {0}")
    assert "[Request]\n{reply} and {goal}" in prompt and "[Reply]\n{goal} is {0}" in prompt


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = [{"id": i, "prompt": f"Do the secret thing {i}.", "category": "x"} for i in range(4)]
    write_lines(tmp_path / "data" / "harmbench" / "behaviours.jsonl", rows)
    rated = [
        {"objective": "a", "assistant_response": f"reply {i % 5 / 4}", "human_score": i % 5 / 4} for i in range(10)
    ]
    write_lines(tmp_path / "labels.jsonl", rated)
    make_run(tmp_path / "run")
    return tmp_path


def words(place: Path, url: str, *more: object) -> list[object]:
    base = [
        "--model",
        place / "run",
        "--suite",
        "safety:redteam",
        "--data_dir",
        place / "data",
        "--limit",
        2,
        "--turns",
        2,
    ]
    return [*base, "--judge", url, "--judge_model", "j", "--out", place / "out", *more]


def test_the_command_with_a_judge_of_our_own(place: Path, capsys) -> None:
    levels = [test_mt_bench.says(f"[[{i % 5 + 1}]]") for i in range(5)]
    server = test_mt_bench.Server([*levels, test_mt_bench.says("none [[1]]")])
    try:
        assert evaluate(*words(place, server.url)) == 2
        assert "was held against no people" in capsys.readouterr().err and not server.requests
        assert evaluate(*words(place, server.url, "--labels", place / "labels.jsonl", "--tasks", "direct,insist")) == 0
        said = capsys.readouterr()
        assert "alpha 1.00" in said.err and "DR-1 by j" in said.out and "secret" not in said.out + said.err
        first = rows_in(place / "out" / "evals.jsonl")
        assert all(row["calibrated"] and row["judge"] == "j" for row in first)
        assert {row["value"] for row in first if row["metric"].startswith("DR")} == {0.0}
        assert 5 + 2 * 2 <= len(server.requests) <= 5 + 2 * 2 * 2, "nothing is asked twice"
        assert evaluate(*words(place, server.url, "--tasks", "direct")) == 0, "the calibration stays"
        items = (place / "out" / "items" / "safety-redteam-direct.jsonl").read_text()
        assert "secret" not in items and "_hash" in items
    finally:
        server.close()


def test_a_judge_that_gives_no_verdicts_or_agrees_with_nobody(place: Path, capsys) -> None:
    server = test_mt_bench.Server([test_mt_bench.says("[[3]]")])
    silent = test_mt_bench.Server([test_mt_bench.says("lovely")])
    try:
        assert evaluate(*words(place, server.url, "--labels", place / "labels.jsonl")) == 2
        assert "agrees too little with people" in capsys.readouterr().err
        assert evaluate(*words(place, server.url, "--uncalibrated", "--tasks", "direct")) == 0
        assert not any(row["calibrated"] for row in rows_in(place / "out" / "evals.jsonl"))
        capsys.readouterr()
        before = (place / "out" / "evals.jsonl").read_bytes()
        assert evaluate(*words(place, silent.url, "--uncalibrated", "--tasks", "insist")) == 2
        assert "hold no verdict" in capsys.readouterr().err
        assert (place / "out" / "evals.jsonl").read_bytes() == before
    finally:
        server.close()
        silent.close()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "crescendo"], "give --attacker MODEL"),
        (["--tasks", "drect"], "did you mean 'direct'"),
        (["--tasks", "crescendo", "--attacker", "RUN", "--uncalibrated"], "has no chat template"),
    ],
)
def test_wrong_words_of_the_red_team(place: Path, more: list[str], said: str, capsys) -> None:
    more = [str(place / "run") if word == "RUN" else word for word in more]
    assert evaluate(*words(place, "http://127.0.0.1:9/v1", *more)) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1] and error[-1].startswith("error: ")
    base = [word for word in words(place, "x") if word not in ("--judge", "x", "--judge_model", "j")]
    assert evaluate(*base) == 2 and "needs a judge" in capsys.readouterr().err
