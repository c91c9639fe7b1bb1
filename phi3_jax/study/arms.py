"""A study with arms as plain studies of one arm and seed each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from phi3_jax import family
from phi3_jax.data import sources
from phi3_jax.errors import UserError
from phi3_jax.experiment import SOURCES, Arm, arms_of

# facts grow with the parameters; names are pairs of ids, so that no universe is larger than micro's
K_FACTS = {"femto": 0.25, "pico": 1, "nano": 4, "micro": 32}


@dataclasses.dataclass(frozen=True)
class Part:
    """One seed of one arm: a plain study of its own, of one budget, with its own data."""

    arm: str  # its name; "" for a study without arms
    data: Path  # folder of its data within the study's
    config: Any


def parts(config: Any, scale: str) -> list[Part]:
    """A study as plain studies: itself, or where `config.arms` says so one a seed and arm, seeds outermost.

    Every seed has a universe of facts and reasoning items of its own. Counts of an arm are multiplied by `K_FACTS` and by
    `config.size_factor`. Arms that differ in the training alone share their data.
    """
    _check_weights(config)
    found: list[Part] = []
    folders: dict[str, Path] = {}
    for i in range(config.seeds):
        for name, arm in arms_of(config).items():
            if i >= (config.seeds if arm.seeds is None else arm.seeds):
                continue
            factor = K_FACTS.get(scale, 32) * config.size_factor
            one = _plain(config, arm, config.seed + i, factor)
            key = json.dumps(one.data.to_dict(), sort_keys=True) + str(arm.tokens * factor)
            folder = folders.setdefault(key, Path("data") / f"{name}-s{one.seed}")
            budgets = {size: _budgets(one, arm, size, scale, factor) for size in one.sizes}
            for same in sorted(set(budgets.values())):
                part = ConfigDict(one.to_dict())
                part.sizes = tuple(size for size in one.sizes if budgets[size] == same)
                part.budgets = same or one.budgets
                found.append(Part(name, folder, part))
    return found or [Part("", Path("data"), config)]


def _budgets(one: Any, arm: Arm, size: str, scale: str, factor: float) -> tuple[int, ...]:
    """Where an arm gives a size another number of tokens than that of all its sources; else ()."""
    if arm.ratios:
        params = family.proxy(size, scale, one.ladder).matrix_params
        return tuple(round(ratio * params * one.size_factor) for ratio in sorted(arm.ratios))
    return (round(arm.budgets[size] * factor),) if size in arm.budgets else ()


def _check_weights(config: Any) -> None:
    """Refuses arms in which a fact weighs differently, unless the study says that its loss is weighed so.

    Raises:
      UserError: naming two arms and the ratio.
    """
    weights = {
        name: arm.fact_weight("domain")
        for name, arm in arms_of(config).items()
        if arm.facts and arm.knowledge and not (arm.weighting or config.train.weighting)
    }
    if weights and (ratio := max(weights.values()) / min(weights.values())) > 1.01:
        most, least = max(weights, key=weights.__getitem__), min(weights, key=weights.__getitem__)
        raise UserError(
            f"a fact weighs {ratio:.2f} times as much in the loss of arm {most} as in that of {least}, since each domain "
            "weighs the same; set train.weighting=token for equal weights, or say train.weighting=domain"
        )


def _plain(config: Any, arm: Arm, seed: int, factor: float) -> Any:
    """The config of one seed of an arm."""
    one = ConfigDict(config.to_dict())
    one.arms, one.seed, one.seeds = {}, seed, 1
    one.update({key: getattr(arm, key) for key in ("sizes", "ladder", "mup") if getattr(arm, key) is not None})
    if arm.data:
        one.data.source = arm.data
        if sources.find(arm.data).fresh:
            one.data.seed = seed
    else:
        counts = {key: getattr(arm, key) * factor for key in ("facts", *SOURCES)}
        total = sum(counts[key] for key in SOURCES)
        one.budgets = (round(total),)
        one.data.update(
            source="facts", universe=round(config.universe * factor), facts=round(counts["facts"]),
            share=counts["knowledge"] / total, text_share=counts["text"] / total, reading=counts["reading"] / total,
            unheard=counts["unheard"] / total, seed=seed,
            **{key: getattr(arm, key) for key in ("value_bits", "frequency") if getattr(arm, key) is not None},
        )  # fmt: skip
    if arm.peak_lr is not None:
        one.optim.peak_lr = arm.peak_lr
    if arm.weighting is not None:
        one.train.weighting = arm.weighting
    return one
