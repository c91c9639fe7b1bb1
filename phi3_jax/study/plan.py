"""From a config to a plan: each run at full size as configured, and the best way to train it on the same devices."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from phi3_jax.chips import EXAMPLES, Topology, parse_topology
from phi3_jax.commands import Flags
from phi3_jax.errors import UserError, nearest
from phi3_jax.experiment import asked
from phi3_jax.models.flops import train_flops_per_token
from phi3_jax.planning import best, tiles
from phi3_jax.planning.best import Candidate
from phi3_jax.planning.memory import KEPT, limit, temp_bytes
from phi3_jax.planning.roofline import forward_seconds
from phi3_jax.planning.setup import Setup, row_ways
from phi3_jax.sharding.rules import degrees
from phi3_jax.study import plan_page
from phi3_jax.study import runs as studies
from phi3_jax.study.full import FULL_BATCH_TOKENS
from phi3_jax.study.planned import Job, jobs


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run on given devices.

    Attributes:
      job: what is trained.
      configured: what `launch/run.py` does with the same config.
      proposal: the best that fits.
    """

    job: Job
    configured: Candidate
    proposal: Candidate

    @property
    def tokens(self) -> float:
        return self.job.tokens

    @property
    def trained(self) -> int:
        """Parameters that are trained: those of the adapters, or all."""
        return sum(spec.size for _, spec in self.configured.setup.trained)

    @property
    def flops_per_token(self) -> float:
        job, setup = self.job, self.configured.setup
        text = train_flops_per_token(job.model, job.length, lora=job.lora, parts=job.parts)
        return text + tiles.model_flops_per_token(setup)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.configured.setup.batch_tokens)

    @property
    def reference_seconds(self) -> float:
        """Of the forward passes that make the reference's log-probabilities, at full rate; 0 where there are none."""
        rows, setup = self.job.rows, self.configured.setup
        if not self.job.reference or rows is None:
            return 0.0
        return forward_seconds(
            setup, rows.windows * rows.window if self.job.reference == "kept" else round(self.tokens)
        )

    def days(self, way: Candidate) -> float:
        """Of the whole budget at the roofline's speed."""
        return self.tokens / way.tokens_per_s / 86400

    def chip_hours(self, way: Candidate) -> float:
        """Of the whole budget at the roofline's speed."""
        return self.days(way) * 24 * way.setup.topology.chips

    def record(self) -> dict[str, Any]:
        """As plain JSON types; fields of the configured way at the top, the proposal's under "proposal"."""
        setup = self.configured.setup
        shared = {
            "model": setup.model.name,
            "params": self.job.params,
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "steps": self.steps,
        }
        if self.job.given:
            shared |= {
                "trained_params": self.trained,
                "pairs": self.job.pairs,
                "tiles_per_window": self.job.tiles,
                "rows": self.job.rows and dataclasses.asdict(self.job.rows),
                "reference_s": self.reference_seconds,
            }
        proposal = self._way(self.proposal) | {
            "overrides": overrides(self.proposal.setup, setup),
            "speedup": self.proposal.tokens_per_s / self.configured.tokens_per_s,
        }
        return shared | self._way(self.configured) | {"proposal": proposal}

    def _way(self, way: Candidate) -> dict[str, Any]:
        setup, roofline = way.setup, way.roofline
        memory = way.memory.categories()
        return {
            "strategy": setup.strategy,
            "mesh": setup.degrees._asdict(),
            "remat": setup.remat,
            "accumulation": setup.accumulation,
            "window": setup.sequence_length,
            "batch_tokens": setup.batch_tokens,
            "bytes_per_device": memory | {"total": way.memory.total, "limit": limit(setup)},
            "argument_bytes": way.memory.argument_bytes,
            "temp_bytes": temp_bytes(setup),
            "fullest_moment": way.memory.moment,
            "fits": way.fits,
            "collectives": [dataclasses.asdict(c) for c in roofline.moved],
            "seconds": {k: getattr(roofline, k) for k in ("compute", "hbm", "ici", "dcn", "exposed", "serial")},
            "hardware_flops_per_token": roofline.hardware_flops * setup.devices / setup.batch_tokens,
            "step_time_s": roofline.step,
            "tokens_per_s": way.tokens_per_s,
            "mfu_bound": roofline.mfu,
            "bound_by": roofline.bound_by,
            "chip_hours": self.chip_hours(way),
            "days": self.days(way),
        }


