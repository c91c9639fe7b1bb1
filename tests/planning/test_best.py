"""The search proposes what fits, with the batch asked for, and nothing it looked at is better."""

from __future__ import annotations

import pytest

from phi3_jax import UserError
from phi3_jax.chips import parse_topology
from phi3_jax.family import published
from phi3_jax.planning.best import MAX_GROWTH, MIN_BATCH, best, candidates, meshes
from phi3_jax.planning.memory import limit


@pytest.mark.parametrize(
    ("member", "length", "topology"),
    [
        ("mini", "4k", "v5e:16x16"),
        ("small", "8k", "v6e:16x16"),
        ("medium", "4k", "h100:4x8"),
        ("mini", "128k", "v5p:4x4x8"),
    ],
)  # fmt: skip
def test_nothing_that_fits_is_faster(member: str, length: str, topology: str) -> None:
    model, where = published(member, length), parse_topology(topology)
    found = best(model, where, model.context)
    assert found.memory.total <= limit(found.setup)
    assert MIN_BATCH <= found.setup.batch_tokens <= MAX_GROWTH * MIN_BATCH
    every = list(candidates(model, where, model.context, MIN_BATCH, False))
    rivals = [c for c in every if c.fits and c.setup.batch_tokens <= MAX_GROWTH * MIN_BATCH]
    assert len(every) > len(rivals) > 3
    assert found.tokens_per_s >= 0.99 * max(c.tokens_per_s for c in rivals)


def test_a_given_batch_is_kept() -> None:
    where = parse_topology("v5p:4x4x8")
    assert best(published("medium"), where, 4096, 2**23, exact=True).setup.batch_tokens == 2**23
    with pytest.raises(UserError, match="no strategy divides"):
        best(published("medium"), where, 4096, 2**23 + 1, exact=True)


def test_parameters_stay_inside_a_slice() -> None:
    found = best(published("medium"), parse_topology("2xv5p:4x4x4"), 4096)
    assert "replica" not in found.setup.embed_axes and found.setup.degrees.replica == 2


def test_meshes_are_those_that_divide() -> None:
    sizes = {(s, d.context, d.tensor) for s, d in meshes(published("medium"), parse_topology("v5p:4x4x8"), 4096)}
    assert ("fsdp", 1, 1) in sizes and ("fsdp_tp", 1, 2) in sizes and ("fsdp_cp", 8, 1) in sizes
    assert not any(tensor == 5 or strategy == "multislice" for strategy, _, tensor in sizes)


def test_what_fits_nowhere_says_what_it_needs() -> None:
    with pytest.raises(UserError) as error:
        best(published("medium"), parse_topology("v5e:2x2"), 4096)
    assert "does not fit v5e:2x2" in str(error.value) and "the least is" in str(error.value)
    assert "\n" not in str(error.value)
