"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any


def human_count(count: float | None, digits: int = 3) -> str:
    """Short form of a count: 416000 -> '416k', 4.8e12 -> '4.8T', None -> '–'; names of runs are made of it."""
    if count is None or not math.isfinite(count):
        return "–"
    scaled, letter = _scaled(count, "kMBT", digits)
    return f"{scaled:g}{letter}"


def human_bytes(size: float) -> str:
    """Bytes with a decimal prefix: 167.5 GB."""
    scaled, letter = _scaled(size, "kMGTP")
    return f"{scaled:.1f} {letter}B" if letter else f"{size:.0f} B"


def _scaled(value: float, letters: str, digits: int = 15) -> tuple[float, str]:
    """The value over the largest power of 1000 that it reaches, rounded to digits, and the power's letter."""
    power = next((i for i in range(len(letters), 0, -1) if abs(value) >= 1000**i), 0)
    scaled = float(f"{value / 1000**power:.{digits}g}")
    if abs(scaled) == 1000 and power < len(letters):  # 999,936 is 1M and not 1000k
        scaled, power = scaled / 1000, power + 1
    return scaled, ("", *letters)[power]


def divisors(number: int) -> str:
    """The divisors of a number, up to 512: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, min(number, 512) + 1) if number % d == 0)


def number(value: Any) -> float | None:
    """A finite number of a JSON file, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
