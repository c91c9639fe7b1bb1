"""Items of benchmarks that stand in the corpus: documents that hold one are dropped, cut or tagged, and listed by item.

An item is looked for by the word 13-grams of its question, of its answer, and of both in a row, also with the word "answer"
between (Brown et al. 2020, appendix C, take 13-grams). Of a shorter text 8-grams are taken, of one with 5 to 7 words the
whole; what is shorter still cannot be told from chance, and is counted. N-grams that several benchmarks share, or that
stand in very many documents, are no evidence; they are ignored and counted too. Every run plants items of its own and looks
for them, and for the same words in another order.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import shingles, store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.rule import Step
from phi3_jax.errors import UserError
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

ROWS = 1 << 32
LONG, SHORT, LEAST = 13, 8, 5  # words of an n-gram
AROUND, PIECE, PIECES = 200, 200, 10  # characters around a match that are cut, least ones of a piece, most pieces
PLANTED = 200  # items of the control
_SPACED = re.compile(r"\S+")
_FIELDS = (("question", "answer"), ("question", "target"), ("prompt", "answer"), ("question", "solution"))


@dataclasses.dataclass(frozen=True)
class Item:
    """One item: the benchmark, its id, and the texts in whose form it may stand in a document."""

    benchmark: str
    id: str
    texts: tuple[str, ...]


def listed(folder: str) -> list[Path]:
    """The files that hold items: test.jsonl of each folder inside, or the .jsonl files, or the file itself.

    Raises:
      UserError: there is none.
    """
    path = Path(folder)
    found = [path] if path.is_file() else sorted(path.glob("*/test.jsonl")) or sorted(path.glob("*.jsonl"))
    if not found:
        raise UserError(f"benchmarks={folder} holds no items; give a folder of NAME/test.jsonl, or a .jsonl file")
    return found


def items(folder: str) -> list[Item]:
    """All items of a folder.

    Raises:
      UserError: a row that is no object, or has no question.
    """
    found = []
    for path in listed(folder):
        name = path.parent.name if path.name == "test.jsonl" else path.stem
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            row = files.parse_json(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is no object; an item has the fields question and answer or target")
            question, answer = _parts(row, f"{path}:{number}")
            both = (f"{question} {answer}", f"{question} answer {answer}") if answer else ()
            texts = tuple(shingles.plain(text) for text in (question, answer, *both) if text)
            benchmark = str(row.get("benchmark") or name)
            found.append(Item(benchmark, str(row.get("id", number)), texts))
    if not found:
        raise UserError(f"benchmarks={folder} holds no items")
    return found


def _parts(row: dict[str, Any], where: str) -> tuple[str, str]:
    for asked, answered in _FIELDS:
        question, answer = row.get(asked), row.get(answered)
        if isinstance(question, str) and question.strip() and (isinstance(answer, str) or answered == "answer"):
            return question, answer if isinstance(answer, str) else str(row.get("target") or "")
    fields = ", ".join(map(repr, [*row][:20]))
    raise UserError(f"{where} has no text in question and answer or target; its fields are {fields}")


class Index:
    """Hashes of n-grams, and which items they are of.

    Attributes:
      items: all; short: how many are too short to be looked for; shared: n-grams of several benchmarks, left out.
    """

    def __init__(self, found: Sequence[Item]) -> None:
        self.items = list(found)
        owners: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.short = 0
        for number, item in enumerate(self.items):
            looked = False
            for text in item.texts:
                hashes = shingles.Hashes(text)
                n = LONG if hashes.words >= LONG else SHORT if hashes.words >= SHORT else hashes.words
                if n < SHORT and (text != item.texts[-1] or n < LEAST):
                    continue
                looked = True
                for value in np.unique(hashes.of(n)).tolist():
                    owners[n][value].add(number)
            self.short += not looked
        self.shared = 0
        self._tables: dict[int, tuple[np.ndarray, list[tuple[int, ...]]]] = {}
        for n, of in sorted(owners.items()):
            good = {h: who for h, who in of.items() if len({self.items[i].benchmark for i in who}) == 1}
            self.shared += len(of) - len(good)
            values = np.asarray(sorted(good), np.uint64)
            self._tables[n] = values, [tuple(sorted(good[int(value)])) for value in values]

    def hits(self, text: str) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
        """(first word, words, hash, items) of every n-gram of a text that `plain` gave which is an item's."""
        hashes = shingles.Hashes(text)
        for n, (values, owners) in self._tables.items():
            if hashes.words < n or not len(values):
                continue
            grams = hashes.of(n)
            at = np.minimum(np.searchsorted(values, grams), len(values) - 1)
            for first in np.flatnonzero(values[at] == grams).tolist():
                yield first, n, int(grams[first]), owners[int(at[first])]


