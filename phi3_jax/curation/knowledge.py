"""The knowledge filter: facts that a model of N parameters has no room for leave the corpus, and their tokens are free.

Documents on one subject are a group, which stays or goes whole, so that a fact that stays keeps its exposures. A group
costs the bits of its distinct facts per word. The cheapest groups stay until the distinct bits of all that stays reach the
budget, `bits` * `parameters` ** `power`. A subject that is often written of has its bits spread over more words: frequent
facts stay first. The order knows nothing of the budget, so a smaller model's corpus lies within a larger one's. Documents
without facts stay.

Stages, each with a file a part: how words are written (`names`), what follows which words (`frames`), the facts of each
document (`facts`). Only the last step, `_select`, reads the budget. All facts are held in memory at once, 40 bytes each.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import facts, shingles, store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.rule import Step
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

ROWS = 1 << 32
ORDERS = ("cost", "random")
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of N that the page lists
_SHOWN = 8  # subjects on either end of the order that the page shows
Columns = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------ stages of a part


def count(task: dict[str, Any]) -> dict[str, Any]:
    """Writes how often each word of a part stands with a capital within a sentence, and how often without one."""
    capital, lower = Counter[str](), Counter[str]()
    for text in texts_of(Path(task["text"]), np.asarray(task["rows"], np.int64)):
        facts.count_names(text, capital, lower)
    words = sorted({*capital, *lower})
    columns = {"capital": [capital[w] for w in words], "lower": [lower[w] for w in words]}
    arrays = {name: np.asarray(values, np.int64) for name, values in columns.items()}
    store.write(Path(task["out"]), {"word": words, **arrays})
    return {}


def follow(task: dict[str, Any]) -> dict[str, Any]:
    """Writes how often which word follows which words of a sentence with a subject, in a part."""
    names = _names(task["names"])
    tally: Counter[tuple[int, int]] = Counter()
    for text in texts_of(Path(task["text"]), np.asarray(task["rows"], np.int64)):
        for sentence in facts.subjects(text, names.__contains__):
            prefixes = sentence.prefixes()
            for k in range(sentence.first, len(prefixes)):
                tally[facts.key(prefixes[k]), facts.key(sentence.rest[k])] += 1
    pairs = sorted(tally)
    store.write(
        Path(task["out"]),
        {
            "prefix": np.asarray([p for p, _ in pairs], np.uint64), "next": np.asarray([n for _, n in pairs], np.uint64),
            "count": np.asarray([tally[pair] for pair in pairs], np.int64),
        },
    )  # fmt: skip
    return {}


def state(task: dict[str, Any]) -> dict[str, Any]:
    """Writes every fact that the documents of a part state, and how many words each document has."""
    names, slots = _names(task["names"]), _slots(task["slots"])
    rows = np.asarray(task["rows"], np.int64)
    columns: dict[str, list[int]] = {name: [] for name in ("doc", "subject", "value", "frame", "kind")}
    words: list[int] = []
    for row, text in zip(rows.tolist(), texts_of(Path(task["text"]), rows), strict=True):
        words.append(len(text.split()))
        for sentence in facts.subjects(text, names.__contains__):
            for fact in facts.stated(sentence, lambda prefix: facts.key(prefix) in slots):
                columns["doc"].append(task["number"] * ROWS + row)
                columns["subject"].append(facts.key(fact.subject))
                columns["value"].append(facts.key(fact.value))
                columns["frame"].append(facts.key(fact.frame))
                columns["kind"].append(fact.kind)
    kinds = {"doc": np.int64, "kind": np.int64}
    store.write(Path(task["docs"]), {"doc": task["number"] * ROWS + rows, "words": np.asarray(words, np.int64)})
    store.write(Path(task["out"]), {n: np.asarray(v, kinds.get(n, np.uint64)) for n, v in columns.items()})
    return {}


@functools.lru_cache(1)
def _names(path: str) -> frozenset[str]:
    return frozenset(store.read(Path(path))["word"].to_pylist())


@functools.lru_cache(1)
def _slots(path: str) -> frozenset[int]:
    return frozenset(store.read(Path(path))["prefix"].to_pylist())


# ------------------------------------------------------------------------------------------------ the step


def knowledge(work: Work, step: Step) -> None:
    """Drops the groups that the budget has no room for, and notes what stays at other sizes."""
    found, documents = _scored(work, step)
    _select(work, step, found, documents)


def _scored(work: Work, step: Step) -> tuple[Columns, Columns]:
    """The facts of all documents that are left, and their words; what is done is not done again."""
    folder = work.stage(step)
    names, slots = folder / "names.parquet", folder / "frames.parquet"

    def run(function: str, stage: str, **more: str) -> list[Path]:
        paths = [store.part(folder / stage, n) for n in range(len(work.left))]
        tasks = [
            {
                "number": n, "text": str(store.part(work.texts_in, n)), "rows": work.rows(n).tolist(), "out": str(path),
                "docs": str(path.with_name(f"docs-{path.name}")), **more,
            }
            for n, path in enumerate(paths)
            if not path.is_file()
        ]  # fmt: skip
        for _ in work.engine.map(f"{__name__}:{function}", tasks):
            pass
        return paths

    if not names.is_file():
        store.write(names, {"word": _merged_names(run("count", "names"))})
    if not slots.is_file():
        store.write(slots, {"prefix": _wide(run("follow", "frames", names=str(names)))})
    parts = run("state", "facts", names=str(names), slots=str(slots))
    return _together(parts), _together([path.with_name(f"docs-{path.name}") for path in parts])


def _merged_names(paths: Sequence[Path]) -> list[str]:
    capital, lower = Counter[str](), Counter[str]()
    for path in paths:
        columns = {name: column.to_pylist() for name, column in store.read(path).items()}
        capital.update(dict(zip(columns["word"], columns["capital"], strict=True)))
        lower.update(dict(zip(columns["word"], columns["lower"], strict=True)))
    return facts.names_of(capital, lower)


def _wide(paths: Sequence[Path]) -> np.ndarray:
    """Prefixes after which a value stands: uint64, sorted."""
    pairs = _together(paths)
    order = np.lexsort((pairs["next"], pairs["prefix"]))
    prefix, after, counts = (pairs[name][order] for name in ("prefix", "next", "count"))
    if not len(prefix):
        return prefix
    same = np.concatenate([[True], (prefix[1:] != prefix[:-1]) | (after[1:] != after[:-1])])
    starts = np.flatnonzero(same)
    prefix, counts = prefix[starts], np.add.reduceat(counts, starts)
    begins = np.flatnonzero(np.concatenate([[True], prefix[1:] != prefix[:-1]]))
    whole = np.add.reduceat(counts, begins)
    entropy = np.log2(whole) - np.add.reduceat(counts * np.log2(counts), begins) / whole
    return prefix[begins][(whole >= facts.SEEN) & (2**entropy >= facts.WIDE)]


def _together(paths: Sequence[Path]) -> Columns:
    tables = [{n: c.to_numpy(zero_copy_only=False) for n, c in store.read(path).items()} for path in paths]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


# ------------------------------------------------------------------------------------------------ bits


def _mixed(*columns: np.ndarray) -> np.ndarray:
    """One hash for each row of some columns."""
    value = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        value = shingles.mixed(value * np.uint64(3) + column.astype(np.uint64))
    return value


def priced(found: Columns) -> tuple[Columns, Columns]:
    """(statements, facts): what is left of the statements, with the place of each one's fact; bits and exposures of facts.

    A value of a slot counts where the corpus says it twice or more, of whatever subject: else what follows the words of a
    slot is mere prose.
    """
    slot = found["kind"] == facts.SLOT
    _, inverse, counts = np.unique(found["value"][slot], return_inverse=True, return_counts=True)
    keep = np.ones(len(slot), bool)
    keep[np.flatnonzero(slot)[counts[inverse] < 2]] = False
    said = {name: column[keep] for name, column in found.items()}
    known, fact, exposures = np.unique(_mixed(said["subject"], said["value"]), return_inverse=True, return_counts=True)
    frame = _mixed(said["frame"], said["kind"])
    # Each fact once a frame: how often it is said says nothing of how many values there might have been.
    _, once = np.unique(_mixed(fact, frame), return_index=True)
    value, frame, kind, of = said["value"][once], frame[once], said["kind"][once], fact[once]
    _, at, whole = np.unique(frame, return_inverse=True, return_counts=True)
    frame = np.where(whole[at] < facts.SEEN, kind.astype(np.uint64), frame)
    bits = surprises(frame, value)
    total = np.bincount(of, bits, len(known)) / np.maximum(1, np.bincount(of, minlength=len(known)))
    return said | {"fact": fact}, {"fact": known, "bits": total, "exposures": exposures}


def surprises(frame: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Bits of each value in its frame: its surprise there, raised by what the frame's mean falls short of its entropy."""
    if not len(frame):
        return np.zeros(0)
    _, of_frame, whole = np.unique(frame, return_inverse=True, return_counts=True)
    _, first, of_value, count = np.unique(
        _mixed(frame, value), return_index=True, return_inverse=True, return_counts=True
    )
    bits = np.log2(whole[of_frame] / count[of_value])
    missing = facts.entropies(of_frame[first], count) - np.bincount(of_frame, bits) / whole
    return bits + missing[of_frame]


