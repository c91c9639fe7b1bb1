"""What an export is made of, by value: a recipe, which a source gives (phi3_jax.data.sources) and `export` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.data.corpora.inputs import Inputs
from phi3_jax.data.picture_rows import Pictures
from phi3_jax.data.windows import Windows

VERSION = 1  # of the output for given parameters; raise it when the same request gives other windows


@dataclass
class Part:
    """Windows that training mixes, or those of an eval; `windows` is consumed once, and sources before evals.

    Attributes:
      fresh: no window may come twice.
      bytes: UTF-8 bytes behind the targets, asked after the windows.
      meter: of an eval, a name in phi3_jax.data.meters.METERS.
      extra: arrays that the meter needs.
      optional: an eval that is left out where it has no windows; without windows any other part is an error.
    """

    name: str
    windows: Iterable[Windows]
    weight: float = 1
    fresh: bool = False
    bytes: Callable[[], int] | None = None
    meter: str | None = None
    extra: dict[str, np.ndarray] | None = None
    optional: bool = False


@dataclass
class Recipe:
    """All that is written: parts, what their numbers mean, and the parameters that made them.

    Attributes:
      inputs: what is read, to skip by; not in the fingerprint.
      warnings: asked after the windows.
      files: of the tokenizer, by their names in the data set.
      pictures: those that the windows show, None where they show none.
    """

    kind: str
    vocab: int
    window: int
    domains: list[str]
    loss: str
    tokenizer: dict[str, Any] | None
    generator: dict[str, Any]
    sources: list[Part]
    evals: list[Part]
    inputs: Inputs = field(default_factory=Inputs)
    warnings: Callable[[], list[str]] = list
    files: Mapping[str, Path] = field(default_factory=dict)
    pictures: Pictures | None = None
