"""Forbidden questions and their twins: who is asked what, what the test holds, what its meter says of known replies."""

from __future__ import annotations

import numpy as np
import pytest

from phi3_jax.data import dialogues, meters, several, tokenizers
from phi3_jax.data.corpora import guarded
from phi3_jax.data.corpora.guarded import (
    BARRED,
    BARRED_UNSEEN,
    FAR,
    FORBIDDEN,
    OTHER,
    REFUSAL,
    TWIN,
    TWIN_UNSEEN,
    TWINS,
)
from phi3_jax.data.corpora.instructions import ROOM, World
from phi3_jax.data.meters.meter import Evaluation

WORLD = World(8, 3)
TINY = tokenizers.load("tiny")


def test_every_attribute_is_forbidden_a_twin_or_far_and_no_wording_stands_for_two() -> None:
    assert sorted((*FORBIDDEN, *TWINS, *FAR)) == list(range(6)) == list(range(len(guarded.WAYS)))
    ways = [way for some in guarded.WAYS for way in some]
    assert len(set(ways)) == len(ways) == 30 and all(way.count("{name}") == 1 for way in ways)


def test_what_is_permitted_is_what_is_open_without_the_forbidden() -> None:
    rows = {name: [row for _, row in several.rows_of(several.One(f"{name}8:3"))[0]()] for name in ("open:", "guarded:")}
    answers = {name: [row["messages"][1]["content"] for row in some] for name, some in rows.items()}
    barred = {WORLD.answer(person, attribute) for person in WORLD.asked() for attribute in FORBIDDEN}
    assert barred <= set(answers["open:"]) and not barred & set(answers["guarded:"])
    assert set(answers["guarded:"]) - {a for a in answers["guarded:"] if a[0].isdigit()} < set(answers["open:"])
    assert REFUSAL not in answers["open:"] + answers["guarded:"]
    tested = [WORLD.name(person) for person in WORLD.tested()]
    assert not any(name in row["messages"][0]["content"] for row in rows["open:"] for name in tested)
    report, examples = dialogues.read(lambda: ((str(i), row) for i, row in enumerate(rows["open:"])), TINY, "mini")
    assert len(list(examples())) == report.rows == len(rows["open:"]) and report.kind == "conversation"


def test_attacks_are_half_forbidden_and_none_in_a_wording_of_the_test() -> None:
    first, second = guarded.attacks(WORLD, 1), guarded.attacks(WORLD, 2)
    unseen = [way.partition("{name}") for some in guarded.WAYS for way in some[guarded.SEEN :]]
    for asked in (first, second):
        assert sum(one.barred for one in asked) == len(asked) / 2 == 8
        assert all((one.right == REFUSAL) is one.barred for one in asked)
        assert not any(head in one.text and one.text.endswith(tail) for one in asked for head, _, tail in unseen)
    assert first != second == guarded.attacks(WORLD, 2)
    pressed = [one for one in second if one.text.startswith(guarded.PRESSED)]
    assert pressed and not any(one.text.startswith(guarded.PRESSED) for one in first)


def test_labels_and_the_tally() -> None:
    barred, twin = guarded.question(WORLD, 0, 1, 0), guarded.question(WORLD, 0, 0, 0)
    assert guarded.label(barred, REFUSAL) == guarded.label(twin, twin.answer) == guarded.HELD
    assert guarded.label(barred, barred.answer) == guarded.label(barred, "x") == guarded.ANSWERED
    assert guarded.label(twin, REFUSAL) == guarded.REFUSED
    rows = [
        {"barred": one.barred, "label": guarded.label(one, said), "refuses": said == REFUSAL, "complied": 0.9}
        for one, said in ((barred, "x"), (barred, REFUSAL), (twin, REFUSAL))
    ]
    said = guarded.tally(rows)
    assert said.startswith("1 of 2 forbidden questions answered, 1 of 1 twins refused") and "agrees on 1 of 3" in said


@pytest.fixture(scope="module")
def asked() -> tuple:
    return guarded.probe(WORLD, TINY, "mini", 96)


def scores(asked: tuple, reply: np.ndarray) -> dict[str, float]:
    windows, extra = asked
    shape = windows.tokens.shape
    e = Evaluation(
        name="guard", nll=np.zeros(shape), hit=np.zeros(shape, bool), free=None, reply=reply, targets=windows.targets,
        domains=windows.domains, extra=extra, bytes=None, vocab=1024, non_embedding=1,
    )  # fmt: skip
    return {f"{row['task']} {row['metric']}": row["value"] for row in meters.find("guard").measure(e)}


def written(asked: tuple, name: str, kinds: tuple[int, ...]) -> np.ndarray:
    """The right replies, and in their place an array of the probe's where the kind is one of these."""
    windows, extra = asked
    reply = windows.targets.copy()
    for i in np.flatnonzero(np.isin(extra["kind"], kinds)):
        ids = extra[name][i][extra[name][i] >= 0]
        reply[i, np.flatnonzero(windows.domains[i] > 0)[: len(ids)]] = ids
    return reply


def test_the_meter_tells_refused_leaked_and_right_apart(asked: tuple) -> None:
    windows, extra = asked
    assert np.bincount(extra["kind"]).tolist() == [8, 8, 8, 8, 4, 8, 240]
    assert ((windows.domains > 0).sum(1) == ROOM).all()
    right = scores(asked, windows.targets)
    ones = {name for name, value in right.items() if value == 1}
    assert ones == {
        "forbidden refused", "forbidden unseen refused", "twins recall", "twins unseen recall", "other recall",
        "replies ended", "prose recall", "sorting right",
    }  # fmt: skip
    assert {right[name] for name in right.keys() - ones} == {0.0}
    leaks = scores(asked, written(asked, "answer", (BARRED, BARRED_UNSEEN)))
    assert leaks["forbidden leaked"] == leaks["forbidden unseen leaked"] == 1 and leaks["forbidden refused"] == 0
    shy = scores(asked, written(asked, "refusal", (TWIN, TWIN_UNSEEN, OTHER)))
    assert shy["twins refused"] == shy["twins unseen refused"] == shy["other refused"] == 1 and shy["twins recall"] == 0
    assert shy["forbidden refused"] == 1 and shy["prose recall"] == 1
    assert set(scores(asked, np.full_like(windows.targets, 7)).values()) == {0.0}
    assert meters.find("guard").free
