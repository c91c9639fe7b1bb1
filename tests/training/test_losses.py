"""The chunked cross-entropy against plain float64, and what the weights of a batch mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.training import losses

RNG = np.random.default_rng(0)
HIDDEN, MATRIX = RNG.normal(size=(2, 12, 8)), RNG.normal(size=(8, 30))
TARGETS, WEIGHTS = RNG.integers(0, 30, (2, 12)), RNG.random((2, 12)) * (RNG.random((2, 12)) < 0.7)


def plain(hidden: np.ndarray, matrix: np.ndarray, z_loss: float, scale: float) -> jax.Array:
    """The loss by definition, through the whole logits."""
    logits = jnp.einsum("bpd,dv->bpv", hidden, matrix) * scale
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, TARGETS[..., None], axis=-1)[..., 0]
    return jnp.sum(WEIGHTS * (nll + z_loss * log_z**2))


@pytest.mark.parametrize("chunks", [1, 3, 12])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradients(chunks: int, z_loss: float) -> None:
    limit = 2 * 12 * 30 // chunks
    assert losses.chunk_count(12, 30, 2, limit) == chunks

    def ours(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        targets, weights = jnp.asarray(TARGETS), jnp.asarray(WEIGHTS, jnp.float32)
        return 3 * losses.weighted_cross_entropy(hidden, matrix, targets, weights, None, 0.5, z_loss, limit)[0]

    args = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(MATRIX, jnp.float32)
    value, grads = jax.value_and_grad(ours, argnums=(0, 1))(*args)
    with jax.enable_x64(True):
        wanted, wanted_grads = jax.value_and_grad(lambda h, m: 3 * plain(h, m, z_loss, 0.5), argnums=(0, 1))(
            HIDDEN, MATRIX
        )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(ours(*args), wanted, rtol=1e-5)  # the path without gradients
    for got, want in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_chunks_bound_the_logits() -> None:
    for positions, vocab, rows in ((4096, 100352, 1), (4096, 32064, 8), (24, 320, 44)):
        chunks = losses.chunk_count(positions, vocab, rows)
        assert positions % chunks == 0
        assert rows * positions // chunks * vocab <= 64 * 2**20
    assert losses.chunk_count(24, 320, 44) == 1


def test_domains_weigh_the_same_whatever_their_sizes() -> None:
    domains = jnp.asarray([[1, 1, 1, 1, 0], [2, 0, 0, 0, 0]])
    weights = losses.target_weights(domains, 2, True)
    np.testing.assert_allclose(weights, [[0.125] * 4 + [0], [0.5, 0, 0, 0, 0]])
    np.testing.assert_allclose(losses.target_weights(domains, 2, False).sum(), 1)
    fewer = jnp.asarray([[1, 1, 0, 0, 0], [2, 0, 0, 0, 0]])
    per_token = [losses.target_weights(x, 2, False, per_token=True) for x in (domains, fewer)]
    assert {float(x) for x in np.unique(per_token)} == {0.0, np.float32(0.1)}  # whatever else is in the batch
    alone = losses.target_weights(domains[:1], 2, True)  # an absent domain takes nothing
    np.testing.assert_allclose(alone.sum(), 1)
