"""What a design can see before it is paid for: `python -m phi3_jax.scaling.power --sizes 110592,212992,416000 --seeds 3`.

The noise between seeds is that of --endpoint as measured at each size (`scaling.noise`), or --seed_sd for all sizes.

For three sizes the contrast is the second gain per doubling minus the first; with `--arms 2` the interaction is its
difference between two arms, paired by seed. Prints the smallest effect that a t test over seeds finds with 80 % power at
level .05, by formula and by simulation.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("power"))

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special, stats

from phi3_jax.errors import UserError
from phi3_jax.scaling import noise

MOST_SEEDS, MOST_ITEMS = 10_000, 10**12


@dataclass(frozen=True)
class Design:
    """Three sizes, seeds a size, test items, accuracy that items are drawn at, and noise between seeds.

    `seed_sd` is that noise in points at every size; None: as measured for `endpoint`, a share, at each size.
    """

    sizes: tuple[float, float, float]
    seeds: int = 3
    items: int = 54_000
    seed_sd: float | None = None
    accuracy: float = 0.5
    arms: int = 1
    endpoint: str = "knowledge/universe/recall_teacher_forced"

    @functools.cached_property
    def seed_sds(self) -> np.ndarray:
        """(3,) points between seeds at each size.

        Raises:
          UserError: see `noise.of`.
        """
        if self.seed_sd is not None:
            return np.full(3, self.seed_sd)
        return np.array([100 * noise.of(self.endpoint, size).sd for size in self.sizes])

    @property
    def weights(self) -> np.ndarray:
        """Contrast = weights . scores: 1 / d1, -(1 / d1 + 1 / d2), 1 / d2."""
        d1, d2 = np.diff(np.log2(self.sizes))
        return np.array([1 / d1, -(1 / d1 + 1 / d2), 1 / d2])

    @property
    def per_seed_sd(self) -> float:
        """SD of one seed's contrast (or interaction), in points per doubling.

        Items are the same for all seeds and sizes, but each model answers them with its own luck: their noise is taken as
        independent, which is conservative.
        """
        item = 1e4 * self.accuracy * (1 - self.accuracy) / self.items
        return math.sqrt(self.arms * np.sum(np.square(self.weights) * (np.square(self.seed_sds) + item)))

    @property
    def stderr(self) -> float:
        """Standard error of the mean over seeds."""
        return self.per_seed_sd / math.sqrt(self.seeds)


def check(design: Design) -> None:
    """Raises UserError for a design that cannot be tested."""
    seed_sd = 0.0 if design.seed_sd is None else design.seed_sd
    if not np.isfinite([*design.sizes, seed_sd, design.accuracy]).all():
        raise UserError(
            f"sizes={design.sizes}, seed_sd={design.seed_sd}, accuracy={design.accuracy} must be finite numbers"
        )
    if len(design.sizes) != 3 or not design.sizes[0] < design.sizes[1] < design.sizes[2] or design.sizes[0] <= 0:
        raise UserError(f"sizes={','.join(f'{s:g}' for s in design.sizes)} must be three rising numbers of parameters")
    if not 2 <= design.seeds <= MOST_SEEDS:
        raise UserError(
            f"seeds={design.seeds}: a test over seeds needs 2 or more, and this one takes {MOST_SEEDS:,} at most"
        )
    if not 1 <= design.items <= MOST_ITEMS or seed_sd < 0 or not 0 < design.accuracy < 1 or design.arms not in (1, 2):
        raise UserError(
            f"items={design.items}, seed_sd={seed_sd:g}, accuracy={design.accuracy:g}, arms={design.arms} need "
            f"1 to {MOST_ITEMS:,} items, seed_sd >= 0, 0 < accuracy < 1 and 1 or 2 arms"
        )


def normal_effect(design: Design, power: float = 0.8, level: float = 0.05) -> float:
    """Detectable effect if the noise were known: (z_power + z_level) standard errors."""
    return float(special.ndtri(power) + special.ndtri(1 - level / 2)) * design.stderr


def power_at(design: Design, effect: float, level: float = 0.05) -> float:
    """Power of the two-sided t test over seeds at a true effect, from the noncentral t distribution."""
    df = design.seeds - 1
    critical, shift = stats.t.ppf(1 - level / 2, df), effect / design.stderr
    return float(stats.nct.sf(critical, df, shift) + stats.nct.cdf(-critical, df, shift))


def detectable(design: Design, power: float = 0.8, level: float = 0.05) -> float:
    """Smallest true effect found with this power by the t test over seeds, which must estimate its noise."""
    low, high = 0.0, design.stderr
    while power_at(design, high, level) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power_at(design, middle, level) < power else (low, middle)
    return high


def simulate(design: Design, effect: float, trials: int = 4000, seed: int = 0, level: float = 0.05) -> float:
    """Share of simulated studies with this true effect whose t interval excludes 0: models are trained and tested anew."""
    rng = np.random.default_rng(seed)
    # The effect sits in the last size of the last arm, where a contrast of `effect` needs effect / weight points.
    means = np.full((design.arms, 3), 100 * design.accuracy)
    means[-1, 2] += effect / design.weights[2]
    true = means + design.seed_sds * rng.normal(size=(trials, design.seeds, design.arms, 3))
    share = np.clip(true / 100, 0, 1)
    scores = 100 * rng.binomial(design.items, share) / design.items
    contrast = scores @ design.weights
    value = contrast[..., -1] - (contrast[..., 0] if design.arms == 2 else 0)
    value = value - (0 if design.arms == 2 else 100 * design.accuracy * design.weights.sum())
    t = value.mean(1) / (value.std(1, ddof=1) / math.sqrt(design.seeds))
    return float(np.mean(np.abs(t) > stats.t.ppf(1 - level / 2, design.seeds - 1)))


def beyond_ceiling(design: Design, effect: float) -> bool:
    """Whether the effect would put the largest size above 100 %, so that no study can show it."""
    return bool(100 * design.accuracy + effect / design.weights[2] > 100)


def line(design: Design) -> str:
    """One sentence for a study's start."""
    what = "an interaction" if design.arms == 2 else "a contrast"
    return (
        f"power: {design.seeds} seeds see {what} of {detectable(design):.1f} points per doubling or more in 4 of 5 "
        f"studies, at {_noise(design)}"
    )


