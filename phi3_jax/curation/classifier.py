"""Quality by example: logistic regression on hashed word 1- and 2-grams, learned from labelled rows.

What it is worth is measured by leaving out one source at a time: on a random split such a model recognises the sources,
which says nothing about a new one. Both labels weigh the same. The idea and the labels' use are those of FineWeb-Edu and
DCLM (arXiv:2406.17557, arXiv:2406.11794); features are hashed as in Joulin et al. 2016.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import scores, shingles, store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.rule import Step
from phi3_jax.errors import UserError
from phi3_jax.foreign import Fields
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work

BUCKETS = 1 << 18
ORDERS = (1, 2)
STEPS, RATE, DECAY = 150, 0.1, 1e-5  # of the descent (Adam), and the weight of |w|^2 / 2
ROWS = 1 << 32


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Texts (n), labels (n,) of 0 or 1, and sources (n)."""

    texts: list[str]
    labels: np.ndarray
    sources: list[str]


@dataclasses.dataclass(frozen=True)
class Features:
    """Hashed n-grams of n texts: which text each is of, its bucket, its value (a text's have length 1)."""

    owner: np.ndarray
    bucket: np.ndarray
    value: np.ndarray
    count: int


def read(path: str, characters: int) -> Labelled:
    """Rows of JSON lines with text, label (0 or 1) and source.

    Raises:
      UserError: a file that is none, a field that is missing, or fewer than two sources of either label.
    """
    if not path or not Path(path).is_file():
        raise UserError(f"labels={path or 'nothing'} is no file; give JSON lines with text, label (0 or 1) and source")
    texts, labels, sources = [], [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = Fields(files.parse_json(line, f"{path}:{number}"), f"{path}:{number}")
        label = row.raw("label")
        if label not in (0, 1):
            raise row.refuse("label", "must be 0 or 1")
        texts.append(row.text("text")[:characters])
        sources.append(row.text("source"))
        labels.append(int(label))
    for label in (0, 1):
        if len({s for s, found in zip(sources, labels, strict=True) if found == label}) < 2:
            raise UserError(
                f"labels={path} has fewer than two sources of label {label}; what is learned cannot be judged"
            )
    return Labelled(texts, np.asarray(labels), sources)


def content(path: str) -> str:
    """A hash of a file of labels."""
    if not path or not Path(path).is_file():
        raise UserError(f"labels={path or 'nothing'} is no file; give JSON lines with text, label (0 or 1) and source")
    return store.sha256(Path(path))


def features(texts: Sequence[str]) -> Features:
    """Hashed n-grams of some texts."""
    owners, buckets, values = [], [], []
    for at, text in enumerate(texts):
        hashes = shingles.Hashes(shingles.plain(text))
        found = [hashes.of(n) for n in ORDERS if hashes.words >= n]
        mine = np.unique(np.concatenate(found) % np.uint64(BUCKETS)) if found else np.zeros(0, np.uint64)
        owners.append(np.full(len(mine), at))
        buckets.append(mine.astype(np.int32))
        values.append(np.full(len(mine), 1 / np.sqrt(max(1, len(mine))), np.float32))
    whole = [np.concatenate(each) if each else np.zeros(0) for each in (owners, buckets, values)]
    return Features(whole[0].astype(np.int32), whole[1].astype(np.int32), whole[2].astype(np.float32), len(texts))


@functools.cache
def _descent() -> Any:
    import jax
    import jax.numpy as jnp
    import optax

    def logits(w: Any, owner: Any, bucket: Any, value: Any, count: int) -> Any:
        return jax.ops.segment_sum(w["words"][bucket] * value, owner, count, indices_are_sorted=True) + w["bias"]

    def run(owner: Any, bucket: Any, value: Any, labels: Any, weights: Any) -> tuple[Any, Any]:
        adam = optax.adam(RATE)
        start = {"words": jnp.zeros(BUCKETS), "bias": jnp.zeros(())}

        def loss(w: Any) -> Any:
            found = logits(w, owner, bucket, value, len(labels))
            nats = optax.sigmoid_binary_cross_entropy(found, labels)
            return (weights * nats).sum() + DECAY / 2 * (w["words"] ** 2).sum()

        def step(state: Any, _: Any) -> tuple[Any, None]:
            w, moments = state
            change, moments = adam.update(jax.grad(loss)(w), moments)
            return (optax.apply_updates(w, change), moments), None

        (w, _), _ = jax.lax.scan(step, (start, adam.init(start)), None, STEPS)
        return w, jax.nn.sigmoid(logits(w, owner, bucket, value, len(labels)))

    return jax.jit(run)


def fit(found: Features, labels: np.ndarray, use: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(weights {words (BUCKETS,), bias}, P(label 1) (n,) of every text), learned from those of `use` (n,) alone.

    Each label has half of the weight.
    """
    weights = np.zeros(found.count, np.float32)
    for label in (0, 1):
        mine = use & (labels == label)
        weights[mine] = 0.5 / max(1, mine.sum())
    learned, p = _descent()(found.owner, found.bucket, found.value, labels.astype(np.float32), weights)
    return {name: np.asarray(value) for name, value in learned.items()}, np.asarray(p)


def predict(weights: dict[str, np.ndarray], found: Features) -> np.ndarray:
    """P(label 1) (n,)."""
    logits = np.bincount(found.owner, weights["words"][found.bucket] * found.value, found.count) + float(
        weights["bias"]
    )
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -60, 60))))


def held_out(rows: Labelled, found: Features) -> list[dict[str, Any]]:
    """Of each source what a model says that never saw it: documents, share labelled 1, share right at .5, mean P."""
    names = np.asarray(rows.sources)
    table = []
    for name in sorted(set(rows.sources)):
        mine = names == name
        p = fit(found, rows.labels, ~mine)[1][mine]
        right = (p >= 0.5) == (rows.labels[mine] == 1)
        table.append(
            {"source": name, "documents": int(mine.sum()), "good": float(rows.labels[mine].mean()),
             "right": float(right.mean()), "mean": float(p.mean())}
        )  # fmt: skip
    return table


def quality(work: Work, step: Step) -> None:
    """Drops documents whose probability of the label 1 is below a limit; notes what the model is worth."""
    out, p = work.stage(step), step.parameters
    paths = [store.part(out, number) for number in range(len(work.left))]
    judged = out / "held_out.json"
    if not judged.is_file() or any(not path.is_file() for path in paths):
        rows = read(p["labels"], p["characters"])
        known = features(rows.texts)
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(judged, {"held_out": held_out(rows, known)})
        weights = fit(known, rows.labels, np.ones(known.count, bool))[0]
        for number, path in enumerate(paths):
            if not path.is_file():
                mine = work.rows(number)
                texts = [text[: p["characters"]] for text in texts_of(store.part(work.texts_in, number), mine)]
                store.write(path, {"doc": number * ROWS + mine, "p": predict(weights, features(texts))})
    note = {"unit": "Probability of the label 1", **files.read_json(judged)}
    scores.choose(work, step, paths, lambda found: found["p"], (p["least"], 1.0), note)
