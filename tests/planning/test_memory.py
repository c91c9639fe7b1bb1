"""Memory a device: what is conserved, what has a closed form, and what grows with what."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from setups import setup

from phi3_jax import UserError
from phi3_jax.chips import parse_topology
from phi3_jax.configs import DataConfig, LoraConfig, OptimConfig, RunConfig
from phi3_jax.family import MEMBERS, proxy, published
from phi3_jax.keys import OPTIMIZERS
from phi3_jax.models.flops import all_params, matmul_params
from phi3_jax.models.spec import count_params
from phi3_jax.planning import memory
from phi3_jax.planning.memory import KEPT, kept_bytes, predict, temp_bytes
from phi3_jax.planning.setup import Setup
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.sharding.rules import batch_sharding, degrees
from phi3_jax.training import losses, step
from phi3_jax.units import human_bytes

WAYS = [
    ("dp", "v5p:4x4x8", {}),
    ("fsdp", "v5p:4x4x8", {}),
    ("fsdp_tp", "v5p:4x4x8", {"tensor": 2}),
    ("fsdp_cp", "v5p:4x4x8", {"context": 4}),
    ("multislice", "2xv5p:4x4x4", {}),
]


def pieces(strategy: str, topology: str) -> int:
    """Pieces a tensor with an embed (and under tensor parallelism a heads, mlp or vocab) dimension is cut into."""
    return {"dp": 1, "multislice": 64}.get(strategy, 128)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize(("strategy", "topology", "more"), WAYS)
def test_no_parameter_is_lost_or_held_twice(member: str, strategy: str, topology: str, more: dict) -> None:
    """Every piece of every matrix lies on one device; gains and biases, which may be whole, are under 0.1 % of all."""
    one = setup(member, topology, strategy, **more)
    got, stored = predict(one), memory.stored_params(one)
    model, cut = published(member), pieces(strategy, topology)
    matrices = matmul_params(model) + (0 if model.tied else model.vocab * model.embed)
    small = all_params(model) - matrices
    assert 0 <= stored - matrices / cut <= small
    if not model.bias and strategy != "fsdp_tp":  # gains have an embed dimension, biases of the MLP have none
        assert stored == pytest.approx(all_params(model) / cut, rel=1e-12)
    assert 4 * stored <= got.parameters < 1.15 * 4 * stored  # a TPU pads
    assert got.optimizer == 2 * got.parameters
    assert predict(one).argument_bytes == got.parameters + got.optimizer + got.batch


@pytest.mark.parametrize(
    ("member", "topology", "remat", "accumulation", "arguments", "temporaries", "peak"),
    [
        ("mini", "v5p:4x4x8", "full", 1, 396_726_784, 19_348_843_328, 12_688_436_896),
        ("mini", "v5p:4x4x8", "none", 4, 396_726_784, 64_493_857_024, 62_397_362_336),
        ("medium", "v5p:4x4x8", "full", 1, 1_309_577_728, 32_694_692_992, 24_416_812_704),
        ("medium", "v5p:4x4x8", "dots", 2, 1_309_577_728, 82_631_698_720, 78_110_680_224),
        ("medium", "v5e:16x16", "full", 1, 657_887_744, 16_965_352_960, 12_723_913_728),
    ],
)
def test_bytes_are_near_the_tpu_compilers(
    member: str, topology: str, remat: str, accumulation: int, arguments: int, temporaries: int, peak: int
) -> None:
    """`memory_analysis()` of the training step (fsdp, 1,024 windows of 4,096), libtpu 0.0.42."""
    one = setup(member, topology, remat=remat, accumulation=accumulation)
    assert predict(one).argument_bytes == pytest.approx(arguments, rel=0.01)
    assert temp_bytes(one) == pytest.approx(temporaries, rel=0.15)
    assert predict(one).total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_takes_in_the_state_of_the_optimizer_that_was_planned(name: str, strategy: str) -> None:
    model, rows, window = proxy("mini", "pico"), 8, 256
    model = dataclasses.replace(model, embed=512, layers=8, heads=8, kv_heads=8, head_dim=64, mlp=1408, vocab=2048)
    data = DataConfig("facts", "", "", window, model.vocab)
    run = RunConfig("x", model, OptimConfig(name=name), data, rows, 100, remat="full", unroll=False, strategy=strategy)
    mesh = mesh_of(run)
    names = ("tokens", "targets", "segments", "positions", "domains")
    with jax.set_mesh(mesh):
        placed = batch_sharding(strategy, mesh)
        batch = {name: jax.ShapeDtypeStruct((rows, window), jnp.int32, sharding=placed) for name in names}
        lowered = step.compile_steps(run, step.Loss(("facts",), False))[0].lower(
            step.abstract_state(run, mesh), batch, jax.ShapeDtypeStruct((), jnp.float32)
        )
        compiled = lowered.compile().memory_analysis()
    plan = Setup(model, parse_topology("cpu:8"), strategy, degrees(strategy, 8), window, rows, 1, "full", 4, name)
    assert compiled.argument_size_in_bytes == pytest.approx(predict(plan).argument_bytes, rel=0.01)
    if strategy == "fsdp":
        assert temp_bytes(plan) == pytest.approx(compiled.temp_size_in_bytes, rel=0.25)  # .15 as users compile
    state = {other: memory.state_bytes(dataclasses.replace(plan, optimizer=other)) for other in OPTIMIZERS}
    assert state["adamw"] == 8 * memory.stored_params(plan) and state["muon"] < 0.8 * state["adamw"]


def test_a_gpu_pads_nothing() -> None:
    assert predict(setup("mini", "h200:8", sequences=64)).argument_bytes == 12 * 3_821_079_552 / 8 + 20 * 64 / 8 * 4096


def test_arguments_and_temporaries_make_the_total() -> None:
    for remat in KEPT:
        got = predict(setup(remat=remat))
        assert got.argument_bytes + got.temporaries == pytest.approx(got.total)
        assert sum(got.categories().values()) == pytest.approx(got.total)


def test_full_remat_keeps_the_residual_stream_of_every_layer() -> None:
    """40 layers x 8 windows x 4,096 tokens x 5,120 values in bf16 a device; half with a stack of two layers a block."""
    assert kept_bytes(setup()) == 40 * 8 * 4096 * 5120 * 2
    assert kept_bytes(setup("small", sequence_length=8192, sequences=512)) == 32 / 2 * 4 * 8192 * 4096 * 2


def test_context_and_tensor_parallelism_split_the_residual_stream() -> None:
    whole = kept_bytes(setup())
    assert kept_bytes(setup(strategy="fsdp_cp", context=4)) == whole
    assert kept_bytes(setup(strategy="fsdp_tp", tensor=2)) == whole
    assert kept_bytes(setup(strategy="fsdp_cp", context=4, sequences=256)) == whole / 4


def test_policies_that_keep_more_need_more() -> None:
    kept = {remat: kept_bytes(setup(remat=remat)) for remat in KEPT}
    assert kept["full"] < kept["names"] < kept["none"] and kept["full"] < kept["dots"] < kept["none"]
    # qkv, attention and gate_up of 40 layers: 5120 + 2 x 1280, 5120 and 2 x 17920 values a token.
    assert kept["names"] - kept["full"] == 40 * 8 * 4096 * (5120 + 2560 + 5120 + 35840) * 2


@pytest.mark.parametrize("remat", KEPT)
def test_more_windows_need_more_and_microbatches_less(remat: str) -> None:
    totals = [predict(setup(sequences=n, remat=remat)).total for n in (128, 256, 1024, 2048)]
    assert totals == sorted(totals) and totals[0] < totals[-1]
    one, four = (predict(setup(remat=remat, accumulation=n)) for n in (1, 4))
    assert four.activations < one.activations and four.parameters == one.parameters


def test_more_devices_need_less_each() -> None:
    few, many = (predict(setup(topology=t, sequences=1024)) for t in ("v5p:4x4x4", "v5p:4x4x8"))
    assert many.parameters == pytest.approx(few.parameters / 2, rel=1e-3) and many.total < few.total


def test_logits_are_never_held_whole() -> None:
    assert memory.LOGIT_CHUNK == losses.LIMIT
    most = memory.LOGIT_BYTES * memory.LOGIT_CHUNK
    assert memory.logit_bytes(setup()) == most
    assert memory.logit_bytes(setup(sequences=128, sequence_length=64)) == memory.LOGIT_BYTES * 64 * 32064 < most


def test_a_cpu_adds_the_process() -> None:
    there = memory.needed_on_one_device(published("mini"), 1, 128, remat="full", value_bytes=4, on_cpu=True)
    elsewhere = memory.needed_on_one_device(published("mini"), 1, 128, remat="full", value_bytes=4, on_cpu=False)
    assert there.runtime == memory.CPU_RUNTIME_BYTES and elsewhere.runtime == 0
    assert there.state == elsewhere.state == 12 * 3_821_079_552


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(strategy="fsdp_tp", tensor=4), "does not divide kv_heads=10; use 1, 2, 5, 10"),
        (dict(sequences=100), "does not divide batch_windows=100"),
        (dict(accumulation=3), "accumulation=3 does not divide the batch of 1024 sequences"),
        (dict(accumulation=16), "does not divide batch_windows=64"),
        (dict(strategy="fsdp_cp", context=8, sequence_length=100), "does not divide window=100"),
        (dict(topology="v5p:16x16x24", sequences=6144), "does not divide embed=5120"),
    ],
)
def test_what_does_not_divide_is_refused(wrong: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        setup(**wrong)
    assert words in str(error.value).replace("axis 'replica' x 'data'", "axis") and "\n" not in str(error.value)


def test_memory_of_a_study_counts_what_it_counted() -> None:
    """`state` is what headline sentences call the training state."""
    need = memory.needed_on_one_device(published("medium"), 1, 4096, remat="full", value_bytes=2, on_cpu=False)
    assert human_bytes(need.state) == "167.5 GB"
    assert need.total > need.state + 4 * 13_960_238_080
    assert memory.mesh_that_holds(need.total) == "data=2 on 2 x H200 or data=4 on 4 x TPU v5p"
    assert dataclasses.replace(need, moment="").categories() == need.categories()


def test_adapters_need_the_frozen_weights_and_little_more() -> None:
    """Rank 16 on mini: 7.6 GB of bfloat16 and 16 bytes for each of 25.2M parameters of A and B (its gradients included)."""
    how = LoraConfig(16, 32.0)
    need = functools.partial(
        memory.needed_on_one_device, published("mini"), 1, 4096, remat="full", value_bytes=2, on_cpu=False
    )
    found, full = need(lora=how), need()
    weights, adapters = count_params(published("mini")), 25_165_824
    assert found.parameters == 2 * weights + 4 * adapters and found.optimizer == 8 * adapters
    assert found.gradients <= 4 * adapters and found.activations + found.logits > 0
    assert full.state == 12 * weights and found.total < full.total / 4
    assert need(lora=how, frozen_bytes=4).parameters == 4 * weights + 4 * adapters
