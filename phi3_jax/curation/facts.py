"""Facts that a text states, without labels: what a sentence says of somebody or something that a reader must know.

A fact is a subject and a value in one sentence. The subject is the name in it that the document says most often. A value
is

- what fills a *slot*: after some words that many sentences share ("SUBJECT works for"), the first place where many
  different words follow; up to `LONGEST` words to the end of the sentence;
- where a sentence has no slot: another name in it, or a number. Its frame is the word before it.

The bits of a fact are the surprise of its value among the values of its frame. Which words are names, and where slots are,
is counted over the whole corpus: `knowledge.py` does that. Everything here is a function of one text or of counts.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

LONGEST = 6  # words of a slot's value
REACH = 8  # words on either side of a subject that a frame may hold
SEEN, WIDE = 20, 4.0  # a slot's frame stands so often, and so many different words follow it (as a perplexity)
SLOT, NAME, NUMBER = range(3)  # kinds of values
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,:/]\d+)*|\n|[^\w\s]")
_ENDS = frozenset(".!?;\n")
_QUOTES = frozenset("\"“'‘(«:")  # what follows one of them may be a sentence of its own, with a capital
_CLOSES = frozenset(".!?;,:\"”'’)»")
_MARK = "\0"  # stands for the subject in a frame

Words = list[str]


def sentences(text: str) -> Iterator[Words]:
    """Words, numbers and marks of each sentence; a line ends one too."""
    words: Words = []
    for token in _TOKEN.findall(text):
        if token not in _ENDS:
            words.append(token)
        elif words:
            yield words
            words = []
    if words:
        yield words


def count_names(text: str, capital: Counter[str], lower: Counter[str]) -> None:
    """Adds how often each word stands within a sentence with a capital, and how often anywhere without one."""
    for words in sentences(text):
        before = "."
        for at, word in enumerate(words):
            if word[0].isalpha():
                if not word[0].isupper():
                    lower[word] += 1
                elif at and before not in _QUOTES and len(word) > 1:
                    capital[word] += 1
            before = word


def spans(words: Words, is_name: Callable[[str], bool]) -> list[tuple[int, int]]:
    """(start, stop) of the names of a sentence: runs of words with a capital that the corpus knows as names."""
    found: list[tuple[int, int]] = []
    for at, word in enumerate(words):
        if word[0].isupper() and is_name(word):
            if found and found[-1][1] == at:
                found[-1] = found[-1][0], at + 1
            else:
                found.append((at, at + 1))
    return found


@dataclass(frozen=True)
class Sentence:
    """One with a subject: its words, the subject's place in them, and the places of other names."""

    words: Words
    start: int
    stop: int
    names: tuple[tuple[int, int], ...]

    @property
    def subject(self) -> str:
        return " ".join(self.words[self.start : self.stop])

    @functools.cached_property
    def rest(self) -> Words:
        """The words after the subject, without marks at the end."""
        rest = self.words[self.stop :]
        while rest and rest[-1] in _CLOSES:
            rest = rest[:-1]
        return rest

    def prefixes(self) -> list[str]:
        """What stands before each word of `rest`, the subject masked; [] where the subject comes too late.

        A frame has a word beside its subject, so that the first of a sentence which begins with the subject is none.
        """
        if self.start > REACH:
            return []
        head = " ".join([*self.words[: self.start], _MARK])
        return [" ".join([head, *self.rest[:k]]) for k in range(min(len(self.rest), REACH + 1))]

    @property
    def first(self) -> int:
        """The first word of `rest` that may begin a slot."""
        return 0 if self.start else 1


def subjects(text: str, is_name: Callable[[str], bool]) -> list[Sentence]:
    """The sentences of a text that name somebody or something."""
    found = [(words, spans(words, is_name)) for words in sentences(text)]
    said = Counter(" ".join(words[a:b]) for words, names in found for a, b in names)
    made = []
    for words, names in found:
        if names:
            start, stop = max(names, key=lambda span: (said[" ".join(words[span[0] : span[1]])], -span[0]))
            made.append(Sentence(words, start, stop, tuple(name for name in names if name != (start, stop))))
    return made


@dataclass(frozen=True)
class Fact:
    """A value that a sentence states of its subject; `frame` says which values it is one of."""

    subject: str
    value: str
    frame: str
    kind: int


def stated(sentence: Sentence, is_slot: Callable[[str], bool]) -> Iterator[Fact]:
    """The facts of a sentence.

    Args:
      is_slot: whether a value stands after some words, as `Sentence.prefixes` writes them.
    """
    rest = sentence.rest
    for k, prefix in enumerate(sentence.prefixes()):
        if k >= sentence.first and is_slot(prefix):
            if len(rest) - k <= LONGEST:
                yield Fact(sentence.subject, " ".join(rest[k:]), prefix, SLOT)
                return
            break
    words = sentence.words
    numbers = ((at, at + 1) for at, word in enumerate(words) if word[0].isdigit())
    for kind, places in ((NAME, sentence.names), (NUMBER, numbers)):
        for a, b in places:
            yield Fact(sentence.subject, " ".join(words[a:b]), words[a - 1].lower() if a else "", kind)


@functools.lru_cache(1 << 18)
def key(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def entropies(frame: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Bits that the values of each frame hold in the mean, (frames,), also where few are seen of many that there are.

    The estimate of Chao and Shen (2003, Environmental and Ecological Statistics 10:429): shares are lowered to the part of
    the whole that was seen, by Good and Turing, and each value stands for those as rare that were not seen.

    Args:
      frame: number of the frame of each different value; count: how often it was seen, both (values,).
    """
    whole = np.bincount(frame, count)
    single = np.bincount(frame, count == 1)
    covered = (1 - np.minimum(single, whole - 1) / np.maximum(whole, 1))[frame]
    share = np.minimum(covered * count / whole[frame], 1 - 1e-12)
    return np.bincount(frame, -share * np.log2(share) / -np.expm1(whole[frame] * np.log1p(-share)))


def names_of(capital: Mapping[str, int], lower: Mapping[str, int]) -> list[str]:
    """Words that stand within sentences more often with a capital than anywhere without one."""
    return sorted(word for word, count in capital.items() if count > lower.get(word.lower(), 0))
