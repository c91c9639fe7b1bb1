"""The least time of a step against published criteria, brute force, and the plans of the three members."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from setups import setup

from phi3_jax.chips import CHIPS, parse_topology
from phi3_jax.configs import BlockSparse
from phi3_jax.family import CONTEXTS, published
from phi3_jax.models.flops import attention_flops_per_token, matmul_params, train_flops_per_token
from phi3_jax.planning.best import best, candidates
from phi3_jax.planning.memory import KEPT
from phi3_jax.planning.roofline import (
    hardware_flops_per_token,
    padded_head,
    pairs_per_token,
    roofline,
)
from phi3_jax.planning.setup import Setup


def test_fsdp_is_bound_by_compute_from_850_tokens_a_chip_on_v5p() -> None:
    """How to scale your model, part 5: tokens a chip > peak / bandwidth = 4.59e14 / (3 x 1.8e11) on three axes.

    "dots" makes no matrix again, so that layers are gathered twice, reduced once and multiplied three times.
    """
    for window, bound in ((512, "ICI"), (2048, "compute")):
        assert roofline(setup(sequences=128, sequence_length=window, remat="dots")).bound_by == bound
    at = roofline(setup(sequences=128, sequence_length=1024, remat="dots"))
    assert at.compute / at.ici == pytest.approx(1024 / 850, rel=0.1)


def test_without_recomputation_matrices_cost_six_flops_a_parameter() -> None:
    one = setup(remat="none", topology="h100:4x8")
    attention = 7 * 2 * 128 * pairs_per_token(one)  # forward 2 products, backward 5
    assert hardware_flops_per_token(one) - attention == pytest.approx(6 * matmul_params(one.model))


def test_full_remat_makes_all_but_the_last_product_of_a_layer_again() -> None:
    none, full = (setup(remat=r) for r in ("none", "full"))
    again = hardware_flops_per_token(full) - hardware_flops_per_token(none)
    matrices = 2 * 40 * 5120 * (5120 + 2 * 1280 + 5120 + 2 * 17920)
    assert again == pytest.approx(matrices + 2 * 2 * 128 * pairs_per_token(none))


def test_hardware_never_computes_less_than_the_model_where_nothing_is_skipped() -> None:
    for remat in KEPT:
        one = setup(
            "mini", "v5p:4x4x8", "fsdp_cp", context=8, sequence_length=131072, sequences=32, length="128k", remat=remat
        )
        assert hardware_flops_per_token(one) > train_flops_per_token(one.model, one.sequence_length)


def test_a_tpu_pads_minis_heads_to_128_lanes() -> None:
    assert padded_head(setup("mini")) == 128 and padded_head(setup("mini", "h200:8", sequences=64)) == 96
    assert padded_head(setup("medium")) == 128


def tiles(allowed: np.ndarray, tile: tuple[int, int]) -> float:
    """Pairs in every tile of a dense mask (query, key) that holds an allowed pair."""
    rows, columns = tile
    cells = allowed.reshape(allowed.shape[0] // rows, rows, allowed.shape[1] // columns, columns)
    return float(cells.any(axis=(1, 3)).sum() * rows * columns)


@pytest.mark.parametrize(("member", "window"), [("mini", 4096), ("medium", 4096), ("small", 4096)])
def test_attention_is_counted_in_whole_tiles(member: str, window: int) -> None:
    """Against a dense mask: causal with a window of 2,048 keys, and phi-3-small's pattern head by head."""
    one = setup(member, sequence_length=window)
    model, distance = one.model, np.arange(window)[:, None] - np.arange(window)[None]
    causal = distance >= 0
    if model.window_keys:
        causal &= distance < model.window_keys
    dense = model.heads * tiles(causal, (1024, 1024))
    wanted = model.layers * dense
    if pattern := model.blocksparse:
        q, k = np.arange(window)[:, None] // 64, np.arange(window)[None] // 64
        kept = [(q - k < 16) | ((k + head + 1) % pattern.vert_stride == 0) for head in range(model.heads)]
        sparse = sum(tiles(causal & mask, (1024, 128)) for mask in kept)
        wanted = model.layers / 2 * (dense + sparse)
        assert sparse < dense  # something is skipped
    assert pairs_per_token(one) == pytest.approx(wanted / window)


