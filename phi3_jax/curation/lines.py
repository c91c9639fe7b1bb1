"""Lines that stand in several documents: menus, licences, footers. They stay in one, and are taken out of the others.

Documents are gone through in the order in which copies stay (`near.Rank`). A line goes where a document that stays holds it
already; a document that would lose more than a share of its words goes as a whole, and its lines do not count as held. So
whatever is taken out is still in the corpus.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.near import Rank
from phi3_jax.curation.rule import Step
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

ROWS = 1 << 32
_PASS = 4_000_000  # lines whose keys are compared at a time
_SHOWN = 10  # lines that the page shows
Columns = dict[str, np.ndarray]


def key(line: str) -> tuple[int, int]:
    """(64 bits that stand for a line in lower case with one blank between words, how many words it has)."""
    words = line.lower().split()
    digest = hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big"), len(words)


def sign(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the lines of a part that are long enough, once a document: key, and words that all its copies there have."""
    out = Path(task["out"])
    if out.is_file():
        return {}
    rows = np.asarray(task["rows"], np.int64)
    least, exempt = task["parameters"]["least_words"], set(task["parameters"]["exempt"])
    genres = store.read(Path(task["read"]), ["genre"])["genre"].take(rows).to_pylist()
    columns: dict[str, list[int]] = {name: [] for name in ("doc", "key", "words")}
    whole = []
    for row, genre, text in zip(rows.tolist(), genres, texts_of(Path(task["text"]), rows), strict=True):
        whole.append(len(text.split()))
        found: Counter[int] = Counter()
        for line in text.split("\n") if genre not in exempt else ():
            value, words = key(line)
            if words >= least:
                found[value] += words
        columns["doc"] += [task["number"] * ROWS + row] * len(found)
        columns["key"] += found
        columns["words"] += found.values()
    store.write(Path(task["prints"]), {"doc": task["number"] * ROWS + rows, "words": np.asarray(whole, np.int64)})
    kinds = {"key": np.uint64}
    store.write(out, {name: np.asarray(values, kinds.get(name, np.int64)) for name, values in columns.items()})
    return {}


def cut(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the texts of a part without the lines that go; how often which line went, and its text."""
    rows = np.asarray(task["rows"], np.int64)
    texts = texts_of(Path(task["text"]), rows)
    gone = {int(row): set(keys) for row, keys in task["gone"].items()}
    shown: Counter[str] = Counter()
    for at, row in enumerate(rows.tolist()):
        if row not in gone:
            continue
        kept = []
        for line in texts[at].split("\n"):
            if key(line)[0] in gone[row]:
                shown[" ".join(line.split())] += 1
            else:
                kept.append(line)
        texts[at] = "\n".join(kept).strip("\n")
    store.write(Path(task["out"]), {"row": rows, "text": texts})
    return {"lines": dict(shown.most_common(1000)), "count": shown.total()}


def lines(work: Work, step: Step) -> None:
    """Takes lines out that another document holds, and drops documents of which too little is left."""
    signed = work.sign(step, f"{__name__}:sign")
    whole = [path.with_name(f"prints-{path.name}") for path in signed]
    shared = _shared(signed)
    docs, starts = np.unique(shared["doc"], return_index=True)
    ends = np.concatenate([starts[1:], [len(shared["doc"])]]).astype(np.int64)
    rank = Rank(work, step, whole, [docs.tolist()])
    place = dict(zip(docs.tolist(), zip(starts.tolist(), ends.tolist(), strict=True), strict=True))
    held: set[int] = set()
    gone: dict[int, list[int]] = {}
    dropped: list[tuple[int, int, int, float]] = []
    for doc in sorted(place, key=rank):
        here = slice(*place[doc])
        keys, words = shared["key"][here].tolist(), shared["words"][here].tolist()
        twice = [k for k in keys if k in held]
        lost = sum(w for k, w in zip(keys, words, strict=True) if k in held)
        if lost and (lost / rank.words[doc] > step.parameters["most_removed"] or lost == rank.words[doc]):
            dropped.append((doc, 0, -1, lost / rank.words[doc]))
            continue
        held.update(keys)
        if twice:
            gone[doc] = twice
    out = work.stage(step).with_name(f"{work.stage(step).name}-cut")
    work.take_away(np.asarray([doc for doc, *_ in dropped], np.int64))
    tasks: list[dict[str, Any]] = [
        {
            "text": str(store.part(work.texts_in, n)), "rows": work.rows(n).tolist(), "out": str(store.part(out, n)),
            "gone": {doc - n * ROWS: keys for doc, keys in gone.items() if doc // ROWS == n},
        }
        for n in range(len(work.left))
    ]  # fmt: skip
    shown: Counter[str] = Counter()
    count = 0
    for found in work.engine.map(f"{__name__}:cut", tasks):
        shown.update(found["lines"])
        count += found["count"]
    work.texts_in = out
    most = sorted(shown.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
    files.write_json(
        work.noted(step), {"lines": count, "cut": len(gone), "most": [[n, line[:200]] for line, n in most]}
    )
    work.drop(step, dropped)


def _shared(paths: Sequence[Path]) -> Columns:
    """(doc, key, words) of lines that two documents or more hold, sorted by document."""
    found = list(_passes(paths))
    columns = {name: np.concatenate([each[name] for each in found]) for name in ("doc", "key", "words")}
    order = np.lexsort((columns["key"], columns["doc"]))
    return {name: values[order] for name, values in columns.items()}


def _passes(paths: Sequence[Path]) -> Iterator[Columns]:
    """By ranges of keys, so that memory stays bounded."""
    passes = max(1, -(-sum(store.count(path) for path in paths) // _PASS))
    for number in range(passes):
        low, high = (np.uint64((i << 64) // passes - (i > number)) for i in (number, number + 1))
        tables = []
        for path in paths:
            table = {name: column.to_numpy() for name, column in store.read(path).items()}
            here = (table["key"] >= low) & (table["key"] <= high)
            tables.append({name: values[here] for name, values in table.items()})
        columns = {name: np.concatenate([table[name] for table in tables]) for name in ("doc", "key", "words")}
        _, inverse, counts = np.unique(columns["key"], return_inverse=True, return_counts=True)
        several = counts[inverse] > 1
        yield {name: values[several] for name, values in columns.items()}
