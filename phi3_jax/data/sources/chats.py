"""Conversations or preferences to post-train on, packed whole into windows with loss on the answers (see `dialogues`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from phi3_jax import keys
from phi3_jax.data import chat, dialogues, packing, tokenizers
from phi3_jax.data.corpora import files, text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.dialogues import Report, Row
from phi3_jax.data.recipe import VERSION, Part, Recipe
from phi3_jax.data.sources.documents import OPTIONS as TEXT
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError, nearest

LONGEST = 4096  # sequence length that is proposed: the context that mini, small and medium are trained at

OPTIONS = {
    "tokenizer": keys.local("the model's own: a file or folder with the control tokens of the family", "bytes"),
    "template": keys.word("chat template; a study takes by default the one that the tokenizer's folder brings", ""),
    "window": keys.whole("sequence length, in tokens; default: the shortest that packs nearly all rows whole", None, 2),
    "held_out": TEXT["held_out"],
    "rows": keys.word("what the rows must be; default: what they are", "", "", "conversations", "preferences"),
    "last_answer": keys.Key("loss on the last answer of a conversation only", False, bool),
    "on_error": keys.word("stop at a row that is wrong, or skip and count such rows", "stop", "stop", "skip"),
    "seed": keys.whole("of the order in which rows are packed", 0, 0, keys.MOST_SEED),
}


def recipe(request: Request) -> Recipe:
    """One source, `answers` or, of preferences, `chosen`; and an eval of rows that a hash of their content holds out."""
    o = request.options
    if not request.rest:
        raise UserError("post-training needs data=; for example data=rows.jsonl")
    account = files.account(request.rest)
    tokenizer = tokenizers.load(o["tokenizer"])
    template = o["template"]
    if template not in chat.ROLES:
        said = f"--template {template!r} is unknown" if template else "conversations need a chat template: --template"
        raise UserError(f"{said}{nearest(template, chat.ROLES)}")
    rows = functools.partial(text.rows, account)
    report, examples = dialogues.read(rows, tokenizer, template, last_answer=o["last_answer"], on_error=o["on_error"])
    pairs = report.kind == "preference"
    there = "preferences" if pairs else "conversations"
    if o["rows"] not in ("", there):
        raise UserError(
            f"{request.rest} holds {there}, not {o['rows']}; give other rows, or train on them by sft or dpo"
        )
    domains = ["chosen", "rejected"] if pairs else ["answers"]
    made = _Split(examples, o["held_out"], report)
    window = o["window"] or packing.proposed(
        [sum(e.positions for e in row) for _, row in examples()], LONGEST, len(domains)
    )
    report.dropped.clear()  # that pass was to look at lengths
    generator = dict(version=VERSION, data=f"chats:{files.local(request.rest).resolve().name}", window=window)
    generator |= dict(tokenizer=tokenizer.fingerprint, template=template, seed=o["seed"], held_out=o["held_out"])
    generator |= dict(last_answer=o["last_answer"])
    held = Part(domains[0], made.held(window), meter="preference" if pairs else "text", optional=True)
    return Recipe(
        kind="chats", vocab=tokenizer.vocab_size, window=window, domains=domains,
        loss="preference" if pairs else "token_mean",
        tokenizer=tokenizer.describe(), generator=generator,
        sources=[Part(domains[0], made.train(window, o["seed"]))], evals=[held] if o["held_out"] else [],
        inputs=Inputs([account]), warnings=report.lines, files=tokenizer.files,
    )  # fmt: skip


@dataclass
class _Split:
    """Training rows come out packed; held-out rows are kept for `held`, which is consumed after them."""

    examples: dialogues.Examples
    share: float
    report: Report
    kept: list[Row] = field(default_factory=list)

    def train(self, window: int, seed: int) -> Iterator[Windows]:
        yield from packing.pack(self._training(), window, self.report, seed)

    def held(self, window: int) -> Iterator[Windows]:
        yield from packing.pack(self.kept, window, Report())

    def _training(self) -> Iterator[Row]:
        last = None  # one behind, so that not all rows are held out
        for _, row in self.examples():
            ids = json.dumps([example.ids.tolist() for example in row])
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


SOURCE = Source("chats:PATH", "rows of conversations or of preferences, see phi3_jax.data.dialogues", recipe, OPTIONS)
