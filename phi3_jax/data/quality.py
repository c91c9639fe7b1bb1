"""The quality filter of mixtures: how much a text reads like something to learn from, and which texts are kept."""

from __future__ import annotations

import hashlib
import re

_STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_TEACHING = re.compile(
    r"\b(because|therefore|thus|hence|example|for instance|defined?|definition|means?|called|note that|in general"
    r"|if|then|returns?|how|why|consider|suppose|explain(?:s|ed)?|first|second|finally|compute[ds]?|rule|theory|result)\b",
    re.IGNORECASE,
)


def quality(document: str) -> float:
    """How much a text reads like something to learn from, 0..1: a documented heuristic, not the report's model.

    0.6 for the share of seven rules met (Gopher: Rae et al. 2021, table A1: words of 3-10 letters on average, 80 % of
    them with a letter, at most 0.1 symbols per word, two stop words, at most 90 % list lines, under 30 % repeated lines;
    and 50 or more words), 0.2 for the share of lines that end a sentence (C4: Raffel et al. 2020), 0.2 for words of
    explanation (ours, full at 2 in 100 words).
    """
    words, lines = document.split(), [line.strip() for line in document.splitlines() if line.strip()]
    if not words:
        return 0.0
    n = len(words)
    rules = (
        n >= 50,
        3 <= sum(map(len, words)) / n <= 10,
        sum(any(c.isalpha() for c in word) for word in words) >= 0.8 * n,
        document.count("#") + document.count("...") + document.count("…") <= 0.1 * n,
        len(_STOP_WORDS & {word.lower() for word in words}) >= 2,
        sum(line[0] in "-*•" for line in lines) <= 0.9 * len(lines),
        len(set(lines)) > 0.7 * len(lines),
    )
    ends = sum(line.endswith((".", "!", "?", '"', ":", ";")) for line in lines) / len(lines)
    teaching = min(1.0, 50 * len(_TEACHING.findall(document)) / n)
    return 0.6 * sum(rules) / len(rules) + 0.2 * ends + 0.2 * teaching


def passes(document: str, least: float, seed: int = 0, noise: float = 0.05) -> bool:
    """Whether the filter keeps a text: quality plus seeded noise in +-`noise` reaches `least`.

    The noise (as in GPT-3's filter, Brown et al. 2020, appendix A) lets some doubtful texts through; it depends on seed
    and text alone, so that what a higher threshold keeps is a subset of what a lower one keeps.
    """
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8, key=str(seed).encode()).digest()
    return quality(document) + noise * (2 * int.from_bytes(digest, "big") / 2**64 - 1) >= least
