"""A mixture of sources of text with weights of one's own, `mix:code@3+prose@1`; of weight 0, a source is evaluated alone.

Every source is a domain with its own held-out documents, chosen by their hash. So mixtures of the same sources, whatever
their weights, are scored on the same held-out documents, and no such document is trained on in any of them.
"""

from __future__ import annotations

from phi3_jax.data import several
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.mixture import GENERATED
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.errors import UserError
from phi3_jax.keys import number

WEIGHT = number("weight", 1.0, 0.0, 1e4)


def recipe(request: Request) -> Recipe:
    """A source for each of weight above 0, and an eval for each."""
    how, field = documents.Packing.of(request), request.options["text_field"]
    if not request.rest:
        raise UserError("data=mix: names no source; write mix:A@3+B@1")
    found = several.split(request.rest, WEIGHT)
    if not any(one.weight for one in found):
        raise UserError(f"data={request.spec}: every weight is 0, so that nothing is trained on; write mix:A@3+B@1")
    if not how.held_out and not all(one.weight for one in found):
        raise UserError(
            f"data={request.spec}: a source of weight 0 is there to be evaluated; held_out=0 leaves it nothing"
        )
    whole, inputs, named, warnings = sum(one.weight for one in found), Inputs(), [], []
    for slug, one in zip(several.slugs(found), found, strict=True):
        if one.spec in GENERATED:
            texts = GENERATED[one.spec](0)
        else:
            lent = request.texts(one.spec, field)
            inputs += lent.inputs
            warnings.append(lent.warning)
            texts = lent.documents
        named.append(documents.Named(slug, one.weight / whole, ((text, None) for text in texts)))
    shown = "mix:" + "+".join(f"{one.name}@{one.weight:g}" for one in found)
    return documents.recipe(how, named, inputs, shown, lambda: next(filter(None, (ask() for ask in warnings)), None))


SOURCE = Source(
    "mix:SOURCES",
    "sources of text with weights, A@3+B@1: each PATH, pydocs, tfds:NAME, or "
    f"{' or '.join(GENERATED)} (generated); one of weight 0 is evaluated and not trained on",
    recipe,
    documents.OPTIONS,
)
