"""Lists of RoPE factors in closed form, and LongRoPE's attention factor. NumPy in float64.

A list holds head_dim / 2 factors, by which the frequencies base^(-2i/d) are divided; one long, so that positions up to
s L0 look as positions up to L0 did. s is the scale, L0 the original context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phi3_jax.errors import UserError

CLOSED = ("none", "pi", "ntk", "yarn")


@dataclass(frozen=True)
class Task:
    """What is extended.

    Attributes:
      head_dim, base: of the model's RoPE.
      original: L0, tokens.
      scale: s, the target over the original.
    """

    head_dim: int
    base: float
    original: int
    scale: float

    @property
    def half(self) -> int:
        return self.head_dim // 2


def none(task: Task) -> np.ndarray:
    """No change."""
    return np.ones(task.half)


def pi(task: Task) -> np.ndarray:
    """Position interpolation (arXiv:2306.15595)."""
    return np.full(task.half, float(task.scale))


def ntk(task: Task) -> np.ndarray:
    """NTK-aware: the base becomes base s^(d/(d-2)), so that the last pair is divided by s and the first kept."""
    return task.scale ** (2 * np.arange(task.half) / (task.head_dim - 2))


def ramp(task: Task, fast: float = 32, slow: float = 1, truncate: bool = True) -> np.ndarray:
    """YaRN's g: 1 for pairs that turn at least `fast` times within L0, 0 for those that turn less than `slow` times."""
    low, high = (
        task.head_dim * math.log(task.original / (2 * math.pi * turns)) / (2 * math.log(task.base))
        for turns in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, task.head_dim - 1)
    high += 0.001 * (low == high)
    return 1 - np.clip((np.arange(task.half) - low) / (high - low), 0, 1)


def yarn(task: Task, fast: float = 32, slow: float = 1, truncate: bool = True) -> np.ndarray:
    """YaRN (arXiv:2309.00071): frequencies blended by the ramp."""
    g = ramp(task, fast, slow, truncate)
    return 1 / (g + (1 - g) / task.scale)


def yarn_factors(task: Task) -> np.ndarray:
    """The same blend of factors instead of frequencies: with it LongRoPE's search begins."""
    g = ramp(task)
    return task.scale * (1 - g) + g


def llama3(task: Task, low: float = 1.0, high: float = 4.0) -> np.ndarray:
    """Llama 3.1's rule: wavelengths below L0 / high are kept, above L0 / low stretched, between them blended."""
    turns = task.original / (2 * math.pi) * task.base ** (-2 * np.arange(task.half) / task.head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (smooth + (1 - smooth) / task.scale)


def critical(task: Task) -> int:
    """The first pair whose period is no shorter than L0: it, and those after it, were never seen turning whole."""
    found = math.ceil(task.head_dim / 2 * math.log(task.original / (2 * math.pi)) / math.log(task.base))
    return min(max(found, 1), task.half - 1)


def to_critical(task: Task, pair: int, factor: float) -> np.ndarray:
    """NTK-like factors of the pairs before `pair`, which has `factor` (LongRoPE2, arXiv:2502.20082)."""
    return factor ** (np.arange(pair) / pair)


def longrope2_start(task: Task, pair: int) -> np.ndarray:
    """NTK-like up to the critical pair, and s from there on."""
    return np.r_[to_critical(task, pair, task.scale), np.full(task.half - pair, float(task.scale))]


FORMS: dict[str, Callable[[Task], np.ndarray]] = {"none": none, "pi": pi, "ntk": ntk, "yarn": yarn}


def attention_factor(name: str, task: Task) -> float:
    """Factor on cos and sin that goes with a list: 1, YaRN's .1 ln s + 1, or LongRoPE's sqrt(1 + ln s / ln L0)."""
    if name in ("none", "pi", "ntk"):
        return 1.0
    if name == "yarn":
        return 0.1 * math.log(task.scale) + 1
    return math.sqrt(1 + math.log(task.scale) / math.log(task.original))


def check(factors: object, half: int, name: str) -> np.ndarray:
    """A list that was given, as float64.

    Raises:
      UserError: no numbers, another length, decreasing, below 1, or not finite.
    """
    try:
        found = np.asarray(factors, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} holds something that is no number; give {half} factors") from error
    if found.shape != (half,):
        raise UserError(f"{name} has {found.size} factors; this model's head_dim needs {half}")
    if not np.isfinite(found).all():
        raise UserError(f"{name} holds NaN or infinity at pair {int(np.flatnonzero(~np.isfinite(found))[0])}")
    if found.min() < 1:
        raise UserError(f"{name} has factor {found.min():g} at pair {int(found.argmin())}; factors are 1 or more")
    if (np.diff(found) < 0).any():
        pair = int(np.flatnonzero(np.diff(found) < 0)[0]) + 1
        raise UserError(
            f"{name} falls from {found[pair - 1]:g} to {found[pair]:g} at pair {pair}; factors must not fall"
        )
    return found
