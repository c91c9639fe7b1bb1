"""Duplicates: equal texts, similar texts, and texts that stand inside another one. Every removal is verified.

Candidates come from shared keys: MinHash bands find similar texts, fingerprints of runs of words find a text inside a
longer one. What decides is the exact similarity with a text that stays. Nothing is transitive: a chain of texts, each like
the next, keeps those that are unlike all kept ones. Unverified clusters delete what is no duplicate (marin#6851, #7591).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import shingles, store
from phi3_jax.curation.config import Step
from phi3_jax.curation.documents import texts_of

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

ROWS = 1 << 32  # a document's number is part * ROWS + row
_ANCHORS = 64  # kept texts of one key that a text is compared with
_COMMON = 50  # a fingerprint in more texts than this is boilerplate, and proposes nothing
_WORDS = 2_000_000  # of texts that are compared at a time
_PASS = 200_000  # fingerprints that are grouped at a time
SIMILAR, INSIDE = 0, 1  # reasons of `near`, by index


# ------------------------------------------------------------------------------------------------ keys of a text


def sign_exact(task: dict[str, Any]) -> dict[str, Any]:
    """Writes a key of each text of a part: a hash of its words in lower case, and how many words it has."""
    out = Path(task["out"])
    if not out.is_file():
        rows = np.asarray(task["rows"], np.int64)
        keys, words = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int64)
        for at, text in enumerate(texts_of(Path(task["text"]), rows)):
            pieces = text.lower().split()
            digest = hashlib.blake2b(" ".join(pieces).encode("utf-8", "replace"), digest_size=8).digest()
            keys[at], words[at] = int.from_bytes(digest, "big"), len(pieces)
        store.write(out, {"doc": task["number"] * ROWS + rows, "words": words, "key": keys})
    return {}


def sign_near(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the band keys and, to a file of their own, the fingerprints of each text of a part."""
    out, prints = Path(task["out"]), Path(task["prints"])
    if out.is_file() and prints.is_file():
        return {}
    p = task["parameters"]
    rows = np.asarray(task["rows"], np.int64)
    factors = shingles.multipliers(p["bands"] * p["rows"])
    docs, words, keys, owners, found = [], [], [], [], []
    for row, text in zip(rows.tolist(), texts_of(Path(task["text"]), rows), strict=True):
        hashes = shingles.Hashes(shingles.plain(text))
        if hashes.words < p["least_words"]:
            continue
        doc, fives = task["number"] * ROWS + row, hashes.of(5)
        docs.append(doc)
        words.append(hashes.words)
        keys.append(shingles.bands(fives, factors, p["rows"]))
        marks = shingles.fingerprints(fives, p["window"])
        found.append(marks)
        owners.append(np.full(len(marks), doc, np.int64))
    none = np.zeros(0, np.uint64)
    table = np.stack(keys) if keys else np.zeros((0, p["bands"]), np.uint64)
    store.write(
        prints,
        {
            "doc": np.concatenate(owners) if owners else none.astype(np.int64),
            "print": np.concatenate(found) if found else none,
        },
    )
    columns = {f"band_{i:03}": np.ascontiguousarray(table[:, i]) for i in range(p["bands"])}
    store.write(out, {"doc": np.asarray(docs, np.int64), "words": np.asarray(words, np.int64), **columns})
    return {}


# ------------------------------------------------------------------------------------------------ the steps


def exact(work: Work, step: Step) -> None:
    """Drops texts that are equal but for white space and capitals."""
    signed = work.sign(step, "phi3_jax.curation.near:sign_exact")
    groups = list(work.engine.groups(signed, "key"))
    rank = _Rank(work, step, signed, groups)
    dropped: list[tuple[int, int, int, float]] = []
    for group in groups:
        first, *others = sorted(group, key=rank)
        dropped += [(doc, 0, first, 1.0) for doc in others if rank.words[doc] == rank.words[first]]
    work.drop(step, dropped)


