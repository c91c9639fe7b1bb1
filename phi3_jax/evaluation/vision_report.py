"""The suite `phi3_vision_report`: the benchmarks of the report's vision models, from a local folder.

A folder holds <benchmark>/test.jsonl; a line is an object with

    question: text; `<|image_k|>` or `<image k>` in it is where picture k stands, else all stand before it
    images:   [files], beside test.jsonl
    choices:  [texts], with answer: the gold one's number from 0 on;   or   answers: [texts that count]
    id:       text, of the items that are written; default: the line's number

Prompts are a user's turn, greedy, without shots. The report publishes none of its prompts: those here are LLaVA's, as most
harnesses have them, so that scores are compared with the report's with care.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.chat import chat_ids
from phi3_jax.data.images import Picture
from phi3_jax.data.pictured import TAG, Album
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import picture_scores as scores
from phi3_jax.inference.engine import Engine
from phi3_jax.interop.loading import Model
from phi3_jax.records import files

NAME = "phi3_vision_report"
LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
ROOM = 32  # tokens of a reply
_PLAIN = re.compile(r"<image (\d+)>")

Row = dict[str, Any]
Score = Callable[[str, Sequence[str]], float]
# Of questions without choices; a question with choices is scored by its letter.
BENCHMARKS: Mapping[str, tuple[str, Score]] = {
    "mmmu": ("accuracy", scores.number_or_words),
    "scienceqa": ("accuracy", scores.number_or_words),
    "mathvista": ("accuracy", scores.number_or_words),
    "intergps": ("accuracy", scores.number_or_words),
    "mmbench": ("accuracy", scores.number_or_words),
    "pope": ("accuracy", lambda reply, golds: float(scores.says_yes(reply) == _is_yes(golds))),
    "ai2d": ("accuracy", scores.number_or_words),
    "chartqa": ("relaxed", scores.relaxed),
    "textvqa": ("vqa", scores.vqa),
    "docvqa": ("anls", scores.anls),  # not of the report: Microsoft's recipe for fine-tuning measures it
}


def _is_yes(golds: Sequence[str]) -> bool:
    return golds[0].strip().lower() == "yes"


@dataclasses.dataclass(frozen=True)
class Item:
    """A question, with its pictures opened and not decoded."""

    id: str
    text: str
    pictures: list[Picture]
    choices: list[str]
    answer: int
    answers: list[str]

    def score(self, reply: str, rule: Score) -> float:
        """What a reply is worth."""
        return scores.choice(reply, self.choices, self.answer) if self.choices else rule(reply, self.answers)


def named(flags: Mapping[str, Any]) -> list[str]:
    """The benchmarks that flags ask for.

    Raises:
      UserError: no folder, an unknown benchmark, or one that the folder has not.
    """
    if not flags["data_dir"]:
        raise UserError(f"--suite {NAME} needs --data_dir, a folder with <benchmark>/test.jsonl (docs/vision.md)")
    folder = Path(flags["data_dir"])
    there = [name for name in BENCHMARKS if (folder / name / "test.jsonl").is_file()]
    if flags["tasks"] is None:
        if not there:
            raise UserError(f"{folder} holds no <benchmark>/test.jsonl of {', '.join(BENCHMARKS)}")
        return there
    names = list(dict.fromkeys(flags["tasks"].split(",")))
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"unknown benchmark {name!r} of {NAME}{nearest(name, BENCHMARKS)}")
        if name not in there:
            raise UserError(f"{folder / name / 'test.jsonl'} is not there; leave {name} out, or add it")
    return names


def read(folder: Path, name: str, album: Album, limit: int | None = None) -> list[Item]:
    """The items of a benchmark, the first `limit`.

    Raises:
      UserError: naming file and line: a row of another form, a picture that is missing or none, tags without pictures.
    """
    path = folder / name / "test.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} is empty; give a line for each question")
    return [_item(files.parse_json(line, path), path, number, album) for number, line in numbered[:limit]]


def _item(row: Any, path: Path, number: int, album: Album) -> Item:
    where = f"{path}:{number}"
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError(f"{where} has no question, a text")
    choices, answers, answer = row.get("choices") or [], row.get("answers") or [], row.get("answer")
    for key, value in (("images", row.get("images", [])), ("choices", choices), ("answers", answers)):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{where}: {key} must be a list of texts")
    if choices and (isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices)):
        raise UserError(f"{where}: answer={answer!r:.40} must be the gold choice's number, 0 to {len(choices) - 1}")
    if not choices and not answers:
        raise UserError(f"{where} has neither choices nor answers; give one of them")
    named = [str(path.parent / one) for one in row.get("images", [])]
    pictures = album.open([Picture(one, name=f"{one}, of {where},") for one in named])
    text = _PLAIN.sub(r"<|image_\1|>", row["question"])
    if not TAG.search(text):
        text = "".join(f"<|image_{k}|>\n" for k in range(1, len(pictures) + 1)) + text
    if choices:
        lettered = (f"\n{letter}. {one}" for letter, one in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", choices, strict=False))
        text += "".join(lettered)
    text += f"\n{LETTER if choices else WORD}"
    return Item(str(row.get("id", number)), text, pictures, choices, int(answer or 0) if choices else -1, answers)


def results(
    model: Model, flags: Mapping[str, Any], progress: Callable[[int, int, str], None] = lambda *_: None
) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """(benchmark, rows, items) of each benchmark; see `command.write_rows`."""
    names, album = named(flags), Album(model.config)
    if model.tokenizer is None:
        raise UserError(f"{model.config.name} came without a tokenizer, which the prompts need; put its files there")
    engine = Engine(model, batch=flags["batch"])
    read_all = {name: read(Path(flags["data_dir"]), name, album, flags["limit"]) for name in names}
    for done, (name, items) in enumerate(read_all.items()):
        progress(done, len(names), name)
        prompts = []
        for item in items:
            talk = [{"role": "user", "content": item.text}]
            try:
                counts = album.counts(item.pictures)
                prompts.append(chat_ids(model.tokenizer, talk, engine.template.name, pictures=counts))
            except UserError as error:
                raise UserError(f"{Path(flags['data_dir']) / name / 'test.jsonl'}, item {item.id}: {error}") from None
        replies = engine.generate(prompts, ROOM, images=[item.pictures for item in items])
        metric, rule = BENCHMARKS[name]
        found = [item.score(reply.text, rule) for item, reply in zip(items, replies, strict=True)]
        rows = [_row(name, metric, items, found)]
        if name == "pope":
            said = [scores.says_yes(reply.text) for reply in replies]
            gold = [_is_yes(item.answers) for item in items]
            rows.append(_f1(name, said, gold, rows[0]))
        yield (
            name,
            rows,
            [
                {"id": item.id, "prompt": item.text, "reply": reply.text, "score": score, "images": len(item.pictures)}
                | ({"choices": item.choices, "answer": item.answer} if item.choices else {"answers": item.answers})
                for item, reply, score in zip(items, replies, found, strict=True)
            ],
        )


def _row(name: str, metric: str, items: Sequence[Item], found: Sequence[float]) -> Row:
    whole = all(score in (0.0, 1.0) for score in found)
    e = (
        statistics.proportion(np.array(found) > 0.5)
        if whole
        else statistics.ratio(np.array(found), np.ones(len(found)))
    )
    chance = None
    if all(item.choices for item in items):
        chance = float(np.mean([1 / len(item.choices) for item in items]))
    elif name == "pope":
        chance = 0.5
    numbers = {"value": e.value, "low": e.low, "high": e.high, "stderr": e.stderr}
    finite = {key: float(x) if np.isfinite(x) else None for key, x in numbers.items()}
    return {"task": name, "metric": metric, "n": len(found), "chance": chance} | finite


def _f1(name: str, said: Sequence[bool], gold: Sequence[bool], row: Row) -> Row:
    """F1 with the interval of 1,000 resamples of the items."""
    draws, pairs = np.random.default_rng(0), np.array([said, gold])
    many = []
    for _ in range(1000):
        first, second = pairs[:, draws.integers(0, len(said), len(said))]
        many.append(scores.f1(first.tolist(), second.tolist()))
    low, high = np.quantile(many, [0.025, 0.975])
    numbers = {"value": scores.f1(said, gold), "low": float(low), "high": float(high), "stderr": float(np.std(many))}
    return row | {"task": name, "metric": "f1", "chance": None} | numbers
