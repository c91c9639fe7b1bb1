"""What counts as a word: a named choice, for a rule on words means something else with each.

`space` takes what stands between white space. `spacy` takes the words of spaCy's English tokenizer, as datatrove does: it
splits punctuation off, so that a comma is a word. spaCy's tokenizer works on what stands between white space, one chunk at
a time; it is asked once for each new chunk, and the answer is kept.
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
        self._tokenizer: Any = spacy.blank("en").tokenizer
        self._ends = frozenset(Sentencizer().punct_chars)
        self._known: dict[str, list[str]] = {}

    def _chunk(self, chunk: str) -> list[str]:
        found = self._known.get(chunk)
        if found is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            found = self._known[chunk] = [token.text for token in self._tokenizer(chunk)]
        return found

    def words(self, text: str) -> list[str]:
        """All words, punctuation marks among them."""
        known, chunk, found = self._known, self._chunk, list[str]()
        for piece in text.split():
            words = known.get(piece)
            found += chunk(piece) if words is None else words
        return found

    def sentences(self, text: str, enough: int) -> int:
        """How many sentences a text has, counted up to `enough`: one ends at a mark, the next begins at a word."""
        count, ended, empty, solid = 0, True, True, False
        for piece in _PIECES.findall(text):
            if piece.isspace():
                # A blank that follows a word belongs to it; what is left of the white space is a token of its own.
                tokens: Iterable[str] = [piece] if piece != " " and not (piece[0] == " " and len(piece) == 1) else ()
            else:
                tokens = self._chunk(piece)
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
