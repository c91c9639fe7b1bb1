"""What the full runs of a study are, and whether the attached devices hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from phi3_jax import family
from phi3_jax.configs import ModelConfig
from phi3_jax.data import sources
from phi3_jax.errors import UserError
from phi3_jax.keys import parse_count
from phi3_jax.models.flops import train_flops_per_token
from phi3_jax.models.spec import count_params
from phi3_jax.planning import memory
from phi3_jax.training.optimizers import optimizer
from phi3_jax.units import human_bytes, human_count

# Budgets from here on are those of the released models; a proxy trains the same share of its reference budget.
FULL_BUDGET = 10_000_000_000
FULL_BATCH_TOKENS = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class FullRun:
    """What training one released member would take."""

    model: ModelConfig
    params: int
    tokens: float
    flops: float
    state_bytes: float
    needed_bytes: float
    optimizer_state: str

    @property
    def line(self) -> str:
        return (
            f"phi-3-{self.model.member}: {self.params:,} parameters, {human_count(self.tokens)} tokens, "
            f"{self.flops:.3g} FLOPs (causal matrix products at {self.model.context:,} tokens), "
            f"{human_bytes(self.state_bytes)} of training state (fp32 weights and {self.optimizer_state}; "
            f"{human_bytes(self.needed_bytes)} with gradients and activations)"
        )


def optimizer_of(config: Any) -> str:
    """The optimiser of a full-size run."""
    return config.optim.name or family.FULL_OPTIM.name


def token_budget(words: str, size: str) -> float:
    """Tokens of the full run that a size stands for: matched 4.8T, the published number, or a given one."""
    if words == "matched":
        return family.MATCHED_TOKENS
    if words == "published":
        return family.published_tokens(size)
    return parse_count(words, "a token budget (matched, published or a number)")


def full_runs(config: Any, scale: str | None = None) -> list[FullRun]:
    """The released members a study is about, and what each full run needs; `scale` (default config.scale) may be full.

    Raises:
      UserError: a full run of fewer tokens than one batch.
    """
    runs, full = [], (scale or config.scale) == "full"
    for size in config.sizes:
        if size not in family.MEMBERS:
            continue
        model = family.published(size, config.context or None)
        params = count_params(model)
        tokens = token_budget(config.tokens, size)
        batch = config.train.batch_tokens or FULL_BATCH_TOKENS
        if full and tokens < batch:
            raise UserError(f"tokens={config.tokens}: a full-size run needs one batch of {batch:,} tokens or more")
        tokens = tokens if tokens >= FULL_BUDGET or full else family.MATCHED_TOKENS
        name = optimizer_of(config)
        need = memory.needed_on_one_device(
            model, 1, model.context, remat="full", value_bytes=2, on_cpu=False, optimizer=name
        )
        flops = tokens * train_flops_per_token(model, model.context)
        runs.append(FullRun(model, params, tokens, flops, need.state, need.total, optimizer(name).about))
    return runs


def choose_scale(config: Any, full: Sequence[FullRun], device: tuple[str, int, float]) -> tuple[str, str]:
    """(scale, one line saying why).

    Raises:
      UserError: scale=full without the memory, naming bytes needed, bytes there and a mesh that would hold it; a
        full run without data; a context of the full models where none of them is trained.
    """
    scale, why = _chosen(config, full, device)
    if config.context and scale != "full":
        raise UserError(
            f"context={config.context} names a released model, and scale={scale} trains none; leave it out, or "
            "say scale=full"
        )
    return scale, why


def _chosen(config: Any, full: Sequence[FullRun], device: tuple[str, int, float]) -> tuple[str, str]:
    kind, count, there = device
    have = f"{count} x {kind} with {human_bytes(there)}"
    needed = max((run.needed_bytes for run in full), default=0.0)
    biggest = max(full, key=lambda run: run.needed_bytes).model.name if full else ""
    fits = bool(full) and needed <= there
    if config.scale == family.GIVEN:
        if not config.train.init:
            raise UserError("scale=given takes the model of train.init, which is not set; add init=RUN or hf:FOLDER")
        return config.scale, f"attached: {have}; training the model of {config.train.init}"
    if config.scale in family.SCALES:
        return config.scale, f"attached: {have}; scale={config.scale} asked for"
    if fits or config.scale == "full":
        if not full:
            raise UserError(
                f"sizes={','.join(config.sizes)} have no released model; use a scale of proxies: {', '.join(family.SCALES)}"
            )
        if not fits:
            raise UserError(
                f"scale=full: {biggest} needs {human_bytes(needed)}, there are {human_bytes(there)} ({count} x {kind}); "
                f"a mesh that would hold it: {memory.mesh_that_holds(needed)}; or use scale=pico"
            )
        if not config.data.source:
            raise UserError(f"a full-size run needs data=; choices: {sources.choices()}")
        return "full", f"attached: {have}; it holds {biggest}: training the full model"
    return "pico", (
        f"attached: {have}, too little for {biggest} ({human_bytes(needed)}): training its shape-preserving "
        "proxy at pico scale instead, labelled so everywhere"
        if full
        else f"attached: {have}; training at pico scale"
    )
