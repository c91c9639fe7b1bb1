"""Cross-entropy of hidden states against targets, without ever holding the logits of a whole batch.

The loss and its gradients with respect to hidden states and output matrix come out of one pass over chunks of
positions: each chunk's logits are made, turned into a loss and into (softmax - one-hot), multiplied back, and
dropped. Nothing is recomputed in the backward pass, which only scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from phi3_jax.models.layers import flat
from phi3_jax.models.layout import join, per_device, spec_of, sum_over

LIMIT = 64 * 2**20  # elements of a device's logits at a time: 256 MiB in float32
Step = Callable[[Any, tuple[jax.Array, ...]], tuple[Any, Any]]


def _chunk_loss(
    hidden: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits, log normaliser, target's logit) of one chunk in float32 or wider."""
    logits = jnp.einsum("bpd,dv->bpv", hidden, matrix)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) * scale
    if mask is not None:
        logits = jnp.where(mask, jnp.finfo(logits.dtype).min, logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, log_z, picked


def chunk_count(positions: int, vocab: int, rows: int, limit: int = LIMIT) -> int:
    """Chunks of positions so that one chunk's logits hold at most `limit` elements."""
    wanted = -(-positions * vocab * rows // limit)
    return next(c for c in range(max(1, wanted), positions + 1) if positions % c == 0) if wanted > 1 else 1


def over_chunks(step: Step, start: Any, arrays: tuple[jax.Array, ...], vocab: int, limit: int = LIMIT) -> Any:
    """`jax.lax.scan` of `step` over chunks of positions of arrays (rows, positions, ...); outputs put together again."""
    rows, positions = arrays[0].shape[:2]
    chunks = chunk_count(positions, vocab, rows, limit)
    if chunks == 1:
        return step(start, arrays)
    cut = tuple(jnp.moveaxis(x.reshape(rows, chunks, positions // chunks, *x.shape[2:]), 1, 0) for x in arrays)
    carry, outs = jax.lax.scan(step, start, cut)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, positions, *x.shape[3:]), outs)


def specs(hidden: jax.Array) -> tuple[P, P, tuple[str, ...]]:
    """Of hidden states, of (rows, positions), and the mesh axes that split them."""
    batch, time, _ = spec_of(hidden)
    return P(join(batch), join(time), None), P(join(batch), join(time)), batch + time


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def weighted_cross_entropy(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    mask: jax.Array | None,
    scale: float,
    z_loss: float,
    limit: int = LIMIT,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weights * (nll + z_loss log_z^2), and the nll of every position.

    Args:
      hidden: (rows, positions, embed) in the compute dtype.
      matrix: (embed, vocab), same dtype; whole on every device.
      targets: (rows, positions) integers.
      weights: (rows, positions) float32; 0 where there is no loss.
      mask: (vocab,) True for ids that never win, or None.
      scale: factor on the logits.
      z_loss: weight of the squared log normaliser (Chowdhery et al. 2022, section 5).
      limit: elements of a device's logits at a time; each device goes over its own rows and positions.

    Returns:
      (scalar, (rows, positions) nll in nats); the nll carries no gradient.
    """

    def part(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        def step(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, t, w = xs
            _, log_z, picked = _chunk_loss(h, matrix, t, mask, scale)
            return total + jnp.sum(w * (log_z - picked + z_loss * log_z**2)), log_z - picked

        total, nll = over_chunks(step, jnp.float32(0), (hidden, targets, weights), matrix.shape[1], limit)
        return sum_over(total, axes), nll

    whole, rows, axes = specs(hidden)
    return per_device(part, (whole, P(), rows, rows, P()), (P(), rows), hidden, matrix, targets, weights, mask)


def _forward(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    mask: jax.Array | None,
    scale: float,
    z_loss: float,
    limit: int,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    def part(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        def step(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]) -> tuple[tuple, tuple]:
            total, d_matrix = carry
            h, t, w = xs
            logits, log_z, picked = _chunk_loss(h, matrix, t, mask, scale)
            total += jnp.sum(w * (log_z - picked + z_loss * log_z**2))
            slope = w if z_loss == 0 else w * (1 + 2 * z_loss * log_z)
            hit = t[..., None] == jnp.arange(matrix.shape[1])
            d_logits = jnp.exp(logits - log_z[..., None]) * slope[..., None] - jnp.where(hit, w[..., None], 0)
            d_logits = (d_logits * scale).astype(h.dtype)
            d_hidden = jnp.einsum("bpv,dv->bpd", d_logits, matrix)
            d_matrix += flat(h, 2).T @ flat(d_logits, 2)
            return (total, d_matrix), (log_z - picked, d_hidden)

        start = jnp.float32(0), jnp.zeros_like(matrix)
        (total, d_matrix), outs = over_chunks(step, start, (hidden, targets, weights), matrix.shape[1], limit)
        return sum_over(total, axes), sum_over(d_matrix, axes), *outs

    whole, rows, axes = specs(hidden)
    total, d_matrix, nll, d_hidden = per_device(
        part, (whole, P(), rows, rows, P()), (P(), P(), rows, whole), hidden, matrix, targets, weights, mask
    )
    return (total, nll), (d_hidden, d_matrix)


def _backward(
    scale: float,
    z_loss: float,
    limit: int,
    saved: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    d_hidden, d_matrix = saved
    slope = cotangents[0].astype(d_hidden.dtype)
    return d_hidden * slope, d_matrix * slope, None, None, None


weighted_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_nll(
    hidden: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array | None, scale: float, limit: int = LIMIT
) -> jax.Array:
    """The nll of every target in nats, (rows, positions) float32, with gradients: for losses that are no weighted sum.

    Arguments as in `weighted_cross_entropy`. The backward pass makes each chunk's logits again: what a position's nll
    weighs is known only when the loss is.
    """

    def part(hidden: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array | None) -> jax.Array:
        def step(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
            log_z, picked = _chunk_loss(xs[0], matrix, xs[1], mask, scale)[1:]
            return None, log_z - picked

        return over_chunks(step, None, (hidden, targets), matrix.shape[1], limit)[1]

    whole, rows, _ = specs(hidden)
    return per_device(part, (whole, P(), rows, P()), rows, hidden, matrix, targets, mask)


def _token_nll_forward(
    hidden: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array | None, scale: float, limit: int
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    return token_nll(hidden, matrix, targets, mask, scale, limit), (hidden, matrix, targets, mask)


def _token_nll_backward(
    scale: float, limit: int, saved: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    hidden, matrix, targets, mask = saved
    _, (d_hidden, d_matrix) = _forward(hidden, matrix, targets, cotangent, mask, scale, 0.0, limit)
    return d_hidden, d_matrix, None, None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def target_weights(domains: jax.Array, count: int, domain_mean: bool, per_token: bool = False) -> jax.Array:
    """Loss weight of every position of a *global* batch; they sum to 1, but for `per_token`.

    Args:
      domains: (batch, time) 0 = no loss, else domain number 1..count.
      count: number of domains.
      domain_mean: each domain present weighs the same (mean of domain means); else every target weighs the same.
      per_token: every target weighs 1 / (batch * time), whatever share of the positions has a target.
    """
    if not domain_mean:
        has = (domains > 0).astype(jnp.float32)
        if per_token:
            return has / domains.size
        return has / jnp.maximum(jnp.sum(has), 1)
    members = domains[..., None] == jnp.arange(1, count + 1)
    sizes = jnp.sum(members, axis=(0, 1)).astype(jnp.float32)
    present = jnp.maximum(jnp.sum(sizes > 0), 1)
    return jnp.sum(jnp.where(members, 1.0 / jnp.maximum(sizes * present, 1), 0.0), axis=-1)