def near(work: Work, step: Step) -> None:
    """Drops texts that are similar to, or stand inside, a text that stays."""
    p = step.parameters
    signed = work.sign(step, "phi3_jax.curation.near:sign_near", prints=True)
    groups: list[list[int]] = []
    for band in range(p["bands"]):
        groups += work.engine.groups(signed, f"band_{band:03}")
    prints = [path.with_name(f"prints-{path.name}") for path in signed]
    passes = max(1, -(-sum(store.count(path) for path in prints) // _PASS))
    for i in range(passes):
        low, high = (i << 64) // passes, ((i + 1) << 64) // passes - 1
        groups += (g for g in work.engine.groups(prints, "print", (low, high)) if len(g) <= _COMMON)
    groups = [list(group) for group in sorted(set(map(tuple, groups)))]
    rank = _Rank(work, step, signed, groups)
    dropped: list[tuple[int, int, int, float]] = []
    for batch in _batches(groups, rank.words):
        dropped += _verified(work, batch, rank, p["jaccard"], p["containment"])
    work.drop(step, dropped)


class _Rank:
    """The order in which texts are kept: by source as asked for, then the longest, then by number."""

    def __init__(self, work: Work, step: Step, signed: Sequence[Path], groups: Iterable[Sequence[int]]) -> None:
        involved = np.unique(np.fromiter((doc for group in groups for doc in group), np.int64))
        order = {source: at for at, source in enumerate(step.parameters["keep"])}
        self.words: dict[int, int] = {}
        self._source: dict[int, int] = {}
        for number, path in enumerate(signed):
            mine = involved[(involved >= number * ROWS) & (involved < (number + 1) * ROWS)]
            if not len(mine):
                continue
            found = store.read(path, ["doc", "words"])
            at = np.searchsorted(found["doc"].to_numpy(), mine)
            self.words |= dict(zip(mine.tolist(), found["words"].to_numpy()[at].tolist(), strict=True))
            if order:
                names = store.read(work.read_part(number), ["source"])["source"].take(mine - number * ROWS).to_pylist()
                self._source |= {d: order.get(name, len(order)) for d, name in zip(mine.tolist(), names, strict=True)}

    def __call__(self, doc: int) -> tuple[int, int, int]:
        return self._source.get(doc, 0), -self.words[doc], doc


def _batches(groups: Sequence[Sequence[int]], words: dict[int, int]) -> Iterator[list[Sequence[int]]]:
    """Groups in batches that share no text, each of about `_WORDS` words."""
    parent: dict[int, int] = {}

    def root(doc: int) -> int:
        while (up := parent.setdefault(doc, doc)) != doc:
            parent[doc] = parent[up]
            doc = up
        return doc

    for group in groups:
        first = root(group[0])
        for doc in group[1:]:
            other = root(doc)
            if other != first:
                low, high = min(first, other), max(first, other)
                parent[high] = first = low
    together: dict[int, list[Sequence[int]]] = {}
    for group in groups:
        together.setdefault(root(group[0]), []).append(group)
    batch: list[Sequence[int]] = []
    size = 0
    for component in together.values():
        batch += component
        size += sum(words[doc] for doc in {doc for group in component for doc in group})
        if size >= _WORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _verified(
    work: Work, groups: Sequence[Sequence[int]], rank: _Rank, jaccard: float, containment: float
) -> list[tuple[int, int, int, float]]:
    """(document, reason, the kept one, similarity) of those that are dropped among some groups."""
    involved = sorted({doc for group in groups for doc in group})
    sets = {
        doc: (np.unique(hashes.of(5)), np.unique(hashes.of(3)))
        for doc, text in work.texts(involved)
        for hashes in [shingles.Hashes(shingles.plain(text))]
    }
    mine: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        for doc in group:
            mine.setdefault(doc, []).append(number)
    anchors: dict[int, list[int]] = {}
    dropped = []
    for doc in sorted(involved, key=rank):
        shared = Counter(a for number in mine[doc] for a in anchors.get(number, ())[:_ANCHORS])
        fives, threes = sets[doc]
        for anchor, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
            similar = shingles.jaccard(fives, sets[anchor][0])
            if similar >= jaccard:
                dropped.append((doc, SIMILAR, anchor, similar))
                break
            inside = shingles.common(threes, sets[anchor][1]) / max(1, len(threes))
            if inside >= containment and rank.words[anchor] > rank.words[doc]:
                dropped.append((doc, INSIDE, anchor, inside))
                break
        else:
            for number in mine[doc]:
                anchors.setdefault(number, []).append(doc)
    return dropped
