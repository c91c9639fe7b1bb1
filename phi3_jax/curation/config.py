"""What a curation is: an order of named steps, each a rule with parameters. A config is data, and so is its plan.

An experiment file gives a ConfigDict with `order`, the names of the steps, and `rules`, {name: {parameter: value}}; a step
whose name is no rule's says which it is by `rule`, a name of the table or FILE.py:NAME. `base` has all keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from phi3_jax import commands, keys
from phi3_jax.curation import against, decontaminate, phases, scores, wanted
from phi3_jax.curation.rule import Step
from phi3_jax.curation.table import CORPUS, DOCUMENT, keys_of
from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import Key

PLACES = {"against": ("corpus",), "perplexity": ("model",), "learnability": ("small", "large")}  # parameters of rules
SECTIONS = ("rules", "synthetic")  # of a config, beside its keys
VERSION = 1  # of what the same config and input give; raise it when a rule gives something else

KEYS: dict[str, Key] = {
    "text_field": keys.word("field of a row that holds its text", "text"),
    "tokenizer": keys.local("whose tokens the report counts: bytes, or a file or folder", "bytes"),
    "sample": keys.number("share of the documents, by id, that is taken", 1.0, 1e-9, 1.0),
    "seed": keys.whole("of the examples that the report shows", 0),
    "part_rows": keys.whole("documents of a part of the result", 2000, 1, 10**6),
    "phase1": keys.whole("tokens of phase 1, for the columns role and phases; 0: no phases", 0),
    "phase2": keys.whole("tokens of phase 2", 0),
    "roles": Key(
        "NAME=SOURCE+GENRE:RATE1:RATE2, shares of each phase's tokens; * is all that no other role names",
        (),
        tuple,
        item=Key("a role", None, str, check=phases.check_role),
    ),
    "quality": keys.share("least quality (phi3_jax.data.quality) in phase 2 of a role in both phases", 0.6),
    "order": Key("names of the steps", (), tuple, 1, item=keys.word("a step", None), unique=True),
}


def with_keys(command: commands.Command) -> commands.Command:
    """A command that takes --config.KEY=VALUE of every key, and of every parameter of a step as rules.STEP.PARAMETER."""
    steps = {f"rules.{rule}.{p}": key for rule in (*DOCUMENT, *CORPUS) for p, key in keys_of(rule).items()}
    synthetic = {f"synthetic.{name}": key for name, key in wanted.KEYS.items()}
    return dataclasses.replace(command, keys=KEYS | steps | synthetic)


def base(**changes: Any) -> ConfigDict:
    """A config with every key at its default, and no steps."""
    made = ConfigDict({name: key.default for name, key in KEYS.items()} | {"rules": {}})
    made.update(changes)
    return made


def with_steps(config: ConfigDict, *steps: str, **parameters: Mapping[str, Any]) -> ConfigDict:
    """Sets the order and makes every parameter of every step a key of config.rules.STEP, so that a command may set it.

    Raises:
      UserError: a step or a parameter that is not there.
    """
    for step in parameters:
        if step not in steps:
            raise UserError(f"parameters for {step!r}, which is no step{nearest(step, steps)}")
    config.order = tuple(steps)
    for name in steps:
        given = dict(parameters.get(name, {}))
        rule = _rule(name, given)
        known = keys_of(rule)
        for parameter in given:
            if parameter not in known and parameter != "rule":
                raise UserError(f"{name} has no parameter {parameter!r}{nearest(parameter, known)}")
        config.rules[name] = ConfigDict({p: given.get(p, key.default) for p, key in known.items()} | given)
    return config


def _rule(name: str, given: Mapping[str, Any]) -> str:
    asked = str(given.get("rule", name))
    if ":" in asked:
        return "own"
    if asked not in DOCUMENT and asked not in CORPUS:
        raise UserError(
            f"unknown rule {asked!r}{nearest(asked, [*DOCUMENT, *CORPUS])}, or rule=FILE.py:NAME of your own"
        )
    return asked


def steps_of(config: Mapping[str, Any]) -> list[Step]:
    """The plan of a config, every value checked.

    Raises:
      UserError: an unknown step, rule, parameter or key, or a value out of range.
    """
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    for name in plain:
        if name not in KEYS and name not in SECTIONS:
            raise UserError(f"unknown key config.{name}{nearest(name, [*KEYS, *SECTIONS])}")
    for name, key in KEYS.items():
        if name not in plain:
            raise UserError(f"config.{name} is missing; start from phi3_jax.curation.config.base()")
        key.valid(plain[name], f"config.{name}={keys.text(plain[name])}")
    if "synthetic" in plain:
        wanted.check(plain["synthetic"])
    found = []
    for name in plain["order"]:
        given = plain["rules"].get(name, {})
        rule = _rule(name, given)
        known = keys_of(rule)
        for parameter, value in given.items():
            if parameter == "rule" and rule != "own":
                continue
            if parameter not in known:
                raise UserError(f"unknown key config.rules.{name}.{parameter}{nearest(parameter, known)}")
            known[parameter].valid(value, f"config.rules.{name}.{parameter}={keys.text(value)}")
        values = {p: given.get(p, key.default) for p, key in known.items()}
        found.append(Step(name, rule, values, rule in CORPUS))
    return found


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder keeps of a config: everything that changes its result, the content of a user's own rule too."""
    plain = {name: config[name] for name in KEYS if name not in ("order",)}
    steps = []
    for step in steps_of(config):
        entry: dict[str, Any] = {"step": step.name, "rule": step.rule, "parameters": dict(step.parameters)}
        if step.rule == "own":
            file = Path(step.parameters["rule"].rpartition(":")[0])
            if not file.is_file():
                raise UserError(f"{step.name}: rule={step.parameters['rule']} names no file; write FILE.py:NAME")
            entry["content"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if step.rule == "decontaminate":
            entry["content"] = decontaminate.content(step.parameters["benchmarks"])
        for name in PLACES.get(step.rule, ()):  # known by their content, wherever they lie
            known = against.content if step.rule == "against" else scores.content
            entry[f"{name} content"] = known(entry["parameters"].pop(name))
        steps.append(entry)
    if "synthetic" in config:
        plain["synthetic"] = wanted.described(config["synthetic"])
    return json.loads(json.dumps({"version": VERSION, **plain, "steps": steps}, default=list))


def fingerprint(described: Mapping[str, Any], inputs: list[Any]) -> str:
    """A name of what a curation gives: of its config and of the content of its inputs, not of places or workers."""
    content = json.dumps([described, inputs], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, each as `steps.near.jaccard: 0.8 -> 0.7`."""
    before, after = _flat(old), _flat(new)
    found = [
        f"{name}: {before[name]} -> {after[name]}"
        for name in dict.fromkeys([*before, *after])
        if name in before and name in after and before[name] != after[name]
    ]
    return found or [f"{name}: only in one" for name in {*before} ^ {*after}]


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in described.items() if name not in ("steps", "synthetic")}
    found |= {f"synthetic.{name}": value for name, value in described.get("synthetic", {}).items()}
    found["order"] = ",".join(step["step"] for step in described.get("steps", []))
    for step in described.get("steps", []):
        found |= {f"{step['step']}.{name}": value for name, value in step.items() if name not in ("step", "parameters")}
        found |= {f"{step['step']}.{name}": value for name, value in step["parameters"].items()}
    return found
