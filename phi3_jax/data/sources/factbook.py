"""Facts of the World Factbook (`corpora.factbook`) as a filter keeps them, and fresh reasoning items in all other tokens.

`factbook:50` keeps half of the bits of all facts, the countries of fewest bits a token first; `factbook:random50` keeps
random countries instead, others with another seed; `factbook:shuffled` has all lines, with values that are dealt anew at
every visit. A fact that is kept is seen `VISITS` times in `OF` tokens, whatever else is. `factbook:50:TEXT` gives half of
the other tokens to a source of text, as bytes in windows of 24, and evaluates its held-out documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from phi3_jax import keys
from phi3_jax.data import tokenizers
from phi3_jax.data.corpora import factbook as corpus
from phi3_jax.data.corpora import reasoning, text
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import SEED, TextStream, first
from phi3_jax.data.sources.source import Request, Source, Texts
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

VISITS, OF = 16, 5_000_000
EVAL_ITEMS, EVAL_SEED = 4096, 0  # reasoning items of the eval, the same whatever the data's seed
SPARE = 1024  # reasoning windows beyond the budget, since runs round their last batch up
OPTIONS = {"tokens": keys.whole("largest budget without a repeated reasoning item, e.g. 5M", OF, 1)} | SEED
SHUFFLED = "shuffled"
_CHUNK = 1 << 14


def share_of(kept: str) -> tuple[float, bool]:
    """(share of the bits, whether countries are chosen at random) of a word such as 50 or random50.

    Raises:
      UserError: no whole number of per cent.
    """
    found = re.fullmatch(r"(random)?(\d{1,3})", kept)
    if not found or int(found[2]) > 100:
        raise UserError(
            f"data=factbook:{kept} keeps {kept!r}; write the per cent of the bits, as factbook:50 or factbook:random50 "
            f"(0 to 100), or factbook:{SHUFFLED}"
        )
    return int(found[2]) / 100, bool(found[1])


def recipe(request: Request) -> Recipe:
    """Kept facts and reasoning items; all facts are asked for, whatever is kept."""
    book, seed, tokens = corpus.shipped(), request.options["seed"], request.options["tokens"]
    kept, _, where = request.rest.partition(":")
    dealt = kept == SHUFFLED
    share, random = (1.0, False) if dealt else share_of(kept)
    chosen = np.flatnonzero(book.kept(share, seed if random else None))
    whole = -(-tokens // corpus.WINDOW)  # windows of the budget
    in_corpus = np.zeros(len(book.facts), bool) if dealt else np.isin(np.arange(len(book.facts)), chosen)
    asked, item = book.windows(np.arange(len(book.facts)))
    extra = dict(item=item, in_corpus=in_corpus, bits=book.bits, usual=book.usual, subject=book.country)
    made = Recipe(
        kind="factbook", vocab=book.closed()["vocab_size"], window=corpus.WINDOW, domains=["knowledge", "reasoning"],
        loss="domain_mean", tokenizer=book.closed(),
        generator=dict(version=VERSION, data=request.spec, tokens=tokens, seed=seed),
        sources=[], evals=[Part("knowledge", [asked], meter="cloze", extra=extra)],
    )  # fmt: skip
    known = Fraction()
    if len(chosen):
        windows, _ = book.windows(chosen)
        known = Fraction(VISITS * len(windows) * corpus.WINDOW, OF).limit_denominator(10_000)
        epochs = -(-whole * known.numerator // (known.denominator * len(windows)))
        visits: Iterator[Windows] = (book.shuffled(seed, i).windows(chosen)[0] for i in range(epochs))
        made.sources.append(Part("knowledge", visits if dealt else [windows], weight=2 * known.numerator))
    rest = known.denominator - known.numerator
    weight = rest if where else 2 * rest
    _reasoning(made, seed, book.pool, int(whole * (1 - known)) // (2 if where else 1), weight)
    if where:
        _text(made, request.texts(where), whole * float(1 - known) / 2, weight)
    return made


def _reasoning(made: Recipe, seed: int, pool: int, count: int, weight: int) -> None:
    count += SPARE
    items = (reasoning.generate(seed, at, min(_CHUNK, count - at), pool=pool) for at in range(0, count, _CHUNK))
    made.sources.append(Part("reasoning", items, weight=weight, fresh=True))
    sums = reasoning.generate(EVAL_SEED, 0, EVAL_ITEMS, stream="eval", pool=pool)
    made.evals.append(Part("reasoning", [sums], meter="reasoning", extra=reasoning.extra()))


def _text(made: Recipe, found: Texts, windows: float, weight: int) -> None:
    as_bytes = tokenizers.load("bytes")
    as_bytes.eos_id = made.vocab - 1  # a spare id; a byte's own end is another's
    enough = first(found.documents, max(400_000, int(1.2 * windows * made.window)))
    stream = TextStream("text", ((t, None) for t in enough), as_bytes, made.window, 3, text.HELD_OUT)
    made.sources.append(stream.part(weight))
    made.evals.append(stream.held_part())
    made.domains.append("text")
    made.inputs = found.inputs
    made.warnings = lambda: [w for ask in (found.warning, stream.warning) if (w := ask())]


SOURCE = Source(
    "factbook:KEPT",
    "facts of the World Factbook, KEPT per cent of them (50, random50) or none (shuffled), with reasoning items, and as "
    "factbook:KEPT:TEXT with text",
    recipe, OPTIONS, fresh=True, closed=lambda: corpus.shipped().closed(),
)  # fmt: skip