def _noise(design: Design) -> str:
    """'2.5 points between seeds', or three sizes' with the endpoint and the runs behind them."""
    if design.seed_sd is not None:
        return f"{design.seed_sd:g} points between seeds"
    runs = ", ".join(str(noise.of(design.endpoint, size).runs) for size in design.sizes)
    sds = ", ".join(f"{sd:.2f}" for sd in design.seed_sds)
    return f"{sds} points between seeds ({design.endpoint}, {runs} runs)"


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    design = Design(**{name: value for name, value in flags.items() if name != "json"})
    check(design)
    effect = detectable(design)
    result = asdict(design) | {
        "seed_sds": design.seed_sds.tolist(),
        "stderr": design.stderr, "detectable": effect, "detectable_if_noise_were_known": normal_effect(design),
        "simulated_power_there": simulate(design, effect), "beyond_ceiling": beyond_ceiling(design, effect),
    }  # fmt: skip
    if flags["json"]:
        print(json.dumps(result))
        return
    print(line(design))
    if beyond_ceiling(design, effect):
        print(f"  out of reach: from {100 * design.accuracy:g} % right, the largest size would have to pass 100 %")
    print(f"  standard error {design.stderr:.2f}; {normal_effect(design):.1f} if the noise were known")
    print(f"  simulated power at {effect:.1f} points: {result['simulated_power_there']:.2f} of 4,000 studies")
