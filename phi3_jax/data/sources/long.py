"""Mixed windows, as LongRoPE2 extends with: rows of short documents, and rows that a long document fills from its start.

A short document, between the ids that begin and end it, is cut into pieces of at most the original length, many of which
share a row; attention stays inside each, and positions restart, so that with LongRoPE's lists each takes the short one. No
cut counts as a beginning or an end. A row of the other kind begins where a long document begins, or goes on with it at a
whole number of windows, and holds nothing else, so that it takes the long list.
"""

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
from phi3_jax.data.windows import Windows, concatenate, most_segments
from phi3_jax.errors import UserError

OPTIONS = (
    TEXT
    | SEED
    | {
        "original": keys.whole("tokens that a short document may have; default an eighth of the window", None, 2),
        "mix": keys.share("share of the rows that hold short documents", 0.5),
        "needles": keys.share("share of pieces and long rows that hold needles", 0.0),
    }
)
CHUNK = 256  # rows that are handed on together
EVAL_ROWS = 64  # of each eval
MOST_NEEDLES = needles.STATED[1] + needles.REPEATED[1]


def recipe(request: Request) -> Recipe:
    """Sources `short` and `long` in the ratio of the mix, each a domain, with values of needles as a third."""
    o = request.options
    tokenizer, window = tokenizers.load(o["tokenizer"]), o["window"]
    original = o["original"] or max(2, window // 8)
    if original > window:
        raise UserError(f"data.original={original:,} exceeds the window of {window:,}; set it lower")
    found = request.texts(request.rest, o["text_field"], True)
    rows = _Rows(needles.Form(tokenizer), window, original, o["held_out"], o["needles"], o["seed"])
    rows.read(found.documents, with_long=o["mix"] < 1)
    made = dict(version=VERSION, data=f"long:{found.name}", window=window, held_out=o["held_out"])
    made |= dict(tokenizer=tokenizer.fingerprint, original=original, mix=o["mix"], needles=o["needles"], seed=o["seed"])
    made |= dict(ends="of documents")
    kinds = [(name, weight) for name, weight in (("short", o["mix"]), ("long", 1 - o["mix"])) if weight > 0]
    return Recipe(
        kind="text", vocab=tokenizer.vocab_size, window=window, domains=["short", "long", "needles"],
        loss="domain_mean" if o["needles"] else "token_mean", tokenizer=tokenizer.describe(), generator=made,
        sources=[Part(name, rows.windows(name, False), weight=weight) for name, weight in kinds],
        evals=[Part(name, rows.windows(name, True), meter="text", optional=True) for name in ("short", "long")],
        inputs=found.inputs, warnings=lambda: [w for w in (found.warning(),) if w], files=tokenizer.files,
    )  # fmt: skip


@dataclass
class _Rows:
    """Documents divided into short pieces and long rows, for training and held out."""

    form: needles.Form
    window: int
    original: int
    held_out: float
    share: float
    seed: int
    kept: dict[tuple[str, bool], list[np.ndarray]] = field(default_factory=dict)

    def read(self, documents: Iterable[str], with_long: bool) -> None:
        """Cuts all documents.

        Raises:
          UserError: no document is as long as a window; names the longest's length.
        """
        longest, size = 0, self.window + 1
        self.kept = {(name, held): [] for name in ("short", "long") for held in (False, True)}
        for document in documents:
            held = bool(self.held_out) and text.is_held_out(document, self.held_out)
            ids = np.asarray(self.form.tokenizer.encode(document), np.int32)
            longest = max(longest, ids.size)
            self.kept["long", held] += list(ids[: ids.size // size * size].reshape(-1, size))
            whole = np.pad(ids, 1, constant_values=self.form.tokenizer.eos_id)
            starts = range(0, ids.size + 1, self.original)
            self.kept["short", held] += [whole[i : i + self.original + 1] for i in starts]
        if with_long and not self.kept["long", False]:
            raise UserError(
                f"the longest document has {longest:,} tokens, too few for rows of {self.window:,} inside one; set "
                "data.window lower or give longer documents"
            )

    def windows(self, name: str, held: bool) -> Iterator[Windows]:
        rng = np.random.default_rng([self.seed, 0x1046, len(name), held])
        pieces = self.kept[name, held]
        order = rng.permutation(len(pieces))
        found = self._short(pieces, order, rng) if name == "short" else self._long(pieces, order, rng)
        left = EVAL_ROWS if held else None
        for some in found:
            if left is not None:
                some = some[:left]
                some = Windows(some.tokens, some.targets, some.segments, np.where(some.domains == 3, 0, some.domains))
                left -= len(some)
            if len(some):
                yield some

    def _planted(self, piece: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < self.share and piece.size >= MOST_NEEDLES * self.form.longest:
            return needles.planted(piece, self.form, rng)
        return piece, np.full(piece.size, needles.TEXT, np.int32)

    def _long(self, pieces: list[np.ndarray], order: np.ndarray, rng: np.random.Generator) -> Iterator[Windows]:
        for start in range(0, len(order), CHUNK):
            rows = [self._planted(pieces[i], rng) for i in order[start : start + CHUNK]]
            ids, kinds = (np.stack(part) for part in zip(*rows, strict=True))
            domains = np.select([kinds == needles.TEXT, kinds == needles.VALUE], [2, 3], 0)
            yield Windows(ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:]), domains[:, 1:])

    def _short(self, pieces: list[np.ndarray], order: np.ndarray, rng: np.random.Generator) -> Iterator[Windows]:
        """Pieces in packed rows; none is cut, for what does not fit begins the next row."""
        rows: list[Windows] = []
        row: list[tuple[np.ndarray, np.ndarray]] = []
        room = self.window
        for i in order:
            ids, kinds = self._between(pieces[i], rng)
            if ids.size - 1 > room or len(row) == most_segments(self.window):
                rows.append(self._row(row))
                row, room = [], self.window
                if len(rows) == CHUNK:
                    yield concatenate(rows)
                    rows = []
            row.append((ids, kinds))
            room -= ids.size - 1
        if row:
            yield concatenate([*rows, self._row(row)])

    def _between(self, piece: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A piece with needles, if any, between the ids that begin and end its document, where it has these."""
        eos = self.form.tokenizer.eos_id
        first, last = int(piece[0] == eos), piece.size - int(piece[-1] == eos)
        ids, kinds = self._planted(piece[first:last], rng)
        ends = np.full(piece.size - last, needles.TEXT)
        return np.r_[piece[:first], ids, piece[last:]], np.r_[np.zeros(first, kinds.dtype), kinds, ends]

    def _row(self, row: list[tuple[np.ndarray, np.ndarray]]) -> Windows:
        """A piece of n ids takes n - 1 positions, each to say the next id; where that is text, it counts."""
        made, at = np.zeros((4, 1, self.window), np.int32), 0
        for segment, (ids, kinds) in enumerate(row, 1):
            domains = np.select([kinds == needles.TEXT, kinds == needles.VALUE], [1, 3], 0)
            end = at + ids.size - 1
            made[:, 0, at:end] = ids[:-1], ids[1:], np.full(ids.size - 1, segment), domains[1:]
            at = end
        return Windows(*made)


SOURCE = Source(
    "long:SPEC",
    "text of another source in mixed windows: rows of short documents, and rows of one long one",
    recipe,
    OPTIONS,
)
