"""Losses of long rows: under a model's own lists, or under any list, which is an argument of one compiled program."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from phi3_jax.configs import ModelConfig
from phi3_jax.data.long_rows import Rows
from phi3_jax.models import decoder, rotary
from phi3_jax.models.layout import ANYWHERE, Layout, join, per_device, spec_of
from phi3_jax.models.spec import Tree
from phi3_jax.sharding import rules
from phi3_jax.training import losses

TOKENS = 8192  # of a device at a time


def scores(
    params: Tree,
    tokens: jax.Array,
    targets: jax.Array,
    index: jax.Array,
    positions: jax.Array,
    factors: jax.Array | None,
    scale: jax.Array | None,
    cfg: ModelConfig,
    dtype: Any = jnp.float32,
    layout: Layout = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
    """Of the positions `index` (n, c) of rows: nll in nats, float32 or wider, and whether the target is the likeliest.

    Args:
      tokens, targets, positions: (n, T).
      factors, scale: a list (head_dim/2,) at every position, and the factor on cos and sin; both have gradients. None:
        what the config says.
      layout: where activations lie on a mesh.
    """
    table = None if factors is None or scale is None else rotary.table_of(positions, cfg, factors, scale)
    hidden = decoder.hidden_states(
        params, tokens, cfg, positions=positions, dtype=dtype, rope=table, layout=layout, piece=decoder.PIECE
    )
    params = layout.gather({k: v for k, v in params.items() if k != "blocks"}, whole=True)

    def part(hidden: jax.Array, targets: jax.Array, index: jax.Array, params: Tree) -> tuple[jax.Array, jax.Array]:
        def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            logits = decoder.logits_of(xs[0], params, cfg)
            picked = jnp.take_along_axis(logits, xs[1][..., None], axis=-1)[..., 0]
            return None, (jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == xs[1])

        here = jnp.take_along_axis(hidden, index[..., None], axis=1), jnp.take_along_axis(targets, index, axis=1)
        return losses.over_chunks(chunk, None, here, cfg.vocab)[1]

    rows = P(join(spec_of(tokens)[0]), None)
    return per_device(part, (P(*rows, None), rows, rows, P()), (rows, rows), hidden, targets, index, params)


class Judge:
    """A model that scores rows under lists.

    Rows are split over all devices of a mesh, a few at a time, so that memory does not grow with their number.
    """

    def __init__(self, params: Tree, cfg: ModelConfig, mesh: Mesh, strategy: str, dtype: Any = jnp.float32) -> None:
        self._params, self.cfg, self._mesh, self._dtype = params, cfg, mesh, dtype
        self._sharding = rules.batch_sharding(strategy, mesh)
        self._shards = rules.row_shards(mesh)
        program = functools.partial(scores, cfg=cfg, dtype=dtype, layout=rules.layout_of(strategy))
        self._program = jax.jit(program)

    def __call__(
        self, rows: Rows, factors: Sequence[float] | np.ndarray | None = None, scale: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """(nll, hit), both (n, c), of the positions that count; under the model's own lists where none is given."""
        length = rows.tokens.shape[1]
        positions = np.broadcast_to(np.arange(length), rows.tokens.shape)
        at_once = self._shards * max(1, min(TOKENS // length, math.ceil(len(rows) / self._shards)))
        found = []
        with jax.set_mesh(self._mesh):
            given = None if factors is None else (jnp.asarray(np.asarray(factors, np.float32)), jnp.float32(scale))
            for start in range(0, len(rows), at_once):
                some = [part[start : start + at_once] for part in (rows.tokens, rows.targets, rows.index, positions)]
                count = len(some[0])
                padded = [np.concatenate([x, np.repeat(x[-1:], at_once - count, axis=0)]) for x in some]
                placed = [jax.device_put(np.ascontiguousarray(x, np.int32), self._sharding) for x in padded]
                out = self._program(self._params, *placed, *(given or (None, None)))
                found.append([np.asarray(x)[:count] for x in out])
        nll, hit = (np.concatenate(part) for part in zip(*found, strict=True))
        return nll, hit
