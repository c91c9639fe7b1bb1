"""Text in windows that lie inside one document each, some of them with needles (`phi3_jax.data.needles`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from phi3_jax import keys
from phi3_jax.data import needles, tokenizers
from phi3_jax.data.corpora import text
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import OPTIONS as TEXT
from phi3_jax.data.sources.documents import SEED
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

OPTIONS = TEXT | SEED | {"needles": keys.share("share of the windows that hold needles", 0.5)}
CHUNK = 1024  # windows that are handed on together
EVAL_WINDOWS = 512  # of each eval, evenly from those that are held out


def recipe(request: Request) -> Recipe:
    """One source of windows with loss on text and on values that were stated before, and an eval of each."""
    o = request.options
    tokenizer, window = tokenizers.load(o["tokenizer"]), o["window"]
    found, form = request.texts(request.rest, o["text_field"], True), needles.Form(tokenizer)
    cut = _Cut(found.documents, form, window, o["held_out"], o["needles"], o["seed"])
    made = dict(version=VERSION, data=f"needles:{found.name}", window=window, held_out=o["held_out"])
    made |= dict(tokenizer=tokenizer.fingerprint, needles=o["needles"], seed=o["seed"], documents="whole")
    chance = {"chance": np.asarray(form.chance)}
    return Recipe(
        kind="text", vocab=tokenizer.vocab_size, window=window, domains=["text", "needles"], loss="domain_mean",
        tokenizer=tokenizer.describe(), generator=made, sources=[Part("text", cut.train())],
        evals=[
            Part("text", cut.held(0.0), meter="text", optional=True),
            Part("needles", cut.held(1.0), meter="needles", extra=chance, optional=True),
        ],
        inputs=found.inputs, warnings=lambda: [w for w in (found.warning(),) if w], files=tokenizer.files,
    )  # fmt: skip


@dataclass
class _Cut:
    """Training windows come out; pieces of held-out documents are kept for `held`, which is consumed after them."""

    documents: Iterable[str]
    form: needles.Form
    window: int
    held_out: float
    share: float
    seed: int
    kept: list[np.ndarray] = field(default_factory=list)

    def train(self) -> Iterator[Windows]:
        yield from _windows(self._pieces(), self.form, self.share, np.random.default_rng([self.seed, 0x4EED]))

    def held(self, share: float) -> Iterator[Windows]:
        rng = np.random.default_rng([self.seed, 0x4E1D])
        some = self.kept[:: max(1, -(-len(self.kept) // EVAL_WINDOWS))]
        for windows in _windows(iter(some), self.form, share, rng):
            values = np.where(windows.domains == needles.VALUE, windows.domains, 0) if share else windows.domains
            yield Windows(windows.tokens, windows.targets, windows.segments, values)

    def _pieces(self) -> Iterator[np.ndarray]:
        longest = 0
        for document in self.documents:
            ids = np.asarray(self.form.tokenizer.encode(document), np.int32)
            longest = max(longest, ids.size)
            count, size = ids.size // (self.window + 1), self.window + 1
            pieces = ids[: count * size].reshape(count, size)
            if text.is_held_out(document, self.held_out):
                self.kept += list(pieces)
            else:
                yield from pieces
        if longest <= self.window:
            raise UserError(
                f"the longest document has {longest:,} tokens, too few for windows of {self.window:,} inside one; set "
                "data.window lower or give longer documents"
            )


def _windows(
    pieces: Iterator[np.ndarray], form: needles.Form, share: float, rng: np.random.Generator
) -> Iterator[Windows]:
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in pieces:
        plain = rng.random() >= share
        rows.append((piece, np.full(piece.size, needles.TEXT)) if plain else needles.planted(piece, form, rng))
        if len(rows) == CHUNK:
            yield _joined(rows)
            rows = []
    if rows:
        yield _joined(rows)


def _joined(rows: list[tuple[np.ndarray, np.ndarray]]) -> Windows:
    ids, kinds = (np.stack(part) for part in zip(*rows, strict=True))
    return Windows(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:]), kinds[:, 1:])


SOURCE = Source("needles:SPEC", "text of another source, with needles in half of the windows", recipe, OPTIONS)