def overrides(setup: Setup, other: Setup) -> str:
    """What to add to a command that trains as `other` to train as `setup`."""
    text = best.words(setup)
    return text if setup.sequences == other.sequences else f"{text} --config.train.batch_tokens={setup.batch_tokens}"


# ------------------------------------------------------------------------------------------------ from a config


def setup_of(config: Any, job: Job, topology: Topology) -> Setup:
    """What a run of a config does on a topology; not yet checked.

    A batch that the config leaves open is `FULL_BATCH_TOKENS`, rounded up until it divides.

    Raises:
      UserError: a mesh that does not divide the devices, sequences longer than the context, a batch that does not divide.
    """
    train, model, length = config.train, job.model, job.length
    slices = train.slices or topology.slices
    if topology.slices > 1 and slices != topology.slices:
        raise UserError(f"train.slices={slices} on {topology.slices} slices; leave it out")
    large = studies.is_large(model)  # as `plan_runs` trains it
    strategy = studies.strategy_of(config, slices) if large or train.strategy != "auto" else "dp"
    mesh = degrees(strategy, topology.devices, slices=slices, context=train.context, tensor=train.tensor)
    if length > model.context:
        raise UserError(f"data.window={length:,} exceeds {model.name}'s context of {model.context:,}; set it lower")
    remat = train.remat or ("full" if large else "none")
    if remat not in KEPT:
        raise UserError(f"unknown remat policy {remat!r}{nearest(remat, KEPT)}")
    if train.accumulation < 1:
        raise UserError(f"train.accumulation={train.accumulation} must be 1 or more")
    unit = row_ways(mesh) * train.accumulation
    if job.batch_tokens:
        sequences, rest = divmod(job.batch_tokens, length)
        if rest or not sequences or sequences % unit:
            least = unit * length
            near = max(1, round(job.batch_tokens / least)) * least
            raise UserError(
                f"train.batch_tokens={job.batch_tokens:,} does not divide into sequences of {length:,} over "
                f"{row_ways(mesh)} rows of devices x accumulation {train.accumulation}; use a multiple of {least:,}, "
                f"for example {near}"
            )
    else:
        sequences = math.ceil(FULL_BATCH_TOKENS / length / unit) * unit
    return Setup(model, topology, strategy, mesh, length, sequences, train.accumulation, remat, **job.how)


def plans(config: Any) -> list[Plan]:
    """A plan for every run at full size of a config.

    Raises:
      UserError: no topology, or an unknown one; see `jobs`, `setup_of`, `Setup.check` and `best.best`.
    """
    if not config.topology:
        raise UserError(f"topology= is missing; for example {EXAMPLES}")
    topology = parse_topology(config.topology)
    found = []
    for job in jobs(config, topology):
        setup, batch = setup_of(config, job, topology), job.batch_tokens
        proposal = best.best(job.model, topology, job.length, batch or best.MIN_BATCH, exact=bool(batch), **job.how)
        try:
            setup.check()
        except UserError as error:
            if config.train.strategy != "auto":
                raise
            raise UserError(f"{error}; what divides and fits: {overrides(proposal.setup, setup)}") from error
        found.append(Plan(job, best.evaluate(setup), proposal))
    return found


def record(found: Sequence[Plan]) -> dict[str, Any]:
    """The plans as one JSON object: a single run's fields at the top, several under "runs"."""
    topology = found[0].configured.setup.topology
    shared = {
        "topology": topology.text,
        "chip": topology.chip.name,
        "chips": topology.chips,
        "devices": topology.devices,
    }
    return shared | found[0].record() if len(found) == 1 else shared | {"runs": [plan.record() for plan in found]}


def main(flags: Flags) -> None:
    """Prints the plan."""
    found = plans(asked(flags).config)
    programs = _compile(found) if flags["compile"] else []
    if flags["json"]:
        tree = record(found)
        if programs:
            tree["compiled"] = [program.record() for program in programs]
        print(json.dumps(tree))
    else:
        print("\n\n".join([plan_page.text(found), *map(plan_page.compiled, programs)]))


def _compile(found: Sequence[Plan]) -> list[Any]:
    from phi3_jax.planning import aot

    if found[0].job.lora or found[0].job.pairs:
        raise UserError("--compile is for training of weights, without adapters and pairs; leave it out")
    aot.devices(found[0].configured.setup.topology)  # errors before minutes of compiling
    return [aot.compile_step(plan.configured.setup) for plan in found]
