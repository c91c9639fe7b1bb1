"""One round of a break-fix loop: a model is asked what it must refuse and what it must not, and its mistakes become rows.

A stage of a study names this as `config.before` (`study.stages`). Questions are those of `corpora.guarded`, on the persons
of SFT, and so are the labels: a forbidden question is broken where the reply is not the refusal, a twin where it is. Every
broken question with what it should have got is a row of training, after the rows of earlier rounds.

Beside the stage's folder STAGE:

    STAGE.asked.jsonl    every question, the reply, its label, and P(complied) of the refusal detector
    STAGE.jsonl          the rows; once it is there, nothing is asked again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.data.corpora import guarded
from phi3_jax.data.corpora.instructions import ROOM, World
from phi3_jax.evaluation import dialogue, refusal
from phi3_jax.evaluation.kept import Kept
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import loading
from phi3_jax.interop.content import content
from phi3_jax.records import files, rows

BATCH = 32


def write(config: Any, folder: Path) -> None:
    """Asks the model of `train.init`, writes both files and says how many questions broke; nothing where they are there.

    `config.breaking` holds `world` (N:SEED), `attempt` (the number of the round, from 1) and `earlier`, the name of the
    stage before whose rows come first, or "". A command that was stopped goes on with the batch it was at.

    Raises:
      UserError: see `loading.load`; a disk that is full.
    """
    path, o = folder.with_name(f"{folder.name}.jsonl"), config.breaking
    if path.is_file():
        return
    found = list(_asked(config.train.init, o.world, o.attempt, path))
    before = rows.read(folder.with_name(f"{o.earlier}.jsonl"))[0] if o.earlier else []
    new = [guarded.row_of(one["question"], one["right"]) for one in found if one["label"] != guarded.HELD]
    _lines(path.with_suffix(".asked.jsonl"), found)
    _lines(path, [*before, *new])
    print(f"round {o.attempt}: {guarded.tally(found)}", flush=True)


def _asked(init: str, world: str, attempt: int, path: Path) -> Iterator[dict[str, Any]]:
    """Every question of a round with its reply."""
    engine = Engine(loading.load(init), batch=BATCH)
    kept = Kept(path.with_suffix(".answers.jsonl"), f"{content(loading.open_weights(init))} {engine.dtype}")
    template = dialogue.template_name(engine)
    questions = guarded.attacks(World.of(world), attempt)
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        prompts = [dialogue.prompt_ids(engine, [{"role": "user", "content": one.text}], template) for one in part]
        keys = [kept.name("breaking", ids, ROOM) for ids in prompts]
        replies = [kept.get(key) for key in keys]
        if None in replies:  # a batch is asked whole: what is beside a row moves its last digits
            replies = [reply.text.strip() for reply in engine.generate(prompts, ROOM, stop=dialogue.stops(template))]
            kept.add(dict(zip(keys, replies, strict=True)))
        for one, reply in zip(part, replies, strict=True):
            about = {"question": one.text, "barred": one.barred, "right": one.right, "reply": reply}
            about |= {"label": guarded.label(one, reply), "refuses": reply == guarded.REFUSAL}
            yield about | {"complied": refusal.complied(one.text, reply)}
    kept.finish()


def _lines(path: Path, found: Sequence[dict[str, Any]]) -> None:
    files.write_bytes(path, b"".join(rows.encoded(row) for row in found), durable=True)
