"""Rounding to 4 or 8 bits, plain or calibrated on activations (GPTQ, arXiv:2210.17323): `launch/quantize.py`."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.interop import huggingface, quantized
from phi3_jax.models.attention import attend
from phi3_jax.models.decoder import default_positions, embed, layer, mask_of
from phi3_jax.models.layers import norm
from phi3_jax.models.quantized import FORMATS, Format, Product
from phi3_jax.models.rotary import rope_table

LARGE, MEASURED = 10**9, 2048  # a model of so many parameters is measured on so many tokens at most: minutes on a CPU
SHRINK = np.linspace(1.0, 0.7, 13)  # scales that are tried, beside that of the largest weight
BLOCK = 128  # columns between two updates of all later ones (arXiv:2210.17323, section 3.3)


# ------------------------------------------------------------------------------------------------ rounding


def _scales(groups: np.ndarray, style: Format) -> np.ndarray:
    """float32 scales (..., 1) of groups (..., group): GGUF's rule, which uses all 16 levels on the larger side."""
    if style.bits == 8:
        return np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1)[..., None], axis=-1)
    return largest / np.float32(-8)


def _levels(groups: np.ndarray, scales: np.ndarray, style: Format) -> np.ndarray:
    """Quants (..., group) as uint8: 8 too large with 4 bits, two's complement with 8; GGUF's rounding."""
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    scaled = groups * inverse
    if style.bits == 4:
        return np.clip(np.trunc(scaled + np.float32(8.5)), 0, 15).astype(np.uint8)
    size = np.abs(scaled)
    whole = np.floor(size)
    return np.clip(np.sign(scaled) * (whole + np.floor(2 * (size - whole))), -128, 127).astype(np.int8).view(np.uint8)


def _values(levels: np.ndarray, scales: np.ndarray, style: Format) -> np.ndarray:
    """The float32 weights that quants and (float16) scales stand for."""
    quants = levels.astype(np.float32) - 8 if style.bits == 4 else levels.view(np.int8).astype(np.float32)
    return quants * scales.astype(np.float16).astype(np.float32)


