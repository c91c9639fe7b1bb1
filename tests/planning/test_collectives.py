"""Bytes and rates of collectives against closed forms written here from the model's published sizes."""

from __future__ import annotations

import pytest
from setups import setup

from phi3_jax.planning.collectives import collectives, rates
from phi3_jax.planning.memory import KEPT
from phi3_jax.planning.setup import Setup

# phi-3-medium: 40 layers of 5120 x (5120 + 2 x 1280 + 5120) + 3 x 5120 x 17920, two gains a layer, two tables.
LAYERS = 40 * (5120 * (5120 + 2 * 1280 + 5120) + 3 * 5120 * 17920)
GAINS = 40 * 2 * 5120
TABLE = 32064 * 5120
LAYER_BYTES = 2 * LAYERS + 4 * GAINS  # matrices travel in bf16, gains in fp32


def total(setup: Setup, name: str = "", **wanted: object) -> float:
    """Bytes of the collectives whose name contains a word and whose fields are as wanted."""
    rows = [c for c in collectives(setup) if name in c.name and all(getattr(c, k) == v for k, v in wanted.items())]
    return sum(c.bytes for c in rows)


def test_fsdp_gathers_layers_twice_and_reduces_them_once() -> None:
    one, share = setup(), 127 / 128
    assert total(one, "layers", op="all-gather") == pytest.approx(2 * LAYER_BYTES * share)
    assert total(one, "layers", op="reduce-scatter") == pytest.approx(LAYER_BYTES * share)
    assert total(one, "embedding", op="all-gather") == pytest.approx(4 * TABLE * share)
    assert total(one, "output matrix", op="reduce-scatter") == pytest.approx(2 * TABLE * share)
    assert total(one, "layers", op="all-gather", slow=True) == 0
    assert total(setup(remat="none"), "layers", op="all-gather") == pytest.approx(LAYER_BYTES * share)
    assert total(setup(accumulation=4)) == pytest.approx(4 * total(one))


def test_dp_adds_up_gradients_and_nothing_else() -> None:
    one = setup(strategy="dp")
    assert {c.op for c in collectives(one)} == {"all-reduce"}
    assert total(one) == pytest.approx(2 * 127 / 128 * (LAYER_BYTES + (4 + 2) * TABLE))


def test_slices_add_up_the_gradients_of_their_pieces_over_the_slow_network() -> None:
    one = setup(topology="2xv5p:4x4x4", strategy="multislice")
    assert total(one, slow=True) == pytest.approx(2 / 2 * (LAYER_BYTES + 6 * TABLE) / 64)
    assert {c.op for c in collectives(one) if c.slow} == {"all-reduce"}
    assert {c.link for c in collectives(one) if c.slow} == {"DCN"}
    assert total(one, "layers", op="all-gather") == pytest.approx(2 * LAYER_BYTES * 63 / 64)


@pytest.mark.parametrize(("remat", "passes"), [("none", 8), ("dots", 10), ("names", 11), ("full", 11)])
def test_tensor_parallelism_moves_the_residual_stream_around_every_matrix(remat: str, passes: int) -> None:
    one = setup(strategy="fsdp_tp", tensor=2, remat=remat)
    tokens = 1024 / 64 * 4096  # of a pair of devices
    assert total(one, "residual stream") == pytest.approx(40 * passes * tokens * 5120 * 2 / 2)
    assert not any(c.overlaps for c in collectives(one) if c.name == "residual stream")
    assert total(one, "layers", op="reduce-scatter") == pytest.approx((2 * LAYERS / 2 + 4 * GAINS) * 63 / 64)


@pytest.mark.parametrize("remat", KEPT)
def test_context_parallelism_gathers_keys_and_values(remat: str) -> None:
    one = setup(strategy="fsdp_cp", context=4, remat=remat)
    tokens, passes = 1024 / 32 * 4096, 1 if remat == "none" else 2
    both = tokens * 2 * 10 * 128 * 2 * 3 / 4
    assert total(one, "keys", op="all-gather") == pytest.approx(40 * passes * both)
    assert total(one, "keys", op="reduce-scatter") == pytest.approx(40 * both)
    # Parameters are sliced over data and context together.
    assert total(one, "layers", op="reduce-scatter") == pytest.approx(LAYER_BYTES * 127 / 128)


def test_nodes_change_the_links_but_not_the_bytes() -> None:
    """Over 8 GPUs of a node and 4 nodes a gather still brings in 31/32, of which the network carries 3/32."""
    one = setup(topology="h100:4x8")
    assert total(one, "layers", op="all-gather") == pytest.approx(2 * LAYER_BYTES * 31 / 32)
    assert total(one, "layers", op="all-gather", slow=True) == pytest.approx(2 * LAYER_BYTES * 3 / 32)
    tensor_inside = setup(topology="h100:4x8", strategy="fsdp_tp", tensor=2)
    assert total(tensor_inside, "residual", slow=False) > 0 == total(tensor_inside, "residual", slow=True)


def test_one_device_sends_nothing() -> None:
    assert collectives(setup("mini", "h200:1", sequences=8)) == []
    assert collectives(setup("mini", "h200:2", sequences=8))


def test_a_mesh_axis_owns_axes_of_the_torus() -> None:
    link = 9e10
    whole = setup()
    assert rates(whole.topology, whole.degrees)["data"] == 3 * 2 * link
    by_context = setup(strategy="fsdp_cp", context=8)
    assert rates(by_context.topology, by_context.degrees)["context"] == 2 * link
    assert rates(by_context.topology, by_context.degrees)["data"] == 2 * 2 * link
    no_rings = setup(topology="v5p:2x2x2", sequences=1024)
    assert rates(no_rings.topology, no_rings.degrees)["data"] == 3 * link
    shared = setup(strategy="fsdp_tp", tensor=2)  # half of an axis of 4
    got = rates(shared.topology, shared.degrees)
    assert got["tensor"] == link and got["data"] == (1 + 2 + 2) * link


def test_seconds_are_bytes_over_the_rate() -> None:
    for c in collectives(setup()):
        assert c.seconds == pytest.approx(c.bytes / (3 * 2 * 9e10))