def test_tiles_hold_the_pairs_that_the_flop_convention_counts() -> None:
    one = setup("small", sequence_length=8192, sequences=512)
    counted = attention_flops_per_token(one.model, 8192, "block_sparse") / 4 / one.model.head_dim
    assert counted < pairs_per_token(one) < 1.6 * counted
    dense = dataclasses.replace(one, model=dataclasses.replace(one.model, blocksparse=None))
    assert pairs_per_token(one) < 0.8 * pairs_per_token(dense)
    everything = dataclasses.replace(one.model, blocksparse=BlockSparse(local_blocks=128))
    assert pairs_per_token(dataclasses.replace(one, model=everything)) > pairs_per_token(one)


def test_every_device_of_a_context_has_the_mean() -> None:
    more = dict(sequence_length=131072, sequences=32, length="128k")
    even = setup("mini", "v5p:4x4x8", "fsdp_tp", tensor=8, **more)
    split = setup("mini", "v5p:4x4x8", "fsdp_cp", context=8, **more)
    assert pairs_per_token(split) == pytest.approx(pairs_per_token(even), rel=1e-6)
    gpus = setup("mini", "h200:8", "fsdp_cp", context=8, **more)
    assert pairs_per_token(gpus) == gpus.model.layers * gpus.model.heads * 131072  # its kernel skips nothing


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cp", "fsdp_tp"])
def test_a_step_is_the_largest_part_and_what_nothing_hides(strategy: str) -> None:
    one = roofline(setup(strategy=strategy, **{"fsdp_cp": {"context": 4}, "fsdp_tp": {"tensor": 2}}.get(strategy, {})))
    assert (one.exposed > 0) == (strategy != "fsdp")
    assert one.step == pytest.approx(one.exposed + max(one.compute, one.hbm, one.ici - one.exposed))
    assert one.step < one.serial == pytest.approx(one.compute + one.hbm + one.ici + one.dcn)
    assert one.mfu == pytest.approx(one.model_flops / 459e12 / one.step)


def test_more_recomputation_takes_longer() -> None:
    steps = [roofline(setup(remat=r)).step for r in ("none", "dots", "names", "full")]
    assert steps == sorted(steps) and steps[0] < steps[-1]


def test_a_slow_network_can_bind() -> None:
    one = roofline(setup(topology="2xv5p:2x2x1", sequences=64, sequence_length=128))
    assert one.bound_by == "DCN" and one.step >= one.dcn


def _mfu(one: Setup) -> float:
    return roofline(one).mfu


def test_medium_may_reach_60_percent_on_v5p_and_50_on_v6e() -> None:
    """With a batch of 4Mi tokens, as configured by default and as the search proposes."""
    medium = published("medium")
    for topology, least in (("v5p:4x4x8", 0.6), ("v6e:16x16", 0.5)):
        assert _mfu(setup(topology=topology)) >= least
        proposal = best(medium, setup(topology=topology).topology, 4096)
        assert proposal.fits and proposal.setup.batch_tokens >= 4 * 2**20
        assert proposal.roofline.mfu >= _mfu(setup(topology=topology))


@pytest.mark.parametrize(("member", "length"), [(m, length) for m, lengths in CONTEXTS.items() for length in lengths])
def test_no_bound_exceeds_the_peak(member: str, length: str) -> None:
    """The least that a step can compute is all that its mask keeps, whatever window or blocks let the hardware skip."""
    model = published(member, length)
    window = int(length.removesuffix("k")) * 1024
    for chip in CHIPS.values():
        topology = parse_topology(f"{chip.name}:{ {0: '8', 2: '2x4', 3: '2x2x2'}[len(chip.pod)] }")
        found = [one.roofline.mfu for one in candidates(model, topology, window, 4 * 2**20, False)]
        assert found and max(found) <= 1, chip.name
