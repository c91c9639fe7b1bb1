"""Blocked attention against the whole score matrix, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import BlockSparse
from phi3_jax.models import attention
from phi3_jax.models.attention import Mask

CASES = {
    "causal": (24, {}),
    "odd length in blocks": (301, {}),
    "window": (300, {"window": 37}),
    "packed": (140, {"packed": True}),
    "packed window": (300, {"packed": True, "window": 20}),
    "block-sparse": (270, {"blocksparse": BlockSparse(8, 2, 3)}),
    "packed block-sparse": (270, {"blocksparse": BlockSparse(8, 2, 3), "packed": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str) -> None:
    time, options = CASES[name]
    options = dict(options)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q = jnp.asarray(rng.normal(size=(2, time, 2, 3, 8)))
        k, v = (jnp.asarray(rng.normal(size=(2, time, 2, 8))) for _ in range(2))
        segments = positions = None
        if options.pop("packed", False):
            cut = time // 3
            segments = jnp.asarray(np.repeat([[1] * cut + [2] * (time - cut)], 2, 0))
            positions = jnp.asarray(np.repeat([[*range(cut), *range(time - cut)]], 2, 0))
        mask = Mask(segments=segments, positions=positions, **options)

        def total(args: tuple, implementation: str) -> jax.Array:
            return jnp.sum(jnp.sin(attention.attend(*args, mask, 0.3, implementation)))

        results = {
            i: jax.jit(jax.value_and_grad(lambda a, i=i: total(a, i)))((q, k, v)) for i in ("reference", "chunked")
        }
    for a, b in zip(jax.tree.leaves(results["reference"]), jax.tree.leaves(results["chunked"]), strict=True):
        assert a.dtype == b.dtype == np.float64
        np.testing.assert_allclose(a, b, atol=1e-9)
