"""Initial values, role by role: phi-3-small's as Microsoft's code draws them, mini's and medium's, and muP's."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from phi3_jax import family
from phi3_jax.configs import ModelConfig, Mup
from phi3_jax.models.spec import init_params, multipliers, param_specs


def shaped(member: str, **changes: object) -> ModelConfig:
    """A published recipe at a width of a few thousand numbers a tensor; no two fan-ins are alike."""
    base = family.published(member)
    sizes = dict(vocab=500, embed=64, layers=6, heads=8, kv_heads=2, head_dim=8, mlp=112)
    return dataclasses.replace(base, **sizes, dummy_tokens=(), **changes)


def names(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        out |= names(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: np.asarray(value, float)}
    return {key.removeprefix("blocks."): value for key, value in out.items()}


def check_normal(values: np.ndarray, std: float, name: str) -> None:
    """Mean 0, the standard deviation to 5 standard errors, and the tails of a normal distribution."""
    n = values.size
    assert abs(values.mean()) < 5 * std / math.sqrt(n), name
    assert values.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
    assert np.mean(values**4) / values.var() ** 2 == pytest.approx(3, abs=5 * math.sqrt(24 / n)), name


def test_small_s_is_that_of_microsofts_code() -> None:
    """_init_weights: normal(0, 0.02) for linear maps and the table, down_proj over sqrt(2 layers); LayerNorm 1 and 0;
    biases of linear maps stay PyTorch's uniform(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    found = names(init_params(shaped("small"), 7))
    stds = {"embedding": 0.02, "qkv.weight": 0.02, "out.weight": 0.02, "gate_up.weight": 0.02}
    stds["down.weight"] = 0.02 / math.sqrt(2 * 6)
    fan_in = {"qkv.bias": 64, "out.bias": 64, "gate_up.bias": 64, "down.bias": 112}
    for name, std in stds.items():
        check_normal(found.pop(name), std, name)
    for name, inputs in fan_in.items():
        values, edge = found.pop(name), inputs**-0.5
        assert np.abs(values).max() <= edge and np.abs(values).max() == pytest.approx(edge, rel=0.05), name
        assert values.std() == pytest.approx(edge / math.sqrt(3), rel=0.12), name  # of a uniform, not of a normal
        assert abs(values.mean()) < 5 * edge / math.sqrt(3 * values.size), name
    assert set(found) == {
        f"{norm}.{part}" for norm in ("attention_norm", "mlp_norm", "final_norm") for part in ("scale", "bias")
    }
    for name, values in found.items():
        assert (values == (1 if name.endswith("scale") else 0)).all(), name


@pytest.mark.parametrize("member", ["mini", "medium"])
def test_mini_s_and_medium_s_have_one_standard_deviation(member: str) -> None:
    found = names(init_params(shaped(member), 7))
    matrices = {"embedding", "unembedding", "qkv.weight", "out.weight", "gate_up.weight", "down.weight"}
    for name in matrices:
        check_normal(found.pop(name), 0.02, name)
    assert set(found) == {"attention_norm.scale", "mlp_norm.scale", "final_norm.scale"}
    assert all((values == 1).all() for values in found.values())


def test_under_mup_matrices_start_at_the_root_of_their_fan_in() -> None:
    """Residual outputs are divided by sqrt(2 base layers), whatever the depth; biases and the head start at 0."""
    mup = Mup(base_embed=32, base_layers=2, base_head_dim=8, embed_std=0.7)
    small, mini = (names(init_params(shaped(m, mup=mup), 7)) for m in ("small", "mini"))
    for found in (small, mini):
        check_normal(found["qkv.weight"], 64**-0.5, "qkv")
        check_normal(found["gate_up.weight"], 64**-0.5, "gate_up")
        check_normal(found["out.weight"], 64**-0.5 / 2, "out")
        check_normal(found["down.weight"], 112**-0.5 / 2, "down")
    check_normal(small["embedding"], 0.02, "a tied table is also the output matrix")
    check_normal(mini["embedding"], 0.7, "embedding")
    assert all((values == 0).all() for name, values in small.items() if name.endswith("bias"))
    assert (mini["unembedding"] == 0).all()
    warm = dataclasses.replace(mup, head_zero_init=False)
    check_normal(names(init_params(shaped("mini", mup=warm), 7))["unembedding"], 0.02, "unembedding")


def test_the_mixture_of_experts_starts_with_its_own_deviations() -> None:
    cfg = dataclasses.replace(shaped("moe"), experts=dataclasses.replace(family.published("moe").experts, count=4))
    found = names(init_params(cfg, 7))
    for name in ("router.weight", "gate_up.weight", "down.weight", "unembedding"):
        check_normal(found[name], 0.02, name)
    assert (found["unembedding_bias"] == 0).all()


def test_seeds_and_tensors_have_streams_of_their_own() -> None:
    one, other = names(init_params(shaped("mini"), 7)), names(init_params(shaped("mini"), 8))
    gate, linear = one["gate_up.weight"][:, :, 0], one["gate_up.weight"][:, :, 1]
    matrices = [values.ravel() for values in one.values() if values.std() > 0]
    pairs = [(one["embedding"].ravel(), other["embedding"].ravel()), (gate.ravel(), linear.ravel())]
    for a, b in [*pairs, *itertools.combinations(matrices, 2)]:
        n = min(a.size, b.size)
        assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < 5 / math.sqrt(n)


def test_factors_of_depth_follow_alpha() -> None:
    """arXiv:2505.01618 table 1 at four times the width, nine times the depth and alpha 1/2."""
    cfg = shaped("mini", mup=Mup(base_embed=16, base_layers=1, base_head_dim=8, alpha=0.5))
    cfg = dataclasses.replace(cfg, layers=9)
    specs = param_specs(cfg)
    rows = {
        "hidden": (specs["blocks"]["qkv"]["weight"], (1 / 12, 4.0, 1 / 12)),
        "gain": (specs["blocks"]["mlp_norm"]["scale"], (1 / 3, 0.0, 1 / 12)),
        "final": (specs["final_norm"]["scale"], (1.0, 0.0, 1 / 4)),
        "embedding": (specs["embedding"], (1.0, 1.0, 1 / 4)),
        "unembedding": (specs["unembedding"], (1.0, 1.0, 1.0)),
    }
    for name, (spec, expected) in rows.items():
        assert dataclasses.astuple(multipliers(cfg, spec)) == pytest.approx(expected), name
    scaled = dataclasses.replace(cfg, embed_multiplier=10.0)
    assert multipliers(scaled, specs["embedding"]).lr == pytest.approx(0.1)
    assert cfg.residual_multiplier == pytest.approx(1 / 3)
