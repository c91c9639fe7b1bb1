"""The rotation's gradients: of its input and, where somebody asks, of its table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import family
from phi3_jax.models.rotary import _rotation, rope_table, rotate

CFG = family.proxy("mini", "pico", "clean")
POSITIONS = jnp.arange(5)[None] * jnp.ones((2, 1), jnp.int32)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    x, cotangent = (jax.random.normal(key, (2, 5, 3, 2, CFG.head_dim)) for key in keys)
    return x, rope_table(POSITIONS, CFG), cotangent


def test_both_gradients_are_those_of_the_plain_rotation() -> None:
    x, table, cotangent = inputs()
    want = jax.vjp(lambda x, table: _rotation(x, table, 1.0), x, table)[1](cotangent)
    got = jax.vjp(rotate, x, table)[1](cotangent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(want[1]).max()) > 1


def test_a_table_nobody_trains_keeps_no_input() -> None:
    x, table, _ = inputs()
    kept = jax.tree.leaves(jax.vjp(lambda x: rotate(x, table), x)[1])
    assert x.shape not in [y.shape for y in kept]
    assert x.shape in [y.shape for y in jax.tree.leaves(jax.vjp(lambda t: rotate(x, t), table)[1])]


def test_a_rotation_that_is_not_used_has_a_gradient_of_zero() -> None:
    x, table, _ = inputs()
    grad = jax.grad(lambda x, t: 0.0 * jnp.sum(x[0]) + jnp.sum(rotate(x, t)[0] * 0), argnums=(0, 1))(x, table)
    assert all(float(jnp.abs(g).max()) == 0 for g in grad)
