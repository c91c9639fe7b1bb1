"""A plan as a page of text that needs no other page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phi3_jax.models.flops import masked
from phi3_jax.planning.best import Candidate, words
from phi3_jax.planning.memory import LANES, SHARE, limit, predict, temp_bytes
from phi3_jax.planning.roofline import padded_head, roofline
from phi3_jax.study.planned import UNSAID
from phi3_jax.training.optimizers import optimizer
from phi3_jax.units import human_count

if TYPE_CHECKING:
    from phi3_jax.planning.aot import Compiled
    from phi3_jax.study.plan import Plan

GIB = 2**30
_ABOUT = {
    "parameters": "fp32 master weights",
    "batch": "tokens, targets, segments, positions, domains",
    "gradients": "once reduced, fp32",
    "activations": "kept for the backward pass, and one layer's work in it",
    "logits": "one chunk of positions",
    "collectives": "gathered weights, gradients before they are reduced",
    "runtime": "the process itself",
}
_DTYPES = {2: "bfloat16", 4: "float32"}


def text(found: Sequence[Plan]) -> str:
    """The plans, one after the other."""
    return "\n\n".join(_plan(plan) for plan in found)


def compiled(one: Compiled) -> str:
    """What the TPU compiler says of a step, compared with the plan."""
    setup, mine, chip = one.setup, one.roofline(), one.setup.topology.chip
    plan, planned = predict(setup), roofline(setup)
    sizes = [("", "compiler", "plan", "")]
    for name, got, expected, note in (
        ("arguments, GiB", one.argument, plan.argument_bytes, "the state and the batch"),
        ("temporaries, GiB", one.temporary, temp_bytes(setup), "all of them, those that never live together too"),
        ("peak, GiB", one.peak, plan.total, f"what lives together; may fill {limit(setup) / GIB:.2f}"),
    ):
        sizes.append((name, f"{got / GIB:.2f}", f"{expected / GIB:.2f}", note))
    for slow in (False, True):
        sent, thought = (sum(c.bytes for c in r.moved if c.slow == slow) / 1e9 for r in (mine, planned))
        if sent or thought:
            sizes.append((f"sent over {chip.slow if slow else chip.fast}, GB", f"{sent:.2f}", f"{thought:.2f}", ""))
    sizes.append(("step, s", f"{mine.step:.3f}", f"{planned.step:.3f}", "at least"))
    sizes.append(("MFU", f"{mine.mfu:.1%}", f"{planned.mfu:.1%}", f"at most; bound by {mine.bound_by}"))
    rows = [("how", "over", "link", "GB", "s", "while computing")]
    for c in mine.moved:
        overlap = "yes" if c.overlaps else "no"
        rows.append((c.op, ", ".join(c.axes), c.link, f"{c.bytes / 1e9:.2f}", f"{c.seconds:.3f}", overlap))
    verdict = "fits" if one.fits else "DOES NOT FIT"
    whole = len(one.rematerialised) or "none"
    return "\n".join(
        [
            f"{setup.model.name} on {setup.topology.text}, compiled in {one.seconds:.0f} s: {verdict}",
            "a device in a step",
            *_table(sizes, "<>><"),
            "",
            f"sent by a device in a step, as compiled: {one.at_once:.0%} of the bytes while it computes",
            *_table(rows, "<<<>><"),
            f"tensors gathered whole for want of a better way: {whole}",
        ]
    )


def _table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows as aligned lines; `align` has < or > a column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    lines = ("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]


def _plan(plan: Plan) -> str:
    way = plan.configured
    setup, topology = way.setup, way.setup.topology
    mesh = " x ".join(f"{axis} {size}" for axis, size in setup.degrees._asdict().items())
    each = f"{setup.rows:g} windows a device" if setup.rows >= 1 else f"a window over {setup.degrees.context} devices"
    several = f", {topology.slices} slices" if topology.slices > 1 else ""
    head = [
        f"{setup.model.name} on {topology.text} ({topology.chips} chips{several}), as configured",
        f"  {plan.job.params:,} parameters, {plan.flops_per_token / 1e9:.2f} GFLOP a token (causal), "
        f"{human_count(plan.tokens)} tokens",
        f"  batch {setup.batch_tokens:,} tokens = {setup.sequences} windows of {setup.sequence_length:,}: {each}, "
        f"{setup.accumulation} microbatch{'es' * (setup.accumulation > 1)}",
        f"  strategy {setup.strategy}: {mesh}; remat {setup.remat}",
        *_given(plan),
    ]
    return "\n".join([*head, "", *_memory(way), "", *_collectives(way), "", *_time(way), "", *_cost(plan)])


def _given(plan: Plan) -> list[str]:
    """What post-training trains, and on what."""
    job, setup = plan.job, plan.configured.setup
    if not job.given:
        return []
    what = (
        f"{', '.join(job.parts)}: {plan.trained:,} parameters are trained"
        if job.parts
        else "all parameters are trained"
    )
    lines = [f"  products in {_DTYPES[job.value_bytes]}; {what}"]
    if job.lora:
        share = plan.trained / job.params
        lines = [
            f"  products in {_DTYPES[job.value_bytes]}; adapters of rank {job.lora.rank} are trained: {plan.trained:,} "
            f"parameters ({share:.2%}); the others stay in {_DTYPES[job.frozen_bytes]}"
        ]
    if job.tiles:
        lines.append(
            f"  {job.tiles:.1f} tiles of pictures a window{', those of one square picture' * (job.rows is None)}"
        )
    if job.rows is None:
        what = "pairs, each two segments of a window" if job.pairs else "conversations"
        return [*lines, f"  {what}; no data= is named, so that a pass is counted as {human_count(UNSAID)} tokens"]
    rows = job.rows
    if not job.pairs:
        return [*lines, f"  conversations, packed into {rows.windows:,} windows of {rows.window:,} tokens"]
    each = rows.pairs / rows.windows
    return [
        *lines,
        f"  {rows.pairs:,} pairs, each two segments of one of {rows.windows:,} windows of {rows.window:,} tokens: "
        f"{each * setup.sequences:.1f} pairs a batch",
    ]


def _memory(way: Candidate) -> list[str]:
    sizes = way.memory.categories()
    about = {"optimizer": optimizer(way.setup.optimizer).about, **_ABOUT}
    if way.setup.lora:
        about |= {"parameters": f"frozen {_DTYPES[way.setup.frozen_bytes]} weights, fp32 adapters"}
        about |= {"gradients": "of adapters alone, fp32", "collectives": "gathered weights"}
    if way.setup.pairs:
        about |= {"batch": f"{_ABOUT['batch']}, reference"}
    rows = [(name, f"{size / GIB:.2f}", about[name]) for name, size in sizes.items() if size or name != "runtime"]
    room = way.setup.topology.chip.memory
    verdict = "fits" if way.fits else "DOES NOT FIT"
    allowed = f"{verdict}: a plan may fill {limit(way.setup) / GIB:.2f}, {SHARE:.0%} of {room / GIB:.2f}"
    return [
        f"memory a device, GiB, when it is fullest: in {way.memory.moment}",
        *_table([*rows, ("total", f"{way.memory.total / GIB:.2f}", allowed)], "<><"),
    ]


def _collectives(way: Candidate) -> list[str]:
    if not way.roofline.moved:
        return ["collectives: none"]
    rows = [("what", "how", "over", "link", "GB", "s", "while computing")]
    for c in way.roofline.moved:
        overlap = "yes" if c.overlaps else "no"
        rows.append((c.name, c.op, ", ".join(c.axes), c.link, f"{c.bytes / 1e9:.2f}", f"{c.seconds:.3f}", overlap))
    return ["sent by a device in a step", *_table(rows, "<<<<>><")]


def _time(way: Candidate) -> list[str]:
    roof, setup, chip = way.roofline, way.setup, way.setup.topology.chip
    more = roof.hardware_flops / roof.model_flops
    why = ["recomputation, whole attention tiles"]
    if padded_head(setup) != setup.model.head_dim:
        why.append(f"head_dim {setup.model.head_dim} padded to {LANES} lanes")
    if setup.ways(setup.layout.time) > 1:
        why.append("the device with the end of a window")
    rows = [("compute", f"{roof.compute:.3f}", f"{more:.2f} x the model's FLOPs: {', '.join(why)}")]
    rows.append(("HBM", f"{roof.hbm:.3f}", "rough"))
    rows += [(name, f"{s:.3f}", "") for name, s in ((chip.fast, roof.ici), (chip.slow, roof.dcn)) if s]
    if roof.exposed:
        rows.append(("held up", f"{roof.exposed:.3f}", "collectives that nothing hides"))
    rows.append(("step", f"{roof.step:.3f}", f"at least: the largest, and what is held up; {roof.serial:.3f} in turn"))
    bound = f"  MFU at most {roof.mfu:.1%} ({masked(setup.model)} convention), bound by {roof.bound_by}"
    return ["time of a step, s", *_table(rows, "<><"), bound]


def _span(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit = next(
        ((size, name) for size, name in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= size), (1, "s")
    )
    return f"{seconds / unit[0]:,.1f} {unit[1]}"


def _cost(plan: Plan) -> list[str]:
    way, best = plan.configured, plan.proposal
    chips = way.setup.topology.chips
    lines = [
        f"{human_count(plan.tokens)} tokens: {plan.steps:,} steps, {plan.days(way):,.1f} days, "
        f"{plan.chip_hours(way):,.0f} chip-hours on {chips} chips, at the least"
    ]
    if plan.job.given:
        lines = [
            f"{human_count(plan.tokens)} tokens: {plan.steps:,} steps, {_span(plan.days(way) * 86400)} on {chips} "
            f"chip{'s' * (chips > 1)}, at the least"
        ]
    if seconds := plan.reference_seconds:
        what = "before them one pass over the data for the reference, kept with the run"
        if plan.job.reference == "frozen":
            what = "beside them one forward pass of each step for the reference"
        lines += [f"  {what}: {_span(seconds)}"]
    if best.setup == way.setup:
        return [*lines, "this is the best the search finds"]
    faster = best.tokens_per_s / way.tokens_per_s
    gain = f"{faster:.2f} x the tokens a second" if way.fits else "it fits"
    batch = (
        "" if best.setup.sequences == way.setup.sequences else f" --config.train.batch_tokens={best.setup.batch_tokens}"
    )
    return [
        *lines,
        f"{_compared(way, best)}: {words(best.setup)}{batch}",
        f"  {gain}: step {best.roofline.step:.3f} s, MFU at most {best.roofline.mfu:.1%}, bound by "
        f"{best.roofline.bound_by}; {best.memory.total / GIB:.2f} GiB a device; "
        + (
            _span(plan.days(best) * 86400)
            if plan.job.given
            else f"{plan.days(best):,.1f} days, {plan.chip_hours(best):,.0f} chip-hours"
        ),
    ]


def _compared(way: Candidate, best: Candidate) -> str:
    """What the proposal is beside the way that is configured: the search keeps to its batch, and to slices."""
    faster = best.tokens_per_s / way.tokens_per_s
    if not way.fits or faster > 1.005:
        return "better"
    if faster >= 0.995:
        return "as fast"
    if best.setup.batch_tokens < way.setup.batch_tokens:
        return f"slower, but with a batch of {human_count(best.setup.batch_tokens)} tokens"
    return "slower, but its parameters stay inside a slice"
