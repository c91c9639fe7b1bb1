"""A phase of a curated corpus that was planned with budgets: each role a Task of a seqio Mixture, at its rate.

The manifest of the folder says which roles a phase has and at which rates; each document's row says which role and which
phases it belongs to. A phase 2 that holds a document of a role in both phases which phase 1 does not hold is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_jax.data.corpora import files, text
from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.recipe import Recipe
from phi3_jax.data.sources import documents
from phi3_jax.data.sources.source import Request, Source
from phi3_jax.errors import UserError
from phi3_jax.records.files import read_json


def recipe(request: Request) -> Recipe:
    """A source and an eval for each role of the phase."""
    from phi3_jax.data import tasks  # the only way to TensorFlow

    how = documents.Packing.of(request)
    phase, _, folder = request.rest.partition(":")
    path = files.local(folder)
    if not folder or not (path / files.CURATION).is_file():
        raise UserError(
            f"data={request.spec} is not curated:PHASE:FOLDER with the folder of a curation, curated:1:curated/mine"
        )
    account = files.account(path)
    phases = read_json(path / files.MANIFEST).get("phases", {})
    if phase not in phases:
        there = f"its phases are {', '.join(phases)}" if phases else "it was curated without --config.phase1"
        raise UserError(f"data={request.spec}: {folder} has no phase {phase!r}; {there}")
    roles = phases[phase]["roles"]
    both = set.intersection(*({*of["roles"]} for of in phases.values())) if len(phases) > 1 else set()
    parts = {
        role: tasks.Part(functools.partial(texts, path, account, role, phase, role in both), of["rate"])
        for role, of in roles.items()
    }
    mixture = tasks.add_mixture(f"curated_{phase}", parts, how.tokenizer)
    named = [
        documents.Named(task.name.split(".")[-1], mixture.get_rate(task), tasks.documents(task))
        for task in mixture.tasks
    ]
    return documents.recipe(how, named, Inputs([account]), f"curated:{phase}:{path.resolve().name}")


def texts(path: Path, account: files.Account, role: str, phase: str, both: bool) -> Iterator[str]:
    """The documents of a role in a phase.

    Raises:
      UserError: a document of phase 2 that is none of phase 1, of a role in both.
    """
    for place, row in text.rows(account):
        found: dict[str, Any] = row
        if found["role"] != role or phase not in found["phases"]:
            continue
        if both and "1" not in found["phases"]:
            raise UserError(f"{place}: document {found['id']} is in phase 2 and not in phase 1 of {path}; curate again")
        yield found["text"]


SOURCE = Source(
    "curated:PHASE:FOLDER",
    "phase 1 or 2 of a corpus curated with budgets (--config.phase1=4M); each role at its rate",
    recipe,
    documents.OPTIONS,
)
