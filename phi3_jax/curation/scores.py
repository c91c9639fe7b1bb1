"""Scores under our own models: bits per byte of a document, and how much more a small model needs for it than a large one.

A score is a stage of its own, by document: other limits choose anew and nothing is scored again (`--reuse`). Perplexity
bands are CCNet's idea (Wenzek et al., arXiv:1911.00359); the second score is how much a larger model gains on a text, which
a smaller one does not learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3_jax.curation import store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.rule import Step
from phi3_jax.errors import UserError
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.curation.work import Work
    from phi3_jax.inference.engine import Engine

ROWS = 1 << 32
BATCH = 8  # rows at a time
BELOW, ABOVE = 0, 1  # reasons, by index
POINTS = (5, 25, 50, 75, 95)  # percentiles of a source that the page shows
PIECE = 512  # most tokens of a row


def perplexity(work: Work, step: Step) -> None:
    """Drops documents whose bits per byte under a model lie outside two limits."""
    _score(work, step, [str(step.parameters["model"])])


def learnability(work: Work, step: Step) -> None:
    """Drops documents whose bits per byte under a small model, minus those under a large one, lie outside two limits."""
    _score(work, step, [str(step.parameters["small"]), str(step.parameters["large"])])


def content(path: str) -> str:
    """A name of the weights at a path, made of their values.

    Raises:
      UserError: no model there.
    """
    from phi3_jax.interop import loading
    from phi3_jax.interop.content import content as named

    if not path:
        raise UserError("a score needs a model; name one: perplexity=RUN, or learnability=SMALL+LARGE")
    return named(loading.open_weights(path))


def _score(work: Work, step: Step, models: Sequence[str]) -> None:
    """Writes bits per byte under each model of every document that is left; then decides."""
    out, p = work.stage(step), step.parameters
    paths = [store.part(out, number) for number in range(len(work.left))]
    if any(not path.is_file() for path in paths):
        engines = [_engine(model) for model in models]
        for number, path in enumerate(paths):
            if not path.is_file():
                rows = work.rows(number)
                texts = [text[: p["characters"]] for text in texts_of(store.part(work.texts_in, number), rows)]
                scores = {f"bits_{i}": bits_per_byte(engine, texts) for i, engine in enumerate(engines)}
                store.write(path, {"doc": number * ROWS + rows, **scores})
    of = (lambda found: found["bits_0"] - found["bits_1"]) if len(models) > 1 else lambda found: found["bits_0"]
    choose(work, step, paths, of, (p["least"], p["most"]), {"unit": "Bits per byte"})


def choose(
    work: Work,
    step: Step,
    paths: Sequence[Path],
    of: Callable[[dict[str, np.ndarray]], np.ndarray],
    limits: tuple[float, float],
    note: dict[str, Any],
) -> None:
    """Drops documents whose score lies outside two limits, and notes percentiles by source.

    Args:
      paths: a part with `doc` and numbers for each part that was read; of: the score, of a part's columns.
      note: what else the manifest says.
    """
    least, most = limits
    dropped: list[tuple[int, int, int, float]] = []
    by_source: dict[str, list[np.ndarray]] = {}
    for number, path in enumerate(paths):
        found = {name: column.to_numpy() for name, column in store.read(path).items()}
        values = of(found)
        for check, out_of in ((BELOW, values < least), (ABOVE, values > most)):
            pairs = zip(found["doc"][out_of].tolist(), values[out_of].tolist(), strict=True)
            dropped += [(doc, check, -1, value) for doc, value in pairs]
        names = store.read(work.read_part(number), ["source"])["source"].take(found["doc"] - number * ROWS).to_pylist()
        for name in sorted(set(names)):
            by_source.setdefault(name, []).append(values[[each == name for each in names]])
    spread = {}
    for name in sorted(by_source):
        values = np.concatenate(by_source[name])
        points = [round(float(x), 4) for x in np.percentile(values, POINTS)]
        kept = int(((values >= least) & (values <= most)).sum())
        spread[name] = {"documents": len(values), "kept": kept, "percentiles": points}
    files.write_json(work.noted(step), {**note, "scores": spread, "points": POINTS})
    work.drop(step, dropped)


def _engine(path: str) -> Engine:
    from phi3_jax.inference.engine import Engine
    from phi3_jax.interop import loading

    model = loading.load(path)
    if model.tokenizer is None:
        raise UserError(f"{path} has no tokenizer; put its files into {loading.kept_folder(path)}")
    return Engine(model, BATCH)


def bits_per_byte(engine: Engine, texts: Sequence[str]) -> np.ndarray:
    """(n,) float64: bits that a model needs for each text, per byte of it; 0 of an empty one.

    A text begins after the end of another document. One that is longer than a row goes on in the next without what was
    before, as training windows do.
    """
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # `_engine` has seen to it
    room = min(PIECE, engine.config.context)
    pairs: list[tuple[Any, Any]] = []
    owners: list[int] = []
    for at, ids in enumerate(tokenizer.encode_batch(list(texts))):
        for start in range(0, len(ids), room):
            pairs.append(([tokenizer.eos_id], ids[start : start + room]))
            owners.append(at)
    nats = np.zeros(len(texts))
    for at, score in zip(owners, engine.score(pairs) if pairs else [], strict=True):
        nats[at] -= score.logprob
    return nats / math.log(2) / np.maximum(1, [len(text.encode()) for text in texts])
