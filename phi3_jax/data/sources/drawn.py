"""Drawn items (`corpora.drawn`), their content shown as pictures, as text, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

from phi3_jax import keys
from phi3_jax.data.corpora import drawn
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import SEED
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError, nearest

EVAL_SEED = 0  # items of the evals are the same whatever the data's seed
ASKED = dict(zip(drawn.KINDS, (256, 256, 1024), strict=True))  # items of each kind
SPARE = 1024  # items beyond the budget, since runs round their last batch up
OPTIONS = {"tokens": keys.whole("largest budget without a repeated item, e.g. 2M", 2_000_000, 1)} | SEED
_CHUNK = 1 << 13


def recipe(request: Request) -> Recipe:
    """One source of fresh items, and an eval for each kind."""
    if request.rest not in drawn.SHOWN:
        raise UserError(
            f"data={request.spec}: content is shown as {request.rest!r}{nearest(request.rest, drawn.SHOWN)}"
        )
    seed, count = request.options["seed"], -(-request.options["tokens"] // drawn.WINDOW) + SPARE
    return Recipe(
        kind="drawn", vocab=drawn.VOCAB, window=drawn.WINDOW, domains=list(drawn.DOMAINS), loss="domain_mean",
        tokenizer=drawn.closed(),
        generator=dict(version=VERSION, data=request.spec, tokens=request.options["tokens"], seed=seed),
        sources=[Part("drawn", _train(seed, count, request.rest), fresh=True)],
        evals=[
            Part(name, [_asked(kind, name, request.rest)], meter="seeing", extra=drawn.extra(kind))
            for kind, name in enumerate(ASKED)
        ],
        pictures=drawn.Drawings() if request.rest == "picture" else None,
    )  # fmt: skip


def _train(seed: int, count: int, shown: str) -> Iterator[Windows]:
    for start in range(0, count, _CHUNK):
        yield drawn.windows(seed, "train", start, min(_CHUNK, count - start), shown)


def _asked(kind: int, name: str, shown: str) -> Windows:
    """The first items of a kind of the eval's stream."""
    return drawn.windows(EVAL_SEED, "eval", 0, drawn.among(kind, ASKED[name]), shown, kind)


SOURCE = Source(
    f"drawn:{'|'.join(drawn.SHOWN).upper()}",
    "symbols, charts and sums that are drawn, their content a picture, text or hidden",
    recipe, OPTIONS, fresh=True, closed=drawn.closed,
)  # fmt: skip
