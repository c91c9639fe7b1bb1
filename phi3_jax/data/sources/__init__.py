"""Sources of data by name. Each is a module here with a `SOURCE` (see `source`); a new one is a file and a line."""

from __future__ import annotations

import importlib
import os
from typing import Any

from phi3_jax.data.corpora import files
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources.source import Request, Source, Texts
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Key

SOURCES: dict[str, Source] = {
    module: importlib.import_module(f"{__name__}.{module}").SOURCE
    for module in (
        "facts",
        "pydocs",
        "path",
        "tfds",
        "mixture",
        "mixed",
        "curated",
        "chats",
        "prose",
        "needles",
        "long",
        "drawn",
        "factbook",
    )
}


def names() -> list[str]:
    """How --data names each source."""
    return [source.name for source in SOURCES.values()]


def choices() -> str:
    """All sources in a line."""
    return ", ".join(f"{source.name} ({source.what})" for source in SOURCES.values())


def find(spec: str) -> Source:
    """The source that a word of --data names.

    Raises:
      UserError: a word that names no source and no path.
    """
    for source in SOURCES.values():
        if source.takes(spec):
            return source
    if not os.path.lexists(files.local(spec)):
        raise UserError(f"data {spec!r} does not exist{nearest(spec, names())}")
    return SOURCES["path"]


def options() -> dict[str, tuple[Key, list[str]]]:
    """{option: (its declaration, names of the sources that take it)}."""
    found: dict[str, tuple[Key, list[str]]] = {}
    for source in SOURCES.values():
        for name, key in source.options.items():
            found.setdefault(name, (key, []))[1].append(source.name)
    return found


def recipe(spec: str, **given: Any) -> Recipe:
    """What is written for a request; options that are not given, or None, have their defaults.

    Raises:
      UserError: an option of other sources, a value out of range, or anything wrong with the source.
    """
    source = find(spec)
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        flag = f"--{name}"
        if name not in source.options:
            owners = options().get(name, (None, []))[1]
            if not owners:
                raise UserError(f"unknown option {flag}{nearest(name, source.options)}")
            raise UserError(f"{flag} belongs to --data {', '.join(owners)}, not to {spec}")
        source.options[name].valid(value, f"{flag} {value}")
    values = {name: key.default for name, key in source.options.items()} | given
    return source.recipe(Request(spec, values, texts))


def texts(spec: str, text_field: str = "text", whole: bool = False) -> Texts:
    """The documents of a source.

    Raises:
      UserError: a source that has none to lend, or anything wrong with it.
    """
    source = find(spec)
    if source.texts is None:
        lenders = ", ".join(other.name for other in SOURCES.values() if other.texts)
        raise UserError(f"{spec} is no text for a part of other data; name one of {lenders}")
    return source.texts(spec, text_field, whole) if whole else source.texts(spec, text_field)