# ------------------------------------------------------------------------------------------------ choice


def ordered(said: Columns, known: Columns, documents: Columns, order: str, seed: int = 0) -> tuple[Columns, Columns]:
    """Groups in the order in which they stay, and the documents with facts.

    Returns:
      groups: subject (a hash), cost in bits per word, words, documents, and `total`, the distinct bits of all groups up to
      this one, all (groups,); and documents: doc, group, its place in that order.
    """
    # The subject that a document states most of; of several, one by its hash.
    _, first, count = np.unique(_mixed(said["doc"], said["subject"]), return_index=True, return_counts=True)
    doc, subject = said["doc"][first], said["subject"][first]
    by = np.lexsort((subject, -count, doc))
    chosen = by[np.unique(doc[by], return_index=True)[1]]
    doc, subject = doc[chosen], subject[chosen]
    words = documents["words"][np.searchsorted(documents["doc"], doc)]
    subjects, group = np.unique(subject, return_inverse=True)
    of_fact = group[np.searchsorted(doc, said["doc"])]
    mine = np.unique(np.stack([of_fact, said["fact"]]), axis=1)
    bits = np.bincount(mine[0], known["bits"][mine[1]], len(subjects))
    size = np.bincount(group, words, len(subjects))
    cost = bits / np.maximum(1, size)
    by = np.lexsort((subjects, cost if order == "cost" else _mixed(subjects, np.full(len(subjects), seed))))
    rank = np.empty(len(by), np.int64)
    rank[by] = np.arange(len(by))
    # A fact that several groups state counts once, in the first of them.
    at = np.full(len(known["fact"]), len(by), np.int64)
    np.minimum.at(at, mine[1], rank[mine[0]])
    total = np.cumsum(np.bincount(at, known["bits"], len(by))[: len(by)])
    groups = {
        "subject": subjects[by], "cost": cost[by], "words": size[by], "total": total,
        "documents": np.bincount(group, minlength=len(subjects))[by],
    }  # fmt: skip
    return groups, {"doc": doc, "group": rank[group]}


