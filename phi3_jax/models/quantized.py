"""Group-quantised matrices as leaves of the parameter tree: 4 or 8 bits per weight and a float16 scale per group.

`linear`, `embed` and the unembedding accept a `QuantizedTensor` where they accept an array. On a CPU the product runs in a
compiled kernel where one can be had (`kernels.grouped`), elsewhere the matrix is widened first, in plain XLA.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from phi3_jax.models.kernels import grouped

ROWS = 16  # output rows of a tile
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Format:
    """`bits` a weight and one float16 scale for `group` weights along the contracted dimension; symmetric."""

    bits: int
    group: int

    @property
    def group_bytes(self) -> int:
        """Of one group of one row: the scale and the quants."""
        return 2 + self.group * self.bits // 8


# q4_0 and q8_0 are GGUF's blocks, bit for bit (`inference.quantize`); int4_g128 is q4_0 with a scale for 128 weights.
FORMATS = MappingProxyType({"q4_0": Format(4, 32), "q8_0": Format(8, 32), "int4_g128": Format(4, 128)})


class Product(abc.ABC):
    """What may stand where a product's matrix is expected, besides an array."""

    @abc.abstractmethod
    def apply(self, x: jax.Array) -> jax.Array:
        """x (..., *inputs) times the matrix: (..., *outputs) in x's dtype."""


@struct.dataclass
class QuantizedTensor(Product):
    """A matrix (or a stack of them) of `rows` outputs and `columns` inputs in tiles of 16 rows by one group.

    Columns are filled up with zeros to whole groups.

    Attributes:
      tiles: uint8 (*stack, ceil(rows / 16), ceil(columns / group), 16 * group_bytes): 16 float16 scales, then quants, 32
        columns after another, each as (4 or 8, 16 rows, 4 columns); with 4 bits, byte i holds column i in its low half
        and column i + 16 in its high half, each 8 too large.
      format: name in FORMATS.
      shape: of the array it stands for, without the stack: inputs first, then outputs; a table of embeddings the other
        way round.
      inputs: how many dimensions of `shape` are contracted (0: a table, whose columns are its last dimension).
    """

    tiles: jax.Array
    format: str = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)

    @property
    def columns(self) -> int:
        return math.prod(self.shape[: self.inputs]) if self.inputs else self.shape[-1]

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.shape[self.inputs :] if self.inputs else self.shape[:-1]

    @property
    def rows(self) -> int:
        return math.prod(self.outputs)

    @property
    def T(self) -> QuantizedTensor:
        """The transposed table: what a tied model unembeds with."""
        return dataclasses.replace(self, shape=self.shape[::-1], inputs=1 - self.inputs)

    def apply(self, x: jax.Array) -> jax.Array:
        """x (..., *inputs) times the matrix: (..., *outputs) in x's dtype."""
        lead = x.shape[: x.ndim - max(1, self.inputs)]
        flat = x.reshape(math.prod(lead), self.columns)
        if pad := -self.columns % FORMATS[self.format].group:
            flat = jnp.pad(flat, ((0, 0), (0, pad)))
        if grouped.available():
            style = FORMATS[self.format]
            y = grouped.multiply(flat.astype(jnp.float32), self.tiles, self.rows, style.bits, style.group)
        else:
            wide = jnp.promote_types(x.dtype, jnp.float32) if jax.default_backend() == "cpu" else x.dtype
            matrix = _widen(self.tiles, self.format)[: self.rows].astype(wide)
            y = jnp.einsum("mk,nk->mn", flat.astype(wide), matrix)
        return y.reshape(*lead, *self.outputs).astype(x.dtype)

    def matrix(self) -> jax.Array:
        """Float32 (*stack, rows, columns)."""
        return _widen(self.tiles, self.format)[..., : self.rows, : self.columns]

    def dense(self) -> jax.Array:
        """The float32 array it stands for: (*stack, *shape)."""
        matrix = self.matrix()
        if self.inputs:
            matrix = matrix.swapaxes(-1, -2)
        return matrix.reshape(*self.tiles.shape[:-3], *self.shape)

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Float32 rows of a table: (*ids.shape, columns)."""
        tiles = self.tiles[ids // ROWS]  # a tile is read for each row: 16 times the bytes, of a few rows
        matrix = _widen(tiles[..., None, :, :], self.format)
        return jnp.take_along_axis(matrix, (ids % ROWS)[..., None, None], axis=-2)[..., 0, : self.columns]


def _widen(tiles: jax.Array, name: str) -> jax.Array:
    """Float32 (..., tile rows x 16, columns) of tiles (..., tile rows, groups, bytes)."""
    style, lead = FORMATS[name], tiles.shape[:-1]
    scales = jax.lax.bitcast_convert_type(tiles[..., : 2 * ROWS].reshape(*lead, ROWS, 2), jnp.float16)
    quants, blocks = tiles[..., 2 * ROWS :], style.group // BLOCK
    if style.bits == 4:
        quants = quants.reshape(*lead, blocks, 1, 4, ROWS, 4)
        quants = jnp.concatenate([quants & 15, quants >> 4], axis=-4).astype(jnp.float32) - 8
    else:
        quants = jax.lax.bitcast_convert_type(quants.reshape(*lead, blocks, 2, 4, ROWS, 4), jnp.int8).astype(
            jnp.float32
        )
    wide = quants * scales.astype(jnp.float32)[..., None, None, None, :, None]
    # (.., tile, group, block, half, part, row, 4) -> (.., tile, row, group, block, half, part, 4)
    wide = jnp.moveaxis(wide, -2, -6)
    return wide.reshape(*lead[:-2], lead[-2] * ROWS, lead[-1] * style.group)


def to_tiles(blocks: np.ndarray, name: str) -> np.ndarray:
    """Tiles of GGUF-like blocks: uint8 (..., rows, columns / group * group_bytes) -> (..., tile rows, groups, bytes)."""
    style = FORMATS[name]
    *stack, rows, width = blocks.shape
    groups, parts = width // style.group_bytes, style.bits  # of 32 columns, as (parts, 4) bytes: 4 or 8 of them
    if pad := -rows % ROWS:
        blocks = np.concatenate([blocks, np.zeros((*stack, pad, width), np.uint8)], axis=-2)
    blocks = blocks.reshape(*stack, -1, ROWS, groups, style.group_bytes)
    scales = np.moveaxis(blocks[..., :2], -3, -2).reshape(*stack, -1, groups, 2 * ROWS)
    quants = np.ascontiguousarray(blocks[..., 2:]).view(np.uint32)  # four columns at a time
    quants = quants.reshape(*stack, -1, ROWS, groups, style.group // BLOCK * parts)
    quants = np.ascontiguousarray(np.moveaxis(quants, -3, -1)).view(np.uint8)
    return np.concatenate([scales, quants.reshape(*stack, -1, groups, ROWS * (style.group_bytes - 2))], axis=-1)
