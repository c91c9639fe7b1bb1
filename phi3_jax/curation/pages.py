"""Rules on pages of the web: C4's on lines (Raffel et al. 2020, section 2.2) and FineWeb's (arXiv:2406.17557, 3.6).

The decisions, and the text that C4 leaves, are those of datatrove 0.10.1.
"""

from __future__ import annotations

import re
from typing import Any

from phi3_jax.curation import words as wording
from phi3_jax.curation.gopher import WORDS, duplicates
from phi3_jax.curation.rule import EXEMPT, Check, Measured, Rule
from phi3_jax.keys import Key, share, switch, whole

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_QUOTES = "\"'”’)]» "
_SENTENCE = re.compile(r"[.!?](?=\s|$)")


def c4(
    text: str, row: Any, words: str = "space", terminal: bool = True, line_words: int = 3, longest_word: int = 1000,
    enough: int = 5,
) -> Measured:  # fmt: skip
    """Whether a line holds "lorem ipsum" or a curly bracket, how many sentences are left (up to `enough`), and the text.

    The first of the two that is met decides, and only a line that the rules before it kept is looked at.
    """
    kept: list[str] = []
    sentences = 0
    for line in text.splitlines():
        line = line.strip()
        found = line.split()
        if len(line) > longest_word and any(len(w) > longest_word for w in found):
            continue
        line = _CITATION.sub("", line) if "[" in line else line
        if terminal and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(found) < line_words:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return (1.0, 0.0, sentences), text
        if "javascript" in lower:
            continue
        if "{" in line:
            return (0.0, 1.0, sentences), text
        if any(phrase in lower for phrase in _POLICY):
            continue
        if sentences < enough:
            left = enough - sentences
            sentences += wording.english().sentences(line, left) if words == "spacy" else _count(line)
        kept.append(line)
    return (0.0, 0.0, min(sentences, enough)), "\n".join(kept).strip()


def _count(line: str) -> int:
    return max(1, len(_SENTENCE.findall(line)))


C4 = Rule(
    "C4's rules: drops lines without an end, short ones, and those on cookies and scripts; then documents",
    c4,
    (
        Check("lorem_ipsum", 0.5),
        Check("curly_bracket", 0.5),
        Check("too_few_sentences", "enough", False),
    ),
    {
        "words": WORDS,
        "terminal": Key("drops lines that do not end a sentence", True, bool),
        "line_words": whole("least words of a line", 3),
        "longest_word": whole("most characters of a word of a line", 1000),
        "enough": whole("least sentences of a document", 5),
        "exempt": EXEMPT,
    },
    changes=True,
)


def fineweb(text: str, row: Any, words: str = "space", short: int = 30, quotes: bool = False) -> Measured:
    """Shares of lines that end a sentence, of short lines, of characters in repeated lines; line breaks a word."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return (1.0, 0.0, 0.0, 0.0, 0.0), text
    ended = sum((line.rstrip(_QUOTES)[-1:] if quotes else line[-1]) in wording.ENDS for line in lines)
    return (
        0.0,
        ended / len(lines),
        sum(len(line) <= short for line in lines) / len(lines),
        duplicates(lines)[1] / len(text.replace("\n", "")),
        text.count("\n") / len(wording.lexicon(words).words(text)),
    ), text


FINEWEB = Rule(
    "FineWeb's rules: lines that end a sentence, short lines, repeated lines, lists",
    fineweb,
    (
        Check("empty", 0.5),
        Check("line_punct_ratio", "min_ended", False),
        Check("short_line_ratio", "max_short"),
        Check("char_dup_ratio", "max_repeated"),
        Check("list_ratio", "max_breaks"),
    ),
    {
        "words": WORDS,
        "quotes": switch("a quotation mark or bracket that closes after the end of a sentence does not hide it"),
        "min_ended": share("least share of lines that end a sentence", 0.12),
        "short": whole("characters up to which a line is short", 30),
        "max_short": share("most lines that are short", 0.67),
        "max_repeated": share("most characters in lines that were there before", 0.01),
        "max_breaks": share("most line breaks a word", 0.3),
        "exempt": EXEMPT,
    },
)
