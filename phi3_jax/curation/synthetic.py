"""Synthetic text: requests are answered, and what was written is curated as any other text is.

In the folder of the result lie, beside those of a curation, `asked/answers-NNNNN.jsonl`, every answer as soon as it is
there (which the same command goes on from), and `asked/written/part-NNNNN.jsonl`, the documents that answers have become.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.curation import backends, diversity, pipeline, store, templates, wanted
from phi3_jax.curation import config as configs
from phi3_jax.curation.engine import Engine
from phi3_jax.curation.wanted import Pages, Request
from phi3_jax.errors import UserError
from phi3_jax.evaluation import refusal
from phi3_jax.evaluation.kept import Kept
from phi3_jax.inference.endpoint import Answer
from phi3_jax.records import files, ownership, rows

OUTPUT = "curated/synthetic"
ASKED, WRITTEN = "asked", "written"
WRITES = "written"  # how an answer ends that becomes a document
OUTCOMES = (WRITES, "truncated", "empty", "refused", backends.TOO_LONG)
_WAYS = {
    "truncated": "raise --config.synthetic.max_tokens", "empty": "look at the server, or take another model",
    "refused": "take other templates or another model",
    backends.TOO_LONG: "set a smaller --config.synthetic.max_tokens or page_words, or take a model with a longer context",
}  # fmt: skip
_EVERY = 25  # answers between two lines that say how far it is
_REFUSES = re.compile(
    r"\W*(?:(?:i'?m|i am) (?:so |very |truly )?(?:sorry|afraid|unable)|sorry|unfortunately|i apologi[sz]e|my apologies|"
    r"i (?:can't|cannot|can not|won't|will not|must decline)|as an? (?:ai|assistant|language model))\b"
)
_SAYS_SO = [re.compile(refusal.PHRASES[name]) for name in ("cannot_do", "i_cannot", "ai", "denied")]
_OPENING = re.compile(
    r"\A\s*(?:(?:sure|certainly|of course|absolutely)\b[^\n]{0,200}|here(?: is|'s| are)\b[^\n]{0,200}:)[ \t]*\n+", re.I
)


def command(given: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Asks for synthetic text and curates it; the manifest.

    Args:
      given: the flags.
      config: of the experiment, with the section `synthetic`.

    Raises:
      UserError: a config that is none, an endpoint that fails for good (the answers that came are kept), no answer that is
        a text, or see `pipeline.curate`.
    """
    asked = config["synthetic"]
    if bool(given["endpoint"]) == bool(given["model"]):
        raise UserError(
            "synthetic text needs a model: --endpoint http://localhost:8000/v1, or --model runs/NAME; one of them"
        )
    if given["input"] or given["more"]:
        raise UserError(
            "synthetic text has no --input; pages to rephrase and to compare with are web=FOLDER, a curated one"
        )
    if given["sample"] is not None:
        raise UserError("--sample forecasts pages that are there; for a look ask for little, such as count=20")
    engine = Engine(given["engine"], given["workers"] or os.cpu_count() or 1)
    out = Path(given["output"] or OUTPUT)
    backend: backends.Backend
    if given["model"]:
        backend = backends.Ours(given["model"], wanted.sampling(asked), asked["seed"])
    else:
        how = wanted.sampling(asked)
        name = given["endpoint_model"] or _begun_with(out)
        backend = backends.Server(given["endpoint"], name, how, given["at_once"], given["timeout"])
    asked[wanted.MODEL] = backend.name
    described = configs.described(config)
    with ownership.own(out, "choose another --output", wait=True):
        pipeline.start(out, described)
        asking = Asking(asked, backend, out, _reused(given["reuse"]))
        asking.run()
    return pipeline.curate(config, [str(out / ASKED / WRITTEN)], out, engine, about=lambda m: asking.about(out, m))


def _begun_with(out: Path) -> str | None:
    """The model that a folder was begun with, so that one whose answers are all there needs no server."""
    begun = files.read_state(out / pipeline.STATE).get("config", {}).get("synthetic", {}).get(wanted.MODEL)
    return begun if isinstance(begun, str) else None


