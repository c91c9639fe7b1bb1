"""Gopher's rules on quality and on repetition (Rae et al. 2021, arXiv:2112.11446, table A1), as datatrove computes them.

With words=spacy the decisions are those of datatrove 0.10.1, in its order. With words=space a word is what stands between
white space, which is how the paper's limits read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from phi3_jax.curation import words as wording
from phi3_jax.curation.rule import EXEMPT, Check, Measured, Rule
from phi3_jax.keys import number, share, whole, word

_PARAGRAPH = re.compile(r"\n{2,}")
_TOP, _REPEATED = (2, 3, 4), (5, 6, 7, 8, 9, 10)
WORDS = word("what counts as a word", "space", *wording.KINDS)


# ------------------------------------------------------------------------------------------------ quality


def quality(text: str, row: Any, words: str = "space") -> Measured:
    """Counts of words, their mean length, shares of hashes, ellipses, bullets, letters; how many stop words there are."""
    found = wording.lexicon(words).words(text)
    n, words_alone = len(found), ~found.marks()
    solid = int(np.count_nonzero(words_alone))
    characters = int(found.lengths @ words_alone)
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
        found.letters() / n if n else nan,
        found.stop_words(),
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
        "min_stop_words": whole("least different ones of: " + ", ".join(sorted(wording.STOP_WORDS)), 2),
        "exempt": EXEMPT,
    },
)


# ------------------------------------------------------------------------------------------------ repetition


def repetition(text: str, row: Any, words: str = "space") -> Measured:
    """Repeated paragraphs, lines and n-grams, as shares of their number or of the text's characters."""
    if not text:
        return (1.0, *[0.0] * 13), text
    paragraphs, lines = _PARAGRAPH.split(text.strip()), lines_of(text)
    of_paragraphs, of_lines = duplicates(paragraphs), duplicates(lines)
    tops, repeated = _ngrams(wording.lexicon(words).words(text))
    return (
        0.0,
        of_paragraphs[0] / len(paragraphs),
        of_paragraphs[1] / len(text),
        of_lines[0] / len(lines),
        of_lines[1] / len(text),
        *(count / len(text) for count in (*tops, *repeated)),
    ), text


def lines_of(text: str) -> list[str]:
    """What stands between runs of line breaks; a text that begins or ends with one has an empty line there."""
    first, *others = text.split("\n")
    return [first, *filter(None, others[:-1]), *others[-1:]]


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


def _ngrams(words: wording.Words) -> tuple[list[int], list[int]]:
    """Characters of the most frequent n-gram (with its blanks) times its count, and of all repeated n-grams.

    Repeated ones are counted from left to right; one that was there before is skipped whole, as datatrove does. Longer
    n-grams are looked for only where both shorter ones inside are repeated.
    """
    tops: list[int] = []
    repeated: list[int] = []
    ends = np.concatenate([[0], np.cumsum(words.lengths)])
    # Of every place that may hold a repeated n-gram: where it is, and which number the (n-1)-gram there has.
    places, kinds = np.arange(len(words)), words.ids
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
