"""The prose of a small world of persons, for bases that are to chat about them (`corpora.instructions`)."""

from __future__ import annotations

import dataclasses

from phi3_jax.data import tokenizers
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.corpora.instructions import VERSION, World, probe
from phi3_jax.data.recipe import Part, Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Request, Source, Texts

TEMPLATE = "mini"


def texts(spec: str, text_field: str = "text", whole: bool = False) -> Texts:
    """Documents of prose:N[:SEED]."""
    return Texts(World.of(spec.partition(":")[2]).prose(), Inputs(versions=[spec, VERSION]), spec)


def recipe(request: Request) -> Recipe:
    """Text, and the test of the chat where the tokenizer has the control tokens of one."""
    made = _SOURCE.recipe(request)
    tokenizer = tokenizers.load(request.options["tokenizer"])
    if "<|end|>" not in tokenizer.special_tokens:
        return made
    windows, extra = probe(World.of(request.rest), tokenizer, TEMPLATE, made.window)
    return dataclasses.replace(made, evals=[*made.evals, Part("chat", [windows], meter="chat", extra=extra)])


_SOURCE = documents.source("prose:N", "prose about N generated persons, for bases that chat (tokenizer tiny)", texts)
SOURCE: Source = dataclasses.replace(_SOURCE, recipe=recipe)
