"""A study that grows: what an earlier command began is kept, and runs of new budgets leave the trunks that are there.

A trunk of the larger budgets of a new command would have another warm-up and another length than the one on the disk. So a
run that has begun keeps its schedule, and a new budget is a fork of a trunk on the disk: from its checkpoint where the new
run's decay starts, or from an earlier one of the constant phase, on which the length of a run has no influence. Where no
such checkpoint was kept, the new run is a trunk of its own, with the warm-up of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_jax.configs import RunConfig, decay_start, run_from_dict, science
from phi3_jax.records.files import read_state

_SCHEDULE = ("steps", "trunk_steps", "start_step")


def grown(runs: Sequence[RunConfig], folder: Path) -> list[RunConfig]:
    """The planned runs of a study in `folder`, fitted to what is there; unchanged where nothing has begun."""
    begun = {run.name: old for run in runs if (old := _begun(run, folder)) is not None}
    if not begun:
        return list(runs)
    found: dict[str, RunConfig] = {name: _kept(run, begun[name]) for run in runs if (name := run.name) in begun}
    alone: dict[str, list[RunConfig]] = {}  # {a trunk that they could not leave: runs}
    for run in runs:
        if run.name in begun:
            continue
        trunks = [t for t in found.values() if t.name in begun and t.parent is None and _same(t, run)]
        forks = [(start, trunk) for trunk in trunks if (start := _leaves(run, trunk, folder))]
        if forks and run.optim.schedule == "wsd":
            start, trunk = max(forks, key=lambda fork: fork[0])
            found[run.name] = _fork(run, trunk, start)
            found[trunk.name] = dataclasses.replace(trunk, keep_steps=tuple(sorted({*trunk.keep_steps, start})))
        elif trunks and run.optim.schedule == "wsd":
            alone.setdefault(trunks[0].name, []).append(dataclasses.replace(run, trunk_steps=trunks[0].trunk_steps))
        else:
            found[run.name] = run
    for others in alone.values():
        trunk = max(others, key=lambda run: run.steps)
        starts = {run.name: max(0, decay_start(run.steps, run.optim.decay)) for run in others if run is not trunk}
        trunk = dataclasses.replace(
            trunk, parent=None, start_step=0, keep_steps=tuple(sorted(filter(None, {*starts.values()})))
        )
        found |= {run.name: _fork(run, trunk, starts[run.name]) for run in others if run.name != trunk.name}
        found[trunk.name] = trunk
    # A trunk before its forks, else as planned.
    order = [run.name for run in runs]
    return sorted(found.values(), key=lambda run: (run.parent is not None, order.index(run.name)))


def _begun(run: RunConfig, folder: Path) -> RunConfig | None:
    """The run as it began, where one of this name did that differs in its schedule alone."""
    written: dict[str, Any] = read_state(folder / run.name / "config.json").get("config", {})
    if not written:
        return None
    try:
        old = run_from_dict(written)
    except (KeyError, TypeError, ValueError):  # damaged: what else is there decides
        return None
    return old if old.steps == run.steps and _same(old, run) else None


def _same(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs differ in their lengths alone."""
    parts = [{key: value for key, value in science(run).items() if key not in _SCHEDULE} for run in (one, other)]
    return parts[0] == parts[1]


def _kept(run: RunConfig, old: RunConfig) -> RunConfig:
    return dataclasses.replace(
        run, trunk_steps=old.trunk_steps, start_step=old.start_step, parent=old.parent, keep_steps=old.keep_steps
    )


def _fork(run: RunConfig, trunk: RunConfig, start: int) -> RunConfig:
    """`run` from step `start` of the trunk on; with 0 from scratch, with the trunk's warm-up."""
    parent = trunk.name if start else None
    return dataclasses.replace(run, trunk_steps=trunk.trunk_steps, start_step=start, parent=parent, keep_steps=())


def _leaves(run: RunConfig, trunk: RunConfig, folder: Path) -> int:
    """The latest step at which `run` can leave a trunk: of its constant phase, and kept; 0: none."""
    from phi3_jax.records.checkpoint import list_steps  # brings orbax, which a plan does without

    latest = min(decay_start(length, run.optim.decay) for length in (run.steps, trunk.steps))
    there = list_steps(folder / trunk.name / "checkpoints")
    if trunk.steps in there:  # it has ended, and its checkpoints stay
        kept = set(there)
    else:
        ahead = {latest} if latest > max(there, default=0) else set()
        kept = {*trunk.keep_steps} | ahead
    return max((step for step in kept if step <= latest), default=0)
