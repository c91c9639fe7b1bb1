"""MT-Bench (arXiv:2306.05685): 80 two-turn questions, replies saved, graded 1 to 10 by a judge that the user brings.

As in FastChat's llm_judge: sampling temperatures by category, single-answer grading with its prompts, each turn graded
alone, `[[rating]]` parsed from the judge's text. No judge is built in: without one there are replies and no score. A
rating is comparable only with ratings by the same judge, so rows carry its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.errors import UserError
from phi3_jax.evaluation import dialogue
from phi3_jax.evaluation.judge import Ask, Judge, Prompt
from phi3_jax.records import files, rows

REPLIES, JUDGEMENTS = "mt_bench_replies.jsonl", "mt_bench_judgements.jsonl"
# FastChat's temperature_config; other categories get 0.7.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # FastChat's NEED_REF_CATS: graded with a reference answer
MAX_NEW = 1024  # tokens of a reply, as in FastChat
GROUP = 8  # questions between two saves
# What tells a reply, and a judgement, from another: a later row of the same replaces it.
REPLY, JUDGEMENT = ("id", "model", "settings", "turns"), ("judge", "model", "id", "turn", "prompt_hash")
ANOTHER = "choose another --out"
TURNS = 2
_RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------- data


def questions(data_dir: str | Path) -> list[Row]:
    """Questions of `<data_dir>/mt_bench/test.jsonl`: id, subset (the category), turns, reference, gpt4_reference.

    Raises:
      UserError: no such file, or a line with a wrong shape (line and key named).
    """
    path = Path(data_dir) / "mt_bench" / "test.jsonl"
    found = _lines(path, "questions; give the folder that holds mt_bench/ as --data_dir")
    for number, row in enumerate(found, 1):
        for key, kind in (("id", str), ("subset", str), ("turns", list), ("reference", list)):
            if not isinstance(row.get(key), kind):
                raise UserError(f"{path} line {number}: {key} is {row.get(key)!r:.60}, not a {kind.__name__}")
        texts = [*row["turns"], *row["reference"], *row.setdefault("gpt4_reference", [])]
        if len(row["turns"]) != TURNS or not all(isinstance(t, str) for t in texts):
            raise UserError(f"{path} line {number}: turns has {len(row['turns'])} entries; two texts are needed")
    return found


def judge_prompts(data_dir: str | Path) -> dict[str, Row]:
    """FastChat's single-answer prompts by name, of `<data_dir>/mt_bench/judge_prompts.jsonl`.

    Raises:
      UserError: no such file, or one without the four prompts that are used.
    """
    path = Path(data_dir) / "mt_bench" / "judge_prompts.jsonl"
    rows = _lines(path, "the judge's prompts; take FastChat's judge_prompts.jsonl")
    found: dict[str, Row] = {row["name"]: row for row in rows if "name" in row}
    for name in (f"single{math}-v1{turn}" for math in ("", "-math") for turn in ("", "-multi-turn")):
        row = found.get(name) or {}
        if not all(isinstance(row.get(k), str) for k in ("system_prompt", "prompt_template")):
            raise UserError(f"{path} has no whole prompt {name!r} (system_prompt, prompt_template)")
    return found


def _lines(path: Path, what: str) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; it holds {what}")
    found = []
    lines = path.read_bytes().split(b"\n")  # a line separator inside a text ends no row
    for number, line in enumerate(lines[: -1 if not lines[-1] else None], 1):
        row = files.parse_json(line, f"{path} line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is {row!r:.60}, not an object")
        found.append(row)
    if not found:
        raise UserError(f"{path} is empty; it holds {what}")
    return found


# ---------------------------------------------------------------------------------------------------- replies


def answer(
    engine: Any,
    asked: Sequence[Row],
    out: str | Path,
    model: str,
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Both replies to each question, added to `<out>/mt_bench_replies.jsonl` a few questions at a time, all or none.

    Replies there of the same model and settings are taken as they are, so a run that was stopped goes on, and draws what it
    would have drawn: samples depend on the questions that are answered together, which are saved together.

    Args:
      engine: of `phi3_jax.inference.engine`, with a tokenizer.
      asked: of `questions`.
      out: folder.
      model: name of the model, with its step: what tells its replies from another's.
      seed: of the sampled categories.

    Returns:
      Rows in the order of `asked`: id, category, model, settings, turns, replies, finish, cut (prompts that lost their
      beginning because the context is too short).
    """
    path = Path(out) / REPLIES
    limit = max(1, min(MAX_NEW, engine.config.context // 4))
    template = dialogue.template_name(engine)
    base = {"max_new_tokens": limit, "seed": seed, "template": template}
    wanted = {q["id"]: base | {"temperature": TEMPERATURES.get(q["subset"], 0.7)} for q in asked}
    kept = {
        row["id"]: row
        for row in _kept(path)
        if _whole(row) and row.get("model") == model and row.get("settings") == wanted.get(row["id"])
        and [q["turns"] for q in asked if q["id"] == row["id"]] == [row.get("turns")]
    }  # fmt: skip
    todo = [q for q in asked if q["id"] not in kept]
    for group in _groups(todo):
        settings = wanted[group[0]["id"]]
        talks: list[list[dict[str, str]]] = [[] for _ in group]
        finish: list[list[str]] = [[] for _ in group]
        cut = [0] * len(group)
        for turn in range(TURNS):
            prompts = []
            for i, (question, talk) in enumerate(zip(group, talks, strict=True)):
                talk.append({"role": "user", "content": question["turns"][turn]})
                ids = dialogue.prompt_ids(engine, talk, template)
                cut[i] += len(ids) > engine.config.context - limit
                prompts.append(ids[-(engine.config.context - limit) :])
            sampling = _sampling(settings["temperature"], int.from_bytes(_digest([seed, turn, group[0]["id"]])[:4]))
            for i, reply in enumerate(engine.generate(prompts, limit, sampling, stop=dialogue.stops(template))):
                talks[i].append({"role": "assistant", "content": reply.text.strip()})
                finish[i].append(reply.finish)
        for question, talk, ends, n in zip(group, talks, finish, cut, strict=True):
            row = {"id": question["id"], "category": question["subset"], "model": model, "settings": settings}
            row |= {"turns": question["turns"], "replies": [m["content"] for m in talk[1::2]], "finish": ends, "cut": n}
            kept[question["id"]] = row
        rows.add_rows(path, [kept[question["id"]] for question in group], ANOTHER, REPLY)
        if progress is not None:
            progress(len(kept), len(asked), "MT-Bench replies")
    return [kept[q["id"]] for q in asked]


def _whole(row: Row) -> bool:
    """Whether a row of an earlier start, which anybody may have edited, is a reply."""
    replies = row.get("replies")
    texts = isinstance(replies, list) and len(replies) == TURNS and all(isinstance(text, str) for text in replies)
    return texts and isinstance(row.get("id"), str) and isinstance(row.get("cut"), int)


def _groups(todo: Sequence[Row]) -> Iterable[list[Row]]:
    by_temperature: dict[float, list[Row]] = {}
    for question in todo:
        by_temperature.setdefault(TEMPERATURES.get(question["subset"], 0.7), []).append(question)
    for same in by_temperature.values():
        yield from (same[i : i + GROUP] for i in range(0, len(same), GROUP))


def _sampling(temperature: float, seed: int) -> Any:
    from phi3_jax.inference.engine import Sampling

    return Sampling(temperature=temperature, seed=seed)


# ---------------------------------------------------------------------------------------------------- grading


def grade(
    replies: Sequence[Row],
    asked: Sequence[Row],
    prompts: Mapping[str, Row],
    judge: Ask,
    name: str,
    out: str | Path,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """One judgement a turn, added to `<out>/mt_bench_judgements.jsonl` as they come.

    Judgements there by the same judge of the same prompt are taken as they are; those without a rating are asked again.

    Args:
      replies, asked: of `answer` and `questions`, in the same order.
      prompts: of `judge_prompts`.
      judge: gets the whole prompt, returns its text; a `Prompt` has its system part apart.
      name: of the judge, for the rows.

    Returns:
      Rows: id, category, turn (1, 2), model, judge, rating (None where the text holds none from 1 to 10), judgement.
    """
    path, found, judged = Path(out) / JUDGEMENTS, [], Judge(name, judge, rating)
    kept = {_identity(row): row for row in _kept(path) if isinstance(row.get("rating"), int | float)}
    for reply, question in zip(replies, asked, strict=True):
        for turn in range(TURNS):
            prompt = prompt_of(question, reply["replies"], turn, prompts)
            row = {"id": question["id"], "category": question["subset"], "turn": turn + 1, "model": reply["model"]}
            row |= {"judge": name, "prompt_hash": _digest([prompt.system, prompt.user]).hex()[:16]}
            old = kept.get(_identity(row))
            if old is None:
                verdict, text = judged(prompt)
                old = row | {"rating": verdict, "judgement": text}
                rows.add_rows(path, [old], ANOTHER, JUDGEMENT)
            found.append(old)
            if progress is not None:
                progress(len(found), TURNS * len(asked), f"judgements by {name}")
    return found


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in JUDGEMENT)


def _kept(path: Path) -> list[Row]:
    """The rows of an earlier start; of several of one kind the last comes last."""
    try:
        return rows.read(path)[0]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {ANOTHER}") from error


def prompt_of(question: Row, replies: Sequence[str], turn: int, prompts: Mapping[str, Row]) -> Prompt:
    """The judge's prompt for one turn; math, reasoning and coding with the reference answers where there are some.

    The reference is GPT-4's, as in FastChat's own scores, or the question file's where that has none.
    """
    reference = question["gpt4_reference"] or question["reference"]
    math = question["subset"] in WITH_REFERENCE and len(reference) == TURNS
    row = prompts[f"single{'-math' * math}-v1{'-multi-turn' * turn}"]
    names = {"question": question["turns"][0], "answer": replies[0]}
    for i in range(TURNS):
        names |= {f"question_{i + 1}": question["turns"][i], f"answer_{i + 1}": replies[i]}
        names |= {f"ref_answer_{i + 1}": reference[i]} if math else {}
    # One pass over the template: braces in a reply are text.
    fill = re.sub(r"\{(\w+)\}", lambda m: names.get(m[1], m[0]), row["prompt_template"])
    return Prompt(row["system_prompt"], fill)


def rating(text: str) -> float | None:
    """The first `[[rating]]` (or `[rating]`) of a judge's text, if it is from 1 to 10."""
    for pattern in _RATING:
        if found := pattern.search(text):
            value = float(found[1])
            return value if 1 <= value <= 10 else None
    return None


def rows_of(judgements: Sequence[Row], total: int) -> list[Row]:
    """Rows for evals.jsonl: mean rating over both turns, each turn, and each category; none without a rating.

    The two turns of a question share its noise: standard errors are clustered by question. n counts ratings;
    subset_of is what the whole benchmark of `total` questions would have, where that is more, else None.
    """
    good = [j for j in judgements if j["rating"] is not None]
    groups = {"mt_bench": good}
    groups |= {f"mt_bench/turn{t}": [j for j in good if j["turn"] == t] for t in range(1, TURNS + 1)}
    groups |= {
        f"mt_bench/{c}": [j for j in good if j["category"] == c] for c in dict.fromkeys(j["category"] for j in good)
    }
    out = []
    for task, members in groups.items():
        if not members:
            continue
        found = statistics.clustered_mean([m["rating"] for m in members], np.array([m["id"] for m in members]))
        judge = members[0]["judge"]
        row = {"task": task, "metric": f"rating by {judge}", "scoring": "judge", "judge": judge, "value": found.value}
        row |= {"n": len(members), "stderr": found.stderr, "low": _clip(found.low), "high": _clip(found.high)}
        whole = task == "mt_bench" and len(members) < TURNS * total
        out.append(row | {"chance": None, "subset_of": TURNS * total if whole else None})
    return out


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()


def _clip(value: float) -> float:
    return float(np.clip(value, 1, 10))  # a NaN stays one
