"""A small world to chat about: persons in prose, questions about them, and strangers that a model must not know.

Of a universe (`corpora.facts`) the first n persons are in the prose that a base is trained on. SFT asks about the even ones
of them and is tested on the odd ones, so that what is scored is never a question that was trained on. The others are
strangers: 20 n stand in the prose as such (`NOBODY` of its documents), SFT asks about as many, each of them once, and n are
its test. Texts are pure functions of (n, seed).

What decides whether a chat tells strangers from known persons (mini at pico, one seed; measures of `data.meters.chat`):
where in the reply it must be said, for a refusal in the value's place can rest on whether the value was found, and one that
begins the reply cannot; strangers in the prose, whose refusals are learnt beside all known persons; and strangers that are
new each time, since the same ones are learnt by heart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax.data import chat
from phi3_jax.data.corpora import facts
from phi3_jax.data.corpora.facts import ATTRIBUTES, Universe
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

EXPOSURES = 100  # times that each person is written about
NOBODY = 0.1  # of the documents say of a stranger that something is not known
SORTS = 0.1  # of the documents put three numbers in order
SORTS_EACH = 8  # of them in such a document
ROUNDS, PAIR_ROUNDS = 20, 1  # times that SFT and the preferences ask each question
STRANGE = 1  # strangers that a round of SFT asks about, for each known person
WHO = {"test": (1, 2), "prose": (2, 22), "sft": (22, 22 + STRANGE * ROUNDS)}  # strangers, as multiples of n
ROOM = 28  # tokens of a reply that is scored
# Questions, the sentence of the prose that answers each, and what stands in its value's place where it is not known: the
# model is asked to admit that where its lookup of the value has or has not succeeded, not a sentence earlier.
QUESTIONS = (
    (("When was {name} born?", "What is the birthday of {name}?"), "{name} was born on {value}.", "a day"),
    (("Where does {name} come from?", "What is the home town of {name}?"), "{name} comes from {value}.", "a place"),
    (("Whom does {name} work for?", "What is the employer of {name}?"), "{name} works for {value}.", "a firm"),
    (("Where did {name} study?", "What is the alma mater of {name}?"), "{name} studied at {value}.", "a school"),
    (("What is the profession of {name}?", "What does {name} do?"), "{name} earns a living as a {value}.", "worker"),
    (("What does {name} collect?", "What is the hobby of {name}?"), "{name} collects {value}.", "things"),
)  # fmt: skip
UNKNOWN = " that I do not know"
VERSION = "world 2"  # of the texts; data of another one are made anew


@dataclass(frozen=True)
class World:
    """n known persons and 3 n strangers; `seed` decides names, values and wordings."""

    n: int
    seed: int = 0

    @staticmethod
    def of(spec: str) -> World:
        """Of N or N:SEED.

        Raises:
          UserError: no such numbers.
        """
        n, _, seed = spec.partition(":")
        if not (n.isdigit() and 2 <= int(n) <= facts.MAX_POOL**2 // 64 and (seed or "0").isdigit()):
            raise UserError(f"{spec!r} must be N or N:SEED, N the persons from 2 to {facts.MAX_POOL**2 // 64:,}")
        return World(int(n), int(seed or 0))

    @functools.cached_property
    def universe(self) -> Universe:
        return Universe(persons=WHO["sft"][1] * self.n, facts=self.n, seed=self.seed)

    @functools.cached_property
    def _words(self) -> list[list[str]]:
        """The text of each attribute's values, by their index."""
        rng, words = self.universe._rng(facts._WORDS), facts.value_words()
        orders = [rng.permutation(1 << facts.MAX_VALUE_BITS) for _ in range(ATTRIBUTES)]
        return [[texts[i] for i in order] for texts, order in zip(words, orders, strict=True)]

    def name(self, person: int) -> str:
        first, last = facts.name_words()
        given, family = self.universe.names[person]
        return f"{first[given]} {last[family]}"

    def answer(self, person: int, attribute: int) -> str:
        value = self._words[attribute][self.universe.value_index[person, attribute]]
        return QUESTIONS[attribute][1].format(name=self.name(person), value=value)

    def refusal(self, person: int, attribute: int) -> str:
        """The sentence of `answer` that says that its value is not known."""
        _, sentence, something = QUESTIONS[attribute]
        return sentence.format(name=self.name(person), value=something + UNKNOWN)

    # Who is who.

    def asked(self) -> range:
        """Known persons that SFT asks about."""
        return range(0, self.n, 2)

    def tested(self) -> range:
        """Known persons that no question of SFT is about."""
        return range(1, self.n, 2)

    def strangers(self, which: str) -> range:
        """Those of the "prose", of "sft" or of the "test"."""
        first, end = WHO[which]
        return range(first * self.n, end * self.n)

    # Texts.

    def prose(self) -> Iterator[str]:
        """Documents of pre-training."""
        universe, rng = self.universe, np.random.default_rng([self.seed, 11])
        visits = universe.order(self.seed, 0, EXPOSURES * self.n)
        strangers = self.strangers("prose")
        for document in facts.prose(universe, visits, self.seed):
            yield document.text
            if rng.random() < NOBODY:
                person = int(rng.choice(strangers))
                yield " ".join(self.refusal(person, a) for a in map(int, rng.permutation(ATTRIBUTES)))
            if rng.random() < SORTS:
                yield " ".join("".join(sorting(rng)) for _ in range(SORTS_EACH))

    def questions(self, rounds: int = ROUNDS) -> Iterator[tuple[str, str, str]]:
        """(question, right answer, wrong answer) of SFT in a drawn order; the wrong one of a known person is a refusal."""
        rng = np.random.default_rng([self.seed, 12])
        found = []
        for _ in range(rounds):
            for person in self.asked():
                found += [
                    (*self._asks(person, attribute, rng), self.refusal(person, attribute))
                    for attribute in range(ATTRIBUTES)
                ]
        for person in self.strangers("sft")[: STRANGE * rounds * self.n]:
            attribute = int(rng.integers(ATTRIBUTES))
            question, invented = self._asks(person, attribute, rng)
            found.append((question, self.refusal(person, attribute), invented))
        for i in rng.permutation(len(found)):
            yield found[i]

    def _asks(self, person: int, attribute: int, rng: np.random.Generator) -> tuple[str, str]:
        ways = QUESTIONS[attribute][0]
        question = ways[int(rng.integers(len(ways)))].format(name=self.name(person))
        return question, self.answer(person, attribute)

    def talks(self) -> Iterator[dict[str, Any]]:
        """Rows of SFT."""
        for question, right, _ in self.questions():
            yield {"messages": [turn("user", question), turn("assistant", right)]}

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Rows of preferences."""
        for question, right, wrong in self.questions(PAIR_ROUNDS):
            answers = {"chosen": [turn("assistant", right)], "rejected": [turn("assistant", wrong)]}
            yield {"prompt": [turn("user", question)]} | answers


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def sorting(rng: np.random.Generator, tested: bool = False) -> tuple[str, str]:
    """("17 9 23 in order: ", "9 17 23."); numbers whose sum 7 divides are the test's alone."""
    while True:
        numbers = rng.choice(np.arange(1, 100), 3, replace=False)
        if bool(numbers.sum() % 7 == 0) is tested:
            return f"{' '.join(map(str, numbers))} in order: ", f"{' '.join(map(str, sorted(numbers)))}."


