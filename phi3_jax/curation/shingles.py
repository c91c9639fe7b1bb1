"""Word n-grams of a text as numbers, MinHash signatures, and fingerprints of runs of words: pure NumPy.

Words are those of the text in lower case, without punctuation and diacritics; digits stay, so that two word problems with
other numbers are two texts. A hash is a function of the bytes alone, the same in every process.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

_BASE, _INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
_BLOCK = 512  # shingles whose hashes fit the cache
_APOSTROPHES = dict.fromkeys(map(ord, "'’‘`´"), None)


class _Blank(dict[int, int | None]):
    """Translates every mark and symbol to a blank, apostrophes to nothing, combining marks to nothing."""

    def __missing__(self, code: int) -> int | None:
        kind = unicodedata.category(chr(code))
        value: int | None = code
        if code in _APOSTROPHES or kind == "Mn":
            value = None
        elif kind[0] in "PSC":
            value = ord(" ")
        self[code] = value
        return value


_TABLE = _Blank()
_OTHER = re.compile(r"[^\x00-\x7f]+")
_known: dict[str, str] = {}
_ASCII = str.maketrans({chr(c): _TABLE[c] for c in range(128)})


def plain(text: str) -> str:
    """Words in lower case with one blank between them; no punctuation, no diacritics, digits as they are."""
    text = text.lower()
    if not text.isascii():
        text = _OTHER.sub(_in_ascii, text)
    return " ".join(text.translate(_ASCII if text.isascii() else _TABLE).split())


def _in_ascii(match: re.Match[str]) -> str:
    """A run of characters beyond ASCII without marks and diacritics; the answer is kept, up to 10,000 of them."""
    found = _known.get(match[0])
    if found is None:
        if len(_known) > 10_000:
            _known.clear()
        found = _known[match[0]] = unicodedata.normalize("NFKD", match[0]).translate(_TABLE)
    return found


_powers = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    global _powers
    if len(_powers[0]) < size:
        count = 1 << (size - 1).bit_length()
        made = []
        for base in (_BASE, _INVERSE):
            steps = np.full(count, base, np.uint64)
            steps[0] = 1
            made.append(np.multiply.accumulate(steps))
        _powers = (made[0], made[1])
    return _powers


class Hashes:
    """Hashes of all word n-grams of a text that `plain` gave, for any n."""

    def __init__(self, text: str) -> None:
        raw = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        up, self._down = _up_to(len(raw) + 1)
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((raw.astype(np.uint64) + 1) * up[: len(raw)])])
        blanks = np.flatnonzero(raw == 32)
        none = np.zeros(0, np.int64)
        self._starts = np.concatenate([[0], blanks + 1]) if len(raw) else none
        self._ends = np.concatenate([blanks, [len(raw)]]) if len(raw) else none

    @property
    def words(self) -> int:
        return len(self._starts)

    def of(self, n: int) -> np.ndarray:
        """uint64 of every n-gram in order; of a text with fewer words, one of the whole text."""
        n = min(n, self.words)
        if not n:
            return np.zeros(0, np.uint64)
        starts, ends = self._starts[: self.words - n + 1], self._ends[n - 1 :]
        return mixed((self._sums[ends] - self._sums[starts]) * self._down[starts])


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's last step (Steele et al. 2014): every bit depends on all."""
    x = values.copy()
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def multipliers(count: int) -> np.ndarray:
    """Odd numbers, of which each makes another order of the hashes."""
    return mixed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_BASE)) | np.uint64(1)


def bands(shingles: np.ndarray, factors: np.ndarray, rows: int) -> np.ndarray:
    """Keys of the bands of a MinHash signature (Broder 1997; Leskovec et al., ch. 3): uint64 (bands,).

    Two texts share the key of a band with probability J**rows, J being the Jaccard similarity of their shingles. Each
    number of the signature is the least of a*x + b over the upper 32 bits x of the hashes, modulo 2**32, with an odd a.
    """
    return band_keys(signatures(shingles, np.zeros(1, np.int64), factors), rows)[0]


def signatures(shingles: np.ndarray, starts: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """MinHash signatures of several texts at once: uint32 (texts, hashes).

    Args:
      shingles: of all texts, one text after the other; each has one or more.
      starts: where each text begins.
    """
    factor, offset = (factors >> np.uint64(32)).astype(np.uint32) | np.uint32(1), factors.astype(np.uint32)
    least = np.full((len(starts), len(factors)), np.iinfo(np.uint32).max, np.uint32)
    values = (shingles >> np.uint64(32)).astype(np.uint32)[:, None]
    bounds = np.concatenate([starts, [len(shingles)]])
    for at in range(0, len(values), _BLOCK):
        block = values[at : at + _BLOCK] * factor
        block += offset
        first, last = np.searchsorted(bounds, at, "right") - 1, np.searchsorted(bounds, at + len(block), "left")
        inside = np.maximum(bounds[first:last], at) - at
        np.minimum(least[first:last], np.minimum.reduceat(block, inside), out=least[first:last])
    return least


def band_keys(least: np.ndarray, rows: int) -> np.ndarray:
    """Keys of the bands of signatures (texts, hashes): uint64 (texts, bands)."""
    keys = np.zeros((len(least), least.shape[1] // rows), np.uint64)
    for i in range(rows):
        keys = mixed(keys + least[:, i::rows].astype(np.uint64) + np.uint64(1))
    return mixed(keys + np.arange(keys.shape[1], dtype=np.uint64) * np.uint64(_BASE))


def fingerprints(shingles: np.ndarray, window: int) -> np.ndarray:
    """Winnowing (Schleimer et al. 2003): the least hash of each `window` shingles in a row, one for windows in a row.

    Two texts that share a run of `window` shingles share a fingerprint, wherever the run stands: what a text holds of
    another one is found, however long the other is.
    """
    if len(shingles) <= window:
        return shingles.min(keepdims=True) if len(shingles) else shingles
    least, width = shingles, 1
    while width < window:
        step = min(width, window - width)
        least, width = np.minimum(least[:-step], least[step:]), width + step
    return least[np.concatenate([[True], least[1:] != least[:-1]])]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sorted sets: shared / all."""
    shared = common(a, b)
    return shared / (len(a) + len(b) - shared) if len(a) or len(b) else 1.0


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many values two sorted sets share."""
    if len(a) > len(b):
        a, b = b, a
    if not len(a):
        return 0
    at = np.searchsorted(b, a)
    return int((b[np.minimum(at, len(b) - 1)] == a).sum())
