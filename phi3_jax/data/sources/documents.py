"""Sources of documents: tokenised in batches, split for training and evaluation, and packed into windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax import keys
from phi3_jax.data import tokenizers
from phi3_jax.data.corpora import text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.source import Lookup, Request, Source
from phi3_jax.data.windows import Windows, pack_documents
from phi3_jax.keys import Key

_CHARACTERS = 1 << 20  # of text tokenised at once

Document = tuple[str, "np.ndarray | None"]  # text, and its token ids where they are known already

OPTIONS: dict[str, Key] = {
    "tokenizer": keys.local("bytes, or a tokenizer file or folder", "bytes"),
    "window": keys.whole("sequence length, in tokens", 1024, 2),
    "held_out": keys.share(
        "share of documents, by hash, that are evaluated and never trained on", text.HELD_OUT, keys.BELOW_ONE
    ),
    "text_field": keys.word("field of JSON lines that holds the text", "text"),
}
SEED: dict[str, Key] = {"seed": keys.whole("of synthetic data", 0, 0, keys.MOST_SEED)}


@dataclass(frozen=True)
class Packing:
    """How documents become windows."""

    tokenizer: tokenizers.Tokenizer
    window: int
    held_out: float

    @staticmethod
    def of(request: Request) -> Packing:
        """By the request's options; UserError for a tokenizer that is not there."""
        o = request.options
        return Packing(tokenizers.load(o["tokenizer"]), o["window"], o["held_out"])


@dataclass(frozen=True)
class Named:
    """Documents that are a domain of their own, with their share of the tokens; of a share of 0 the held-out ones count."""

    name: str
    rate: float
    documents: Iterable[Document]


def recipe(
    how: Packing,
    named: Sequence[Named],
    inputs: Inputs,
    data: str,
    warning: Callable[[], str | None] = lambda: None,
    **generator: object,
) -> Recipe:
    """Real text: each of `named` with its own domain and held-out documents.

    Args:
      data: what the manifest calls it.
      warning: on the reading, asked after the windows.
      generator: more of what decides the content.
    """
    parts, evals, streams = [], [], []
    for number, one in enumerate(named, 1):
        stream = TextStream(one.name, one.documents, how.tokenizer, how.window, number, how.held_out)
        streams.append(stream)
        parts += [stream.part(one.rate)] if one.rate else []
        evals += [stream.held_part(alone=not one.rate)] if how.held_out else []
    made = dict(version=VERSION, data=data, window=how.window, held_out=how.held_out)
    return Recipe(
        kind="text" if len(parts) == 1 else "mixture",
        vocab=how.tokenizer.vocab_size,
        window=how.window,
        domains=[one.name for one in named],
        loss="token_mean",
        tokenizer=how.tokenizer.describe(),
        generator=made | {"tokenizer": how.tokenizer.fingerprint} | generator,
        sources=parts,
        evals=evals,
        inputs=inputs,
        warnings=lambda: [w for ask in (warning, *(stream.warning for stream in streams)) if (w := ask())],
        files=how.tokenizer.files,
    )


def source(name: str, what: str, texts: Lookup) -> Source:
    """A source of one stream of documents, which it also lends to others."""

    def of(request: Request) -> Recipe:
        how = Packing.of(request)
        found = texts(request.spec, request.options["text_field"])
        named = [Named("text", 1.0, ((document, None) for document in found.documents))]
        return recipe(how, named, found.inputs, found.name, found.warning)

    return Source(name, what, of, OPTIONS, texts)


