"""What a design can see before it is paid for: `python -m phi3_jax.scaling.power --sizes 110592,212992,416000 --seeds 3`.

For three sizes the contrast is the second gain per doubling minus the first; with `--arms 2` the interaction is its
difference between two arms, paired by seed. Prints the smallest effect that a t test over seeds finds with 80 % power at
level .05, by formula and by simulation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import special, stats

from phi3_jax.errors import UserError


@dataclass(frozen=True)
class Design:
    """Three sizes, seeds a size, test items, and noise in points: SD between seeds, accuracy that items are drawn at."""

    sizes: tuple[float, float, float]
    seeds: int = 3
    items: int = 54_000
    seed_sd: float = 2.5
    accuracy: float = 0.5
    arms: int = 1

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
        return math.sqrt(self.arms * np.square(self.weights).sum() * (self.seed_sd**2 + item))

    @property
    def stderr(self) -> float:
        """Standard error of the mean over seeds."""
        return self.per_seed_sd / math.sqrt(self.seeds)


def check(design: Design) -> None:
    """Raises UserError for a design that cannot be tested."""
    if not np.isfinite([*design.sizes, design.seed_sd, design.accuracy]).all():
        raise UserError(
            f"sizes={design.sizes}, seed_sd={design.seed_sd}, accuracy={design.accuracy} must be finite numbers"
        )
    if len(design.sizes) != 3 or not design.sizes[0] < design.sizes[1] < design.sizes[2] or design.sizes[0] <= 0:
        raise UserError(f"sizes={','.join(f'{s:g}' for s in design.sizes)} must be three rising numbers of parameters")
    if design.seeds < 2:
        raise UserError(f"seeds={design.seeds}: a test over seeds needs 2 or more")
    if design.items < 1 or design.seed_sd < 0 or not 0 < design.accuracy < 1 or design.arms not in (1, 2):
        raise UserError(
            f"items={design.items}, seed_sd={design.seed_sd:g}, accuracy={design.accuracy:g}, arms={design.arms} need "
            "items >= 1, seed_sd >= 0, 0 < accuracy < 1 and 1 or 2 arms"
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
    true = means + design.seed_sd * rng.normal(size=(trials, design.seeds, design.arms, 3))
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
        f"studies, at {design.seed_sd:g} points between seeds"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3_jax.scaling.power",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", default="110592,212992,416000", help="three parameter counts, joined by commas")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a size (default 3)")
    parser.add_argument("--items", type=int, default=54_000, help="test items (default 54,000)")
    parser.add_argument("--seed_sd", type=float, default=2.5, help="points between seeds of one size (default 2.5)")
    parser.add_argument("--accuracy", type=float, default=0.5, help="share of items right (default 0.5)")
    parser.add_argument("--arms", type=int, default=1, help="1: a contrast; 2: an interaction (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    try:
        try:
            options["sizes"] = tuple(float(s) for s in options["sizes"].split(","))
        except ValueError:
            raise UserError(f"--sizes {options['sizes']!r} are not three numbers joined by commas") from None
        design = Design(**options)
        check(design)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    effect = detectable(design)
    result = asdict(design) | {
        "stderr": design.stderr, "detectable": effect, "detectable_if_noise_were_known": normal_effect(design),
        "simulated_power_there": simulate(design, effect), "beyond_ceiling": beyond_ceiling(design, effect),
    }  # fmt: skip
    if as_json:
        print(json.dumps(result))
        return 0
    print(line(design))
    if beyond_ceiling(design, effect):
        print(f"  out of reach: from {100 * design.accuracy:g} % right, the largest size would have to pass 100 %")
    print(f"  standard error {design.stderr:.2f}; {normal_effect(design):.1f} if the noise were known")
    print(f"  simulated power at {effect:.1f} points: {result['simulated_power_there']:.2f} of 4,000 studies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