def _pack(levels: np.ndarray, scales: np.ndarray, style: Format) -> np.ndarray:
    """Blocks (rows, bytes) of quants (rows, groups, group) and scales (rows, groups, 1)."""
    rows, groups, _ = levels.shape
    if style.bits == 4:  # the first and the last 16 of each 32 share bytes
        pairs = levels.reshape(rows, groups, style.group // 32, 2, 16)
        levels = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(rows, groups, -1)
    heads = scales.astype(np.float16).view(np.uint8).reshape(rows, groups, 2)
    return np.concatenate([heads, levels], axis=-1).reshape(rows, -1)


def _grouped(matrix: np.ndarray, style: Format) -> np.ndarray:
    """(rows, columns) -> float32 (rows, groups, group), filled up with zeros."""
    matrix = np.asarray(matrix, np.float32)
    if pad := -matrix.shape[1] % style.group:
        matrix = np.pad(matrix, ((0, 0), (0, pad)))
    return matrix.reshape(len(matrix), -1, style.group)


def round_matrix(matrix: np.ndarray, name: str, search: bool = False) -> np.ndarray:
    """Blocks of a matrix, each weight rounded to the nearest level: q4_0 and q8_0 as GGUF's own, bit for bit.

    Args:
      matrix: (rows, columns) of any float dtype.
      name: in FORMATS.
      search: take the scale that leaves the least squared error in each group, not GGUF's.

    Returns:
      uint8 (rows, groups * group_bytes).
    """
    style = FORMATS[name]
    groups = _grouped(matrix, style)
    if search:
        flat, even = groups.reshape(-1, style.group), np.ones(style.group, np.float32)
        scales = _best_scale(flat, even, style).reshape(*groups.shape[:2], 1)
    else:
        scales = _scales(groups, style)
    return _pack(_levels(groups, scales, style), scales, style)


def dequantise(blocks: np.ndarray, name: str, columns: int) -> np.ndarray:
    """float32 (rows, columns) of blocks (rows, bytes)."""
    style = FORMATS[name]
    blocks = blocks.reshape(len(blocks), -1, style.group_bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)
    levels = np.ascontiguousarray(blocks[..., 2:])
    if style.bits == 4:
        pairs = levels.reshape(*levels.shape[:2], style.group // 32, 1, 16)
        levels = np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(*levels.shape[:2], style.group)
    return _values(levels, scales, style).reshape(len(blocks), -1)[:, :columns]


def calibrate_matrix(
    matrix: np.ndarray, moments: np.ndarray, name: str, drift: np.ndarray | None = None, damping: float = 0.01
) -> np.ndarray:
    """Blocks of a matrix that keep its products with real inputs: GPTQ, with scales searched a group.

    Columns are rounded one after another, and what each one's rounding does to the products is made up for in the columns
    after it, by the second moments of the inputs. Before that, the matrix is moved to what fits the inputs that earlier
    rounding has changed best, with the products of the unchanged ones as the aim (as in GPTAQ, arXiv:2504.02692).

    Args:
      matrix: (rows, columns).
      moments: (columns, columns) sums of x x^T over the inputs x that it will meet.
      name: in FORMATS.
      drift: (columns, columns) sums of (x' - x) x^T, with x' the inputs of the unrounded model.
      damping: added to the moments' diagonal, as a share of its mean.
    """
    style, columns = FORMATS[name], matrix.shape[1]
    spread = np.zeros((columns, columns)) + moments
    spread[np.diag_indices(columns)] += damping * max(np.trace(moments) / columns, 1e-12)
    if drift is not None:
        matrix = matrix + np.asarray(matrix, np.float64) @ np.linalg.solve(spread, drift.T).T
    left = _grouped(matrix, style).reshape(len(matrix), -1).copy()
    width = left.shape[1]
    moments = np.eye(width) * np.trace(spread) / columns
    moments[:columns, :columns] = spread
    weights = np.diag(moments).astype(np.float32)
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    levels, scales = np.empty(left.shape, np.uint8), np.empty((len(left), width // style.group, 1), np.float32)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = np.empty((len(left), stop - start), np.float32)
        for i in range(start, stop):
            group = i // style.group
            if i % style.group == 0:
                here = slice(i, i + style.group)
                scales[:, group] = _best_scale(left[:, here], weights[here], style)
            column = left[:, i : i + 1]
            levels[:, i : i + 1] = _levels(column, scales[:, group], style)
            value = _values(levels[:, i : i + 1], scales[:, group], style)
            errors[:, i - start] = ((column - value) / factor[i, i])[:, 0]
            left[:, i:stop] -= errors[:, i - start, None] * factor[i, i:stop]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return _pack(levels.reshape(len(left), -1, style.group), scales, style)


def _best_scale(groups: np.ndarray, weights: np.ndarray, style: Format) -> np.ndarray:
    """Of some scales (rows, 1) for groups (rows, group), each row's with the least squared error, weighted by column."""
    plain = _scales(groups, style)
    best, least = plain, np.full((len(groups), 1), np.inf, np.float32)
    for sign in (1, -1) if style.bits == 4 else (1,):  # the side with 8 levels may be the other one
        for share in SHRINK:
            scales = plain * np.float32(sign * share)
            error = np.square(groups - _values(_levels(groups, scales, style), scales, style)) @ weights[:, None]
            best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


# ------------------------------------------------------------------------------------------------ calibration


@dataclasses.dataclass
class _Recorder(Product):
    """A matrix that keeps what it is multiplied with."""

    weight: jax.Array
    inputs: int
    seen: list[jax.Array] = dataclasses.field(default_factory=list)

    def apply(self, x: jax.Array) -> jax.Array:
        lead = x.ndim - self.inputs
        flat = x.reshape(math.prod(x.shape[:lead]), -1)
        self.seen.append(flat)
        matrix = self.weight.reshape(flat.shape[1], -1)
        return (flat @ matrix).reshape(*x.shape[:lead], *self.weight.shape[self.inputs :])


def _fit(matrix: np.ndarray, now: _Recorder, once: _Recorder, name: str) -> np.ndarray:
    """Blocks of a matrix that meets `now` where the unrounded model meets `once`."""
    pairs = list(zip(now.seen, once.seen, strict=True))
    moments = functools.reduce(operator.add, (np.asarray(x.T @ x, np.float64) for x, _ in pairs))
    drift = functools.reduce(operator.add, (np.asarray((y - x).T @ x, np.float64) for x, y in pairs))
    return calibrate_matrix(matrix, moments, name, drift)


Batch = dict[str, jax.Array]


def calibrated(
    cfg: ModelConfig, read: Callable[[str, int | None], np.ndarray], batches: Sequence[Batch], name: str
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(leaf, layer, blocks or float32 array) of every part, layer by layer; each sees the rounding of those before it.

    Args:
      cfg: the model.
      read: (leaf, layer) -> that part of the parameters.
      batches: tokens to calibrate on: "tokens" and, for packed documents, "segments" and "positions", (batch, time).
    """
    specs = huggingface.leaves_of(cfg)
    get = lambda leaf, i=None: np.asarray(read(leaf, i), np.float32)  # noqa: E731
    blocks = round_matrix(get("embedding"), name, search=True)
    yield "embedding", None, blocks
    table = jnp.asarray(dequantise(blocks, name, cfg.embed))
    states = [embed(table, b["tokens"], cfg, jnp.float32) for b in batches]
    exact = [embed(jnp.asarray(get("embedding")), b["tokens"], cfg, jnp.float32) for b in batches]
    for i in range(cfg.layers):
        parts = {leaf: get(leaf, i) for leaf in specs if leaf.startswith("blocks.")}
        # Matrices in the order in which they are used: each is rounded before the inputs of the next are measured.
        order = [f"blocks.{kind}.weight" for kind in ("qkv", "out", "gate_up", "down")]
        record = lambda leaf, part: _Recorder(jnp.asarray(part), quantized.inputs_of(leaf, specs[leaf]))  # noqa: E731
        once = {leaf: record(leaf, parts[leaf]) for leaf in order}
        exact = _through(cfg, i, parts | once, exact, batches)
        for leaf in order:
            now = record(leaf, parts[leaf])
            _through(cfg, i, parts | {leaf: now}, states, batches)
            matrix = quantized.as_matrix(leaf, specs[leaf], parts[leaf])
            blocks = _fit(matrix, now, once.pop(leaf), name)
            parts[leaf] = quantized.as_part(leaf, specs[leaf], dequantise(blocks, name, matrix.shape[1]))
            yield leaf, i, blocks
        for leaf, part in parts.items():
            if not quantized.is_quantised(specs[leaf]):
                yield leaf, i, part
        states = _through(cfg, i, parts, states, batches)
    gains = {k: get(k) for k in specs if k.startswith("final_norm.")}
    yield from ((leaf, None, part) for leaf, part in gains.items())
    if "unembedding" in specs:
        mine, theirs = (_Recorder(jnp.asarray(get("unembedding")), 1) for _ in range(2))
        last = {k.removeprefix("final_norm."): jnp.asarray(v) for k, v in gains.items()}
        for x, y in zip(states, exact, strict=True):
            mine.apply(norm(x, last, cfg))
            theirs.apply(norm(y, last, cfg))
        yield "unembedding", None, _fit(get("unembedding").T, mine, theirs, name)
    for leaf, spec in specs.items():
        if leaf.startswith("vision."):
            yield from ((leaf, i, get(leaf, i)) for i in spec.layers)
    if "unembedding_bias" in specs:
        yield "unembedding_bias", None, get("unembedding_bias")


def _through(
    cfg: ModelConfig, i: int, parts: dict[str, Any], states: Sequence[jax.Array], batches: Sequence[Batch]
) -> list[jax.Array]:
    """Hidden states after layer i, whose parts are named as leaves."""
    tree: dict[str, Any] = {}
    for leaf, part in parts.items():
        _, kind, last = leaf.split(".")
        tree.setdefault(kind, {})[last] = part if isinstance(part, Product) else jnp.asarray(part)
    out = []
    for x, batch in zip(states, batches, strict=True):
        segments, positions = batch.get("segments"), batch.get("positions")
        positions = default_positions(batch["tokens"], segments) if positions is None else positions
        mask = mask_of(cfg, i, segments, positions)
        see = functools.partial(attend, mask=mask, scale=cfg.softmax_scale)
        out.append(layer(x, tree, rope_table(positions, cfg, segments=segments), cfg, see))
    return out


# ------------------------------------------------------------------------------------------------ measuring


# ------------------------------------------------------------------------------------------------ the command
