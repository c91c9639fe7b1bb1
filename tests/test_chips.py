"""Chips and topologies: published totals, what their texts mean, and errors that name the nearest valid ones."""

from __future__ import annotations

import math

import pytest

from phi3_jax import UserError
from phi3_jax.chips import CHIPS, of_device, parse_topology


@pytest.mark.parametrize(("name", "petaflops"), [("v5e", 50.63), ("v6e", 234.9)])
def test_a_pods_peak_is_the_published_one(name: str, petaflops: float) -> None:
    chip = CHIPS[name]
    assert math.prod(chip.pod) * chip.peak_flops / 1e15 == pytest.approx(petaflops, rel=0.01)


@pytest.mark.parametrize(("name", "gigabytes"), [("v5e", 400), ("v5p", 1200), ("v6e", 800), ("tpu7x", 1200)])
def test_links_add_up_to_the_published_bandwidth_of_a_chip(name: str, gigabytes: float) -> None:
    """Makers count both ways; usable rates of the scaling book are a tenth lower."""
    chip = CHIPS[name]
    both_ways = 2 * chip.link * 2 * len(chip.pod) * chip.cores / 1e9
    assert 0.88 * gigabytes < both_ways <= gigabytes


def test_the_data_centre_network_of_a_v5e_pod_is_the_published_one() -> None:
    assert 256 * CHIPS["v5e"].network * 8 == pytest.approx(6.4e12)


@pytest.mark.parametrize(
    ("text", "slices", "devices"),
    [
        ("v5p:4x4x8", 1, 128), ("2xv5p:4x4x4", 2, 128), ("v5e:16x16", 1, 256), ("h200:8", 1, 8), ("h100:4x8", 1, 32),
        ("cpu:8", 1, 8), ("tpu7x:2x2x2", 1, 16), (" V6E:8x8", 1, 64),
    ],
)  # fmt: skip
def test_a_topologys_text(text: str, slices: int, devices: int) -> None:
    topology = parse_topology(text)
    assert (topology.slices, topology.devices) == (slices, devices)
    assert topology.chips == devices / topology.chip.cores


def test_wraparound_needs_whole_cubes_or_sixteens() -> None:
    assert parse_topology("v5p:4x4x8").wraps == (True, True, True)
    assert parse_topology("v5p:2x4x4").wraps == (False, False, False)
    assert parse_topology("v5e:8x16").wraps == (False, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5q:4x4x4", ("unknown chip 'v5q'", "'v5p'", "valid: v4, v5e")),
        ("v5p:4x4x7", ("unknown topology", "nearest: 4x4x8")),
        ("v5e:12x16", ("nearest: 16x16",)),
        ("v5e:4x4x4", ("nearest: 8x8",)),
        ("h200:16", ("at most 8", "h200:2x8")),
        ("2xh200:8", ("nodes, not slices",)),
        ("v5p", ("not CHIP:SIZES", "v5p:4x4x8")),
        ("v5p:0x4x4", ("not CHIP:SIZES",)),
        ("", ("unknown chip",)),
    ],
)
def test_a_wrong_topology_is_one_line_that_names_the_way_out(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_devices_by_the_names_jax_gives_them() -> None:
    names = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
    }  # fmt: skip
    assert {kind: of_device(kind).name for kind in names} == names
    assert of_device("cpu") is None and of_device("NVIDIA A100-SXM4-40GB") is None
