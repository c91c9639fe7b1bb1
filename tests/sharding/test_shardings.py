"""Shardings of the released members, under every strategy, against the golden file; see `shardings.py`."""

from __future__ import annotations

import json

import pytest
from shardings import GOLDEN, shardings

from phi3_jax.family import MEMBERS
from phi3_jax.sharding.rules import STRATEGIES


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("member", MEMBERS)
def test_shardings_are_the_golden_files(member: str, strategy: str) -> None:
    wanted = json.loads(GOLDEN.read_text())[member][strategy]
    assert shardings(member, strategy) == wanted, "made anew by: python tests/sharding/shardings.py"


def test_strategies_differ() -> None:
    golden = json.loads(GOLDEN.read_text())
    for member in MEMBERS:
        assert len({json.dumps(golden[member][s], sort_keys=True) for s in STRATEGIES}) == len(STRATEGIES)
