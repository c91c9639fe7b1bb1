"""Where windows and documents come from: facts (knowledge), reasoning (fresh items) and text."""

from __future__ import annotations

import numpy as np


def counter_draws(seed: int, stream: int, start: int, count: int, width: int) -> np.ndarray:
    """Uniform 32-bit draws (width, count) as uint64; column i depends on (seed, stream, start + i) only.

    A counter-based generator (Philox 4x64) jumps to any item, so any split of the work draws the same
    numbers.
    """
    blocks = -(-width // 8)  # a counter step gives four 64-bit words
    key = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2, np.uint64)
    words = np.random.Philox(key=key, counter=start * blocks).random_raw(count * blocks * 4)
    return (
        words.astype("<u8", copy=False).view("<u4").reshape(count, blocks * 8)[:, :width].T.astype(np.uint64, order="C")
    )


def below(draws: np.ndarray, limit: int) -> np.ndarray:
    """32-bit draws as int32 numbers 0 .. limit - 1 (the bias is below limit / 2^32)."""
    return (draws * np.uint64(limit) >> np.uint64(32)).astype(np.int32)
