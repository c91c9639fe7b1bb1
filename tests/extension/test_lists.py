"""Closed forms: transformers' own numbers, and what each form promises."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import read_golden

from phi3_jax import family
from phi3_jax.configs import LongRope
from phi3_jax.errors import UserError
from phi3_jax.extension import lists
from phi3_jax.extension.lists import Task
from phi3_jax.models import rotary

TASK = Task(16, 10000.0, 128, 8.0)


def closed(case: dict) -> np.ndarray:
    """The list of a golden case, by the closed form of its kind."""
    task = Task(case["head_dim"], case["rope_theta"], case["original"], case["scale"])
    kind = case["kind"]
    if kind == "dynamic":
        stretched = case["factor"] * max(case["seq_len"] / task.original, 1) - (case["factor"] - 1)
        return lists.ntk(dataclasses.replace(task, scale=stretched))
    if kind == "yarn":
        return lists.yarn(task, case["beta_fast"], case["beta_slow"], case["truncate"])
    if kind == "llama3":
        return lists.llama3(task, case["low_freq_factor"], case["high_freq_factor"])
    if kind == "longrope":
        return np.asarray(case[f"{case['which']}_factor"])
    return {"default": lists.none, "linear": lists.pi, "ntk": lists.ntk}[kind](task)


def attention(case: dict) -> float:
    task = Task(case["head_dim"], case["rope_theta"], case["original"], case["scale"])
    if case["kind"] != "longrope":
        return lists.attention_factor("yarn" if case["kind"] == "yarn" else "none", task)
    given = case.get("given", {})
    if "attention_factor" in given:
        return given["attention_factor"]
    return lists.attention_factor("longrope", dataclasses.replace(task, scale=given.get("factor", case["scale"])))


@pytest.mark.shared("goldens/longcontext")
def test_every_list_is_that_of_transformers() -> None:
    meta, tensors = read_golden("longcontext/rope_scaling")
    assert len(meta["cases"]) == 170
    for i, case in enumerate(meta["cases"]):
        factors, scale = closed(case), attention(case)
        np.testing.assert_allclose(factors, tensors[f"{i}.factors"], rtol=4e-6, err_msg=str(case))
        assert scale == pytest.approx(case["attention_factor"], rel=1e-12)
        # transformers blends yarn's and llama3's frequencies in float32, where the part that fades out is rounded beside
        # one that is `scale` times smaller: its frequencies are up to 1.9e-6 off float64, and at far positions so are the
        # angles. Hence the narrow bound for the table of their factors, and a wider one for the table of ours.
        ours, factors = factors, tensors[f"{i}.factors"].astype(np.float64)
        positions = tensors[f"{i}.positions"]
        cfg = dataclasses.replace(
            family.proxy("mini", "pico"),
            head_dim=case["head_dim"],
            rope_base=case["rope_theta"],
            context=case.get("context", 1),
        )
        with jax.enable_x64(True):
            table, own = (
                rotary.table_of(jnp.asarray(positions)[None], cfg, jnp.asarray(f), jnp.float64(scale))[0]
                for f in (factors, ours)
            )
        assert table.dtype == np.float64
        angles = positions[:, None] / (case["rope_theta"] ** (np.arange(factors.size) / factors.size) * factors)
        for part, name in enumerate(("cos", "sin")):
            assert (np.abs(table[:, part] - tensors[f"{i}.{name}"]) <= 1e-6 + 4e-7 * np.abs(angles)).all(), case
            assert (np.abs(own[:, part] - tensors[f"{i}.{name}"]) <= 1e-6 + 2.5e-6 * scale * np.abs(angles)).all(), case


def test_closed_forms_do_what_they_promise() -> None:
    ntk, yarn, blend = lists.ntk(TASK), lists.yarn(TASK), lists.yarn_factors(TASK)
    assert ntk[0] == 1 and ntk[-1] == pytest.approx(8)
    np.testing.assert_allclose(yarn, [1, 1 / (2 / 3 + 1 / 24), 2.4, 8, 8, 8, 8, 8])
    np.testing.assert_allclose(blend, [1, 1 + 7 / 3, 1 + 14 / 3, 8, 8, 8, 8, 8])
    assert lists.critical(TASK) == 3  # the pair whose period is 10000^(2 3/16) 2 pi = 199; that of pair 2 is 63
    assert lists.critical(Task(96, 10000.0, 2048, 64.0)) == 31  # Phi3-mini in LongRoPE2
    assert lists.critical(Task(128, 500000.0, 8192, 16.0)) == 35  # Llama-3-8B
    np.testing.assert_allclose(lists.longrope2_start(TASK, 3), [1, 2, 4, 8, 8, 8, 8, 8])
    assert lists.attention_factor("longrope", Task(128, 1e4, 2048, 64.0)) == pytest.approx(1.243163121016122, rel=1e-15)


def test_a_table_of_one_list_is_that_of_the_long_regime() -> None:
    factors = tuple(lists.yarn(TASK))
    cfg = dataclasses.replace(family.proxy("mini", "pico"), context=1024, longrope=LongRope(128, (1.0,) * 8, factors))
    positions = jnp.arange(0, 1024, 7)[None]
    scale = lists.attention_factor("longrope", TASK)
    got = rotary.table_of(positions, cfg, jnp.asarray(factors, jnp.float32), jnp.float32(scale))
    np.testing.assert_allclose(got, rotary.rope_table(positions, cfg, "long"), atol=1e-4)
    assert scale == pytest.approx(math.sqrt(1 + math.log(8) / math.log(128)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0] * 7, "has 7 factors; this model's head_dim needs 8"),
        ([1.0] * 7 + [math.nan], "NaN or infinity at pair 7"),
        ([0.5] + [1.0] * 7, "factor 0.5 at pair 0"),
        ([1.0, 3.0, 2.0] + [4.0] * 5, "falls from 3 to 2 at pair 2"),
        (["one"] * 8, "no number"),
    ],
)
def test_a_list_that_is_none_is_refused(given: list, said: str) -> None:
    with pytest.raises(UserError, match=said):
        lists.check(given, 8, "long_factor")
