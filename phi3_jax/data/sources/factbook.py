"""Facts of the World Factbook (`corpora.factbook`) as a filter keeps them, and fresh reasoning items in all other tokens.

`factbook:50` keeps half of the bits of all facts, the countries of fewest bits a token first; `factbook:random50` keeps
random countries instead, others with another seed; `factbook:shuffled` has all lines, with values that are dealt anew at
every visit. A fact that is kept is seen `VISITS` times in `OF` tokens, whatever else is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from phi3_jax import keys
from phi3_jax.data.corpora import factbook as corpus
from phi3_jax.data.corpora import reasoning
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import SEED
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

VISITS, OF = 16, 4_000_000
EVAL_ITEMS, EVAL_SEED = 4096, 0  # reasoning items of the eval, the same whatever the data's seed
SPARE = 1024  # reasoning windows beyond the budget, since runs round their last batch up
OPTIONS = {"tokens": keys.whole("largest budget without a repeated reasoning item, e.g. 4M", OF, 1)} | SEED
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
    dealt = request.rest == SHUFFLED
    share, random = (1.0, False) if dealt else share_of(request.rest)
    kept = np.flatnonzero(book.kept(share, seed if random else None))
    whole = -(-tokens // corpus.WINDOW)  # windows of the budget
    sources, known = [], Fraction()
    if len(kept):
        windows, _ = book.windows(kept)
        known = Fraction(VISITS * len(windows) * corpus.WINDOW, OF).limit_denominator(10_000)
        epochs = -(-whole * known.numerator // (known.denominator * len(windows))) if dealt else 1
        facts: Iterator[Windows] = (book.shuffled(seed, i).windows(kept)[0] for i in range(epochs))
        sources.append(Part("knowledge", facts if dealt else [windows], weight=known.numerator))
    count = int(whole * (1 - known)) + SPARE
    items = (reasoning.generate(seed, at, min(_CHUNK, count - at), pool=book.pool) for at in range(0, count, _CHUNK))
    sources.append(Part("reasoning", items, weight=known.denominator - known.numerator, fresh=True))
    asked, item = book.windows(np.arange(len(book.facts)))
    sums = reasoning.generate(EVAL_SEED, 0, EVAL_ITEMS, stream="eval", pool=book.pool)
    in_corpus = np.zeros(len(book.facts), bool) if dealt else np.isin(np.arange(len(book.facts)), kept)
    extra = dict(item=item, in_corpus=in_corpus, bits=book.bits, usual=book.usual, subject=book.country)
    return Recipe(
        kind="factbook", vocab=book.closed()["vocab_size"], window=corpus.WINDOW, domains=["knowledge", "reasoning"],
        loss="domain_mean", tokenizer=book.closed(),
        generator=dict(version=VERSION, data=request.spec, tokens=tokens, seed=seed),
        sources=sources,
        evals=[
            Part("knowledge", [asked], meter="cloze", extra=extra),
            Part("reasoning", [sums], meter="reasoning", extra=reasoning.extra()),
        ],
    )  # fmt: skip


SOURCE = Source(
    "factbook:KEPT",
    "facts of the World Factbook, of which KEPT per cent are kept (50, random50) or none (shuffled), and reasoning items",
    recipe, OPTIONS, fresh=True, closed=lambda: corpus.shipped().closed(),
)  # fmt: skip
