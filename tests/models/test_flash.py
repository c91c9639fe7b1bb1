"""Attention of a CPU without written scores, and its gradients, against float64."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.models.attention import Mask, Problem, attend, choose, reference
from phi3_jax.models.kernels import flash, native

needs_kernel = pytest.mark.skipif(
    flash._obstacle_of_machine() is not None, reason="no C++ compiler: the kernel cannot be built"
)
# batch, time, kv heads, queries a kv head, head_dim; mask
CASES = {
    "blocks of odd lengths": ((2, 333, 2, 3, 16), {}),
    "whole blocks": ((1, 384, 1, 2, 32), {}),
    "heads of 96": ((1, 300, 2, 1, 96), {}),
    "heads of no whole vector": ((1, 290, 1, 2, 7), {}),
    "heads of 40": ((1, 290, 1, 1, 40), {}),
    "window": ((2, 500, 1, 2, 24), {"window": 100}),
    "window of one": ((1, 270, 1, 1, 16), {"window": 1}),
    "documents": ((2, 450, 1, 2, 16), {"packed": True}),
    "documents and window": ((2, 450, 2, 1, 48), {"packed": True, "window": 70}),
}


def inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng, (b, t, g, _, d) = np.random.default_rng(seed), shape
    return tuple(jnp.asarray(3 * rng.normal(size=s), jnp.float32) for s in (shape, (b, t, g, d), (b, t, g, d)))


def documents(batch: int, time: int) -> jax.Array:
    """Documents of one token and of many, other borders in each row, and padding at the end."""
    rows = [np.repeat([1, 2, 3, 4, 5, 0], [1, 90 + i, 7, 200, time - 330 - i, 32]) for i in range(batch)]
    return jnp.asarray(rows, jnp.int32)


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_float64(name: str) -> None:
    shape, options = CASES[name]
    segments = documents(*shape[:2]) if options.get("packed") else None
    mask = Mask(window=options.get("window"), segments=segments)
    q, k, v = inputs(shape)
    got = jax.jit(lambda *args: attend(*args, mask, 0.3, "flash"))(q, k, v)
    with jax.enable_x64(True):
        want = reference(*(jnp.asarray(np.float64(x)) for x in (q, k, v)), mask, 0.3)
    assert want.dtype == np.float64
    off = np.abs(got - want).max()
    plain = np.abs(attend(q, k, v, mask, 0.3, "chunked") - want).max()  # float32 sums of scores up to 50 are this exact
    assert off <= 2 * plain < 2e-4


@needs_kernel
def test_scores_far_apart_and_far_from_zero_keep_their_sum() -> None:
    q, k, v = inputs((1, 300, 1, 1, 16))
    with jax.enable_x64(True):
        want = reference(*(jnp.asarray(np.float64(x)) for x in (q * 30, k, v)), Mask(), 1.0)
    np.testing.assert_allclose(attend(q * 30, k, v, Mask(), 1.0, "flash"), want, atol=2e-3)
    ones = attend(q * 30, k, jnp.ones_like(v), Mask(), 1.0, "flash")
    np.testing.assert_allclose(ones, 1, atol=1e-6)


@needs_kernel
def test_what_the_mask_leaves_out_changes_no_bit() -> None:
    q, k, v = inputs((1, 420, 1, 2, 16))
    segments = jnp.asarray([[1] * 150 + [2] * 270])
    for mask, kept, changed in (
        (Mask(), slice(0, 200), slice(200, None)),
        (Mask(window=50), slice(300, None), slice(0, 200)),
        (Mask(segments=segments), slice(150, None), slice(0, 150)),
    ):
        other = [x.at[:, changed].set(x[:, changed] * -5 + 1) for x in (q, k, v)]
        before, after = attend(q, k, v, mask, 0.3, "flash"), attend(*other, mask, 0.3, "flash")
        np.testing.assert_array_equal(before[:, kept], after[:, kept])
        assert not np.array_equal(before, after)


@needs_kernel
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    q, k, v = inputs((1, 300, 1, 1, 16))
    for i in range(3):
        given = [x.at[0, 100].set(bad) if i == j else x for j, x in enumerate((q, k, v))]
        out = np.asarray(attend(*given, Mask(), 0.3, "flash"))
        assert not np.isfinite(out[0, 100]).all()
        assert i == 0 or not np.isfinite(out[0, 299]).all()
        assert i == 2 or np.isfinite(out[0, :100]).all()


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name: str) -> None:
    shape, options = CASES[name]
    segments = documents(*shape[:2]) if options.get("packed") else None
    mask = Mask(window=options.get("window"), segments=segments)
    given = inputs(shape)

    def gradients(of: Callable[..., jax.Array], args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return jax.grad(lambda args: jnp.sum(jnp.sin(of(*args))))(args)

    got, plain = (gradients(lambda *x, n=n: attend(*x, mask, 0.3, n), given) for n in ("flash", "chunked"))
    with jax.enable_x64(True):
        doubles = tuple(jnp.asarray(np.float64(x)) for x in given)
        want = gradients(lambda *x: reference(*x, mask, 0.3), doubles)
    for ours, theirs, right in zip(got, plain, want, strict=True):
        size = np.abs(right).max() + 1
        assert np.abs(ours - right).max() <= max(2 * np.abs(theirs - right).max(), 1e-5) < 1e-4 * size


@needs_kernel
def test_on_a_mesh_and_under_vmap() -> None:
    q, k, v = inputs((4, 300, 2, 2, 16))
    segments = documents(4, 362)[:, :300]
    want = attend(q, k, v, Mask(segments=segments), 0.3, "flash")
    several = jax.vmap(lambda q, k, v, s: attend(q[None], k[None], v[None], Mask(segments=s[None]), 0.3, "flash")[0])
    np.testing.assert_array_equal(several(q, k, v, segments), want)
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = P("rows", None, "heads")
        put = [jax.device_put(x, NamedSharding(mesh, P(*spec, *[None] * (x.ndim - 3)))) for x in (q, k, v)]
        rows = jax.device_put(segments, NamedSharding(mesh, P("rows")))
        got = jax.jit(lambda *args: attend(*args[:3], Mask(segments=args[3]), 0.3, "flash"))(*put, rows)
    np.testing.assert_array_equal(got, want)


def test_without_a_compiler_auto_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Problem("cpu", 512, 16, jnp.dtype("float32"), Mask(), False, False)

    def fails(*_: object) -> None:
        raise native.NotBuilt("no C++ compiler found; install g++ or set CXX")

    monkeypatch.setattr(native, "library", fails)
    monkeypatch.setattr(flash, "_obstacle_of_machine", flash._obstacle_of_machine.__wrapped__)
    assert choose("auto", asked) == "chunked"
    assert "no C++ compiler found" in str(flash.obstacle(asked))
    monkeypatch.undo()
    monkeypatch.setenv("PHI3_JAX_KERNEL", "off")
    assert choose("auto", asked) == "chunked"


@needs_kernel
def test_auto_takes_it_on_a_cpu() -> None:
    assert choose("auto", Problem("cpu", 256, 16, jnp.dtype("float32"), Mask(), False, False)) == "flash"
