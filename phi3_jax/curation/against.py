"""Texts that another curated corpus has already: synthetic text against the web, say. The other corpus stays as it is.

Its parts follow ours in number, so that a document of it has a number as ours do. Candidates and the decision are those of
`near`; what is compared is one of ours with one of theirs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import near, shingles, store
from phi3_jax.curation.rule import Step
from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

_AT_A_TIME = 1000  # of our documents whose candidates are in memory


def parts_of(corpus: str) -> list[Path]:
    """The parts of a curated folder.

    Raises:
      UserError: it is none, or not finished, or a part is damaged.
    """
    if not corpus or not (Path(corpus) / listing.CURATION).is_file():
        raise UserError(f"{corpus or 'nothing'} is no curated folder; name one that `curate --output` has written")
    return [file.path for file in listing.account(corpus).files]


def content(corpus: str) -> str:
    """What tells a curated corpus from others: its fingerprint."""
    parts_of(corpus)
    return str(files.read_json(Path(corpus) / listing.MANIFEST)["fingerprint"])


def against(work: Work, step: Step) -> None:
    """Drops texts that are similar to, or stand inside, a text of the other corpus."""
    p = step.parameters
    ours = work.sign(step, "phi3_jax.curation.near:sign_near", prints=True)
    theirs = _sign(work, step)
    signed = [*ours, *theirs]
    bands = _pairs(work, [near.bands_file(path) for path in signed])
    prints = _pairs(work, [path.with_name(f"prints-{path.name}") for path in signed], near.COMMON)
    words, marks = _sizes(signed, {*bands, *prints, *(a for of in (*bands.values(), *prints.values()) for a in of)})
    dropped: list[tuple[int, int, int, float]] = []
    docs = sorted({*bands, *prints})
    none: Counter[int] = Counter()
    for at in range(0, len(docs), _AT_A_TIME):
        batch = docs[at : at + _AT_A_TIME]
        candidates = {}
        for doc in batch:
            b, f = bands.get(doc, none), prints.get(doc, none)
            ranked = sorted((-b[other], -f[other], other) for other in {*b, *f})
            candidates[doc] = [other for _, _, other in ranked[: near.ANCHORS]]
        texts = dict(work.texts(sorted({*batch, *(a for of in candidates.values() for a in of)})))

        @functools.lru_cache(4096)
        def grams(doc: int, n: int, texts: dict[int, str] = texts) -> np.ndarray:
            return np.unique(shingles.Hashes(shingles.plain(texts[doc])).of(n))

        for doc in batch:
            for other in candidates[doc]:
                if bands.get(doc, none)[other]:
                    value = shingles.jaccard(grams(doc, 5), grams(other, 5))
                    if value >= p["jaccard"]:
                        dropped.append((doc, near.SIMILAR, other, value))
                        break
                if prints.get(doc, none)[other] >= near.HELD * max(1, marks[doc]) and words[other] > words[doc]:
                    threes = grams(doc, 3)
                    value = shingles.common(threes, grams(other, 3)) / max(1, len(threes))
                    if value >= p["containment"]:
                        dropped.append((doc, near.INSIDE, other, value))
                        break
    work.drop(step, dropped)


def _sign(work: Work, step: Step) -> list[Path]:
    """Writes keys of every text of the other corpus; the files, one a part."""
    out, first = work.stage(step), work.first_of[step.name]
    tasks: list[dict[str, Any]] = []
    paths = []
    for number, part in enumerate(parts_of(step.parameters["corpus"]), first):
        path = out / f"other-{number - first:05}.parquet"
        paths.append(path)
        if not path.is_file():
            tasks.append(
                {
                    "number": number, "text": str(part), "rows": list(range(store.count(part))), "out": str(path),
                    "prints": str(path.with_name(f"prints-{path.name}")), "parameters": dict(step.parameters),
                }
            )  # fmt: skip
    for _ in work.engine.map("phi3_jax.curation.near:sign_near", tasks):
        pass
    return paths


def _pairs(work: Work, paths: Sequence[Path], most: int = 1 << 62) -> dict[int, Counter[int]]:
    """{one of ours: {one of theirs: how many keys both have}}; keys of more than `most` documents count for nothing."""
    border = len(work.left) * near.ROWS
    found: dict[int, Counter[int]] = {}
    for group in near.groups(work, paths):
        theirs = [doc for doc in group if doc >= border]
        if theirs and len(group) <= most:
            for doc in group[: len(group) - len(theirs)]:
                found.setdefault(doc, Counter()).update(theirs[: near.ANCHORS])
    return found


def _sizes(signed: Sequence[Path], wanted: set[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Words, and fingerprints, of some documents."""
    words: dict[int, int] = {}
    marks: dict[int, int] = {}
    for path in signed:
        columns = store.read(path)
        rows = zip(*(columns[name].to_pylist() for name in ("doc", "words", "prints")), strict=True)
        for doc, count, prints in rows:
            if doc in wanted:
                words[doc], marks[doc] = count, prints
    return words, marks
