"""The learning-rate schedules."""

from __future__ import annotations

import math

from phi3_jax.configs import RunConfig, decay_start


def learning_rate(run: RunConfig, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then WSD, cosine or linear.

    WSD: constant until the last `decay` fraction of the run, then linear to `final_lr` times the peak
    (MiniCPM arXiv:2404.06395; Haegele et al. arXiv:2405.18392). The warm-up is a fraction of the trunk's
    steps, so that all forks share it. Cosine and linear: over the whole run, to the same floor. With
    `warmup_from_zero` the rates are those of transformers' schedules (and TRL's trainers) step by step.
    """
    optim = run.optim
    steps = optim.warmup * (run.trunk_steps or run.steps)
    ahead = 0 if optim.warmup_from_zero else 1
    warmup = math.ceil(steps) if optim.warmup_from_zero else max(1, round(steps))
    if step < warmup:
        return optim.peak_lr * (step + ahead) / warmup
    floor = optim.final_lr
    if optim.schedule == "wsd":
        start = decay_start(run.steps, optim.decay)
        if step < start:
            return optim.peak_lr
        return optim.peak_lr * (1 - (1 - floor) * (step - start + ahead) / (run.steps - start))
    progress = (step - warmup) / max(1, run.steps - warmup)
    left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.peak_lr * (floor + (1 - floor) * left)
