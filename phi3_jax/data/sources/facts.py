"""The controlled corpora: compact facts (repeat in fresh orders), reasoning items (never repeat), and real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from phi3_jax import keys
from phi3_jax.data import tokenizers
from phi3_jax.data.corpora import facts as corpus
from phi3_jax.data.corpora import reading, reasoning, strangers, text
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import SEED, TextStream, first
from phi3_jax.data.sources.source import Lookup, Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError
from phi3_jax.keys import Key

EVAL_ITEMS, EVAL_SEED = 4096, 0  # reasoning items of the eval, the same whatever the data's seed
SPARE_WINDOWS = 1024  # reasoning windows beyond the budget, since runs round their last batch up
MOST_VISITS = 1_000_000  # written of persons whose frequencies are 1 / rank; a longer run begins again
BYTES = 256  # ids that text takes of the pool

OPTIONS: dict[str, Key] = {
    "tokens": keys.whole("largest budget without a repeated reasoning item, e.g. 4M", 4_000_000, 1),
    "facts": keys.whole("facts in the corpus", 4500),
    "universe": keys.whole("facts there are", 9000, 1),
    "frequency": keys.word("how often facts are seen", "uniform", *corpus.FREQUENCIES),
    "pool": keys.whole("ids shared by names and values", 256, 1),
    "value_bits": keys.whole("bits a value holds", corpus.MAX_VALUE_BITS, 0, corpus.MAX_VALUE_BITS),
    # facts / (2 universe): each fact is seen equally often whatever the filter keeps (1/4 of the tokens at 4,500 of 9,000)
    "share": keys.share("share of the tokens that are facts; default facts / (2 universe)"),
    "text_share": keys.share(
        "share of the tokens that are text; reasoning takes what facts, text and reading leave", 0.0
    ),
    "text_source": keys.local("the text, as --data names it; its bytes' ids are the pool's", "pydocs"),
    "reading": keys.share("share of the tokens that teach to read from context; adds three evals, with search", 0.0),
    "unheard": keys.share("share of the tokens that say of strangers that nobody knows them", 0.0),
    "strangers": keys.whole("persons of no corpus who are asked about; adds evals of abstention", 0),
} | SEED  # of the universe and of the training items


@dataclass(frozen=True)
class _Asked:
    """The options, and the numbers that follow."""

    tokens: int
    facts: int
    universe: int
    frequency: str
    pool: int
    value_bits: int
    share: float
    text_share: float
    text_source: str
    reading: float
    unheard: float
    strangers: int
    seed: int

    @staticmethod
    def of(options: dict[str, Any]) -> _Asked:
        share = options["share"]
        return _Asked(**options | {"share": options["facts"] / (2 * options["universe"]) if share is None else share})

    @cached_property
    def people(self) -> corpus.Universe:
        return corpus.Universe(self.universe, self.facts, self.pool, self.value_bits, self.frequency, self.seed)

    @cached_property
    def shares(self) -> dict[str, Fraction]:
        """Of the tokens, by part."""
        parts = {"knowledge": self.share, "text": self.text_share, "reading": self.reading}
        parts |= {"unheard": self.unheard}
        found = {name: Fraction(x).limit_denominator(1000) for name, x in parts.items()}
        return found | {"reasoning": 1 - sum(found.values(), Fraction())}

    def weight(self, part: str) -> int:
        """A whole number, in the ratio of the shares."""
        return int(self.shares[part] * math.lcm(*(x.denominator for x in self.shares.values())))

    @property
    def windows(self) -> int:
        """Of the whole budget."""
        return -(-self.tokens // reasoning.Layout().window)

    @cached_property
    def nobody(self) -> np.ndarray:
        """Strangers that training says nobody knows, as many as its tokens have room for."""
        count = round(self.windows * float(self.shares["unheard"]) * corpus.PER_WINDOW)
        return strangers.taught(self.people, count, self.strangers)


def recipe(request: Request) -> Recipe:
    """Parts of knowledge, reasoning, reading and text in their shares; the two first are evaluated in any case.

    Reading counts as reasoning in the loss. Without it, and without text, nothing but the other two is there.

    Raises:
      UserError: shares that are more than 1 together, or corpora that cannot be.
    """
    asked = _Asked.of(dict(request.options))
    people, total = asked.people, asked.share + asked.text_share + asked.reading + asked.unheard
    if not 0 <= min(asked.share, asked.text_share, asked.reading, asked.unheard) <= total <= 1:
        raise UserError(
            f"share={asked.share}, text_share={asked.text_share}, reading={asked.reading} and unheard={asked.unheard} need "
            "0 <= share <= 1, the shares at most 1 together"
        )
    generator = dict(
        version=VERSION, data=request.spec, tokens=asked.tokens, facts=asked.facts, universe=asked.universe
    )
    generator |= dict(frequency=asked.frequency, pool=asked.pool, value_bits=asked.value_bits, share=asked.share)
    generator |= dict(seed=asked.seed)
    made = Recipe(
        kind="facts",
        vocab=people.vocab,
        window=reasoning.Layout().window,
        domains=["knowledge", "reasoning"],
        loss="domain_mean",
        tokenizer=corpus.closed(asked.pool),
        generator=generator,
        sources=[],
        evals=[],
    )
    _knowledge(made, asked)
    _reasoning(made, asked)
    if asked.shares["reading"]:
        _reading(made, asked)
    if asked.shares["unheard"]:
        _unheard(made, asked)
    if asked.strangers:
        _strangers(made, asked)
    if asked.shares["text"]:
        _text(made, asked, request.texts)
    return made


def _knowledge(made: Recipe, asked: _Asked) -> None:
    people, weight = asked.people, asked.weight("knowledge")
    if weight:
        # One epoch, which the loader shuffles anew each time; rare facts, though, are not in every epoch.
        seen = asked.windows * corpus.PER_WINDOW * asked.share
        seen = min(seen, MOST_VISITS) if asked.frequency == "inverse_rank" else seen
        epochs = 1 if asked.frequency == "uniform" else max(1, round(seen / asked.facts))
        windows = corpus.compact_windows(people, people.order(asked.seed, 0, epochs * asked.facts))
        made.sources.append(Part("knowledge", [windows], weight=weight))
    known, extra = corpus.eval_windows(people)
    made.evals.append(Part("knowledge", [known], meter="knowledge", extra=extra))


def _reasoning(made: Recipe, asked: _Asked) -> None:
    weight, pool = asked.weight("reasoning"), asked.pool
    if weight:
        count = int(asked.windows * asked.shares["reasoning"]) + SPARE_WINDOWS
        parts = _chunks(count, lambda start, n: reasoning.generate(asked.seed, start, n, pool=pool))
        made.sources.append(Part("reasoning", parts, weight=weight, fresh=True))
    items = reasoning.generate(EVAL_SEED, 0, EVAL_ITEMS, stream="eval", pool=pool)
    made.evals.append(Part("reasoning", [items], meter="reasoning", extra=reasoning.extra()))


def _reading(made: Recipe, asked: _Asked) -> None:
    people, count = asked.people, max(1, round(asked.windows * asked.shares["reading"]))
    count = min(count, asked.pool**2 - asked.universe)  # the loader begins again where they are too few
    spared = asked.strangers + len(asked.nobody)
    pairs = reading.train_pairs(people, asked.seed, count, spared)
    parts = _chunks(count, lambda at, n: reading.windows_of(people, *pairs[:, at : at + n]))
    made.sources.append(Part("reading", parts, weight=asked.weight("reading")))
    for name, passage in reading.passages(people).items():
        windows, extra = reading.eval_windows(people, passage)
        made.evals.append(Part(name, [windows], meter="knowledge", extra=extra))
    made.generator |= dict(reading=asked.reading)


def _unheard(made: Recipe, asked: _Asked) -> None:
    if not len(asked.nobody):
        raise UserError(
            f"unheard={asked.unheard} needs names that universe={asked.universe} and strangers leave unused"
        )
    parts = _chunks(len(asked.nobody), lambda at, n: strangers.taught_windows(asked.people, asked.nobody[at : at + n]))
    made.sources.append(Part("unheard", parts, weight=asked.weight("unheard")))
    made.generator |= dict(unheard=asked.unheard)


def _strangers(made: Recipe, asked: _Asked) -> None:
    for name in ("abstention", "abstention_search") if asked.shares["reading"] else ("abstention",):
        windows, extra = strangers.eval_windows(asked.people, asked.strangers, searched=name == "abstention_search")
        made.evals.append(Part(name, [windows], meter="abstention", extra=extra))
    made.generator |= dict(strangers=asked.strangers)


def _text(made: Recipe, asked: _Asked, texts: Lookup) -> None:
    if asked.pool < BYTES:
        raise UserError(
            f"text_share={asked.text_share} needs pool={BYTES} or more, the ids of bytes; pool is {asked.pool}"
        )
    as_bytes = tokenizers.load("bytes")
    as_bytes.eos_id = made.vocab - 1  # spare in the closed vocabulary, where a byte's own end is <R>
    found, share = texts(asked.text_source), asked.shares["text"]
    enough = ((t, None) for t in first(found.documents, max(400_000, int(1.2 * asked.windows * share) * made.window)))
    stream = TextStream("text", enough, as_bytes, made.window, len(made.domains) + 1, text.HELD_OUT)
    made.sources.append(stream.part(asked.weight("text")))
    made.evals.append(stream.held_part())
    made.domains.append("text")
    made.generator |= dict(text_share=asked.text_share, text_source=asked.text_source)
    made.inputs = found.inputs
    made.warnings = lambda: [w for ask in (found.warning, stream.warning) if (w := ask())]


def _chunks(count: int, make: Callable[[int, int], Windows], size: int = 1 << 14) -> Iterator[Windows]:
    for start in range(0, count, size):
        yield make(start, min(size, count - start))


SOURCE = Source(
    "facts", "controlled corpora: facts to know and fresh reasoning items, closed vocabulary", recipe, OPTIONS
)
