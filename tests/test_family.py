"""Published counts, exact ratios of the proxies, and errors that name the way out."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest

from phi3_jax import UserError, family
from phi3_jax.configs import DataConfig, OptimConfig, RunConfig, fingerprint, science
from phi3_jax.models.spec import count_params
from phi3_jax.scaling.flops import train_flops_per_token

PUBLISHED = {"mini": 3_821_079_552, "small": 7_392_272_384, "medium": 13_960_238_080}


@pytest.mark.parametrize("member", family.MEMBERS)
def test_published_parameter_counts(member: str) -> None:
    for context in family.CONTEXTS[member]:
        assert count_params(family.published(member, context)) == PUBLISHED[member]
    assert family.published_params(member) == PUBLISHED[member]


@pytest.mark.parametrize("scale,ladder", itertools.product(family.SCALES, ("clean", "family")))
def test_proxies_keep_the_ratio_of_non_embedding_parameters(scale: str, ladder: str) -> None:
    sizes = [family.proxy(m, scale, ladder).matrix_params for m in family.MEMBERS]
    base = {"pico": 110_592, "nano": 442_368, "micro": 3_538_944}[scale]
    assert sizes[0] == base
    # 1 : 1.93 : 3.76 exactly: 52/27 and 5,200/1,382.4 of mini.
    assert sizes[1] * 27 == sizes[0] * 52
    assert sizes[2] * 110_592 == sizes[0] * 416_000


@pytest.mark.parametrize("scale", family.SCALES)
def test_sizes_of_the_clean_ladder_grow(scale: str) -> None:
    counts = [family.proxy(size, scale).matrix_params for size in family.SIZES]
    assert counts == sorted(set(counts))


def test_family_proxies_keep_their_members_architecture() -> None:
    for member in family.MEMBERS:
        full, proxy = family.published(member), family.proxy(member, "nano", "family")
        for field in (
            "norm",
            "activation",
            "bias",
            "tied",
            "rope_base",
            "blocksparse",
            "sliding_window",
            "gegelu_limit",
        ):
            assert getattr(proxy, field) == getattr(full, field)
        assert full.queries_per_kv == proxy.queries_per_kv
    assert family.proxy("small", "nano", "clean").norm == "rms"  # the clean ladder does not


@pytest.mark.parametrize(
    "member,time,expected", [("mini", 4096, 24.75), ("small", 8192, 50.78), ("medium", 4096, 87.81)]
)
def test_flops_per_token(member: str, time: int, expected: float) -> None:
    assert round(train_flops_per_token(family.published(member), time) / 1e9, 2) == expected


def test_unknown_words_name_the_nearest() -> None:
    for call in (
        lambda: family.published("medum"),
        lambda: family.published("mini", "8k"),
        lambda: family.proxy("mini", "picoo"),
        lambda: family.proxy("mini-small", "pico", "family"),
    ):
        with pytest.raises(UserError, match="mini|4k|pico|clean"):
            call()


def test_sizes_that_do_not_divide_are_refused() -> None:
    mini = family.published("mini")
    with pytest.raises(UserError, match="kv_heads=5 does not divide heads=32; use a divisor: 1, 2, 4"):
        dataclasses.replace(mini, kv_heads=5)
    with pytest.raises(UserError, match="not embed=3000"):
        dataclasses.replace(mini, embed=3000)


def _run(**changes: object) -> RunConfig:
    run = RunConfig("a", family.proxy("mini"), OptimConfig(), DataConfig("facts", "x", "f", 24, 320), 44, 100)
    return dataclasses.replace(run, **changes)


def test_fingerprint_is_the_science_only() -> None:
    base = fingerprint(_run())
    assert fingerprint(_run(strategy="fsdp", remat="full", log_every=7, name="b", unroll=False)) == base
    changed = [
        _run(seed=1), _run(steps=101), _run(dtype="bfloat16"), _run(model=family.proxy("small")),
        _run(optim=OptimConfig(peak_lr=1e-3)), _run(data=DataConfig("facts", "x", "g", 24, 320)),
    ]  # fmt: skip
    prints = {fingerprint(run) for run in changed}
    assert len(prints) == len(changed) and base not in prints
    assert fingerprint(_run(data=DataConfig("facts", "elsewhere", "f", 24, 320))) == base
    assert "seed" in science(_run())


def test_import_is_light() -> None:
    code = "import sys, phi3_jax; print([m for m in ('tensorflow', 'jax', 'seqio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
