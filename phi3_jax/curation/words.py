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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

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
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# Ends of sentences in all scripts, and other marks, by code point: datatrove's utils/text.py.
_ENDS = """
21 2e 3f 589 61d 61e 61f 6d4 700 701 702 7f9 837 839 83d 83e 964 965 104a 104b 1362 1367 1368 166e 1735 1736 17d4 17d5
17d6 17d9 17da 1803 1809 1944 1945 1aa8 1aa9 1aaa 1aab 1b5a 1b5b 1b5e 1b5f 1b7d 1b7e 1c3b 1c3c 1c7e 1c7f 203c 203d 2047
2048 2049 2e2e 2e3c 2e53 2e54 3002 a4ff a60e a60f a6f3 a6f7 a876 a877 a8ce a8cf a92f a9c8 a9c9 aa5d aa5e aa5f aaf0 aaf1
abeb fe52 fe56 fe57 ff01 ff0e ff1f ff61 10a56 10a57 10f55 10f56 10f57 10f58 10f59 10f86 10f87 10f88 10f89 11047 11048
110be 110bf 110c0 110c1 11141 11142 11143 111c5 111c6 111cd 111de 111df 11238 11239 1123b 1123c 112a9 1144b 1144c 115c2
115c3 115c9 115ca 115cb 115cc 115cd 115ce 115cf 115d0 115d1 115d2 115d3 115d4 115d5 115d6 115d7 11641 11642 1173c 1173d
1173e 11944 11946 11a42 11a43 11a9b 11a9c 11c41 11c42 11ef7 11ef8 11f43 11f44 16a6e 16a6f 16af5 16b37 16b38 16b44 16e98
1bc9f 1da88"""
ENDS = frozenset(chr(int(code, 16)) for code in _ENDS.split())
MARKS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»" + "".join(
    map(chr, (*range(9), *range(11, 32), *range(127, 160)))
)
_SYMBOLS = re.compile(f"[{re.escape(MARKS + ''.join(sorted(ENDS)))}]+")
_STOPS = {word: 1 + i for i, word in enumerate(sorted(STOP_WORDS))}


class Words:
    """The words of a text, as numbers of a lexicon, and what is known of each: arrays with an entry a word.

    Attributes:
      ids: equal for equal words.
      lengths: characters.
    """

    def __init__(self, ids: np.ndarray, names: list[str], facts: tuple[np.ndarray, ...]) -> None:
        self.ids, self._names, self._facts = ids, names, facts
        self.lengths: np.ndarray = facts[0].take(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return map(self._names.__getitem__, self.ids.tolist())

    def letters(self) -> int:
        """How many words have a letter."""
        return int(np.count_nonzero(self._facts[1].take(self.ids)))

    def marks(self) -> np.ndarray:
        """Which words are nothing but marks, of `MARKS` and `ENDS`."""
        return self._facts[2].take(self.ids) < 0

    def stop_words(self) -> int:
        """How many different ones of `STOP_WORDS` there are."""
        return len(set(self._facts[2].take(self.ids).tolist()) - {-1, 0})


class Lexicon:
    """Numbers for words. It is bounded: with too many chunks it starts anew, with other numbers.

    Args:
      split: chunks between white space -> the words of each.
    """

    def __init__(self, split: Callable[[Sequence[str]], Iterable[list[str]]]) -> None:
        self._split = split
        self._last: tuple[str, Words] | None = None
        self._start()

    def _start(self) -> None:
        self._known: dict[str, list[int]] = {}
        self._numbers: dict[str, int] = {}
        self.names: list[str] = []
        self._facts = tuple(np.zeros(1024, kind) for kind in (np.int64, bool, np.int8))

    def _number(self, word: str) -> int:
        number = self._numbers.get(word)
        if number is None:
            number = self._numbers[word] = len(self.names)
            self.names.append(word)
            if number == len(self._facts[0]):  # new arrays: those of earlier texts stay as they are
                self._facts = tuple(np.concatenate([each, np.zeros_like(each)]) for each in self._facts)
            mark = not (word.isascii() and word.isalnum()) and _SYMBOLS.fullmatch(word)
            kind = -1 if mark else _STOPS.get(word, 0)
            for array, fact in zip(self._facts, (len(word), any(map(str.isalpha, word)), kind), strict=True):
                array[number] = fact
        return number

    def numbers(self, chunks: list[str]) -> list[int]:
        """Of the words of some chunks, in order."""
        known = self._known
        try:
            return list(itertools.chain.from_iterable(map(known.__getitem__, chunks)))
        except KeyError:
            new = [chunk for chunk in dict.fromkeys(chunks) if chunk not in known]
            if len(known) + len(new) >= _MOST:
                self._start()
                new = list(dict.fromkeys(chunks))
            for chunk, words in zip(new, self._split(new), strict=True):
                self._known[chunk] = [self._number(word) for word in words]
            return list(itertools.chain.from_iterable(map(self._known.__getitem__, chunks)))

    def words(self, text: str) -> Words:
        """All words of a text."""
        if self._last is None or text is not self._last[0]:  # several rules ask for those of one, one after the other
            ids = np.array(self.numbers(text.split()), np.int64)
            self._last = text, Words(ids, self.names, self._facts)
        return self._last[1]


@functools.cache
def lexicon(kind: str) -> Lexicon:
    """Words of one of `KINDS`, one object a process."""
    return english() if kind == "spacy" else Lexicon(lambda chunks: [[chunk] for chunk in chunks])


@functools.cache
def english() -> English:
    """spaCy's English words, one object a process."""
    return English()


class English(Lexicon):
    """spaCy's blank English tokenizer and its rule of sentences, without a pipeline; punctuation marks are words.

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
        self._quiet: set[str] = set()  # chunks that end no sentence
        super().__init__(self._words_of)

    def _words_of(self, chunks: Sequence[str]) -> list[list[str]]:
        """Words of chunks; those that spaCy is asked for are asked for together."""
        found = {chunk: words for chunk in chunks if (words := self._plain(chunk)) is not None}
        asked = [chunk for chunk in chunks if chunk not in found]
        found |= zip(asked, self.asked(asked), strict=True)
        if len(self._quiet) >= _MOST:
            self._quiet.clear()
        self._quiet |= {chunk for chunk, words in found.items() if self._ends.isdisjoint(words)}
        return [found[chunk] for chunk in chunks]

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

    def sentences(self, text: str, enough: int) -> int:
        """How many sentences a text has, counted up to `enough`: one ends at a mark, the next begins at a word."""
        count, ended, empty, solid = 0, True, True, False
        pieces = text.split()
        for piece in pieces if " ".join(pieces) == text else _PIECES.findall(text):
            if not (ended or empty) and piece in self._quiet:
                solid = True
                continue
            if piece.isspace():
                # A blank that follows a word belongs to it; what is left of the white space is a token of its own.
                tokens: Iterable[str] = [piece] if piece != " " and not (piece[0] == " " and len(piece) == 1) else ()
            else:
                tokens = [self.names[number] for number in self.numbers([piece])]
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
