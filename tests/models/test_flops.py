"""FLOP and parameter accounting: published figures, brute force, and the operations in the traced program."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.configs import BlockSparse, LoraConfig, ModelConfig, Vision
from phi3_jax.errors import UserError
from phi3_jax.family import proxy, published
from phi3_jax.models import decoder, flops, lora, parts, vision
from phi3_jax.models.masks import blocksparse_allowed
from phi3_jax.models.spec import count_params, init_params


@pytest.fixture(autouse=True)
def products_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by a compiled kernel are no operations that can be counted."""
    monkeypatch.setenv("PHI3_JAX_KERNEL", "off")


@pytest.mark.parametrize(
    ("member", "time", "matmul", "giga", "share"),
    [
        ("mini", 4096, "3.722e+09", {"causal": "24.75", "windowed": "24.15", "non_causal": "27.17", "6n": "22.33"}, 9.8),
        ("small", 8192, "7.390e+09", {"causal": "50.78", "non_causal": "57.23", "6n": "44.34"}, 12.7),
        ("medium", 4096, "1.380e+10", {"causal": "87.81", "windowed": "86.55", "non_causal": "92.84", "6n": "82.77"}, 5.7),
    ],
)  # fmt: skip
def test_the_table_of_targets(member: str, time: int, matmul: str, giga: dict[str, str], share: float) -> None:
    model = published(member)
    assert f"{flops.matmul_params(model):.3e}" == matmul
    for convention, text in giga.items():
        assert f"{flops.train_flops_per_token(model, time, convention) / 1e9:.2f}" == text
    causal = flops.train_flops_per_token(model, time)
    assert round(300 * flops.attention_flops_per_token(model, time) / causal, 1) == share


@pytest.mark.parametrize("member", ["mini", "small", "medium", "moe"])
def test_parameters_equal_the_declared_ones(member: str) -> None:
    model = published(member)
    assert flops.all_params(model) == count_params(model)


def test_active_parameters_of_the_mixture() -> None:
    model = published("moe", "128k")
    assert flops.all_params(model, active=True) == 6_640_999_744
    assert flops.train_flops_per_token(model, 4096, "6nd") == 6 * 6_640_999_744


@pytest.mark.parametrize("time", [64, 100, 1024])
@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        (BlockSparse(16, 2, 3), 4), (BlockSparse(16, 2, 8), 3), (BlockSparse(64, 16, 8), 8),
        (BlockSparse(16, 1, 4, homo_head=True), 2),
    ],
)  # fmt: skip
def test_kept_pairs_by_brute_force(pattern: BlockSparse, heads: int, time: int) -> None:
    index = jnp.arange(time)
    seen = blocksparse_allowed(pattern, index, index, heads) & (index[:, None] >= index[None])
    assert flops.kept_pairs(pattern, heads, time) == int(seen.sum())


def test_density_at_8192_is_the_reference_builders() -> None:
    pattern, blocks = BlockSparse(), 128
    pairs = flops.kept_pairs(pattern, 32, blocks * 64)
    diagonal = 32 * blocks * 64 * 65 // 2
    kept_blocks = (pairs - diagonal) / 64**2 + 32 * blocks
    assert round(kept_blocks / (32 * blocks * (blocks + 1) / 2), 6) == 0.329336


