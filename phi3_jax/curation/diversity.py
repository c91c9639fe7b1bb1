"""How varied texts are: new n-grams as one reads on, openings, compression, and the most similar other text.

Share of distinct n-grams after Li et al. 2016 (arXiv:1510.03055), which falls with the length that is read: texts of two
kinds are compared at the same number of words, and drawn as a curve. Openings are what Cosmopedia's authors had to fight
("Once upon a time"). Similarity is exact, of word 3-grams.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phi3_jax.curation import shingles

SAMPLE = 500  # texts of a kind that are looked at
WORDS = (250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000)  # points of the curve
ORDERS = (1, 2, 3)
OPENING, COMMONEST = 3, 10  # words of an opening; how many of the commonest count
LIKE = 0.5  # similarity from which two texts are near duplicates of one another here
BINS = 10


def measure(texts: Sequence[str]) -> dict[str, Any]:
    """Numbers of some texts; only their count where there are fewer than two.

    Returns: documents; words; curve {n: [[words read, share of n-grams that are new], ..]}; openings, the share of texts
      that begin with one of the ten commonest; opening, the commonest with its share; compressed, bytes of zlib over bytes;
      similar, mean over texts of the similarity with the one most like it; near, share of texts where that reaches .5; and
      histogram of it in ten bins from 0 to 1.
    """
    plain = [shingles.plain(text) for text in texts]
    found: dict[str, Any] = {"documents": len(texts), "words": sum(len(text.split()) for text in plain)}
    if len(texts) < 2:
        return found
    openings = Counter(" ".join(text.split()[:OPENING]) for text in plain)
    first, count = openings.most_common(1)[0]
    whole = "\n".join(texts).encode("utf-8", "replace")
    nearest = most_alike(plain)
    bins = np.minimum((nearest * BINS).astype(int), BINS - 1)
    return found | {
        "curve": {str(n): _curve(plain, n) for n in ORDERS},
        "openings": sum(c for _, c in openings.most_common(COMMONEST)) / len(texts),
        "opening": [first, count / len(texts)],
        "compressed": len(zlib.compress(whole, 6)) / max(1, len(whole)),
        "similar": float(nearest.mean()),
        "near": float((nearest >= LIKE).mean()),
        "histogram": np.bincount(bins, minlength=BINS).tolist(),
    }


def _curve(plain: Sequence[str], n: int) -> list[list[float]]:
    """Share of distinct n-grams among the first words of all texts, read one after the other."""
    hashes, words = [], []
    for text in plain:
        found = shingles.Hashes(text)
        if found.words >= n:
            hashes.append(found.of(n))
            words.append(np.full(found.words - n + 1, found.words / (found.words - n + 1)))
    if not hashes:
        return []
    grams, read = np.concatenate(hashes), np.cumsum(np.concatenate(words))
    new = np.zeros(len(grams), bool)
    new[np.unique(grams, return_index=True)[1]] = True
    distinct = np.cumsum(new)
    points = []
    for stop in [*(w for w in WORDS if w < read[-1]), float(read[-1])]:
        if stop <= WORDS[-1]:
            at = max(0, int(np.searchsorted(read, stop, "right")) - 1)
            points.append([round(float(stop)), float(distinct[at] / (at + 1))])
    return points


def most_alike(plain: Sequence[str]) -> np.ndarray:
    """Of each text the Jaccard similarity of word 3-grams with the one most like it: (n,)."""
    from scipy import sparse

    grams = [np.unique(shingles.Hashes(text).of(3)) for text in plain]
    sizes = np.array([len(each) for each in grams])
    _, columns = np.unique(np.concatenate(grams), return_inverse=True)
    owners = np.repeat(np.arange(len(plain)), sizes)
    table = sparse.csr_matrix((np.ones(len(columns), np.int64), (owners, columns)))
    shared = (table @ table.T).toarray()
    every = sizes[:, None] + sizes[None] - shared
    alike = np.where(every > 0, shared / np.maximum(every, 1), 1.0)
    np.fill_diagonal(alike, 0.0)
    return np.asarray(alike.max(axis=1))


def at(found: Mapping[str, Any], n: int, words: int) -> float | None:
    """Share of new n-grams after so many words; None where fewer were read."""
    points = {int(w): share for w, share in found.get("curve", {}).get(str(n), [])}
    return points.get(words)


def common_length(kinds: Sequence[Mapping[str, Any]]) -> int:
    """The largest point of the curve that all kinds reach; 0 where one has none."""
    reached = [{int(w) for w, _ in kind.get("curve", {}).get("1", [])} & {*WORDS} for kind in kinds]
    return max(set.intersection(*reached), default=0) if reached else 0
