"""Collectives of a compiled program, read from its text: what they move per step, over which mesh axes, when.

A collective inside a loop counts once a turn. On TPU a scattered sum is written as an all-reduce inside a computation named
all-reduce-scatter, and a collective that runs while other work does, as a start and a done, or inside a fusion named async.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Moved:
    """One collective.

    Attributes:
      op: one of OPS.
      bytes: gathered, or before scattering or adding, each time.
      times: turns per step.
      group: numbers of the devices of its first group, in mesh order.
      at_once: whether it may run while other work does.
      source: name of the operation in the traced program.
    """

    op: str
    bytes: int
    times: int
    group: tuple[int, ...]
    at_once: bool
    source: str

    def axes(self, shape: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
        """The mesh axes along which the group's devices differ, for a mesh of `shape`."""
        places = np.stack(np.unravel_index(np.asarray(self.group), tuple(shape)))
        return tuple(name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str


def collectives(text: str, devices: int) -> list[Moved]:
    """Every collective of a compiled module's text on `devices` devices."""
    computations, entry = _parse(text)
    found: dict[str, Moved] = {}
    for number, (channel, one) in enumerate(_walk(computations, entry, 1, devices, False)):
        key = channel or f"no channel, {number}"
        # One that runs while other work does stands in every fusion that it runs in, with one channel.
        found[key] = dataclasses.replace(one, at_once=one.at_once or (key in found and found[key].at_once))
    return list(found.values())


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, times: int, devices: int, at_once: bool
) -> Iterator[tuple[str, Moved]]:
    """(channel, collective) of a computation that runs `times` times, and of those it calls."""
    for one in computations.get(name, ()):
        op = one.op.removesuffix("-start")
        if op in OPS:
            # Permutations share a channel.
            channel = None if op == "collective-permute" else re.search(r"channel_id=(\d+)", one.rest)
            yield channel[1] if channel else "", _moved(one, op, name, times, devices, at_once)
            continue
        if one.op.endswith(("-done", "-update")):
            continue
        turns = _turns(computations, one) if one.op == "while" else 1
        beside = at_once or one.op == "async-start" or "async" in one.name
        for inner in _called(one):
            yield from _walk(computations, inner, times * turns, devices, beside)


def _called(one: _Instruction) -> list[str]:
    """Computations that an instruction calls."""
    names = [name for pair in _CALLED.findall(one.rest) for part in pair for name in part.split(",")]
    return [name.strip().lstrip("%") for name in names if name.strip()]


def _turns(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """How often a loop runs: the largest constant that its condition compares with."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    assert condition is not None  # HLO's `while` always names one
    bounds, queue = [1], [condition[1]]
    while queue:
        for one in computations.get(queue.pop(), ()):
            if one.op == "constant" and one.shape.startswith("s32[]"):
                bounds.append(int(one.rest.split(")")[0]))
            queue += _called(one)
    return max(bounds)


def _moved(one: _Instruction, op: str, inside: str, times: int, devices: int, at_once: bool) -> Moved:
    sizes = [
        BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in _SHAPE.findall(one.shape)
    ]
    group = _group(one.rest, devices)
    if one.op.endswith("-start") and one.shape.startswith("(") and op != "all-reduce":
        size = max(sizes)  # (operand, result, ...)
    else:
        size = sum(sizes)
    if op == "reduce-scatter":
        size *= 1 if one.op.endswith("-start") else len(group)
    if op == "all-reduce" and inside.startswith("all-reduce-scatter"):
        op = "reduce-scatter"
    source = re.search(r'op_name="([^"]*)"', one.rest)
    return Moved(op, size, times, group, at_once or one.op.endswith("-start"), source[1] if source else "")


def _group(text: str, devices: int) -> tuple[int, ...]:
    """The first of an instruction's groups of devices, in any of the forms that XLA writes."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:\s*device_ids=\([^)]*\))?\s*\{([^}]*)\}", text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        ids = np.arange(devices).reshape([int(n) for n in axes.values()])
        chosen = set(re.findall(r"'([^']+)'", mesh[2]))
        index = tuple(slice(None) if name in chosen else 0 for name in axes)
        return tuple(int(i) for i in ids[index].ravel())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        groups, dims = ([int(n) for n in part.split(",")] for part in iota.group(1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return tuple(int(i) for i in ids.reshape(groups)[0].ravel())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", text):
        return tuple(int(n) for n in listed[1].split(",") if n)
    return tuple(range(devices))
