"""Adapters where they lie: the run that trained them, or that they were imported to, and what becomes of weights with them.

The folder of an adapter is a run's: config.json names the model, the adapters' `LoraConfig` and the weights under them
(where they lay, and their content); checkpoints hold A and B and nothing of those weights.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import LoraConfig, ModelConfig, lora_from_dict, model_from_dict
from phi3_jax.errors import UserError
from phi3_jax.models import lora
from phi3_jax.models.spec import ParamSpec, named
from phi3_jax.records import files, streaming


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapters of one model.

    Attributes:
      model: whose they are.
      how: ranks, scales and targets.
      values: of "blocks.qkv.lora_a" and so on, (layers, ...), as they are stored.
      base, base_content: where the weights under them lay, and what those are (`content.content`).
    """

    model: ModelConfig
    how: LoraConfig
    values: Mapping[str, np.ndarray]
    base: str
    base_content: str

    @property
    def content(self) -> str:
        """Sixteen hex digits that are equal exactly when base, scales and the float32 values of A and B are."""
        how = dataclasses.asdict(dataclasses.replace(self.how, base="", base_content=""))
        digest = hashlib.sha256(json.dumps([self.base_content, how]).encode())
        for name, value in sorted(self.values.items()):
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(np.ascontiguousarray(value, np.float32).data)
        return digest.hexdigest()[:16]

    def merges(self, leaf: str) -> bool:
        """Whether a parameter of the model, by its name, has an adapter."""
        return self._pair(leaf)[0] in self.values

    @staticmethod
    def _pair(leaf: str) -> tuple[str, str]:
        kind = leaf.removesuffix(".weight")
        return f"{kind}.{lora.A}", f"{kind}.{lora.B}"

    @functools.cached_property
    def _scales(self) -> dict[str, np.ndarray]:
        return {lora.leaf_of(kind): lora.scales(self.model, self.how, kind) for kind in self.how.targets}

    @functools.cached_property
    def _weights(self) -> dict[str, ParamSpec]:
        return {lora.leaf_of(kind): spec for kind, spec in lora.projections(self.model).items()}

    def change(self, leaf: str, layer: int | None) -> np.ndarray:
        """s A B of one layer of a weight (None: of one that is not stacked), float32, in the weight's shape."""
        a, b = (self.values[name] if layer is None else self.values[name][layer] for name in self._pair(leaf))
        return lora.delta(self._weights[leaf], a, b, float(self._scales[leaf][layer or 0]))

    def layers(self, leaf: str) -> Sequence[int | None]:
        """Numbers of the layers of a weight that has an adapter; None alone where nothing is stacked."""
        return self._weights[leaf].layers

    def merged(self, leaf: str, layer: int | None, part: np.ndarray) -> np.ndarray:
        """A layer of a parameter (all of it where `layer` is None) with its adapter added in float32, where it has one."""
        if not self.merges(leaf):
            return part
        if layer is None and lora.stacked(self._weights[leaf]):
            return np.stack([self.merged(leaf, i, one) for i, one in enumerate(part)])
        return np.asarray(part, np.float32) + self.change(leaf, layer)


def record_of(run: Path) -> dict[str, Any] | None:
    """What a run's config.json says of its adapters, with the model and the weights under them; None: it has none."""
    config = files.read_state(run / "config.json").get("config")
    return config if isinstance(config, dict) and config.get("lora") else None


def open_run(run: Path, step: int | None = None) -> Adapter:
    """The adapters in a run's newest checkpoint, or that of a step.

    Raises:
      UserError: the run has none, or its checkpoint does not fit its config.json.
    """
    record = record_of(run)
    if record is None:
        raise UserError(f"{run} holds a model, no adapter; name a run of lora=, or --model {run}")
    try:
        model, how = model_from_dict(record["model"]), lora_from_dict(record["lora"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / 'config.json'} describes no adapter (config.lora); put it back") from error
    reader = streaming.Reader(run / "checkpoints", "params.", step)
    reader.check({name: spec.shape for name, spec in specs_of(model, how).items()})
    values = {name: reader.read(name, None) for name in reader.dtypes}
    base = how.base or str(record.get("init") or ""), how.base_content or str(record.get("init_content") or "")
    return Adapter(model, how, values, *base)


def specs_of(model: ModelConfig, how: LoraConfig) -> dict[str, ParamSpec]:
    """{"blocks.qkv.lora_a": its declaration, ..}."""
    return named(lora.adapter_specs(model, how), is_leaf=lambda x: isinstance(x, ParamSpec))


def require_base(found: Adapter, name: object, base: ModelConfig, label: str, content: Callable[[], str]) -> None:
    """Checks that adapters are those of weights.

    Args:
      found: the adapters.
      name: what the user called them.
      base: the model of the weights.
      label: what the user called those.
      content: gives theirs; called only where the shapes agree.

    Raises:
      UserError: they were made for others, which it names.
    """
    kinds = [lora.projections(cfg) for cfg in (found.model, base)]
    shapes = [{kind: of[kind].shape for kind in found.how.targets} for of in kinds]
    if shapes[0] != shapes[1] or content() != found.base_content:
        raise UserError(
            f"{name} is an adapter for other weights than {label}: for {found.base_content}, which lay at {found.base}; "
            "name those"
        )
