"""Stages of another curation that are the same in this one: other limits decide anew over what was measured there.

Files of stages are whole, and replaced by others but never written into, so that a second name for them is enough.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax.curation.rule import Step
from phi3_jax.curation.table import CORPUS, DOCUMENT
from phi3_jax.curation.work import segments
from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError
from phi3_jax.records import files

_READ = ("version", "text_field", "sample")  # of a config: what decides over the documents that are read


def reuse(other: Path, out: Path, described: Mapping[str, Any]) -> None:
    """Takes over what a finished curation read and measured, as far as its plan is the same.

    Steps are the same up to the first that measures otherwise. One that only decides otherwise is the last whose numbers
    are taken; steps after it saw other documents.

    Raises:
      UserError: `other` holds no finished curation, or one that reads otherwise.
    """
    if not (other / listing.MANIFEST).is_file():
        raise UserError(f"--reuse {other} is no finished curation; name the folder that its --output named")
    old = files.read_state(other / listing.CURATION)["config"]
    for name in _READ:
        if old[name] != described[name]:
            raise UserError(
                f"--reuse {other} was read with {name}={old[name]}, this one with {described[name]}; leave it out"
            )
    _take(other, out, "read.json", "read")
    before, now = ([*segments(_steps(of))] for of in (old, described))
    contents = [
        {
            step["step"]: {name: value for name, value in step.items() if name.endswith("content")}
            for step in of["steps"]
        }
        for of in (old, described)
    ]
    at = 0
    for mine, theirs in zip(now, before, strict=False):
        known = [[(s.name, s.rule, measuring(s), contents[side].get(s.name)) for s in segment]
                 for side, segment in ((0, theirs), (1, mine))]  # fmt: skip
        if known[0] != known[1]:
            return
        same = [dict(s.parameters) for s in mine] == [dict(s.parameters) for s in theirs]
        folder = f"{at:02}-{mine[0].name}"
        _take(
            other, out, folder, *([f"{folder}-cut", f"dropped-{at:02}.parquet", f"noted-{at:02}.json"] if same else [])
        )
        at += len(mine)
        if not same:
            return


def measuring(step: Step) -> dict[str, Any]:
    """The parameters of a step that change what it measures."""
    limits = CORPUS[step.rule].limits if step.corpus else DOCUMENT[step.rule].limits
    return {name: value for name, value in step.parameters.items() if name not in limits}


def _steps(described: Mapping[str, Any]) -> list[Step]:
    return [Step(s["step"], s["rule"], s["parameters"], s["rule"] in CORPUS) for s in described["steps"]]


def _take(other: Path, out: Path, *names: str) -> None:
    for name in names:
        source = other / "stages" / name
        found = [p for p in sorted(source.rglob("*")) if p.is_file()] if source.is_dir() else [source]
        for path in found:
            target = out / "stages" / path.relative_to(other / "stages")
            if path.is_file() and not target.exists() and not path.name.startswith("."):
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(path, target)


def _link(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # another file system, or one without links
        os.link(path, target)
        return
    partial = files.temporary(target)
    shutil.copyfile(path, partial)
    os.replace(partial, target)