def count_products(jaxpr: jax.extend.core.Jaxpr, times: int = 1) -> int:
    """FLOPs of every matrix product in a traced program, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += times * 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count_products(inner, times * turns)
    return total


MODELS = [proxy(m, "pico", "family") for m in ("mini", "small", "medium")] + [proxy("medium")]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("unroll", [True, False])
def test_the_traced_forward_pass_has_these_products(model: ModelConfig, unroll: bool) -> None:
    tokens = jnp.zeros((2, 32), jnp.int32)
    params = jax.eval_shape(lambda: init_params(model, 0))

    def run(p: dict) -> jax.Array:
        return decoder.forward(p, tokens, model, attention="reference", unroll=unroll)

    counted = count_products(jax.make_jaxpr(run)(params).jaxpr)
    assert counted == tokens.size * flops.forward_flops_per_token(model, 32, "non_causal")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_the_traced_gradient_has_three_times_as_many(model: ModelConfig) -> None:
    model = dataclasses.replace(model, dummy_tokens=())
    tokens = jnp.zeros((2, 32), jnp.int32)

    def loss(p: dict) -> jax.Array:
        return decoder.forward(p, tokens, model, attention="reference", unroll=True).sum()

    counted = count_products(jax.make_jaxpr(jax.grad(loss))(jax.eval_shape(lambda: init_params(model, 0))).jaxpr)
    assert counted == tokens.size * flops.train_flops_per_token(model, 32, "non_causal")


@pytest.mark.parametrize("member", ["mini", "medium"])
@pytest.mark.parametrize("time", [2048, 4096])
def test_windowed_counts_the_keys_that_a_query_meets(member: str, time: int) -> None:
    """Against the mask of the model, of which half of the diagonal counts, as in "causal"."""
    model = published(member)
    distance = np.arange(time)[:, None] - np.arange(time)[None]
    pairs = ((distance >= 0) & (distance < model.window_keys)).sum() - time / 2
    assert model.window_keys == model.sliding_window + 1  # so that one key more or less is seen
    per_token = 4 * model.head_dim * model.heads * model.layers * pairs / time
    # The last query of the window's first rows meets its own key too: half a key a query at the window's other side.
    beyond = 4 * model.head_dim * model.heads * model.layers * max(0, time - model.window_keys) / 2 / time
    assert flops.attention_flops_per_token(model, time, "windowed") == pytest.approx(per_token + beyond, rel=1e-12)


def test_unknown_convention() -> None:
    with pytest.raises(UserError, match="non_causal"):
        flops.train_flops_per_token(published("mini"), 4096, "noncausal")
    assert np.isfinite(flops.train_flops_per_token(published("small"), 8192, "block_sparse"))


EYES = Vision(embed=32, layers=3, heads=4, mlp=48, tile=28, patch=14)
SEEING = dataclasses.replace(published("vision"), vocab=96, embed=32, layers=1, heads=4, kv_heads=4, head_dim=8, mlp=32,
                             vision=EYES, longrope=None)  # fmt: skip


def test_a_tile_of_the_released_tower() -> None:
    assert f"{flops.tile_flops(published('vision')) / 1e12:.2f}" == "0.37"
    assert flops.tile_flops(published("mini")) == flops.train_tile_flops(published("mini")) == 0
    both = flops.train_tile_flops(published("vision"), parts=("lm",))
    assert both == flops.tile_flops(published("vision"))


@pytest.mark.parametrize(
    "words,how",
    [
        ((), None),
        (("tower",), None),
        (("projector", "lm"), None),
        (("lm",), None),
        ((), LoraConfig(2, 4.0, targets=("tower.qkv", "tower.down"))),
    ],
)
def test_the_traced_tower_has_these_products(words: tuple[str, ...], how: LoraConfig | None) -> None:
    tiles, count = jnp.zeros((3, 3, 28, 28)), 3
    tree = jax.eval_shape(lambda: init_params(SEEING, 0))
    ends = 2 * vision.ENDS * SEEING.embed * (EYES.width + SEEING.embed)  # forward, of what no tile has

    def see(whole: Any) -> jax.Array:
        return vision.rows_of(whole, tiles, SEEING).sum()

    assert count_products(jax.make_jaxpr(see)(tree).jaxpr) == count * flops.tile_flops(SEEING) + ends
    some = {"vision": parts.taken(tree, words).get("vision", {})}
    if how:
        some = lora.adapter_specs(SEEING, how)
        some = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), some, is_leaf=lambda s: hasattr(s, "axes")
        )

    def loss(some: Any, tree: Any) -> jax.Array:
        return see(lora.joined(tree, some, SEEING, how) if how else parts.filled(tree, some))

    found = count_products(jax.make_jaxpr(jax.grad(loss))(some, tree).jaxpr)
    wanted = count * flops.train_tile_flops(SEEING, how, words)
    # The rows of the two ends are in the projector's products too; adapters of the first matrix need no gradient of theirs.
    room = 3 * ends + (2 * count * (EYES.patches + 1) * how.rank * EYES.embed if how else 0)
    assert wanted - room <= found <= wanted + room
    if not how and words:
        whole = count_products(jax.make_jaxpr(jax.grad(see, allow_int=True))(tree).jaxpr)
        assert found < whole
