"""What counts as a word: a named choice, for a rule on words means something else with each.

`space` takes what stands between white space. `spacy` takes the words of spaCy's English tokenizer, as datatrove does: it
splits punctuation off, so that a comma is a word. spaCy's tokenizer works on what stands between white space, one chunk at
a time; it is asked once for each new chunk, and the answer is kept. It is not asked what chunks of common shapes become,
letters or numbers between marks: `tests/curation/test_words.py` holds this against it.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from phi3_jax.errors import UserError

KINDS = ("space", "spacy")
_MOST = 100_000  # chunks whose words are kept; then it starts anew, so that memory stays bounded
# Marks before, letters (joined by hyphens) or a number, 's, marks after: what spaCy's affixes and infixes make of these is
# simple. Two full stops in a row are not among them.
_SHAPE = re.compile(
    """([("\u201c\u2018\\[`<]*)([A-Za-z]+(?:-[A-Za-z]+)*|[0-9]+(?:[.,:][0-9]+)?)((?:['\u2019][sS])?)"""
    """((?:[)"\u201d\\]`>,;:!?]|\\.(?!\\.))*)"""
)
_AFTER = frozenset(')"\u201d]`>,;:!?.')
_HYPHEN = re.compile("(-)")
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
        self._faces = [case for case in self._special if len(case) > 1 and set(case) <= _AFTER]  # such as :)
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
        """Words of a chunk of the common shapes, `_SHAPE`, in which no special case of spaCy's stands; else None."""
        if (found := _SHAPE.fullmatch(chunk)) is None or chunk in self._special:
            return None
        before, stem, owned, after = found.groups()
        words = [stem] if "-" not in stem else _HYPHEN.split(stem)
        if not (before or owned or after):
            return words
        begin, end = len(before), len(before) + len(stem)
        if any(chunk[i:j] in self._special for i in range(begin + 1) for j in range(end, len(chunk) + 1)):
            return None
        if len(after) > 1 and any(mark in after for mark in self._faces):
            return None
        if after[:1] == "." and (
            owned or not (words[-1].isdigit() or (len(words[-1]) > 1 and words[-1][-1].islower()))
        ):
            return None  # an abbreviation, two capitals, or a number with a mark in it
        if words[-1] + after[:1] in self._special:
            return None  # as in Wrangell-St.
        return [*before, *words, *([owned] if owned else ()), *after]

    def words(self, text: str) -> list[str]:
        """All words, punctuation marks among them."""
        if text is self._last[0]:  # several rules ask for the words of one text, one after the other
            return self._last[1]
        pieces = text.split()
        try:
            found = list(itertools.chain.from_iterable(map(self._known.__getitem__, pieces)))
        except KeyError:
            self._learn([piece for piece in dict.fromkeys(pieces) if piece not in self._known])
            found = list(itertools.chain.from_iterable(map(self._known.__getitem__, pieces)))
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
