"""The two phases of the Phi-3 report as mixtures of roles, each of which a user may fill with text of one's own.

The report (arXiv:2404.14219, section 2) has phase 1 mostly of web text for knowledge and language, and phase 2 of a more
heavily filtered part of that web text with synthetic text for reasoning. It publishes no ratios and no filter: every number
here is ours. Rates are shares of tokens: each role is written as a source of its own and the loader mixes windows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from phi3_jax.data.corpora import facts, reasoning
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.quality import passes
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Lookup, Request, Source
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Key, plain


@dataclass(frozen=True)
class Role:
    """One part of a phase.

    Attributes:
      rate: share of the phase's tokens.
      default: where the text comes from when the user names nothing: one of `GENERATED`, or a source that lends texts.
      quality: least `quality` of a document that is kept, 0 keeps all.
    """

    rate: float
    default: str
    quality: float = 0.0


# Rates and thresholds are ours: the report says "mostly" web in phase 1, and in phase 2 "even more heavily filtered
# webdata (a subset used in Phase-1) with some synthetic data". pydocs stands in for the web, so that all works offline.
PHASES: dict[str, dict[str, Role]] = {
    "phi3_phase1": {
        "web": Role(0.9, "pydocs", quality=0.4),
        "textbook": Role(0.1, "prose"),
    },
    "phi3_phase2": {
        "web": Role(0.5, "pydocs", quality=0.6),
        "textbook": Role(0.2, "prose"),
        "reasoning": Role(0.3, "reasoning"),
    },
}


def recipe(request: Request) -> Recipe:
    """A source and an eval for each role."""
    how, seed, filled = documents.Packing.of(request), request.options["seed"], _filled(request.options["source"])
    named, inputs = roles(request.rest, how.tokenizer, filled, request.texts, request.options["text_field"], seed)
    return documents.recipe(how, named, inputs, request.spec, seed=seed)


def roles(
    phase: str, tokenizer: Tokenizer, filled: Mapping[str, str], texts: Lookup, text_field: str = "text", seed: int = 0
) -> tuple[list[documents.Named], Inputs]:
    """The documents of a phase's roles, and what is read for them.

    Args:
      filled: role -> a source that lends texts, or one of `GENERATED`.
      seed: of generated text and of the filter's noise.

    Raises:
      UserError: an unknown phase or role, or a source without text.
    """
    from phi3_jax.data import tasks  # the only way to TensorFlow

    if phase not in PHASES:
        raise UserError(f"unknown mixture {phase!r}{nearest(phase, PHASES)}")
    for role in filled:
        if role not in PHASES[phase]:
            raise UserError(f"{phase} has no role {role!r}{nearest(role, PHASES[phase])}")
    parts, inputs = {}, Inputs()
    for role, part in PHASES[phase].items():
        where = filled.get(role, part.default)
        if where in GENERATED:
            read: Callable[[], Iterator[str]] = functools.partial(GENERATED[where], seed)
        else:
            inputs += texts(where, text_field).inputs
            read = functools.partial(_read, texts, where, text_field)
        keep = functools.partial(passes, least=part.quality, seed=seed) if part.quality else None
        parts[role] = tasks.Part(read, part.rate, keep)
    mixture = tasks.add_mixture(phase, parts, tokenizer)
    rates = {task.name.split(".")[-1]: (mixture.get_rate(task), task) for task in mixture.tasks}
    return [documents.Named(role, rate, tasks.documents(task)) for role, (rate, task) in rates.items()], inputs


def _filled(pairs: tuple[str, ...]) -> dict[str, str]:
    return {role: where for role, _, where in (pair.partition("=") for pair in pairs)}


def _read(texts: Lookup, where: str, text_field: str) -> Iterator[str]:
    """A pass of its own for every time that seqio asks; what is left out is said at its end."""
    found = texts(where, text_field)
    yield from found.documents
    if warning := found.warning():
        print(f"warning: {warning}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- generated text


def prose_texts(seed: int) -> Iterator[str]:
    """The knowledge corpus in prose, one person a text, everyone twice in newly worded sentences."""
    universe = facts.Universe(seed=seed)
    for document in facts.prose(universe, universe.order(seed, 0, 2 * universe.facts), seed):
        yield document.text


def reasoning_texts(seed: int, count: int = 4000, items: int = 10) -> Iterator[str]:
    """Reasoning items written out, `items` a text: steps from left to right, each result kept between 0 and 47."""
    head = f"Work from left to right and keep every result between 0 and {reasoning.NUMBERS - 1}."
    for start in range(0, count * items, items):
        windows = reasoning.generate(seed, start, items)
        yield "\n".join([head, *(_item_text(windows, row) for row in range(items))])


def _item_text(windows: Windows, row: int) -> str:
    pool = 256  # names before the numbers
    item = [*windows.tokens[row].tolist(), int(windows.targets[row, -1])]
    value, column, lines = item[1] - pool - reasoning.FIRST_NUMBER, 2, []
    for gap in reasoning.GAPS:
        line = str(value)
        for at in range(column, column + 2 * gap, 2):
            operator = reasoning.OPERATORS[item[at] - pool - reasoning.FIRST_OPERATOR]
            line += f" {operator} {item[at + 1] - pool - reasoning.FIRST_NUMBER}"
        column += 2 * gap + 1
        value = item[column - 1] - pool - reasoning.FIRST_NUMBER
        lines.append(f"{line} = {value}")
    return "; ".join(lines) + "."


GENERATED: dict[str, Callable[[int], Iterator[str]]] = {"prose": prose_texts, "reasoning": reasoning_texts}


def _is_pair(value: str, shown: str) -> None:
    if not all(value.partition("=")):
        raise UserError(f"{shown} is not of the form ROLE=PATH")
    plain(value, shown)


_SOURCE = Key("a role's text, ROLE=PATH; once for each role", (), tuple, item=Key("a role", None, str, check=_is_pair))
SOURCE = Source(
    "mixture:PHASE",
    f"the report's phases, {' or '.join(PHASES)}; --source ROLE=PATH fills a role with text of one's own",
    recipe,
    documents.OPTIONS | documents.SEED | {"source": _SOURCE},
)
