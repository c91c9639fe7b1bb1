"""Gopher's rules on quality and on repetition (Rae et al. 2021, arXiv:2112.11446, table A1), as datatrove computes them.

With words=spacy the decisions are those of datatrove 0.10.1, in its order. With words=space a word is what stands between
white space, which is how the paper's limits read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from phi3_jax.curation import words as wording
from phi3_jax.curation.rule import EXEMPT, Check, Measured, Rule
from phi3_jax.keys import number, share, whole, word

_PARAGRAPH, _LINES = re.compile(r"\n{2,}"), re.compile(r"\n+")
_TOP, _REPEATED = (2, 3, 4), (5, 6, 7, 8, 9, 10)
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
WORDS = word("what counts as a word", "space", *wording.KINDS)
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


# ------------------------------------------------------------------------------------------------ quality


def quality(text: str, row: Any, words: str = "space") -> Measured:
    """Counts of words, their mean length, shares of hashes, ellipses, bullets, letters; how many stop words there are."""
    found = wording.splitter(words)(text)
    n = len(found)
    counts = Counter(found)
    marks = {w: c for w, c in counts.items() if not (w.isascii() and w.isalnum()) and _SYMBOLS.fullmatch(w)}
    solid = n - sum(marks.values())
    characters = sum(len(w) * c for w, c in counts.items()) - sum(len(w) * c for w, c in marks.items())
    letters = sum(c for w, c in counts.items() if w.isalpha() or any(map(str.isalpha, w)))
    lines = text.splitlines()
    nan = float("nan")
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    trailing = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    mean = characters / solid if solid else nan
    return (
        solid,
        solid,
        mean,
        mean,
        text.count("#") / n if n else nan,
        (text.count("...") + text.count("…")) / n if n else nan,
        bullets / len(lines) if lines else nan,
        trailing / len(lines) if lines else nan,
        letters / n if n else nan,
        len(STOP_WORDS & counts.keys()),
    ), text


QUALITY = Rule(
    "Gopher's rules on quality: words of a document, their lengths, symbols, bullets, letters, stop words",
    quality,
    (
        Check("gopher_short_doc", "min_words", False),
        Check("gopher_long_doc", "max_words"),
        Check("gopher_below_avg_threshold", "min_mean_length", False),
        Check("gopher_above_avg_threshold", "max_mean_length"),
        Check("gopher_too_many_hashes", "max_hashes"),
        Check("gopher_too_many_ellipsis", "max_ellipses"),
        Check("gopher_too_many_bullets", "max_bullets"),
        Check("gopher_too_many_end_ellipsis", "max_trailing"),
        Check("gopher_below_alpha_threshold", "min_letters", False),
        Check("gopher_enough_stop_words", "min_stop_words", False),
    ),
    {
        "words": WORDS,
        "min_words": whole("least words that are more than marks", 50),
        "max_words": whole("most such words", 100_000),
        "min_mean_length": number("least mean length of a word, characters", 3.0),
        "max_mean_length": number("most mean length of a word, characters", 10.0),
        "max_hashes": number("most '#' a word", 0.1),
        "max_ellipses": number("most ellipses a word", 0.1),
        "max_bullets": share("most lines that start with a bullet", 0.9),
        "max_trailing": share("most lines that end in an ellipsis", 0.3),
        "min_letters": share("least share of words with a letter", 0.8),
        "min_stop_words": whole("least different ones of: " + ", ".join(sorted(STOP_WORDS)), 2),
        "exempt": EXEMPT,
    },
)


# ------------------------------------------------------------------------------------------------ repetition


def repetition(text: str, row: Any, words: str = "space") -> Measured:
    """Repeated paragraphs, lines and n-grams, as shares of their number or of the text's characters."""
    if not text:
        return (1.0, *[0.0] * 13), text
    paragraphs, lines = _PARAGRAPH.split(text.strip()), _LINES.split(text)
    of_paragraphs, of_lines = duplicates(paragraphs), duplicates(lines)
    found = wording.splitter(words)(text)
    tops, repeated = _ngrams(found)
    return (
        0.0,
        of_paragraphs[0] / len(paragraphs),
        of_paragraphs[1] / len(text),
        of_lines[0] / len(lines),
        of_lines[1] / len(text),
        *(count / len(text) for count in (*tops, *repeated)),
    ), text


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces were there before, and their characters."""
    if len(set(pieces)) == len(pieces):
        return 0, 0
    seen, count, characters = set[str](), 0, 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        else:
            seen.add(piece)
    return count, characters


def _ngrams(words: list[str]) -> tuple[list[int], list[int]]:
    """Characters of the most frequent n-gram (with its blanks) times its count, and of all repeated n-grams.

    Repeated ones are counted from left to right; one that was there before is skipped whole, as datatrove does. Longer
    n-grams are looked for only where both shorter ones inside are repeated.
    """
    tops: list[int] = []
    repeated: list[int] = []
    ends = np.cumsum([0, *map(len, words)])
    numbers: dict[str, int] = {}
    # Of every place that may hold a repeated n-gram: where it is, and which number the (n-1)-gram there has.
    places, kinds = np.arange(len(words)), np.array([numbers.setdefault(w, len(numbers)) for w in words], np.int64)
    for n in range(2, _REPEATED[-1] + 1):
        follows = places[1:] == places[:-1] + 1
        places, pairs = places[:-1][follows], (kinds[:-1] * (kinds.max(initial=0) + 1) + kinds[1:])[follows]
        _, kinds, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        often = counts[kinds]
        most = int(often.max(initial=0))
        if n in _TOP:
            at = places[often.argmax()] if most > 1 else 0
            tops.append(int(ends[at + n] - ends[at] + n - 1) * max(most, 1) if len(words) >= n else 0)
        places, kinds = places[often > 1], kinds[often > 1]
        if n in _REPEATED:
            repeated.append(_greedy(dict(zip(places.tolist(), kinds.tolist(), strict=True)), n, ends))
        if not places.size and n >= _TOP[-1]:
            break
    return tops, repeated + [0] * (len(_REPEATED) - len(repeated))


def _greedy(grams: dict[int, int], n: int, ends: np.ndarray) -> int:
    seen, free, characters = set[Any](), 0, 0
    for at, gram in grams.items():
        if at < free:
            continue
        if gram in seen:
            characters, free = characters + int(ends[at + n] - ends[at]), at + n
        else:
            seen.add(gram)
    return characters


REPETITION = Rule(
    "Gopher's rules on repetition: of paragraphs, lines and word n-grams",
    repetition,
    (
        Check("empty", 0.5),
        Check("dup_para_frac", "max_paragraphs"),
        Check("dup_para_char_frac", "max_paragraph_characters"),
        Check("dup_line_frac", "max_lines"),
        Check("dup_line_char_frac", "max_line_characters"),
        *(Check(f"top_{n}_gram", f"max_top_{n}") for n in _TOP),
        *(Check(f"duplicated_{n}_n_grams", f"max_repeated_{n}") for n in _REPEATED),
    ),
    {
        "words": WORDS,
        "max_paragraphs": share("most paragraphs that were there before", 0.3),
        "max_paragraph_characters": share("most characters in such paragraphs", 0.2),
        "max_lines": share("most lines that were there before", 0.3),
        "max_line_characters": share("most characters in such lines", 0.2),
        **{
            f"max_top_{n}": share(f"most characters in the most frequent {n}-gram", limit)
            for n, limit in zip(_TOP, (0.2, 0.18, 0.16), strict=True)
        },
        **{
            f"max_repeated_{n}": share(f"most characters in repeated {n}-grams", limit)
            for n, limit in zip(_REPEATED, (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True)
        },
        "exempt": EXEMPT,
    },
)