def budget(parameters: int, bits: float, power: float) -> float:
    """Bits that a model of so many parameters is given to learn."""
    return bits * float(parameters) ** power


def _select(work: Work, step: Step, found: Columns, documents: Columns) -> None:
    p = step.parameters
    said, known = priced(found)
    groups, of = ordered(said, known, documents, p["order"], int(p["seed"]))
    room = budget(p["parameters"], p["bits"], p["power"])
    kept = int(np.searchsorted(groups["total"], room, "right"))
    gone = of["group"] >= kept
    cost = groups["cost"][of["group"]]
    note = _note(p, groups, known, documents) | {"budget": room}
    note["subjects"] = _examples(work, groups, said, of, kept)
    files.write_json(work.noted(step), note)
    work.drop(step, [(int(doc), 0, -1, float(c)) for doc, c in zip(of["doc"][gone], cost[gone], strict=True)])


def _note(p: Mapping[str, Any], groups: Columns, known: Columns, documents: Columns) -> dict[str, Any]:
    """What the manifest keeps: the facts of the corpus, and what stays at some sizes."""
    words, count = np.cumsum(groups["words"]), np.cumsum(groups["documents"])
    free = int(documents["words"].sum() - groups["words"].sum())
    sizes = []
    for times in SIZES:
        size = max(1, round(times * p["parameters"]))
        stay = int(np.searchsorted(groups["total"], budget(size, p["bits"], p["power"]), "right"))
        at = stay - 1
        sizes.append(
            {
                "parameters": size, "bits": float(groups["total"][at]) if stay else 0.0,
                "documents": int(count[at]) if stay else 0, "words": int(words[at]) if stay else 0,
            }
        )  # fmt: skip
    exposures = np.percentile(known["exposures"], (5, 50, 95)).tolist() if len(known["exposures"]) else []
    return {
        "parameters": p["parameters"], "facts": len(known["bits"]), "bits": float(known["bits"].sum()),
        "exposures": exposures, "documents_with_facts": int(groups["documents"].sum()),
        "words_without": free, "sizes": sizes,
    }  # fmt: skip


def _examples(work: Work, groups: Columns, said: Columns, of: Columns, kept: int) -> list[dict[str, Any]]:
    """The cheapest subjects, those beside the limit, and the dearest: cost, documents, the start of a text."""
    count = len(groups["cost"])
    places = sorted(
        {
            *range(min(_SHOWN, count)),
            *range(max(0, kept - 4), min(count, kept + 4)),
            *range(max(0, count - _SHOWN), count),
        }
    )
    by = np.lexsort((of["doc"], of["group"]))
    first = by[np.searchsorted(of["group"][by], places)] if places else np.zeros(0, np.int64)
    docs = of["doc"][first].tolist()
    texts = dict(work.texts(sorted(docs)))
    return [
        {
            "stays": place < kept, "cost": float(groups["cost"][place]), "documents": int(groups["documents"][place]),
            "text": " ".join(texts[doc].split())[:120],
        }
        for place, doc in zip(places, docs, strict=True)
    ]  # fmt: skip
