"""Published counts, exact ratios of the proxies, and errors that name the way out."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import jax
import pytest

from phi3_jax import UserError, family
from phi3_jax.configs import LAYOUTS, DataConfig, OptimConfig, RunConfig, fingerprint, model_from_dict, science
from phi3_jax.models.flops import train_flops_per_token
from phi3_jax.models.spec import count_params, init_params, named, named_specs, named_tree

PUBLISHED = {"mini": 3_821_079_552, "small": 7_392_272_384, "medium": 13_960_238_080}


@pytest.mark.parametrize("member", family.MEMBERS)
def test_published_parameter_counts(member: str) -> None:
    for context in family.CONTEXTS[member]:
        assert count_params(family.published(member, context)) == PUBLISHED[member]
    assert family.published_params(member) == PUBLISHED[member]


@pytest.mark.parametrize("scale,ladder", itertools.product(family.SCALES, ("clean", "family")))
def test_proxies_keep_the_ratio_of_non_embedding_parameters(scale: str, ladder: str) -> None:
    sizes = [family.proxy(m, scale, ladder).matrix_params for m in family.MEMBERS]
    base = {
        "femto": 27_648, "pico": 110_592, "nano": 442_368, "micro": 3_538_944, "milli": 14_155_776, "centi": 56_623_104,
        "deci": 452_984_832,
    }[scale]  # fmt: skip
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
    with pytest.raises(UserError, match="embed=0 must be a positive integer"):
        dataclasses.replace(mini, embed=0)


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


def test_names_of_the_science_are_left_in_wherever_they_lie() -> None:
    """`name` of a run, of its model and `folder` of its data are no science; an optimiser's name is."""
    run = _run(optim=OptimConfig(name="muon"))
    tree = science(run)
    assert fingerprint(run) != fingerprint(_run()) and tree["optim"]["name"] == "muon"
    assert "name" not in tree and "name" not in tree["model"] and "folder" not in tree["data"]
    assert "name" not in science(_run())["optim"], "runs older than the field keep their fingerprints"

    @dataclasses.dataclass(frozen=True)
    class Profiled(DataConfig):
        remat: str = "none"
        strategy: str = dataclasses.field(default="dp", metadata={"science": False})

    nested = science(_run(data=Profiled("facts", "x", "f", 24, 320, "full", "fsdp"), remat="dots"))
    assert nested["data"]["remat"] == "full" and "strategy" not in nested["data"] and "remat" not in nested


# Of the four runs below, as commit 7f9c9e5 gives them.
FINGERPRINTS = ["bbb0c38b77bd", "82d2b524e931", "367c6089347f", "7e66ee509bea"]


def test_older_runs_keep_their_fingerprints() -> None:
    moe = dataclasses.replace(_run(), model=family.published("moe"))
    sparse = dataclasses.replace(_run(), model=family.trained(family.published("small")))
    found = [fingerprint(_run()), fingerprint(_run(model=family.proxy("small", "pico", "family"))), fingerprint(moe)]
    assert [*found, fingerprint(sparse)] == FINGERPRINTS


def test_import_is_light() -> None:
    code = "import sys, phi3_jax; print([m for m in ('tensorflow', 'jax', 'seqio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ layouts and names


def test_a_layout_is_named_and_none_is_guessed() -> None:
    layouts = {member: family.published(member).layout for member in family.RELEASED}
    text = {"mini": "phi3", "small": "phi3small", "medium": "phi3", "moe": "phimoe"}
    assert layouts == text | dict.fromkeys(("vision", "vision-3.5"), "phi3_v")
    assert family.proxy("small", "pico", "family").layout == "phi3small" and family.proxy("small").layout == "phi3"
    for wrong, said in (
        (dict(layout="phi3smal"), "did you mean 'phi3small'"),
        (dict(layout="phi3small"), "gegelu is phi3small's"),
        (dict(layout="phimoe"), "needs experts"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(family.published("mini"), **wrong)
    assert set(layouts.values()) == set(LAYOUTS)


@pytest.mark.parametrize("member", family.RELEASED)
def test_configs_from_before_layouts_were_named_load_and_keep_their_fingerprints(member: str) -> None:
    model = family.published(member, family.CONTEXTS[member][-1])
    if model.vision:
        pytest.skip("no config was written before its layout had a name")
    old = dataclasses.asdict(model)
    del old["layout"]
    assert model_from_dict(old) == model
    run = RunConfig("a", model, OptimConfig(), DataConfig("facts", "x", "f", 24, 320), 44, 100)
    assert "layout" not in science(run)["model"]


def test_a_member_is_told_by_its_whole_shape() -> None:
    for member in family.RELEASED:
        for context in family.CONTEXTS[member]:
            model = family.published(member, context)
            assert family.member_of(dataclasses.replace(model, name="x", member="", vocab=model.vocab + 64)) == member
            assert family.member_of(dataclasses.replace(model, mlp=model.mlp + 2)) == ""


@pytest.mark.parametrize("member", family.RELEASED)
def test_one_walk_names_and_counts_every_parameter(member: str) -> None:
    model = family.published(member)
    specs = named_specs(model)
    assert {"embedding", "blocks.qkv.weight", "final_norm.scale"} <= set(specs) and list(specs) == sorted(specs)
    assert count_params(model) == sum(count_params(model, role) for role in {s.role for s in specs.values()})
    assert count_params(model, "hidden") == model.matrix_params
    small = family.proxy("mini")
    params = init_params(small, 0)
    assert {name: x.shape for name, x in named(params).items()} == {n: s.shape for n, s in named_specs(small).items()}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, named_tree(small, named(params)), params))
