"""Studies that follow one another: `config.stages` holds their configs by name, each of which may start from one before.

`train.init=@NAME` is the study NAME of the same folder, and a stage's folder is named by its key. `{root}` in `data.source`
is that folder of all. `config.before` = MODULE:FUNCTION is called with a stage's config and folder before it begins, at
each start, for rows that only the stages before it can give.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.experiment import Command, check, override
from phi3_jax.records.rows import read_rows


def of(command: Command) -> dict[str, Command]:
    """The commands that a command stands for, in turn; {"": itself} where it has no stages.

    Overrides that were typed hold for every stage.

    Raises:
      UserError: options that name runs, which are those of one study.
    """
    stages = command.config.get("stages")
    if not stages:
        return {"": command}
    if command.runs:
        raise UserError("--run names runs of one study, and this is several; name the experiment of one")
    root = command.workdir or Path("runs") / command.config.name
    found = {}
    for name in sorted(stages):
        config = stages[name]
        if config.train.init.startswith("@"):
            config.train.init = str(root / config.train.init[1:])
        config.data.source = config.data.source.replace("{root}", str(root))
        for typed in command.overrides:
            path, _, value = typed.partition("=")
            override(config, path, value)
        check(config)
        found[name] = dataclasses.replace(command, config=config, workdir=root / name)
    return found


def prepare(command: Command) -> None:
    """Calls what a stage wants to have done before it begins."""
    if before := command.config.get("before"):
        module, _, name = before.partition(":")
        getattr(importlib.import_module(module), name)(command.config, command.workdir)


def summary(commands: dict[str, Command]) -> Iterator[str]:
    """A table of the last chat scores of each stage, where they have any."""
    table: dict[str, dict[str, float]] = {}
    for name, command in commands.items():
        for path in sorted(command.workdir.glob("*/evals.jsonl")) if command.workdir else ():
            rows = [row for row in read_rows(path) if row["suite"] == "chat"]
            for row in rows:
                if row["step"] == max(other["step"] for other in rows):
                    table.setdefault(f"{row['task']} {row['metric']}", {})[name] = row["value"]
    if table:
        yield "  ".join(f"{cell:>18}" for cell in ("chat", *commands))
    for what, values in table.items():
        cells = (f"{values[name]:.1%}" if name in values else "" for name in commands)
        yield "  ".join(f"{cell:>18}" for cell in (what, *cells))
