"""Collectives read from a compiled module's text: turns of loops, groups in every form, one row a channel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from phi3_jax.planning import hlo
from phi3_jax.sharding.mesh import make_mesh

TEXT = """HloModule jit_train, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.7 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add, metadata={op_name="jit(train)/grad"}
  ROOT %slice = bf16[16,32]{1,0} slice(%all-reduce.7), slice={[0:16], [0:32]}
}

%async_collective_fusion.2 (p.1: bf16[4,128]) -> bf16[32,128] {
  %p.1 = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,128]{1,0} all-gather(%p.1), channel_id=3, replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={0}
}

%body (state: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %state = (s32[], bf16[4,128]) parameter(0)
  %part = bf16[4,128]{1,0} get-tuple-element(%state), index=1
  %fusion.1 = bf16[16,32]{1,0} fusion(%part), kind=kCustom, calls=%all-reduce-scatter.1
  %async_fusion.4 = bf16[32,128]{1,0} fusion(%part), kind=kOutput, calls=%async_collective_fusion.2
  %async_fusion.5 = bf16[32,128]{1,0} fusion(%part), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %next = (s32[], bf16[4,128]) tuple(%part, %part)
}

%condition (state.1: (s32[], bf16[4,128])) -> pred[] {
  %state.1 = (s32[], /*index=1*/bf16[4,128]) parameter(0)
  %bound = s32[]{:T(128)} constant(40)
  %at = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%at, %bound), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[4,128]{1,0}) while(%x), condition=%condition, body=%body
  %gather = f32[8,100]{1,0} all-gather(%x), channel_id=9, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %done = f32[8]{0} all-reduce(%x), channel_id=10, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""  # noqa: E501


def test_a_tpu_modules_collectives() -> None:
    scatter, inside, gather, total = hlo.collectives(TEXT, 8)
    assert (scatter.op, scatter.bytes, scatter.times, scatter.group) == (
        "reduce-scatter",
        64 * 32 * 2,
        40,
        (0, 2, 4, 6),
    )
    assert (inside.op, inside.bytes, inside.times, inside.at_once) == ("all-gather", 32 * 128 * 2, 40, True)
    assert inside.group == tuple(range(8)) and scatter.source == "jit(train)/grad"
    assert (gather.bytes, gather.group, gather.at_once) == (3200, (0, 2, 4, 6), False)
    assert (total.op, total.bytes, total.times) == ("all-reduce", 32, 1)


def test_permutations_share_a_channel_and_count_each() -> None:
    shape, pairs = "(bf16[4]{{0}}, bf16[4]{{0}})", "{{{{0,3}},{{3,0}}}}"
    one = f"  %{{0}} = {shape} collective-permute-start(%x), channel_id=1, source_target_pairs={pairs}"
    text = "\n".join(["ENTRY %main (x: bf16[4]) -> bf16[4] {", one.format("a"), one.format("b"), "}"])
    moved = hlo.collectives(text, 4)
    assert [(m.op, m.bytes, m.group, m.at_once) for m in moved] == [("collective-permute", 8, (0, 3), True)] * 2


def test_groups_are_mesh_axes() -> None:
    scatter, inside, _, total = hlo.collectives(TEXT, 8)
    names = ("replica", "data", "context", "tensor")
    assert scatter.axes((1, 4, 1, 2), names) == ("data",)
    assert inside.axes((1, 4, 1, 2), names) == ("data", "tensor")
    assert total.axes((1, 4, 1, 2), names) == ("tensor",)
    assert total.axes((2, 2, 1, 2), names) == ("tensor",)


@pytest.mark.parametrize("turns", [3, 17])
def test_a_real_programs_loop(turns: int) -> None:
    """On CPU: gathering a slice of a stack in a scan moves what arithmetic says."""
    mesh = make_mesh(jax.devices()[:8], "fsdp")

    def total(stack: jax.Array, x: jax.Array) -> jax.Array:
        body = lambda x, w: (jnp.tanh(x @ jax.reshard(w, jax.P(None, None))), None)  # noqa: E731
        return jax.lax.scan(body, x, stack)[0].sum()

    with jax.set_mesh(mesh):
        shard = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
        stack = jax.ShapeDtypeStruct((turns, 64, 64), jnp.float32, sharding=shard(None, "data", None))
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=shard("data", None))
        text = jax.jit(total).lower(stack, x).compile().as_text()
    gathers = [m for m in hlo.collectives(text, 8) if m.op == "all-gather"]
    assert [(m.bytes, m.times, len(m.group)) for m in gathers] == [(64 * 64 * 4, turns, 8)]
