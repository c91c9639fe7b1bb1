"""Runs as a command line names them, before the data say how many steps a budget is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from phi3_jax.configs import RunConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.family import GIVEN
from phi3_jax.study.arms import parts
from phi3_jax.study.runs import _optim, budget_name, budgets_of


@dataclasses.dataclass(frozen=True)
class AskedRun:
    """A run before the data say how many steps its budget is: what a scheduler can name on a machine without data.

    `trunk` is the name of the run it leaves (None for a run from scratch).
    """

    size: str
    seed: int
    budget: int
    trunk: str | None = None
    arm: str = ""

    @property
    def name(self) -> str:
        """`mini-s0-4M`, after the arm where there is one; without the budget where that is a number of epochs."""
        if not self.budget:
            return f"{self.size}-s{self.seed}"
        name = f"{self.size}-s{self.seed}-{budget_name(self.budget)}"
        return f"{self.arm}-{name}" if self.arm else name


def asked_runs(config: Any, scale: str) -> list[AskedRun]:
    """All runs a config asks for, trunks before their forks; `config.scale` is not looked at, `scale` is."""
    asked, wsd = [], _optim(config, scale == "full").schedule == "wsd"
    for part in parts(config, scale):
        for seed in range(part.config.seed, part.config.seed + part.config.seeds):
            for size in part.config.sizes:
                trunk, *smaller = reversed(budgets_of(part.config, scale, size))
                root = AskedRun(size, seed, trunk, arm=part.arm)
                asked += [root, *(AskedRun(size, seed, b, root.name if wsd else None, part.arm) for b in smaller)]
    return asked


def resolve_runs(asked: Sequence[AskedRun], runs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """{asked name: planned run}; budgets less than one batch apart are one run, which the largest of them names."""
    resolved: dict[str, RunConfig] = {}
    for ask in sorted(asked, key=lambda a: -a.budget):
        for run in runs:
            steps = ask.budget // run.tokens_per_step
            same = (run.arm, run.seed) == (ask.arm, ask.seed) and ask.size in (run.model.member, GIVEN)
            if same and run.steps == (steps or run.steps) and run not in resolved.values():
                resolved[ask.name] = run
    return resolved


def select_runs(names: Sequence[str], asked: Sequence[AskedRun], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs of some names (asked for, or as planned), in the order of `runs`.

    Raises:
      UserError: a name that is neither.
    """
    table = resolve_runs(asked, runs) | {run.name: run for run in runs}
    known = {ask.name for ask in asked} | table.keys()
    for name in names:
        if name not in known:
            raise UserError(f"--run {name!r} is no run of this study{nearest(name, sorted(known))}")
    wanted = {table[name].name for name in names if name in table}
    return [run for run in runs if run.name in wanted]
