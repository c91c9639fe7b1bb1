"""The block-sparse kernel against the plain one, the reference kernel's tensors and the reference mask builder."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import check, read_golden

from phi3_jax.configs import BlockSparse
from phi3_jax.errors import UserError
from phi3_jax.models.attention import Mask, attend, reference
from phi3_jax.models.masks import blocksparse_allowed
from phi3_jax.sharding.mesh import make_mesh

SETTINGS = [
    (BlockSparse(16, 2, 3), 2, 4, 200), (BlockSparse(16, 2, 4), 4, 1, 513), (BlockSparse(16, 3, 8), 1, 3, 330),
    (BlockSparse(16, 1, 8), 1, 2, 256), (BlockSparse(16, 2, 3, homo_head=True), 2, 2, 300),
    (BlockSparse(64, 2, 8), 2, 4, 1000), (BlockSparse(512, 1, 2), 1, 2, 1100),
]  # fmt: skip


def inputs(g: int, r: int, time: int, k: int = 8) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(time), 3)
    shapes = (2, time, g, r, k), (2, time, g, k), (2, time, g, k)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize(("pattern", "g", "r", "time"), SETTINGS)
def test_values_and_gradients_equal_the_whole_score_matrix(pattern: BlockSparse, g: int, r: int, time: int) -> None:
    q, k, v = inputs(g, r, time)
    mask, weight = Mask(blocksparse=pattern), jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def total(kind: str):
        return jax.value_and_grad(lambda *x: (attend(*x, mask, 0.7, kind) * weight).sum(), argnums=(0, 1, 2))

    np.testing.assert_allclose(attend(q, k, v, mask, 0.7, "blocksparse"), reference(q, k, v, mask, 0.7), atol=5e-6)
    (value, grads), (expected, exact) = (total(kind)(q, k, v) for kind in ("blocksparse", "reference"))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(grads, exact, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    other = Mask(blocksparse=dataclasses.replace(pattern, vert_stride=pattern.vert_stride + 1))
    assert float(jnp.abs(reference(q, k, v, other, 0.7) - attend(q, k, v, mask, 0.7, "auto")).max()) > 1e-3


@pytest.mark.parametrize("kind", ["auto", "chunked", "blocksparse"])
@pytest.mark.shared("goldens")
def test_the_reference_kernels_tensors(kind: str) -> None:
    meta, t = read_golden("small_blocksparse_op")
    config = meta["config"]
    kv = t["k"].shape[1]
    pattern = BlockSparse(config["block_size"], config["num_local_blocks"], config["vert_stride"])
    q = t["q"].transpose(0, 2, 1, 3).reshape(1, t["q"].shape[2], kv, -1, t["q"].shape[3])
    k, v = (jnp.asarray(t[x].transpose(0, 2, 1, 3)) for x in "kv")
    scale = config.get("softmax_scale", config.get("scale"))
    out = attend(jnp.asarray(q), k, v, Mask(blocksparse=pattern), scale, kind)
    check(out.reshape(*out.shape[:2], -1, out.shape[-1]).transpose(0, 2, 1, 3), t["out"], meta, "out")


def test_masks_of_the_reference_builder() -> None:
    meta, t = read_golden("small_masks")
    for case in meta["cases"]:
        pattern = BlockSparse(
            case["block_size"], case["num_local_blocks"], case["vert_stride"], case["homo_head_pattern"]
        )
        expected = t[f"block_mask_{case['index']}"]
        first = jnp.arange(expected.shape[1]) * pattern.block
        ours = blocksparse_allowed(pattern, first, first, case["n_heads"]) & (first[:, None] >= first[None])
        np.testing.assert_array_equal(ours, expected.astype(bool))


def test_requests_that_cannot_be_served_say_why() -> None:
    q, k, v = inputs(1, 2, 64)
    pattern, segments = BlockSparse(16, 2, 3), jnp.ones((2, 64), jnp.int32)
    for mask, word in (
        (Mask(), "no block pattern"),
        (Mask(blocksparse=pattern, segments=segments, positions=segments), "document"),
        (Mask(blocksparse=pattern, window=5), "window"),
    ):
        with pytest.raises(UserError, match=word):
            attend(q, k, v, mask, 1.0, "blocksparse")
        attend(q, k, v, mask, 1.0)


def test_heads_split_over_devices_keep_their_global_number() -> None:
    """Under tensor parallelism a device holds some kv heads; each head's pattern depends on its number among all."""
    q, k, v = inputs(4, 2, 200)
    mask = Mask(blocksparse=BlockSparse(16, 2, 8))
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharded = [jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(None, None, "tensor"))) for x in (q, k, v)]
    out = jax.jit(lambda *x: attend(*x, mask, 0.7))(*sharded)
    exact = reference(q, k, v, mask, 0.7)
    np.testing.assert_allclose(out, exact, atol=5e-6)
    local = jnp.concatenate(
        [attend(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], mask, 0.7) for i in range(4)], 2
    )
    assert float(jnp.abs(local - exact).max()) > 1e-2  # counting heads from each device's first is another model


def test_batch_split_over_an_explicit_mesh() -> None:
    q, k, v = (jnp.concatenate([x, x + 1]) for x in inputs(2, 2, 200))
    mask = Mask(blocksparse=BlockSparse(16, 2, 3))

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sin(attend(q, k, v, mask, 0.7)).sum()

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    alone = run(q, k, v)
    mesh = make_mesh(jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
        split = run(*(jax.device_put(x, sharding) for x in (q, k, v)))
    assert split[1][0].sharding.spec[0] == "data"
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
