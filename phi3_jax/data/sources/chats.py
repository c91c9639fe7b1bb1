"""Conversations or preferences to post-train on, packed whole into windows with loss on the answers (see `dialogues`).

Several sources are joined as `A@3+B@1`: of four windows three are A's. `text:SOURCE` is text of pre-training, which bears
loss on every token, so that what was learnt before is replayed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi3_jax import keys
from phi3_jax.configs import Vision
from phi3_jax.data import chat, dialogues, packing, several, tokenizers
from phi3_jax.data.corpora import files, guarded, text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.corpora.instructions import World, probe
from phi3_jax.data.dialogues import Report, Row
from phi3_jax.data.images import MOST_CROPS
from phi3_jax.data.picture_rows import Shelf
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import OPTIONS as TEXT
from phi3_jax.data.sources.documents import TextStream
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError, nearest

LONGEST = 4096  # sequence length that is proposed: the context that mini, small and medium are trained at
LONGEST_SEEN = 16_384  # the same for rows with pictures, of which one alone takes up to 2,653 tokens

OPTIONS = {
    "tokenizer": keys.local("the model's own: a file or folder with the control tokens of the family", "bytes"),
    "template": keys.word("chat template; a study takes by default the one that the tokenizer's folder brings", ""),
    "window": keys.whole("sequence length, in tokens; default: the shortest that packs nearly all rows whole", None, 2),
    "held_out": TEXT["held_out"],
    "eval": keys.local("rows that are evaluated and not trained on, in the place of the share that is held out"),
    "rows": keys.word("what the rows must be; default: what they are", "", "", "conversations", "preferences"),
    "last_answer": keys.Key("loss on the last answer of a conversation only", False, bool),
    "on_error": keys.word("stop at a row that is wrong, or skip and count such rows", "stop", "stop", "skip"),
    "images": keys.local("folder that the pictures of the rows lie in, for a phi-3-vision; default: no pictures"),
    "crops": keys.whole("tiles that a picture is cut into at most", 16, 1, MOST_CROPS),
    "eyes": keys.word("TILE/PATCH, sides in pixels, of the model that sees them", "336/14"),
    "seed": keys.whole("of the order in which rows are packed", 0, 0, keys.MOST_SEED),
}


def recipe(request: Request) -> Recipe:
    """A source of each that is named, and evals of rows that a hash of their content holds out, or of a file of their own.

    One source of rows is called `answers` or, of preferences, `chosen`. Text of pre-training is a domain of its own.
    """
    o = request.options
    if not request.rest:
        raise UserError("post-training needs data=; for example data=rows.jsonl")
    named = several.split(request.rest)
    rows, texts = [one for one in named if one.text is None], [one for one in named if one.text is not None]
    if not rows:
        raise UserError(
            f"data={request.rest} names text alone; give rows to learn answers from, or train on it as usual"
        )
    tokenizer, template = tokenizers.load(o["tokenizer"]), o["template"]
    if template not in chat.ROLES:
        said = f"--template {template!r} is unknown" if template else "conversations need a chat template: --template"
        raise UserError(f"{said}{nearest(template, chat.ROLES)}")
    if o["eval"] and several.split(o["eval"])[1:]:
        raise UserError(f"eval={o['eval']} names several sources; give one file")
    held = 0.0 if o["eval"] else o["held_out"]
    shelf = Shelf(files.local(o["images"]), eyes_of(o["eyes"], o["crops"])) if o["images"] else None
    read = [_Rows.read(one, tokenizer, o, held, shelf) for one in rows]
    pairs = read[0].pairs
    for other in read[1:]:
        if other.pairs != pairs:
            raise UserError(
                f"{read[0].one.spec} holds {read[0].kind} and {other.one.spec} {other.kind}; train on one kind at a time"
            )
    if o["rows"] not in ("", read[0].kind):
        raise UserError(
            f"{rows[0].spec} holds {read[0].kind}, not {o['rows']}; give other rows, or train on them by sft or dpo"
        )
    if pairs and texts:
        raise UserError(f"{texts[0].spec} is text, which a loss of pairs does not read; leave it out")
    domains = ["chosen", "rejected"] if pairs else ["answers"]
    longest = LONGEST_SEEN if shelf and shelf.names else LONGEST
    window = o["window"] or packing.proposed([n for some in read for n in some.lengths()], longest, len(domains))
    meter, only = "preference" if pairs else "text", len(named) == 1
    names = dict(zip(named, [domains[0]] if only else several.slugs(named), strict=True))
    sources = [Part(names[some.one], some.split.train(window, o["seed"]), weight=some.one.weight) for some in read]
    evals = [Part(names[some.one], some.split.held(window), meter=meter, optional=True) for some in read if held]
    inputs = sum((some.inputs for some in read), Inputs())
    warnings = [some.report.lines for some in read]
    if o["eval"]:
        own = _Rows.read(several.split(o["eval"])[0], tokenizer, o, 0.0, shelf)
        if own.pairs != pairs:
            raise UserError(f"eval={o['eval']} holds {own.kind}, not {read[0].kind}; name rows of the same kind")
        evals.append(Part("eval", packing.pack(own.rows(), window, own.report), meter=meter))
        inputs += own.inputs
        warnings.append(own.report.lines)
    for one in texts:
        found = request.texts(one.text or "", "text")
        domains.append(names[one])
        stream = TextStream(
            names[one], ((d, None) for d in found.documents), tokenizer, window, len(domains), o["held_out"]
        )
        sources.append(stream.part(one.weight))
        evals += [stream.held_part()] if o["held_out"] else []
        inputs += found.inputs
        warnings.append(functools.partial(_listed, found.warning))
    evals += _questions([*rows, *(several.split(o["eval"]) if o["eval"] else [])], tokenizer, template, window)
    seen = shelf if shelf and shelf.names else None
    if seen:
        inputs += Inputs(versions=[seen.account])
    data = "+".join(one.name if only else f"{one.name}@{one.weight:g}" for one in named)
    generator = dict(version=VERSION, data=f"chats:{data}", window=window)
    generator |= dict(tokenizer=tokenizer.fingerprint, template=template, seed=o["seed"], held_out=o["held_out"])
    generator |= dict(last_answer=o["last_answer"])
    generator |= dict(eval=several.split(o["eval"])[0].name) if o["eval"] else {}
    generator |= dict(crops=o["crops"], eyes=o["eyes"]) if seen else {}
    return Recipe(
        kind="chats", vocab=tokenizer.vocab_size, window=window, domains=domains,
        loss="preference" if pairs else "token_mean",
        tokenizer=tokenizer.describe(), generator=generator,
        sources=sources, evals=evals, inputs=inputs,
        warnings=lambda: [line for lines in warnings for line in lines()], files=tokenizer.files, pictures=seen,
    )  # fmt: skip


def _questions(sources: Sequence[several.One], tokenizer: Any, template: str, window: int) -> list[Part]:
    """The questions that come with the rows of a small world, of the first source that has such rows."""
    made = next((one for one in sources if one.generated), None)
    if made is None:
        return []
    name, ask = ("guard", guarded.probe) if made.generated in (guarded.OPEN, guarded.GUARDED) else ("chat", probe)
    windows, extra = ask(World.of(made.spec.removeprefix(made.generated)), tokenizer, template, window)
    return [Part(name, [windows], meter=name, extra=extra)]


def eyes_of(word: str, crops: int) -> Vision:
    """Tile and patch of `336/14`, and crops; the rest of a tower is nothing to data.

    Raises:
      UserError: another form.
    """
    tile, _, patch = word.partition("/")
    if not (tile.isascii() and tile.isdigit() and patch.isascii() and patch.isdigit()):
        raise UserError(f"--eyes {word} must be TILE/PATCH in pixels, such as 336/14")
    return Vision(tile=int(tile), patch=int(patch), crops=crops)


def _listed(ask: Callable[[], str | None]) -> list[str]:
    return [said] if (said := ask()) else []


@dataclass
class _Rows:
    """The rows of one source, all of them checked."""

    one: several.One
    report: Report
    examples: dialogues.Examples
    inputs: Inputs
    split: _Split

    @staticmethod
    def read(
        one: several.One, tokenizer: tokenizers.Tokenizer, o: Mapping[str, Any], held_out: float, shelf: Shelf | None
    ) -> _Rows:
        rows, inputs = several.rows_of(one)
        report, examples = dialogues.read(
            rows, tokenizer, o["template"], last_answer=o["last_answer"], on_error=o["on_error"], shelf=shelf
        )
        check = functools.partial(shelf.check, o["on_error"] == "skip") if shelf else None
        return _Rows(one, report, examples, inputs, _Split(examples, held_out, report, check))

    @property
    def pairs(self) -> bool:
        return self.report.kind == "preference"

    @property
    def kind(self) -> str:
        return "preferences" if self.pairs else "conversations"

    def rows(self) -> Iterator[Row]:
        return (row for _, row in self.examples())

    def lengths(self) -> list[int]:
        """Positions of each row."""
        found = [sum(e.positions for e in row) for row in self.rows()]
        self.report.dropped.clear()  # that pass was to look at lengths
        return found


@dataclass
class _Split:
    """Training rows come out packed; held-out rows are kept for `held`, which is consumed after them.

    Rows with pictures are held out by the first of these. `check` is called before rows are read to be written.
    """

    examples: dialogues.Examples
    share: float
    report: Report
    check: Callable[[], None] | None = None
    kept: list[Row] = field(default_factory=list)

    def train(self, window: int, seed: int) -> Iterator[Windows]:
        some = False
        if self.check:
            self.check()
        for windows in packing.pack(self._training(), window, self.report, seed):
            yield windows
            some = True
        if not some:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.report.dropped.most_common())
            raise UserError(f"all {self.report.rows} rows were left out ({reasons}), so nothing is left to learn from")

    def held(self, window: int) -> Iterator[Windows]:
        yield from packing.pack(self.kept, window, Report())

    def _training(self) -> Iterator[Row]:
        last = None  # one behind, so that not all rows are held out
        for _, row in self.examples():
            ids = row[0].pictures[0] if row[0].pictures else json.dumps([example.ids.tolist() for example in row])
            if self.share and text.is_held_out(ids, self.share):
                self.kept.append(row)
                continue
            if last is not None:
                yield last
            last = row
        if last is None and self.kept:
            last = self.kept.pop()
        if last is not None:
            yield last


SOURCE = Source(
    "chats:ROWS",
    "rows of conversations or of preferences (phi3_jax.data.dialogues): a file or folder, tfds:NAME or seqio:MODULE:TASK, "
    "talks:N, pairs:N, open:N or guarded:N about the persons of prose:N, or several, A@3+B@1, text:SOURCE among them",
    recipe,
    OPTIONS,
)
