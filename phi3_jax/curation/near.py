"""Duplicates: equal texts, similar texts, and texts that stand inside another one. Every removal is verified.

Candidates come from shared keys: MinHash bands find similar texts, fingerprints of runs of words find a text inside a
longer one. What decides is the exact similarity with a text that stays. Nothing is transitive: a chain of texts, each like
the next, keeps those that are unlike all kept ones. Unverified clusters delete what is no duplicate (marin#6851, #7591).
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import shingles, store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.rule import Step

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

ROWS = 1 << 32  # a document's number is part * ROWS + row
ANCHORS = 64  # kept texts of one key that a text is compared with
COMMON = 50  # a fingerprint in more texts than this is boilerplate, and proposes nothing
HELD = 0.5  # least part of a text's fingerprints in another one: at .98 of its 3-grams two thirds and more are
_WORDS = 2_000_000  # of texts that are compared at a time
_PASS = 500_000  # keys that are grouped at a time
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
    """Writes which texts of a part are long enough, after their band keys and their fingerprints in files beside it."""
    out, prints = Path(task["out"]), Path(task["prints"])
    if out.is_file():
        return {}
    p = task["parameters"]
    rows = np.asarray(task["rows"], np.int64)
    factors = shingles.multipliers(p["bands"] * p["rows"])
    docs, words, fives, owners, found = [], [], [], [], []
    for row, text in zip(rows.tolist(), texts_of(Path(task["text"]), rows), strict=True):
        hashes = shingles.Hashes(shingles.plain(text))
        if hashes.words < p["least_words"]:
            continue
        docs.append(task["number"] * ROWS + row)
        words.append(hashes.words)
        fives.append(hashes.of(5))
        found.append(shingles.fingerprints(fives[-1], p["window"]))
        owners.append(len(found[-1]))
    doc = np.asarray(docs, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(each) for each in fives])]).astype(np.int64)[:-1]
    every = np.concatenate(fives) if fives else np.zeros(0, np.uint64)
    keys = shingles.band_keys(shingles.signatures(every, starts, factors), p["rows"])
    marks = np.concatenate(found) if found else np.zeros(0, np.uint64)
    store.write(prints, {"doc": np.repeat(doc, owners), "key": marks})
    store.write(bands_file(out), {"doc": np.repeat(doc, keys.shape[1]), "key": keys.ravel()})
    store.write(out, {"doc": doc, "words": np.asarray(words, np.int64), "prints": np.asarray(owners, np.int64)})
    return {}


def bands_file(path: Path) -> Path:
    """Where the band keys of a part are."""
    return path.with_name(f"bands-{path.name}")


# ------------------------------------------------------------------------------------------------ the steps


def exact(work: Work, step: Step) -> None:
    """Drops texts that are equal but for white space and capitals."""
    signed = work.sign(step, "phi3_jax.curation.near:sign_exact")
    groups = list(work.engine.groups(signed, "key"))
    rank = Rank(work, step, signed, groups)
    dropped: list[tuple[int, int, int, float]] = []
    for group in groups:
        first, *others = sorted(group, key=rank)
        dropped += [(doc, 0, first, 1.0) for doc in others if rank.words[doc] == rank.words[first]]
    work.drop(step, dropped)


def near(work: Work, step: Step) -> None:
    """Drops texts that are similar to, or stand inside, a text that stays."""
    p = step.parameters
    signed = work.sign(step, "phi3_jax.curation.near:sign_near", prints=True)
    similar = list(groups(work, [bands_file(path) for path in signed]))
    inside, ignored = [], Counter[int]()
    for group in groups(work, [path.with_name(f"prints-{path.name}") for path in signed]):
        if len(group) <= COMMON:
            inside.append(group)
        else:
            ignored.update(group)
    # A group's own number; those of fingerprints are negative.
    named = dict(enumerate(map(list, sorted(set(map(tuple, similar))))))
    named |= {-1 - i: group for i, group in enumerate(sorted(inside))}
    rank = Rank(work, step, signed, named.values())
    rank.prints = {doc: count - ignored[doc] for doc, count in rank.prints.items()}
    dropped: list[tuple[int, int, int, float]] = []
    for batch in _batches(named, rank.words):
        dropped += _verified(work, batch, rank, p["jaccard"], p["containment"])
    work.drop(step, dropped)


def groups(work: Work, paths: Sequence[Path]) -> Iterator[list[int]]:
    """Documents that share a key, by ranges of keys, so that memory stays bounded."""
    passes = max(1, -(-sum(store.count(path) for path in paths) // _PASS))
    for i in range(passes):
        yield from work.engine.groups(paths, "key", ((i << 64) // passes, ((i + 1) << 64) // passes - 1))


class Rank:
    """The order in which texts are kept: by source as asked for, then the longest, then by number."""

    def __init__(self, work: Work, step: Step, signed: Sequence[Path], groups: Iterable[Sequence[int]]) -> None:
        involved = np.unique(np.fromiter((doc for group in groups for doc in group), np.int64))
        order = {source: at for at, source in enumerate(step.parameters["keep"])}
        self.words: dict[int, int] = {}
        self.prints: dict[int, int] = {}
        self._source: dict[int, int] = {}
        for number, path in enumerate(signed):
            mine = involved[(involved >= number * ROWS) & (involved < (number + 1) * ROWS)]
            if not len(mine):
                continue
            found = {name: column.to_numpy() for name, column in store.read(path).items()}
            at = np.searchsorted(found["doc"], mine)
            self.words |= dict(zip(mine.tolist(), found["words"][at].tolist(), strict=True))
            if "prints" in found:
                self.prints |= dict(zip(mine.tolist(), found["prints"][at].tolist(), strict=True))
            if order:
                names = store.read(work.read_part(number), ["source"])["source"].take(mine - number * ROWS).to_pylist()
                self._source |= {d: order.get(name, len(order)) for d, name in zip(mine.tolist(), names, strict=True)}

    def __call__(self, doc: int) -> tuple[int, int, int]:
        return self._source.get(doc, 0), -self.words[doc], doc


def _batches(groups: Mapping[int, Sequence[int]], words: dict[int, int]) -> Iterator[dict[int, Sequence[int]]]:
    """Groups in batches that share no text, each of about `_WORDS` words."""
    parent: dict[int, int] = {}

    def root(doc: int) -> int:
        while (up := parent.setdefault(doc, doc)) != doc:
            parent[doc] = parent[up]
            doc = up
        return doc

    for group in groups.values():
        first = root(group[0])
        for doc in group[1:]:
            other = root(doc)
            if other != first:
                low, high = min(first, other), max(first, other)
                parent[high] = first = low
    together: dict[int, dict[int, Sequence[int]]] = {}
    for number, group in groups.items():
        together.setdefault(root(group[0]), {})[number] = group
    batch: dict[int, Sequence[int]] = {}
    size = 0
    for component in together.values():
        batch |= component
        size += sum(words[doc] for doc in {doc for group in component.values() for doc in group})
        if size >= _WORDS:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _verified(
    work: Work, groups: Mapping[int, Sequence[int]], rank: Rank, jaccard: float, containment: float
) -> list[tuple[int, int, int, float]]:
    """(document, reason, the kept one, similarity) of those that are dropped among some groups."""
    involved = sorted({doc for group in groups.values() for doc in group})
    texts = dict(work.texts(involved))

    @functools.lru_cache(4096)
    def grams(doc: int, n: int) -> np.ndarray:
        return np.unique(shingles.Hashes(shingles.plain(texts[doc])).of(n))

    mine: dict[int, list[int]] = {}
    for number, group in groups.items():
        for doc in group:
            mine.setdefault(doc, []).append(number)
    anchors: dict[int, list[int]] = {}
    dropped = []
    for doc in sorted(involved, key=rank):
        found = None
        bands = Counter(a for number in mine[doc] if number >= 0 for a in anchors.get(number, ())[:ANCHORS])
        prints = Counter(a for number in mine[doc] if number < 0 for a in anchors.get(number, ())[:ANCHORS])
        for anchor in sorted({*bands, *prints}, key=lambda a: (-bands[a], -prints[a], a)):
            if bands[anchor] and (value := shingles.jaccard(grams(doc, 5), grams(anchor, 5))) >= jaccard:
                found = (doc, SIMILAR, anchor, value)
            elif prints[anchor] >= HELD * rank.prints[doc] and rank.words[anchor] > rank.words[doc]:
                threes = grams(doc, 3)
                value = shingles.common(threes, grams(anchor, 3)) / max(1, len(threes))
                found = (doc, INSIDE, anchor, value) if value >= containment else None
            if found:
                dropped.append(found)
                break
        else:
            for number in mine[doc]:
                anchors.setdefault(number, []).append(doc)
    return dropped
