"""Rows that a process reads, and where they land."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from phi3_jax.sharding import feed

MESH = jax.make_mesh((4, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
X = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)


class OneHost:
    """A sharding as one of several hosts sees it: it addresses the devices of `ids` only."""

    def __init__(self, sharding: NamedSharding, ids: set[int]) -> None:
        self.sharding, self.ids = sharding, ids

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        found = self.sharding.addressable_devices_indices_map(shape)
        return {device: index for device, index in found.items() if device.id in self.ids}


@pytest.mark.parametrize("spec", [P("data"), P("data", "context"), P(("data", "context")), P(), P(None, "context")])
def test_hosts_read_every_row_and_those_of_their_devices_only(spec: P) -> None:
    sharding = NamedSharding(MESH, spec)
    assert feed.local_rows(sharding, X.shape).tolist() == list(range(8))
    hosts = [feed.local_rows(OneHost(sharding, {2 * i, 2 * i + 1}), X.shape).tolist() for i in range(4)]
    rows = 8 if not spec or spec[0] is None else 2  # replicated rows are read by all
    assert [len(host) for host in hosts] == [rows] * 4
    assert sorted({row for host in hosts for row in host}) == list(range(8))


@pytest.mark.parametrize("spec", [P("data"), P("data", "context"), P(("data", "context")), P(None, "context")])
def test_parts_land_where_device_put_would_have_put_them(spec: P, monkeypatch: pytest.MonkeyPatch) -> None:
    sharding = NamedSharding(MESH, spec)
    whole = feed.place(X, np.arange(8), 8, sharding)
    monkeypatch.setattr(feed.jax, "process_count", lambda: 2)
    parts = feed.place(X, np.arange(8), 8, sharding)
    assert whole.sharding == parts.sharding == sharding
    for a, b in zip(whole.addressable_shards, parts.addressable_shards, strict=True):
        assert a.device == b.device and np.array_equal(a.data, b.data)


def test_a_host_needs_no_rows_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed.jax, "process_count", lambda: 2)
    seen = {}

    def only_mine(shape, sharding, part):  # as on a host that has the devices of rows 2, 3, 6 and 7
        seen.update({i: part((slice(i, i + 2), slice(0, 3))) for i in (2, 6)})

    monkeypatch.setattr(feed.jax, "make_array_from_callback", only_mine)
    feed.place(X[[2, 3, 6, 7]], np.array([2, 3, 6, 7]), 8, NamedSharding(MESH, P("data", "context")))
    assert {i: part.tolist() for i, part in seen.items()} == {i: X[i : i + 2, :3].tolist() for i in (2, 6)}