@functools.lru_cache(2)
def index(folder: str, content: str) -> Index:
    """The index of a folder whose files have this content."""
    return Index(items(folder))


def content(folder: str) -> str:
    """A hash of the files that hold items."""
    digest = hashlib.sha256()
    for path in listed(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the step


def scan(task: dict[str, Any]) -> dict[str, Any]:
    """Writes the hits of a part: row, item, hash of the n-gram, first word, words."""
    out = Path(task["out"])
    if out.is_file():
        return {}
    found = index(task["benchmarks"], task["content"])
    rows = np.asarray(task["rows"], np.int64)
    columns: dict[str, list[int]] = {name: [] for name in ("row", "item", "gram", "first", "words")}
    for row, text in zip(rows.tolist(), texts_of(Path(task["text"]), rows), strict=True):
        for first, n, gram, owners in found.hits(shingles.plain(text)):
            for owner in owners:
                for name, value in zip(columns, (row, owner, gram, first, n), strict=True):
                    columns[name].append(value)
    kinds = {name: np.uint64 if name == "gram" else np.int64 for name in columns}
    store.write(out, {name: np.asarray(values, kinds[name]) for name, values in columns.items()})
    return {}


def decontaminate(work: Work, step: Step) -> None:
    """Finds items, drops, cuts or tags the documents, and notes which items were met."""
    p = step.parameters
    key = content(p["benchmarks"])
    known = index(p["benchmarks"], key)
    out = work.stage(step)
    tasks = [
        {
            "text": str(store.part(work.texts_in, n)), "rows": work.rows(n).tolist(), "out": str(store.part(out, n)),
            "benchmarks": p["benchmarks"], "content": key,
        }
        for n in range(len(work.left))
        if not store.part(out, n).is_file()
    ]  # fmt: skip
    for _ in work.engine.map("phi3_jax.curation.decontaminate:scan", tasks):
        pass
    hits = [_read(store.part(out, n)) for n in range(len(work.left))]
    common = _common(hits, p["common"])
    found: dict[int, set[int]] = {}
    dropped: list[tuple[int, int, int, float]] = []
    tags: dict[int, list[int]] = {}
    cuts: dict[int, list[tuple[int, int]]] = {}
    for number, columns in enumerate(hits):
        real = ~np.isin(columns["gram"], common)
        for row, item, first, n in zip(
            *(columns[c][real].tolist() for c in ("row", "item", "first", "words")), strict=True
        ):
            doc = number * ROWS + row
            found.setdefault(item, set()).add(doc)
            tags.setdefault(doc, []).append(item)
            cuts.setdefault(doc, []).append((first, n))
    if p["mode"] == "drop":
        dropped = [(doc, 0, -1, float(len(set(of)))) for doc, of in sorted(tags.items())]
    elif p["mode"] == "cut":
        dropped = _cut(work, step, cuts)
    summary = _summary(known, found, common, control(known, int(p["seed"])), p)
    summary["documents"] = {str(doc): sorted({known.items[i].id for i in of}) for doc, of in sorted(tags.items())}
    files.write_json(work.noted(step), summary)
    work.drop(step, dropped)


def _read(path: Path) -> dict[str, np.ndarray]:
    return {name: column.to_numpy(zero_copy_only=False) for name, column in store.read(path).items()}


def _common(hits: Sequence[dict[str, np.ndarray]], most: int) -> np.ndarray:
    """N-grams that stand in more than `most` documents."""
    tally: Counter[int] = Counter()
    for columns in hits:
        pairs = np.unique(np.stack([columns["row"].astype(np.uint64), columns["gram"]]), axis=1)
        tally.update(pairs[1].tolist())
    return np.asarray(sorted(gram for gram, count in tally.items() if count > most), np.uint64)


def _summary(known: Index, found: dict[int, set[int]], common: np.ndarray, control: Any, p: Any) -> dict[str, Any]:
    """What the manifest keeps: by benchmark the ids of contaminated items and how many there are."""
    by: dict[str, list[str]] = defaultdict(list)
    total = Counter(item.benchmark for item in known.items)
    for number in sorted(found):
        by[known.items[number].benchmark].append(known.items[number].id)
    return {
        "mode": p["mode"], "items": dict(sorted(total.items())), "too_short": known.short, "shared_ngrams": known.shared,
        "common_ngrams": len(common), "control": control,
        "contaminated": {benchmark: sorted(by.get(benchmark, [])) for benchmark in sorted(total)},
    }  # fmt: skip


def control(known: Index, seed: int) -> dict[str, int]:
    """Plants items among other words: how many are found, and how many where their words are permuted."""
    draw = random.Random(seed)
    able = [n for n, item in enumerate(known.items) if any(len(text.split()) >= SHORT for text in item.texts)]
    chosen = sorted(draw.sample(able, min(PLANTED, len(able))))
    around = [f"filler{draw.randrange(10**6)}" for _ in range(60)]
    found = permuted = 0
    for number in chosen:
        text = max(known.items[number].texts, key=len).split()
        shuffled = draw.sample(text, len(text))
        for words, real in ((text, True), (shuffled, False)):
            document = " ".join([*around[:30], *words, *around[30:]])
            met = any(number in owners for *_, owners in known.hits(document))
            found, permuted = found + (met and real), permuted + (met and not real)
    return {"planted": len(chosen), "found": found, "permuted_found": permuted}


# ------------------------------------------------------------------------------------------------ cutting


def _cut(work: Work, step: Step, cuts: dict[int, list[tuple[int, int]]]) -> list[tuple[int, int, int, float]]:
    """Writes all texts again, without what was found and 200 characters around; drops what falls into too many pieces."""
    out = work.stage(step).with_name(f"{work.stage(step).name}-cut")
    dropped = []
    for number in range(len(work.left)):
        rows = work.rows(number)
        texts = texts_of(store.part(work.texts_in, number), rows)
        for at, row in enumerate(rows.tolist()):
            doc = number * ROWS + row
            if doc in cuts:
                texts[at], pieces = without(texts[at], cuts[doc])
                if not texts[at] or pieces > PIECES:
                    dropped.append((doc, 0, -1, float(pieces)))
        store.write(store.part(out, number), {"row": rows, "text": texts})
    work.texts_in = out
    return dropped


def without(text: str, spans: Iterable[tuple[int, int]]) -> tuple[str, int]:
    """A text without some spans of `plain` words (first, count) and 200 characters around each; how many pieces stay."""
    places: list[tuple[int, int]] = []
    for match in _SPACED.finditer(text):
        places += [match.span()] * len(shingles.plain(match[0]).split())
    pieces, at = [], 0
    for first, count in sorted(spans):
        start, end = places[first][0] - AROUND, places[min(first + count, len(places)) - 1][1] + AROUND
        if start > at:
            pieces.append(text[at:start])
        at = max(at, end)
    pieces.append(text[at:])
    kept = [piece.strip() for piece in pieces if len(piece.strip()) >= PIECE]
    return "\n".join(kept), len(kept)


def summary_of(path: Path) -> dict[str, Any]:
    """What a step noted; {} where it noted nothing."""
    return files.read_state(path)
