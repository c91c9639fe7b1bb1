"""Pictures of batches on the devices that hold their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import RunConfig
from phi3_jax.data import gallery, loader
from phi3_jax.data.gallery import Gallery
from phi3_jax.data.pictured import bucket
from phi3_jax.sharding import feed, rules


def of(ds: loader.Dataset, run: RunConfig) -> Gallery | None:
    """The pictures of a data set, None where it has none."""
    return loader.pictures(ds, run.model.vision) if gallery.NAME in ds.manifest else None


def fields(
    pictures: Gallery,
    rows: Sequence[gallery.Row],
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    local: np.ndarray,
    accumulation: int = 1,
) -> dict[str, jax.Array]:
    """What a batch has beside its tokens: tiles, index and tile_count (`gallery.Sight`).

    Args:
      rows: the pictures in each row of the global batch.
      local: numbers of the rows that this process has, whole shards of them.
      accumulation: microbatches that the batch is cut into.
    """
    shards, sharding = rules.row_shards(mesh), rules.batch_sharding(run.strategy, mesh)
    by_row = NamedSharding(mesh, P(sharding.spec[0]))
    mine = np.unique(local * shards // len(rows))
    dtype = np.dtype(jnp.dtype(run.dtype))
    sight = pictures.sight(rows, run.data.window, shards, mine.tolist(), accumulation, dtype)

    def placed(values: np.ndarray) -> jax.Array:
        each = len(values) // len(mine)
        numbers = (mine[:, None] * each + np.arange(each)).reshape(-1)
        return feed.place(values, numbers, each * shards, by_row)

    index = feed.place(sight.index, local, len(rows), sharding)
    return {"tiles": placed(sight.tiles), "index": index, "tile_count": placed(sight.count)}


def shapes(run: RunConfig, mesh: jax.sharding.Mesh, tiles: float) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of `fields`, for compiling ahead of time: of a batch whose windows have so many
    tiles each, every unit as full as the mean one, rounded up to a bucket."""
    sharding = rules.batch_sharding(run.strategy, mesh)
    by_row = NamedSharding(mesh, P(sharding.spec[0]))
    units = rules.row_shards(mesh) * run.accumulation
    assert run.model.vision is not None  # who has none has no pictures
    room, side = bucket(math.ceil(tiles * run.batch_windows / units)), run.model.vision.tile
    return {
        "tiles": jax.ShapeDtypeStruct((units * room, 3, side, side), jnp.dtype(run.dtype), sharding=by_row),
        "index": jax.ShapeDtypeStruct((run.batch_windows, run.data.window), jnp.int32, sharding=sharding),
        "tile_count": jax.ShapeDtypeStruct((units,), jnp.int32, sharding=by_row),
    }
