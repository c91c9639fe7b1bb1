"""Arrays on devices of several processes, each of which reads its own rows only."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers, ascending, of the rows of an array of `shape` that the devices of this process hold a part of."""
    parts = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in parts if index is not None]))


def place(local: np.ndarray, rows: np.ndarray, count: int, sharding: Sharding) -> jax.Array:
    """The global array (count, ...) with `sharding`, of which this process has the rows numbered `rows`.

    Args:
      local: (len(rows), ...).
      rows: ascending; `local_rows`, or more.
    """
    if len(rows) == count and jax.process_count() == 1:
        return jax.device_put(local, sharding)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # jax's type has None; its own callbacks assert the same
        begin, end, _ = index[0].indices(count)
        first = np.searchsorted(rows, begin)
        return local[(slice(first, first + end - begin), *index[1:])]

    return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)


def gather(tree: Any) -> Any:
    """numpy copies of global arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
