"""What counts as a word: a named choice, for a rule on words means something else with each.

`space` takes what stands between white space. `spacy` takes the words of spaCy's English tokenizer, as datatrove does: it
splits punctuation off, so that a comma is a word. spaCy's tokenizer works on what stands between white space, one chunk at
a time; it is asked once for each new chunk, and the answer is kept. It is not asked what letters alone, or with one mark at
their end, become: `tests/curation/test_words.py` holds this against it.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from phi3_jax.errors import UserError

KINDS = ("space", "spacy")
_MOST = 100_000  # chunks whose words are kept; then it starts anew, so that memory stays bounded
_PIECES = re.compile(r"\s+|\S+")


def splitter(kind: str) -> Callable[[str], list[str]]:
    """The function text -> words of one of `KINDS`."""
    return str.split if kind == "space" else english().words


@functools.cache
def english() -> English:
    """spaCy's English words, one object a process."""
    return English()


class English:
    """spaCy's blank English tokenizer and its rule of sentences, without a pipeline.

    Raises:
      UserError: spaCy is not installed.
    """

    def __init__(self) -> None:
        try:
            import spacy
            from spacy.pipeline import Sentencizer
        except ImportError as error:
            raise UserError("words=spacy needs spaCy: pip install -e '.[curate]', or take words=space") from error
        nlp: Any = spacy.blank("en")
        self._tokenizer = nlp.tokenizer
        self._special = frozenset(self._tokenizer.rules)
        self._ends = frozenset(Sentencizer().punct_chars)
        self._known: dict[str, list[str]] = {}
        self._last: tuple[str, list[str]] = ("", [])

    def _learn(self, chunks: list[str]) -> None:
        """Words of chunks that are not known yet; those that spaCy is asked for are asked for together."""
        if len(self._known) + len(chunks) >= _MOST:
            self._known.clear()
        self._known |= {chunk: words for chunk in chunks if (words := self._plain(chunk)) is not None}
        asked = [chunk for chunk in chunks if chunk not in self._known]
        self._known |= zip(asked, self.asked(asked), strict=True)

    def asked(self, chunks: list[str]) -> list[list[str]]:
        """What spaCy's tokenizer says."""
        found: list[list[str]] = [[]]
        for token in self._tokenizer(" ".join(chunks)):
            found[-1].append(token.text)
            if token.whitespace_:
                found.append([])
        return found if len(found) == len(chunks) else [[t.text for t in self._tokenizer(chunk)] for chunk in chunks]

    def _plain(self, chunk: str) -> list[str] | None:
        """Words of ASCII letters with at most one mark after them, which no special case of spaCy's names; else None."""
        if not chunk.isascii() or chunk in self._special:
            return None
        if chunk.isalpha():
            return [chunk]
        stem, mark = chunk[:-1], chunk[-1]
        if not stem.isalpha() or stem in self._special:
            return None
        return [stem, mark] if mark in ",;:!?" or (mark == "." and len(stem) > 1 and stem[-1].islower()) else None

    def words(self, text: str) -> list[str]:
        """All words, punctuation marks among them."""
        if text is self._last[0]:  # several rules ask for the words of one text, one after the other
            return self._last[1]
        pieces, found = text.split(), list[str]()
        if new := [piece for piece in dict.fromkeys(pieces) if piece not in self._known]:
            self._learn(new)
        for piece in pieces:
            found += self._known[piece]
        self._last = text, found
        return found

    def sentences(self, text: str, enough: int) -> int:
        """How many sentences a text has, counted up to `enough`: one ends at a mark, the next begins at a word."""
        count, ended, empty, solid = 0, True, True, False
        for piece in _PIECES.findall(text):
            if piece.isspace():
                # A blank that follows a word belongs to it; what is left of the white space is a token of its own.
                tokens: Iterable[str] = [piece] if piece != " " and not (piece[0] == " " and len(piece) == 1) else ()
            else:
                if piece not in self._known:
                    self._learn([piece])
                tokens = self._known[piece]
            for token in tokens:
                ends = token in self._ends
                if empty or (ended and not ends and not _is_punctuation(token)):
                    count += solid
                    ended = empty = solid = False
                if ends:
                    ended = True
                solid |= not token.isspace()
            if count + solid >= enough:
                return enough
        return count + solid


def _is_punctuation(token: str) -> bool:
    return all(unicodedata.category(character).startswith("P") for character in token)
