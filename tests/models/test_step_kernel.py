"""Attention of one new token a row on a CPU, in place, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax import proxy
from phi3_jax.inference import decode
from phi3_jax.inference.cache import reads_in_place
from phi3_jax.models.kernels import native, step
from phi3_jax.models.spec import init_params

SPARE, SCALE = 1, 0.3
needs_kernel = pytest.mark.skipif(not step._built(), reason="no C++ compiler: the kernel cannot be built")
# batch, kv heads, queries a kv head, head_dim, slots; positions; window, tokens of what comes before (and room for more)
CASES = {
    "rows of other lengths": ((3, 2, 1, 16, 200), (0, 63, 199), None, None),
    "one row": ((1, 2, 3, 48, 130), (64,), None, None),
    "heads of no whole vector": ((2, 1, 2, 7, 90), (65, 89), None, None),
    "heads of 40": ((2, 2, 2, 40, 70), (3, 69), None, None),
    "heads of 96": ((2, 2, 1, 96, 70), (31, 65), None, None),
    "a window that has come round": ((3, 2, 2, 16, 50), (49, 50, 333), 50, None),
    "a window below the slots": ((2, 1, 1, 16, 50), (70, 12), 20, None),
    "a beginning": ((3, 2, 2, 16, 64), (0, 5, 63), None, (40, 64)),
    "a beginning of which a window sees a part": ((3, 2, 1, 16, 30), (0, 7, 45), 30, (40, 48)),
    "a beginning that is behind the window": ((2, 2, 1, 16, 30), (29, 70), 30, (5, 8)),
}


def truth(q, k, v, keys, values, at, window, before):
    """(attention, keys, values) in float64, a row, head and query at a time."""
    keys, values, out, slots = keys.copy(), values.copy(), np.zeros(q.shape), keys.shape[2] - SPARE
    for b, g, r in np.ndindex(*q.shape[:3]):
        keys[b, g, at[b] % slots], values[b, g, at[b] % slots] = k[b, g], v[b, g]
        own = [p for p in range(max(0, at[b] - slots + 1), at[b] + 1)]
        seen = [(p, keys[b, g, p % slots], values[b, g, p % slots]) for p in own]
        if before is not None:
            seen += [(p - before[2], before[0][g, p], before[1][g, p]) for p in range(before[2])]
        seen = [(key, value) for p, key, value in seen if window is None or at[b] - p < window]
        scores = np.array([SCALE * (q[b, g, r] @ key) for key, _ in seen])
        weights = np.exp(scores - scores.max())
        out[b, g, r] = weights @ np.array([value for _, value in seen]) / weights.sum()
    return out, keys, values


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_float64(name: str) -> None:
    (b, g, r, d, slots), at, window, begun = CASES[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: (3 * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    q, k, v = draw(b, g, r, d), draw(b, g, d), draw(b, g, d)
    keys, values = draw(b, g, slots + SPARE, d), draw(b, g, slots + SPARE, d)
    before = None if begun is None else (draw(g, begun[1], d), draw(g, begun[1], d), begun[0])
    run = jax.jit(
        lambda *args: step.attend(*args, SCALE, window=window, spare=SPARE, before=before), donate_argnums=(3, 4)
    )
    got = run(*(jnp.array(x) for x in (q, k, v, keys, values)), jnp.array(at))
    wide = [np.float64(x) for x in (q, k, v, keys, values)]
    wide_before = None if before is None else (np.float64(before[0]), np.float64(before[1]), before[2])
    out, all_keys, all_values = truth(*wide, at, window, wide_before)
    np.testing.assert_allclose(got[0], out, atol=5e-5)
    np.testing.assert_array_equal(got[1], all_keys.astype(np.float32))
    np.testing.assert_array_equal(got[2], all_values.astype(np.float32))


def one_key(value: float = 1.0, at: int = 5, slots: int = 7, **more) -> np.ndarray:
    """Attention of one token over keys of ones, that of position 2 apart."""
    one = jnp.ones((1, 1, slots + SPARE, 16))
    keys = one.at[0, 0, 2].set(value)
    args = one[:, :, :1], one[:, :, 0], one[:, :, 0], keys, one, jnp.array([at]), 1.0
    return np.asarray(step.attend(*args, window=None, spare=SPARE, **more)[0])


@needs_kernel
def test_a_key_that_is_not_a_number_is_seen() -> None:
    assert np.isnan(one_key(jnp.nan)).all() and np.isfinite(one_key(-jnp.inf)).all()
    nothing = jnp.full((1, 1, 8, 16), -jnp.inf)
    out, *_ = step.attend(
        -nothing[:, :, :1],
        nothing[:, :, 0],
        nothing[:, :, 0],
        nothing,
        nothing,
        jnp.array([5]),
        1.0,
        window=None,
        spare=1,
    )
    assert np.isnan(out).all()  # as a softmax of nothing but -inf


@needs_kernel
def test_what_would_be_read_or_written_outside_of_the_cache_is_refused() -> None:
    with pytest.raises(Exception, match="position below 0"):
        one_key(at=-1)
    with pytest.raises(Exception, match="cache without slots"):
        one_key(slots=0)
    begun = jnp.ones((1, 3, 16))
    np.testing.assert_array_equal(one_key(before=(begun, begun, 9)), one_key(before=(begun, begun, 3)))


@needs_kernel
def test_a_program_of_the_engine_serves_all_lengths() -> None:
    cfg = proxy("mini", "pico", "clean")
    assert reads_in_place(cfg, "cpu", jnp.dtype("float32")) and not reads_in_place(cfg, "cpu", jnp.dtype("bfloat16"))
    assert not reads_in_place(proxy("small", "pico", "family"), "cpu", jnp.dtype("float32"))


@needs_kernel
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_is_the_same_without_the_kernel(monkeypatch: pytest.MonkeyPatch, dtype: jnp.dtype) -> None:
    cfg = proxy("mini", "pico", "clean", context=64)
    params = decode.unstack(init_params(cfg, 0))
    params["unembedding"] = 0.1 * jax.random.normal(jax.random.key(1), params["unembedding"].shape)
    tokens, lengths = jnp.arange(60).reshape(3, 20) % 256, jnp.array([20, 1, 7])
    found = {}
    for choice in ("auto", "off"):
        monkeypatch.setenv("PHI3_JAX_KERNEL", choice)
        _, cache = decode.prefill(params, tokens, lengths, cfg, 32, dtype=dtype)
        text = str(jax.make_jaxpr(lambda c: decode.step(params, tokens[:, 3], c, cfg, 32, dtype=dtype))(cache))
        assert (step.TARGET in text) == (choice == "auto" and dtype == jnp.float32)
        for token in tokens[:, :5].T:
            logits, cache = decode.step(params, token, cache, cfg, 32, dtype=dtype)
        found[choice] = np.float32(logits)
    np.testing.assert_allclose(found["auto"], found["off"], atol=1e-5 if dtype == jnp.float32 else 0)


def test_what_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, half = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert not step.serves("gpu", wide) and not step.serves("cpu", wide, half)
    monkeypatch.setenv("PHI3_JAX_KERNEL", "off")
    assert not step.serves("cpu", wide)
    monkeypatch.setenv("PHI3_JAX_KERNEL", "auto")
    monkeypatch.setattr(native, "library", lambda *_: (_ for _ in ()).throw(native.NotBuilt("no compiler")))
    step._built.cache_clear()
    assert not step.serves("cpu", wide)
    step._built.cache_clear()
