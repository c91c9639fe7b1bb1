"""A training worker with faults injected: `python injected.py FAULT,FAULT STUDY RUN`, a fault being `name` or `name=value`.

Everything else is the worker that a study starts, `python -m phi3_jax.study.worker STUDY RUN`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from phi3_jax.entry import start
from phi3_jax.records import checkpoint
from phi3_jax.training import reference, step, train


def slow_disk(seconds: str) -> None:
    """Every save takes longer, before and after its commit is prepared."""
    real = checkpoint.checksums

    def checksums(folder: Path) -> dict[str, list[int]]:
        if folder.name.endswith(".partial"):
            time.sleep(float(seconds))
        return real(folder)

    checkpoint.checksums = checksums


def endless_evaluation(marker: str) -> None:
    """Evaluations go on for ever; the file `marker` appears when one has begun."""
    real = train.loader.eval_batches

    def eval_batches(*args: Any) -> Any:
        batch = next(iter(real(*args)))
        while True:
            yield batch
            Path(marker).touch()

    train.loader.eval_batches = eval_batches


def _each_batch(change: Callable[[int, dict], dict]) -> None:
    real = train.loader.train_batches

    class Changed:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.source = real(*args, **options)

        def __getitem__(self, number: int) -> dict:
            return change(number, self.source[number])

    train.loader.train_batches = Changed


def hang(number: str) -> None:
    """The batch of one step never comes."""
    _each_batch(lambda i, batch: threading.Event().wait() if i == int(number) else batch)


def bad_steps(numbers: str) -> None:
    """Loss and gradient are nan at the first of `numbers` (joined by +) and a million times too large at the others."""
    first, *others = map(int, numbers.split("+"))

    def mark(i: int, batch: dict) -> dict:
        mark = -1 if i == first else -2 if i in others else None
        return batch if mark is None else batch | {"positions": batch["positions"] * 0 + mark}

    real = step.loss_and_grads

    def loss_and_grads(params: Any, batch: dict, *args: Any) -> tuple:
        mark = batch["positions"][0, 0]
        total, means, grads = real(params, batch, *args)
        factor = jnp.where(mark == -1, jnp.nan, jnp.where(mark == -2, 1e6, 1.0))
        return total * factor, means, jax.tree.map(lambda g: g * factor, grads)

    _each_batch(mark)
    step.loss_and_grads = loss_and_grads


def slow_reference(seconds: str) -> None:
    """The pass of the reference goes over few windows at a time, each of them slowly, and keeps every one."""
    reference.TOKENS, reference.SECONDS = 1024, 0.0
    real = reference.sums

    def sums(*args: Any) -> Any:
        time.sleep(float(seconds))
        return real(*args)

    reference.sums = sums


def clock_jumps(seconds: str) -> None:
    """The wall clock is set forwards and backwards at every look."""
    real, sign = time.time, [1]

    def jumping() -> float:
        sign[0] = -sign[0]
        return real() + sign[0] * float(seconds)

    time.time = jumping


FAULTS = {f.__name__: f for f in (slow_disk, endless_evaluation, hang, bad_steps, slow_reference, clock_jumps)}

if __name__ == "__main__":
    for fault in filter(None, sys.argv[1].split(",")):
        name, _, value = fault.partition("=")
        FAULTS[name](value)
    sys.exit(start("worker", sys.argv[2:]))
