"""What a source of data is, for the table `SOURCES` of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import Recipe
from phi3_jax.keys import Key


@dataclass
class Texts:
    """One pass over documents.

    Attributes:
      documents: their texts, read while they are consumed.
      inputs: what they come from, known at once.
      name: what the manifest calls it, without the folder that a path happens to lie in.
      warning: one line on what was left out, asked after the documents, or None.
    """

    documents: Iterator[str]
    inputs: Inputs
    name: str
    warning: Callable[[], str | None] = lambda: None


class Lookup(Protocol):
    """The texts of a source by its name; raises UserError at once for what cannot be read.

    `whole`: a file of plain text is one document, for windows longer than the pieces that it is cut into otherwise.
    """

    def __call__(self, spec: str, text_field: str = "text", whole: bool = False) -> Texts: ...


@dataclass(frozen=True)
class Request:
    """What a source is asked for.

    Attributes:
      spec: as a user names it, for example tfds:NAME.
      options: a value for each of `Source.options`.
      texts: of any other source, for one that fills a part of its own with text.
    """

    spec: str
    options: Mapping[str, Any]
    texts: Lookup

    @property
    def rest(self) -> str:
        """What follows the prefix: NAME of tfds:NAME."""
        return self.spec.partition(":")[2]


@dataclass(frozen=True)
class Source:
    """One kind of data.

    Attributes:
      name: how --data names it: a word, a prefix with what follows it (tfds:NAME), or `PATH` for all other words.
      what: it is, in a line.
      recipe: makes the recipe of a request. It checks what is asked for and whether it is there, and raises UserError,
        before it gives windows; `Recipe.generator` and `Recipe.inputs` are its part of the manifest.
      options: what it needs to know, by the name of the flag; each has a default.
      texts: its documents alone, for sources that take text of others; None: it has none to lend.
      fresh: its items are made of `seed`, so that each seed of a study has items of its own.
      closed: its vocabulary, as a manifest describes a tokenizer, where it is always the same one.
    """

    name: str
    what: str
    recipe: Callable[[Request], Recipe]
    options: Mapping[str, Key] = field(default_factory=dict)
    texts: Lookup | None = None
    fresh: bool = False
    closed: Callable[[], dict[str, Any]] | None = None

    def takes(self, spec: str) -> bool:
        """Whether a word of --data names this source."""
        prefix, colon, _ = self.name.partition(":")
        return spec.startswith(f"{prefix}:") if colon else spec == self.name
