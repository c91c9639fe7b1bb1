"""Which runs of a study in blocks ran, and what its rule says: `python -m phi3_jax.study.verdict FILE FOLDER`.

FILE is the experiment, such as experiments/calibration.py, whose words are its blocks; FOLDER holds BLOCK.csv of each block
that has begun. Every planned run is named as run or not run, first. A table that is refused counts as not run, and the
command ends with the reason and status 2.

An experiment may name a rule of its own, `config.verdict` = MODULE:FUNCTION, whose lines for FOLDER are printed instead;
where its module has `figures`, they are drawn into FOLDER.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("verdict"))

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax.data.corpora.facts import MAX_POOL, Universe
from phi3_jax.errors import UserError
from phi3_jax.experiment import arms_of, load_config
from phi3_jax.scaling import regime
from phi3_jax.scaling.regime import Block, Planned
from phi3_jax.study.asked import asked_runs


def plan(config: Any) -> list[Planned]:
    """The runs of one block, in order, each with what its filter keeps."""
    shares = {}
    for name, arm in arms_of(config).items():
        frequency = arm.frequency or config.data.frequency
        universe = Universe(config.universe, round(arm.facts), MAX_POOL, frequencies=frequency)
        shares[name] = arm.facts / config.universe, universe.kept
    return [
        Planned(run.name, run.arm, run.size, run.seed, run.budget, *shares[run.arm])
        for run in asked_runs(config, config.scale)
    ]


def blocks(file: str, folder: Path) -> tuple[dict[str, Block], dict[str, Any], list[UserError]]:
    """({block: what of it ran}, the rule, why tables are refused) of an experiment and the folder of its tables.

    Raises:
      UserError: an experiment without a rule of this kind; no such folder.
    """
    config = load_config(file)
    if not config.get("regime"):
        raise UserError(f"{file} has no rule of blocks (config.regime); give experiments/calibration.py")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that holds the tables of the blocks, as BLOCK.csv")
    found, refused = {}, []
    for name in config.regime.blocks:
        found[name], table = Block(plan(load_config(f"{file}:{name}"))), folder / f"{name}.csv"
        if table.is_file():
            try:
                found[name] = Block(found[name].planned, regime.read(table, found[name].planned))
            except UserError as error:
                refused.append(error)
    return found, config.regime.to_dict(), refused


def lines_of(found: Mapping[str, Block], rule: Mapping[str, Any]) -> list[str]:
    """What ran and what did not by block, then a line a verdict beside what was predicted."""
    said = []
    for name, block in found.items():
        ran = {run.name for run in block.runs}
        missing = [p.name for p in block.planned if p.name not in ran]
        said.append(f"{name}: {len(ran)} of {len(block.planned)} planned runs ran")
        said += [f"{name}: not run: {', '.join(missing)}"] if ran and missing else []
    for verdict in regime.decide(found, rule):
        predicted = rule["predictions"].get(verdict.estimand)
        beside = f" (predicted: {predicted})" if predicted else ""
        said.append(f"{verdict.estimand}: {verdict.word}{beside}. {verdict.sentence}")
    return said


def command(flags: Mapping[str, Any]) -> None:
    """The command.

    Raises:
      UserError: an experiment without such a rule; the first table that is refused, after all else is said.
    """
    if rule_of := load_config(flags["experiment"]).get("verdict"):
        module, _, name = rule_of.partition(":")
        of_rule, folder = importlib.import_module(module), Path(flags["folder"])
        print(*getattr(of_rule, name)(folder), sep="\n")
        for one in of_rule.figures(folder) if hasattr(of_rule, "figures") else ():
            print(f"{one.title}: {one.svg}")
        return
    found, rule, refused = blocks(flags["experiment"], Path(flags["folder"]))
    print(*lines_of(found, rule), sep="\n", flush=True)
    for error in refused:
        raise error
