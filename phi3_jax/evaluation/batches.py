"""How many rows fit the memory beside a model's weights: counted and not tried, so that a machine always takes the same."""

from __future__ import annotations

from collections.abc import Callable

from phi3_jax.configs import ModelConfig
from phi3_jax.planning import memory

MOST = 64  # rows, lm-eval's own limit where --max_batch_size says none
SHARE = 0.5  # of the free memory that is counted on: programs hold temporaries that the count leaves out
PLACES = 64  # of a row whose logits are held at once, where there are eight rows or more
BLOCK = 1024  # queries whose attention scores are held at once, at most


def row_bytes(cfg: ModelConfig, length: int, count: int, width: int) -> float:
    """Bytes that one row takes at its peak: keys and values, a layer at work, logits.

    Args:
      length: tokens of the row, with those of its reply.
      count: tokens whose logits are asked for; the engine makes those of `PLACES` at once.
      width: bytes of a value that is computed with.
    """
    cache = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * length * width
    layer = length * (6 * cfg.embed + 3 * cfg.mlp) * width + 4 * cfg.heads * length * min(length, BLOCK)
    return cache + layer + 3 * 4 * cfg.vocab * min(count, PLACES)


def rows_that_fit(cfg: ModelConfig, length: int, count: int, width: int, free: float, most: int = MOST) -> int:
    """The largest power of two of rows, 1 to `most`, that `free` bytes hold; see `row_bytes`."""
    wanted = max(1.0, SHARE * free / row_bytes(cfg, length, count, width))
    rows = 1
    while 2 * rows <= min(wanted, most):
        rows *= 2
    return rows


def fit(cfg: ModelConfig, dtype: str, most: int = MOST) -> Callable[[int, int], int]:
    """`rows_that_fit` of (length, count) for a model that computes in `dtype`, in what is free now."""
    free = free_bytes()  # once, so that later tasks count as the first
    width = 2 if dtype in ("bfloat16", "float16") else 4
    return lambda length, count: rows_that_fit(cfg, length, count, width, free, most)


def at_once(cfg: ModelConfig, longest: int, replies: int = 256) -> int:
    """Rows for a suite whose texts are not known yet: those that fit at this length, or the context where it is shorter."""
    length = min(longest, cfg.context)
    return fit(cfg, "float32")(length, min(replies, length))


def free_bytes() -> float:
    """Of the first device, with the model on it; of a CPU, half of the memory, which it shares with everything else."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if device.platform == "cpu" or "bytes_limit" not in stats:
        return memory.host_bytes() / 2
    return float(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
