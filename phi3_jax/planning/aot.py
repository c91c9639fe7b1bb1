"""The training step, compiled for TPUs that are not there, and what the compiler says of it, compared with the plan.

`libtpu` compiles for a named topology on any Linux machine (extra `[tpu]`). The step is the one that `training.step` runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax import family
from phi3_jax.chips import Topology
from phi3_jax.configs import DataConfig, RunConfig
from phi3_jax.errors import UserError
from phi3_jax.planning import hlo
from phi3_jax.planning.collectives import Collective, moved
from phi3_jax.planning.memory import limit, predict, temp_bytes
from phi3_jax.planning.roofline import Roofline, roofline, with_collectives
from phi3_jax.planning.setup import Setup
from phi3_jax.sharding.rules import AXES

# Statistics and gains: collectives below this many bytes cost their start, not their size, and are left out of tables.
SMALL = 1 << 20


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the TPU compiler says of one step, in bytes per device and seconds.

    Attributes:
      argument, temporary, peak: `memory_analysis()`; temporaries count buffers that never live together.
      moved: collectives of the program.
      rematerialised: the partitioner's warnings of tensors that it gathers whole because it knows no other way.
      seconds: of compiling.
    """

    setup: Setup
    argument: int
    temporary: int
    peak: int
    moved: tuple[hlo.Moved, ...]
    rematerialised: tuple[str, ...]
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak <= limit(self.setup)

    @property
    def at_once(self) -> float:
        """Share of the bytes moved that may travel while other work is done."""
        total = sum(m.bytes * m.times for m in self.moved)
        return sum(m.bytes * m.times for m in self.moved if m.at_once) / total if total else 1.0

    def collectives(self) -> list[Collective]:
        """The program's collectives at the rates of the plan's links, one row a kind, axes and link."""
        rows: dict[tuple[Any, ...], Collective] = {}
        for one in self.moved:
            axes = one.axes(self.setup.degrees, AXES)
            for part in moved(self.setup, one.op, one.op, axes, float(one.bytes * one.times), one.at_once):
                key = part.op, part.axes, part.link, part.overlaps
                old = rows.get(key)
                if old:
                    part = dataclasses.replace(part, bytes=old.bytes + part.bytes, seconds=old.seconds + part.seconds)
                rows[key] = part
        return sorted(rows.values(), key=lambda c: -c.seconds)

    def roofline(self) -> Roofline:
        """The plan's roofline over the compiled collectives; those not at once hold the step up."""
        return with_collectives(self.setup, self.collectives())

    def record(self) -> dict[str, Any]:
        """One row of a table: the setup, the compiler's numbers and the plan's, and the bound."""
        setup, mine, plan = self.setup, self.roofline(), roofline(self.setup)
        sent = lambda r, slow: sum(c.bytes for c in r.moved if c.slow == slow)  # noqa: E731
        return {
            "model": setup.model.name,
            "topology": setup.topology.text,
            "strategy": setup.strategy,
            "mesh": "x".join(map(str, setup.degrees)),
            "remat": setup.remat,
            "accumulation": setup.accumulation,
            "batch_tokens": setup.batch_tokens,
            "argument_bytes": self.argument,
            "argument_plan": round(predict(setup).argument_bytes / self.argument, 3),
            "temp_bytes": self.temporary,
            "temp_plan": round(temp_bytes(setup) / self.temporary, 3),
            "peak_bytes": self.peak,
            "peak_plan": round(predict(setup).total / self.peak, 3),
            "limit_bytes": int(limit(setup)),
            "fits": self.fits,
            "fast_bytes": round(sent(mine, False)),
            "fast_plan": round(sent(plan, False) / max(1.0, sent(mine, False)), 3),
            "slow_bytes": round(sent(mine, True)),
            "at_once": round(self.at_once, 3),
            "step_s": round(mine.step, 3),
            "mfu_bound": round(mine.mfu, 3),
            "bound_by": mine.bound_by,
            "mfu_plan": round(plan.mfu, 3),
            "rematerialised": len(self.rematerialised),
        }


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, for compiling only.

    Raises:
      UserError: no TPU, or libtpu is not installed.
    """
    if topology.chip.platform != "tpu":
        raise UserError(f"--compile works for TPU topologies, not {topology.text}; leave it out")
    if not available():
        raise UserError("--compile needs the TPU compiler: pip install -e '.[tpu]'")
    # libtpu looks for a TPU's host and locks it for one process unless told that there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    name = f"{topology.chip.name}:{'x'.join(map(str, topology.dims))}"
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    with _stderr():  # libtpu's remarks on the host it is not on
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)


def run_of(setup: Setup) -> RunConfig:
    """The run that a setup plans."""
    return RunConfig(
        name=setup.model.name, model=family.trained(setup.model),
        optim=dataclasses.replace(family.FULL_OPTIM, name=setup.optimizer),
        data=DataConfig("text", "", "", setup.sequence_length, setup.model.vocab), batch_windows=setup.sequences,
        steps=1000, accumulation=setup.accumulation, dtype="bfloat16" if setup.value_bytes == 2 else "float32",
        strategy=setup.strategy, context_parallel=setup.degrees.context, tensor_parallel=setup.degrees.tensor,
        slices=setup.degrees.replica, remat=setup.remat, unroll=False, parts=setup.parts,
    )  # fmt: skip


def compile_step(setup: Setup) -> Compiled:
    """Lowers and compiles the training step of a setup for its topology; minutes.

    Raises:
      UserError: see `devices`; a step that does not fit the chips' memory.
    """
    from phi3_jax.sharding.mesh import mesh_of
    from phi3_jax.sharding.rules import batch_sharding
    from phi3_jax.training import pictures, step

    run = run_of(setup)
    mesh = mesh_of(run, devices(setup.topology))
    shape, sharding = (setup.sequences, setup.sequence_length), batch_sharding(setup.strategy, mesh)
    names = ("tokens", "targets", "segments", "positions", "domains")
    with jax.set_mesh(mesh):
        state = step.abstract_state(run, mesh)
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in names}
        if setup.tiles:
            batch |= pictures.shapes(run, mesh, setup.tiles)
        lowered = step.compile_steps(run, step.Loss(("text",), False), "tpu")[0].lower(
            state, batch, jax.ShapeDtypeStruct((), jnp.float32)
        )
        start = time.perf_counter()
        with _stderr() as said:
            try:
                program = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                line = next(x for x in str(error).splitlines() if "RESOURCE_EXHAUSTED" in x)
                raise UserError(f"the step does not fit a {setup.topology.chip.name}'s memory: {line}") from error
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None  # libtpu's programs have both
    return Compiled(
        setup=setup,
        argument=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        moved=tuple(m for m in hlo.collectives(text, setup.devices) if m.bytes * m.times >= SMALL),
        rematerialised=tuple(x for x in said if "nvoluntary full rematerialization" in x),
        seconds=time.perf_counter() - start,
    )


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What compiled code writes to the process's standard error meanwhile, line by line; kept from the terminal."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile(mode="w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()