def _reused(folder: str | None) -> dict[str, Any]:
    """Answers of another folder by key.

    Raises:
      UserError: it holds none.
    """
    if folder is None:
        return {}
    paths = sorted((Path(folder) / ASKED).glob("answers-*.jsonl"))
    if not paths:
        raise UserError(f"--reuse {folder} holds no answers; name the --output of another command for synthetic text")
    return {
        row["request"]: row["answer"] for path in paths for row in rows.read(path)[0] if {*row} >= {"request", "answer"}
    }


def _answer(kept: Any) -> Answer | None:
    """An answer as it is kept; None where none is, or something else."""
    try:
        return Answer(**kept) if isinstance(kept, dict) else None
    except TypeError:
        return None


class Asking:
    """Asks for all of a config, part by part."""

    def __init__(
        self, asked: Mapping[str, Any], backend: backends.Backend, out: Path, reused: Mapping[str, Any]
    ) -> None:
        self._asked, self._backend, self._folder, self._reused = asked, backend, out / ASKED, reused
        self._chosen = templates.chosen(tuple(asked["templates"]), asked["subjects"])
        self._pages = Pages(asked["pages"])
        self._outcomes: dict[str, Counter[str]] = {name: Counter() for name in self._chosen}
        self._tokens: Counter[str] = Counter()
        self._done = 0

    def run(self) -> None:
        """Writes every part that is not there.

        Raises:
          UserError: an endpoint that fails for good, a full disk, or no answer that is a text.
        """
        if any(template.pages for template in self._chosen.values()) and not len(self._pages):
            raise UserError(f"{self._asked['pages']} holds no page; name another curated folder with web=FOLDER")
        for number, shard in enumerate(wanted.shards(wanted.requests(self._asked, self._chosen, self._pages))):
            counts = self._folder / f"counts-{number:05}.json"
            part = self._folder / WRITTEN / f"part-{number:05}.jsonl"
            if not part.is_file():
                self._part(shard, number, counts, part)
            found = files.read_json(counts)
            for name, of in found["outcomes"].items():
                self._outcomes[name].update(of)
            self._tokens.update(found["tokens"])
            self._done += len(shard)
        total = sum(self._outcomes.values(), Counter[str]())
        if not total[WRITES]:
            most = total.most_common(1)[0][0]
            said = ", ".join(f"{count:,} {name}" for name, count in total.most_common())
            raise UserError(
                f"none of {total.total():,} answers by {self._backend.name} is a text ({said}); {_WAYS[most]}"
            )

    def _part(self, shard: list[Request], number: int, counts: Path, part: Path) -> None:
        kept = Kept(self._folder / f"answers-{number:05}.jsonl")
        found: dict[str, Answer] = {}
        for request in shard:
            answer = _answer(kept.get(request.key))
            if answer is None and (answer := _answer(self._reused.get(request.key))) is not None:
                kept.add({request.key: dataclasses.asdict(answer)})
            if answer is not None:
                found[request.key] = answer
        pages = {request.key: self._pages[request.seed.page] for request in shard}
        prompts = {request.key: self._prompt(request, pages[request.key]) for request in shard}
        for request, new in self._backend.ask(shard, prompts, frozenset(found)):
            kept.add({request.key: dataclasses.asdict(new)})
            found[request.key] = new
            if (count := self._done + len(found)) % _EVERY == 0 or count == self._asked["count"]:
                print(f"{count:,} of {self._asked['count']:,} answers", file=sys.stderr, flush=True)
        outcomes: dict[str, Counter[str]] = {}
        tokens: Counter[str] = Counter()
        lines = []
        for request in shard:
            answer, template = found[request.key], self._chosen[request.template]
            text, outcome = document_of(prompts[request.key][0] if template.bare else "", answer)
            outcomes.setdefault(request.template, Counter())[outcome] += 1
            tokens.update({"read": answer.prompt_tokens, "written": answer.tokens})
            if outcome == WRITES:
                lines.append(rows.encoded(self._row(request, text, pages[request.key])))
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(counts, {"outcomes": outcomes, "tokens": tokens})
            files.write_bytes(part, b"".join(lines), durable=True)
        except OSError as error:
            raise store.cannot_write(part, error) from error

    def _prompt(self, request: Request, page: Mapping[str, str]) -> tuple[str, bool]:
        template = self._chosen[request.template]
        return templates.filled(template, request.seed.values, page["text"], self._asked["page_words"]), template.bare

    def _row(self, request: Request, text: str, page: Mapping[str, str]) -> dict[str, Any]:
        """A document with where it comes from."""
        template = self._chosen[request.template]
        licence = "; ".join(filter(None, dict.fromkeys((page["licence"], self._asked["licence"]))))
        return {
            "text": text, "id": request.key, "source": f"synthetic_{request.template}", "genre": template.genre,
            "licence": licence, "template": request.template, "template_hash": template.hash, "checker": template.checker,
            "model": self._backend.name, "sampling": json.dumps(wanted.sampling(self._asked)), "page": page["id"],
            "seed": json.dumps(dict(request.seed.values) | {"draw": request.seed.draw}),
        }  # fmt: skip

    def about(self, out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says of it: the model, templates and what became of their answers, and how varied texts are."""
        before: dict[str, list[str]] = {name: [] for name in self._chosen}
        for row in _written(self._folder / WRITTEN):
            if len(before[row["template"]]) < diversity.SAMPLE:
                before[row["template"]].append(row["text"])
        kept: Counter[str] = Counter()
        after: dict[str, list[str]] = {name: [] for name in self._chosen}
        for name, text in _kept(out, manifest):
            kept[name] += 1
            if len(after[name]) < diversity.SAMPLE:
                after[name].append(text)
        entries = {
            name: {
                "version": template.version, "hash": template.hash, "prompt": template.prompt, "genre": template.genre,
                "checker": template.checker, "combinations": _combinations(template, len(self._pages)),
                "outcomes": {outcome: self._outcomes[name][outcome] for outcome in OUTCOMES}, "kept": kept[name],
                "diversity_before": diversity.measure(before[name]), "diversity": diversity.measure(after[name]),
            }
            for name, template in self._chosen.items()
        }  # fmt: skip
        web = [self._pages[at]["text"] for at in range(min(len(self._pages), diversity.SAMPLE))]
        how = wanted.sampling(self._asked) | {"seed": self._asked["seed"]}
        return {
            "synthetic": {
                "model": self._backend.name, "sampling": how, "licence": self._asked["licence"],
                "tokens": {name: self._tokens[name] for name in ("read", "written")}, "templates": entries,
                "web": diversity.measure(web) if web else {},
            }
        }  # fmt: skip


def _combinations(template: templates.Template, pages: int) -> int:
    count = pages if template.pages else 1
    for values in template.axes.values():
        count *= len(values)
    return count


def _written(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("part-*.jsonl")):
        yield from rows.read(path)[0]


def _kept(out: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(template, text) of the documents that stay."""
    for entry in manifest["parts"]:
        found = store.read(out / entry["file"], ["template", "text"])
        yield from zip(found["template"].to_pylist(), found["text"].to_pylist(), strict=True)


def document_of(prompt: str, answer: Answer) -> tuple[str, str]:
    """(the text of an answer, how it ended: one of `OUTCOMES`).

    Args:
      prompt: what the text begins with, of a model that goes on with it; else "".
    """
    text = answer.text.strip()
    if answer.finish == backends.TOO_LONG:
        return "", backends.TOO_LONG
    if answer.finish == "refused" or refuses(text):
        return "", "refused"
    if not text:
        return "", "truncated" if answer.finish == "length" else "empty"
    if answer.finish == "length":
        return "", "truncated"
    text = f"{prompt}{answer.text}".strip() if prompt else _OPENING.sub("", text, count=1).strip()
    return (text, WRITES) if text else ("", "empty")


def refuses(text: str) -> bool:
    """Whether a reply opens as a refusal does and says in its first sentences that something is not done."""
    opening = text[:300].lower().replace("’", "'")
    return bool(_REFUSES.match(opening)) and any(pattern.search(opening) for pattern in _SAYS_SO)
