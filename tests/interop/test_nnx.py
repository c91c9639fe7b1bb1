"""The NNX module is the functional model: logits, gradients, parameters; qwix finds its projections."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phi3_jax import family
from phi3_jax.configs import BlockSparse, Experts
from phi3_jax.interop.nnx import LINEARS, Linear, Phi3
from phi3_jax.models import decoder
from phi3_jax.models.spec import init_params

SMALL = family.proxy("small", "pico", "family")
MINI = family.proxy("mini", "pico", "family")
CONFIGS = {
    "mini": MINI,
    "small": dataclasses.replace(SMALL, blocksparse=BlockSparse(4, 1, 3)),
    "medium": family.proxy("medium", "pico", "family"),
    "clean": family.proxy("medium", "pico", "clean"),
    "moe": dataclasses.replace(MINI, layout="phimoe", experts=Experts(4, head_bias=True), mup=None),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 40), 0, 256)
SEGMENTS = jnp.asarray([[1] * 17 + [2] * 23, [1] * 40])


def _params(cfg):
    params = init_params(cfg, 0)
    keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_functional_model(name):
    cfg = CONFIGS[name]
    params = _params(cfg)
    module = Phi3(params, cfg)
    expected = decoder.forward(params, TOKENS, cfg, segments=SEGMENTS)
    np.testing.assert_allclose(nnx.jit(module)(TOKENS, segments=SEGMENTS), expected, atol=2e-4)
    assert float(jnp.abs(module(TOKENS) - expected).max()) > 1e-2  # the segments reach the attention


@pytest.mark.parametrize("name", ["mini", "small"])
def test_gradients_are_those_of_the_functional_model(name):
    cfg = CONFIGS[name]
    params = _params(cfg)
    expected = jax.grad(lambda p: jnp.sum(jnp.sin(decoder.forward(p, TOKENS, cfg))))(params)
    module = Phi3(params, cfg)
    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(TOKENS))))(module)
    nnx.update(module, grads)  # the module as a container, to stack its layers again
    for ours, theirs in zip(jax.tree.leaves(module.params()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * float(jnp.abs(theirs).max()) + 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_return_bitwise(name):
    params = _params(CONFIGS[name])
    back = Phi3(params, CONFIGS[name]).params()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), back, params)))


@pytest.mark.parametrize("name", ["mini", "small"])
def test_qwix_quantises_every_projection(name):
    qwix = pytest.importorskip("qwix")
    cfg = CONFIGS[name]
    module = Phi3(_params(cfg), cfg)
    exact = module(TOKENS)
    errors = {}
    for qtype in (jnp.int8, jnp.int4):
        rules = [qwix.QuantizationRule(module_path=LINEARS, weight_qtype=qtype)]
        small = qwix.quantize_model(module, qwix.PtqProvider(rules), TOKENS)
        for block in small.blocks:
            for linear in (block.qkv, block.out, block.gate_up, block.down):
                assert linear.weight.array.qvalue[...].dtype == qtype
        errors[qtype] = float(jnp.linalg.norm(small(TOKENS) - exact) / jnp.linalg.norm(exact))
    assert 0 < errors[jnp.int8] < 0.05 < errors[jnp.int4] < 1


def test_a_qwix_adapter_starts_at_the_model_and_adapts_every_projection():
    qwix = pytest.importorskip("qwix")
    cfg = CONFIGS["mini"]
    module = Phi3(_params(cfg), cfg)
    provider = qwix.LoraProvider(module_path=LINEARS, rank=2, alpha=4)
    adapted = qwix.apply_lora_to_model(module, provider, TOKENS, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(adapted(TOKENS), module(TOKENS), atol=1e-5)
    adapters = nnx.state(adapted, nnx.LoRAParam)
    count = sum(isinstance(m, Linear) for _, m in nnx.iter_modules(module))
    assert len(jax.tree.leaves(adapters)) == 2 * count
    nnx.update(adapted, jax.tree.map(lambda x: x + 0.1, adapters))
    assert float(jnp.abs(adapted(TOKENS) - module(TOKENS)).max()) > 1e-2
