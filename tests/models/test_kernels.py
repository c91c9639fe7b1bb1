"""The TPU and GPU kernels' masks against the reference, interpreted or by XLA; and which kernel serves what."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from phi3_jax import UserError
from phi3_jax.configs import BlockSparse
from phi3_jax.models.attention import Problem, attend, choose, reference
from phi3_jax.models.kernels import cudnn, splash
from phi3_jax.models.masks import ORIGIN, Mask, Origin, part_rows, seen

TIME, KV, QUERIES = 256, 2, 2
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [100, 60, 96], axis=1), jnp.int32)
PATTERN = BlockSparse(16, 3, 5, per_document=False)
MASKS = {
    "causal": Mask(),
    "window": Mask(window=50),
    "documents": Mask(segments=SEGMENTS),
    "window and documents": Mask(window=50, segments=SEGMENTS),
    "block pattern": Mask(blocksparse=PATTERN),
    "block pattern and documents": Mask(blocksparse=PATTERN, segments=SEGMENTS),
}


def inputs(time: int = TIME, head_dim: int = 32) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    shapes = (2, time, KV, QUERIES, head_dim), (2, time, KV, head_dim), (2, time, KV, head_dim)
    return tuple(jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes)


def run_splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return splash.attend(q, k, v, mask, 0.2, ORIGIN, splash.prepare(mask, q.shape, 1, 1, interpret=True))


@pytest.mark.parametrize("name", MASKS)
def test_splash_is_the_reference(name: str) -> None:
    q, k, v = inputs()
    np.testing.assert_allclose(run_splash(q, k, v, MASKS[name]), reference(q, k, v, MASKS[name], 0.2), atol=2e-5)


@pytest.mark.parametrize("name", ["window and documents", "block pattern"])
def test_splash_gradients_are_the_references(name: str) -> None:
    mask, args = MASKS[name], inputs()
    loss = lambda fn: lambda *x: jnp.sum(jnp.sin(fn(*x, mask)))  # noqa: E731
    got = jax.grad(loss(run_splash), argnums=(0, 1, 2))(*args)
    want = jax.grad(loss(lambda q, k, v, m: reference(q, k, v, m, 0.2)), argnums=(0, 1, 2))(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_splash_tells_masks_apart() -> None:
    q, k, v = inputs()
    outs = [np.asarray(run_splash(q, k, v, mask)) for mask in MASKS.values()]
    for i, a in enumerate(outs):
        for b in outs[i + 1 :]:
            assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("heads", [4, 12])
def test_splash_tiles_of_the_block_pattern(heads: int) -> None:
    """Tile by tile, what `masks.seen` says of the whole, for heads beyond the stride too."""
    mask = Mask(blocksparse=PATTERN)
    every = slice(0, TIME)
    whole = np.asarray(seen(mask, every, every, (1, heads)))[0]
    for head, tiles in enumerate(splash._head_masks(mask, TIME, heads, np.arange(TIME))):
        for row in (slice(0, 128), slice(128, 256)):
            for key in (slice(0, 128), slice(128, 256)):
                np.testing.assert_array_equal(tiles[row, key], whole[head, row, key])


@pytest.mark.parametrize("name", ["causal", "window", "documents", "window and documents"])
def test_cudnns_arguments_mean_the_reference(name: str) -> None:
    q, k, v = inputs()
    got = cudnn.attend(q, k, v, MASKS[name], 0.2, ORIGIN, backend="xla")
    np.testing.assert_allclose(got, reference(q, k, v, MASKS[name], 0.2), atol=2e-5)


@pytest.mark.parametrize("row", [0, 96])
def test_a_part_of_the_queries_sees_what_it_sees_in_the_whole(row: int) -> None:
    """As under context parallelism: queries from `row` on, all keys."""
    q, k, v = inputs()
    for mask in (*MASKS.values(), Mask(blocksparse=BlockSparse(16, 3, 5), segments=SEGMENTS, positions=SEGMENTS * 7)):
        whole = reference(q, k, v, mask, 0.2)
        part = q[:, row : row + 64]
        for fn in (reference, _chunked):
            got = fn(part, k, v, mask, 0.2, Origin(rows=jnp.arange(row, row + 64)))
            np.testing.assert_allclose(got, whole[:, row : row + 64], atol=2e-5)


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("name", ["causal", "window and documents", "block pattern"])
def test_splash_in_parts_of_equal_work_is_the_reference(name: str, shards: int) -> None:
    """As under context parallelism: each device has the queries of `part_rows`, and all keys."""
    time = 2 * shards * 128
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).normal(size=(1, time, 2, *s, 16)), jnp.float32)
        for i, s in enumerate(((2,), (), ()))
    )
    mask = dataclasses.replace(MASKS[name], segments=None)
    if "documents" in name:
        mask = dataclasses.replace(mask, segments=jnp.asarray(1 + np.arange(time)[None] // 200))
    mesh = jax.make_mesh(
        (shards,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:shards]
    )
    rows = np.concatenate([part_rows(time, shards, i) for i in range(shards)])
    tiles = splash.prepare(mask, q.shape, 1, shards, interpret=True)

    def part(q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, tiles: object) -> jax.Array:
        return splash.attend(q, k, v, mask, 0.2, Origin(rows=rows), tiles)

    specs = P(None, "context"), P(), P(), P("context"), splash.specs(tiles, mesh, P(None, "context"))
    run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(None, "context"), check_vma=False)
    out = jax.jit(lambda q, k, v: run(q[:, rows], k, v, jnp.asarray(rows), tiles))
    np.testing.assert_allclose(out(q, k, v), reference(q, k, v, mask, 0.2)[:, rows], atol=2e-5)
    got, want = (
        jax.grad(lambda *x, fn=fn: jnp.sum(jnp.sin(fn(*x))), argnums=(0, 1, 2))(q, k, v)
        for fn in (out, lambda q, k, v: reference(q, k, v, mask, 0.2))
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize(("time", "shards"), [(64, 1), (64, 4), (66, 3), (60, 4), (63, 3)])
def test_parts_are_all_rows_once_and_see_as_many_keys(time: int, shards: int) -> None:
    parts = [part_rows(time, shards, i) for i in range(shards)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(time))
    if shards > 1 and time % (2 * shards) == 0:
        assert {int(part.sum()) for part in parts} == {time * (time - 1) // 2 // shards}
    traced = jax.jit(lambda i: part_rows(time, shards, i))
    np.testing.assert_array_equal(np.stack([traced(i) for i in range(shards)]), np.stack(parts))


def _chunked(*args: object) -> jax.Array:
    from phi3_jax.models.kernels import chunked

    return chunked.attend(*args)


# ------------------------------------------------------------------------------------------------ who serves


def problem(platform: str, mask: Mask = MASKS["causal"], **changes: object) -> Problem:
    return dataclasses.replace(Problem(platform, TIME, 96, jnp.dtype("bfloat16"), mask, 1, False), **changes)


def test_auto_takes_each_platforms_fast_kernel() -> None:
    sparse = MASKS["block pattern"]
    assert choose("auto", problem("tpu")) == choose("auto", problem("tpu", sparse)) == "splash"
    assert choose("auto", problem("gpu")) == "cudnn"
    assert choose("auto", problem("gpu", sparse)) == choose("auto", problem("cpu", sparse)) == "blocksparse"
    assert choose("auto", problem("cpu")) == "chunked"


def test_auto_falls_back_and_says_so_once(capsys: pytest.CaptureFixture) -> None:
    odd = problem("tpu", time=200)
    assert choose("auto", odd) == choose("auto", odd) == "chunked"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'splash' cannot serve: time=200 is no multiple of 128" in said


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("splash", problem("cpu"), "runs on TPU, not on cpu"),
        ("splash", problem("tpu", head_dim=20), "head_dim=20"),
        ("splash", problem("tpu", Mask(blocksparse=PATTERN, positions=SEGMENTS)), "row's start"),
        ("cudnn", problem("tpu"), "runs on GPU"),
        ("cudnn", problem("gpu", dtype=jnp.dtype("float32")), "float32; it computes in bfloat16"),
        ("cudnn", problem("gpu", head_dim=136), "head_dim=136"),
        ("cudnn", problem("gpu", MASKS["block pattern"]), "no block pattern"),
        ("cudnn", problem("gpu", time_shards=2), "part of the keys' times"),
        ("cudnn", problem("gpu", MASKS["documents"], time=16384), "packed rows"),
        ("blocksparse", problem("cpu", MASKS["block pattern"], splits_heads=True), "split over devices"),
        ("flash", problem("tpu"), "runs on CPU"),
        ("flash", problem("cpu"), "bfloat16; it computes in float32"),
        ("flash", problem("cpu", dtype=jnp.dtype("float32"), time=255), "255 tokens; it takes 256"),
        ("flash", problem("cpu", MASKS["block pattern"], dtype=jnp.dtype("float32"), time=256), "no block pattern"),
        ("flash", problem("cpu", dtype=jnp.dtype("float32"), time=256, time_shards=2), "part of the keys' times"),
    ],
)
def test_a_kernel_that_cannot_serve_says_why(name: str, asked: Problem, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose(name, asked)


def test_an_unknown_kernel_is_named() -> None:
    q, k, v = inputs()
    with pytest.raises(UserError, match="unknown attention 'splosh'.*did you mean 'splash'"):
        attend(q, k, v, Mask(), 1.0, "splosh")