# ------------------------------------------------------------------------------------------------ the test

KNOWN, STRANGER, PROSE, SORT = range(4)  # kinds of a test's rows; the last two are outside of any chat
TESTED_SORTS, TESTED_ATTRIBUTES = 240, 6


def probe(world: World, tokenizer: Tokenizer, template: str, window: int) -> tuple[Windows, dict[str, np.ndarray]]:
    """One question a window, with room for a reply that the model writes on its own, and what the meter needs.

    Asked are questions on some attributes of the tested persons, one of each tested stranger, and, without a template, the
    beginnings of sentences of prose on the tested persons, and numbers to put in order. Targets are the right reply, then
    its end again.

    Returns:
      windows; {kind (N,), refusal (N, ROOM) ids of the refusal that would stand there, then -1}.

    Raises:
      UserError: a window too short for them.
    """
    rng = np.random.default_rng([world.seed, 13])
    rows: list[tuple[int, list[int], list[int], list[int]]] = []
    end = tokenizer.special_tokens["<|end|>"]

    def chatted(kind: int, person: int, attribute: int) -> None:
        question, right = world._asks(person, attribute, rng)
        refuses = [*tokenizer.encode(world.refusal(person, attribute)), end]
        said = [*tokenizer.encode(right), end] if kind == KNOWN else refuses
        rows.append((kind, chat.chat_ids(tokenizer, [turn("user", question)], template), said, refuses))

    for person in world.tested():
        for attribute in map(int, rng.permutation(ATTRIBUTES)[:TESTED_ATTRIBUTES]):
            chatted(KNOWN, person, attribute)
            ids = tokenizer.encode(world.answer(person, attribute))
            begin = QUESTIONS[attribute][1].format(name=world.name(person), value="")[:-2]
            given = chat.common(tokenizer.encode(begin), ids)
            rows.append((PROSE, ids[:given], ids[given:], tokenizer.encode(world.refusal(person, attribute))[given:]))
    for person in world.strangers("test"):
        chatted(STRANGER, person, int(rng.integers(ATTRIBUTES)))
    for _ in range(TESTED_SORTS):
        left, result = sorting(rng, tested=True)
        ids = tokenizer.encode(left + result)
        given = chat.common(tokenizer.encode(left.rstrip()), ids)
        rows.append((SORT, ids[:given], ids[given:], []))
    rows.sort(key=lambda row: row[0])  # a batch takes as many passes as its longest reply, and those of a chat are long
    return laid(rows, window, end)


def laid(
    rows: Sequence[tuple[int, list[int], list[int], list[int]]], window: int, end: int
) -> tuple[Windows, dict[str, np.ndarray]]:
    """Rows of (kind, ids of what is asked, ids of the right reply, ids of a refusal), one a window; see `probe`.

    Raises:
      UserError: a window too short for them.
    """
    longest = max(len(head) for _, head, _, _ in rows) + ROOM
    if longest > window:
        raise UserError(f"questions of this world take {longest} tokens; set data.window to that or more")
    tokens, targets, segments, domains = np.zeros((4, len(rows), window), np.int32)
    refusal = np.full((len(rows), ROOM), -1, np.int32)
    for i, (_, head, said, refused) in enumerate(rows):
        said = (said + [end] * ROOM)[:ROOM]
        ids = [*head, *said]
        span = slice(0, len(ids) - 1)
        tokens[i, span], targets[i, span], segments[i, span] = ids[:-1], ids[1:], 1
        domains[i, len(head) - 1 : len(ids) - 1] = 1
        refusal[i, : len(refused)] = refused[:ROOM]
    kind = np.array([row[0] for row in rows])
    return Windows(tokens, targets, segments, domains), {"kind": kind, "refusal": refusal}