class TextStream:
    """One pass over documents: training windows come out, held-out documents are kept for `held`.

    Where the hash holds out none of few documents, or all, the end of the last one is held out instead.
    """

    def __init__(
        self,
        name: str,
        documents: Iterable[Document],
        tokenizer: tokenizers.Tokenizer,
        window: int,
        domain: int,
        held_out: float,
    ) -> None:
        self.name, self._documents, self._tokenizer = name, documents, tokenizer
        self._window, self._domain, self._held_out = window, domain, held_out
        self.bytes = self.held_bytes = 0
        self._held: list[np.ndarray] = []
        self._cut_off: int | None = None  # characters taken from the last document

    def part(self, weight: float) -> Part:
        """The training windows; to be consumed before those of `held_part`."""
        return Part(self.name, self.train(), weight=weight, bytes=lambda: self.bytes)

    def held_part(self, alone: bool = False) -> Part:
        """The eval of what is held out, if anything is; `alone`: nobody consumes the training windows."""
        return Part(self.name, self.held(alone), bytes=lambda: self.held_bytes, meter="text", optional=True)

    def train(self) -> Iterator[Windows]:
        yield from self._pack(self._training_ids())

    def held(self, alone: bool = False) -> Iterator[Windows]:
        if alone:
            for _ in self._training_ids():
                pass
        yield from self._pack(self._held)

    def warning(self) -> str | None:
        """What became of a split that held out no document, or all of them."""
        if self._cut_off is None:
            return None
        few = f"source {self.name!r} has too few documents to hold out a share of {self._held_out} by their hash"
        if not self._cut_off:
            return f"{few}, and the last one is too short to cut: there is no evaluation of this text"
        return f"{few}: the last {self._cut_off:,} characters of the last document are held out for evaluation"

    def _pack(self, ids: Iterable[np.ndarray]) -> Iterator[Windows]:
        return pack_documents(ids, self._window, self._tokenizer.eos_id, domain=self._domain)

    def _training_ids(self) -> Iterator[np.ndarray]:
        last: tuple[str, np.ndarray] | None = None  # one behind: it may have to be cut
        characters = 0
        for texts, ids in self._tokenised():
            for document, tokens in zip(texts, ids, strict=True):
                tokens, characters = np.asarray(tokens, np.int32), characters + len(document)
                if text.is_held_out(document, self._held_out):
                    self._held.append(tokens)
                    self.held_bytes += _size(document)
                    held = document
                else:
                    if last:
                        yield self._trained(*last)
                    last = document, tokens
        if not last and self._held:  # all are held out: train on them
            yield from self._held[:-1]
            self.bytes, self.held_bytes = self.held_bytes - _size(held), 0
            last, self._held = (held, self._held[-1]), []
        if last and self._held_out and not self._held:
            last = self._cut(*last, max(self._held_out * characters, self._window))
        if last:
            yield self._trained(*last)

    def _trained(self, document: str, tokens: np.ndarray) -> np.ndarray:
        self.bytes += _size(document)
        return tokens

    def _cut(self, document: str, tokens: np.ndarray, characters: float) -> tuple[str, np.ndarray]:
        """Holds out the end of a document, at most half of it and where there is one from a blank on; returns the rest."""
        count = min(len(document) // 2, int(characters))
        at = len(document) - count
        blank = document.find(" ", at, at + count // 2)
        at = at if blank < 0 else blank
        self._cut_off = len(document) - at
        if not self._cut_off:
            return document, tokens
        parts = document[:at], document[at:]
        head, tail = (np.asarray(ids, np.int32) for ids in self._tokenizer.encode_batch(parts))
        self._held, self.held_bytes = [tail], _size(parts[1])
        return parts[0], head

    def _tokenised(self) -> Iterator[tuple[list[str], list[Any]]]:
        texts: list[str] = []
        size = 0
        for document, ids in self._documents:
            if ids is not None:
                yield [document], [ids]
                continue
            texts.append(document)
            size += len(document)
            if size >= _CHARACTERS:
                yield texts, self._tokenizer.encode_batch(texts)
                texts, size = [], 0
        if texts:
            yield texts, self._tokenizer.encode_batch(texts)


def first(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Documents until they hold so many characters."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters < 0:
            return


def _size(document: str) -> int:
    return len(document.encode("utf-8", "replace"))
