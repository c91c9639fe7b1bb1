"""What an extension was asked for, checked before anything is written."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.data.long_rows import HELD_OUT
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.extension import lists
from phi3_jax.extension.lists import Task
from phi3_jax.extension.search import METHODS
from phi3_jax.interop import loading
from phi3_jax.keys import parse_count
from phi3_jax.planning import memory
from phi3_jax.records import files
from phi3_jax.units import human_bytes

CLOSED = ("yarn", "ntk", "pi")
FITNESS = ("both", "needle", "text")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One extension.

    Attributes:
      flags: as they were typed, with defaults.
      weights: of the model.
      tokenizer: its own.
      task: head_dim, base, L0 and s.
      target: tokens of the new window.
      data: text, as --data of phi3_jax.data.export names it.
      given: a list that is taken as it is, instead of a search.
      factor: the attention factor that stands beside that list, where it is another than the formula's.
    """

    flags: Mapping[str, Any]
    weights: loading.Weights
    tokenizer: Tokenizer
    task: Task
    target: int
    data: str
    given: np.ndarray | None
    factor: float | None

    @property
    def model(self) -> ModelConfig:
        """The model without lists or window, which is what lists are tried on."""
        return dataclasses.replace(self.weights.config, context=self.target, longrope=None, sliding_window=None)

    @property
    def method(self) -> str:
        return "given" if self.given is not None else str(self.flags["method"])

    @property
    def knows_needles(self) -> bool:
        """Whether the model was trained to find needles, so that its training goes on with them."""
        return self.trained_on.startswith("needles:")

    @property
    def held_out(self) -> float:
        """Share of documents that no training sees: those of the search's rows and of the evaluation's."""
        return HELD_OUT

    @property
    def trained_on(self) -> str:
        """The data of the run, as --data names them; "" where nothing says it."""
        record = files.read_state(self.weights.run / "config.json") if self.weights.run else {}
        return str(((record.get("config") or {}).get("data") or {}).get("source") or "")

    @property
    def searches(self) -> bool:
        return self.method in METHODS


def asked(flags: Mapping[str, Any]) -> Asked:
    """The extension that flags name.

    Raises:
      UserError: weights that cannot be extended, a target that is none, a list that is none, no data, no tokenizer, not
        enough memory.
    """
    weights = loading.open_weights(flags["model"])
    cfg = weights.config
    if cfg.experts:
        raise UserError(
            f"{flags['model']} is a mixture of experts, which cannot be trained here, so it is not extended; take mini, "
            "small or medium"
        )
    if cfg.longrope and not flags["original"]:
        raise UserError(
            f"{flags['model']} has LongRoPE lists from {cfg.longrope.original_context:,} to {cfg.context:,} tokens "
            "already; say from which length to extend again: --original N"
        )
    original = flags["original"] or _trained_at(weights)
    target = _target(flags["to"], original)
    if target <= original:
        raise UserError(f"--to {flags['to']} is {target:,} tokens, not above the original {original:,}; give more")
    tokenizer = loading.tokenizer_of(weights.kept, weights.run)
    if tokenizer is None:
        raise UserError(
            f"{flags['model']} came without a tokenizer, which the rows of the search need; put its files there"
        )
    task = Task(cfg.head_dim, cfg.rope_base, original, target / original)
    given, factor = _given(flags["factors"], task) if flags["factors"] else (None, None)
    data = flags["data"] or _trained_on(weights)
    if not data:
        raise UserError("--data is missing: text with documents longer than the target; a file, a folder or pydocs")
    found = Asked(flags, weights, tokenizer, task, target, data, given, factor)
    _require_memory(found)
    return found


def _target(text: str, original: int) -> int:
    if re.fullmatch(r"[0-9]{1,6}x", text):
        return int(text[:-1]) * original
    if re.fullmatch(r"[0-9]{1,6}k", text):  # as windows are called: 128k is 131,072
        return int(text[:-1]) * 1024
    return parse_count(text, "a target (8x, 128k or 131072)")


def _trained_at(weights: loading.Weights) -> int:
    """The length that a model was trained at: of a run trained here its windows, else its context."""
    record = files.read_state(weights.run / "config.json") if weights.run else {}
    data = (record.get("config") or {}).get("data") or {}
    window = data.get("window")
    return min(int(window), weights.config.context) if isinstance(window, int) else weights.config.context


def _trained_on(weights: loading.Weights) -> str:
    """The text that a run was trained on."""
    record = files.read_state(weights.run / "config.json") if weights.run else {}
    source = str(((record.get("config") or {}).get("data") or {}).get("source") or "")
    return source.removeprefix("needles:") if source not in ("", "facts") else ""


def _given(path: str, task: Task) -> tuple[np.ndarray, float | None]:
    """A list of factors and the attention factor beside it."""
    tree = files.read_json(Path(path))
    tree = tree.get("rope_scaling") or tree
    if "long_factor" not in tree:
        raise UserError(f"{path} has no long_factor; give a factors.json, or a config.json with LongRoPE")
    factor = tree.get("attention_factor")
    if factor is not None and not (type(factor) in (int, float) and math.isfinite(factor) and factor > 0):
        raise UserError(f"{path}: attention_factor is {factor!r:.60}; give a number above 0, or leave it out")
    found = lists.check(tree["long_factor"], task.half, f"{path}: long_factor")
    return found, None if factor in (None, lists.attention_factor("longrope", task)) else float(factor)


def _require_memory(found: Asked) -> None:
    kind, count, there = memory.device_bytes()
    need = memory.needed_on_one_device(found.model, 1, found.target, remat="full", value_bytes=4, on_cpu=kind == "CPU")
    needed = need.total
    if not found.flags["train"]:
        sizes = need.categories()
        needed -= sizes["optimizer"] + sizes["gradients"]
    if needed > there:
        raise UserError(
            f"--to {found.target:,}: {found.model.name} needs {human_bytes(needed)} at that window, there are "
            f"{human_bytes(there)} ({count} x {kind}); a mesh that would hold it: {memory.mesh_that_holds(needed)}"
        )


def identity(found: Asked, rows: Mapping[str, str], content: str) -> dict[str, Any]:
    """What makes two searches the same: where one is gone on with, all of it must agree."""
    flags = found.flags
    tree = {
        "weights": content, "original": found.task.original, "target": found.target, "method": found.method,
        "fitness": flags["fitness"], "evaluations": flags["evaluations"], "seed": flags["seed"], "rows": dict(rows),
        "given": None if found.given is None else found.given.tolist(), "train": flags["train"], "mix": flags["mix"],
    }  # fmt: skip
    if found.factor is not None:
        tree["factor"] = found.factor
    plain: dict[str, Any] = json.loads(json.dumps(tree))
    return plain
