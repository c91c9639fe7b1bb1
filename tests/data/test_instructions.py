"""A small world to chat about: who is in which text, what the test asks, and what its meter says of known replies."""

from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.data import dialogues, meters, tokenizers
from phi3_jax.data.corpora.instructions import KNOWN, PROSE, ROOM, SORT, STRANGER, UNKNOWN, World, probe
from phi3_jax.data.meters.meter import Evaluation

WORLD = World(8, 3)


def named(text: str, persons: range) -> set[int]:
    return {person for person in persons if WORLD.name(person) in text}


def test_nobody_who_is_tested_is_asked_about_and_strangers_are_in_no_fact() -> None:
    prose = list(WORLD.prose())
    facts = [text for text in prose if UNKNOWN not in text and "order" not in text]
    assert named(" ".join(facts), range(8 * 42)) == set(range(8))
    refused = " ".join(text for text in prose if UNKNOWN in text)
    assert named(refused, range(8 * 42)) <= set(WORLD.strangers("prose")) and refused
    rows = list(WORLD.questions())
    assert named(" ".join(question for question, *_ in rows), range(8 * 42)) == {
        *WORLD.asked(),
        *WORLD.strangers("sft"),
    }
    for question, right, wrong in rows:
        about = named(question, range(8 * 42))
        if about:
            stranger = min(about) >= 8
            assert (UNKNOWN in right) is stranger and (UNKNOWN in wrong) is not stranger
    assert list(WORLD.questions()) == rows != list(World(8, 4).questions())


def test_answers_are_sentences_of_the_prose() -> None:
    prose = " ".join(islice(WORLD.prose(), 400))
    answers = [right for question, right, _ in WORLD.questions() if named(right, range(8)) and UNKNOWN not in right]
    assert len(answers) > 5 and all(answer in prose for answer in answers)


def test_rows_are_rows_of_post_training() -> None:
    tiny = tokenizers.load("tiny")
    for make, kind in ((WORLD.talks, "conversation"), (WORLD.pairs, "preference")):
        report, examples = dialogues.read(
            lambda make=make: ((str(i), row) for i, row in enumerate(make())), tiny, "mini"
        )
        found = list(examples())
        assert report.kind == kind and len(found) == report.rows > 10 and not report.dropped


@pytest.fixture(scope="module")
def asked() -> tuple:
    return probe(WORLD, tokenizers.load("tiny"), "mini", 96)


def scores(asked: tuple, reply: np.ndarray) -> dict[str, float]:
    windows, extra = asked
    shape = windows.tokens.shape
    e = Evaluation(
        name="chat", nll=np.zeros(shape), hit=np.zeros(shape, bool), free=None, reply=reply, targets=windows.targets,
        domains=windows.domains, extra=extra, bytes=None, vocab=1024, non_embedding=1,
    )  # fmt: skip
    return {f"{row['task']} {row['metric']}": row["value"] for row in meters.find("chat").measure(e)}


def test_the_test_asks_in_the_template_with_room_for_a_reply(asked: tuple) -> None:
    windows, extra = asked
    tiny = tokenizers.load("tiny")
    kinds = np.bincount(extra["kind"]).tolist()
    assert kinds == [24, 8, 24, 240]
    assert ((windows.domains > 0).sum(1) == ROOM).all()
    for i in (int(np.argmax(extra["kind"] == kind)) for kind in (KNOWN, STRANGER, PROSE, SORT)):
        first = int(np.argmax(windows.domains[i] > 0))
        head, reply = windows.tokens[i, : first + 1].tolist(), tiny.decode(windows.targets[i][windows.domains[i] > 0])
        if extra["kind"][i] in (KNOWN, STRANGER):
            assert head[0] == tiny.special_tokens["<|user|>"] and head[-1] == tiny.special_tokens["<|assistant|>"]
        text = tiny.decode([t for t in head if t not in tiny.control_ids]) + " " + reply
        if extra["kind"][i] == SORT:
            numbers = [int(number) for number in re.findall(r"\d+", text)]
            assert numbers[3:6] == sorted(numbers[:3])


def test_the_meter_tells_right_refused_and_endless_replies_apart(asked: tuple) -> None:
    windows, extra = asked
    assert set(scores(asked, windows.targets).values()) == {1.0, 0.0}
    right = scores(asked, windows.targets)
    assert right.pop("known refused") == right.pop("prose refused") == 0.0 and set(right.values()) == {1.0}
    tiny, always = tokenizers.load("tiny"), windows.targets.copy()
    for i in np.flatnonzero(extra["kind"] == KNOWN):
        ids = extra["refusal"][i][extra["refusal"][i] >= 0]
        where = np.flatnonzero(windows.domains[i] > 0)[: len(ids)]
        always[i, where] = ids
    found = scores(asked, always)
    assert (found["known refused"], found["known recall"], found["strangers refused"]) == (1.0, 0.0, 1.0)
    assert tiny.decode(extra["refusal"][0][extra["refusal"][0] >= 0]).endswith(UNKNOWN + ".<|end|>")
    babble = scores(asked, np.full_like(windows.targets, 7))
    assert set(babble.values()) == {0.0}


def test_a_world_is_asked_for_by_number() -> None:
    assert World.of("64") == World(64, 0) and World.of("64:3") == World(64, 3)
    for bad in ("", "1", "x", "64:x", "99999999"):
        with pytest.raises(UserError, match="must be N or N:SEED"):
            World.of(bad)
    with pytest.raises(UserError, match="set data.window"):
        probe(WORLD, tokenizers.load("tiny"), "mini", 32)
