"""Checkpoints against the disk: save rate, what training feels of it, and restore.

    python benchmarks/checkpoint.py [--gb 1.0] [--rounds 3] [--folder runs/benchmark]

The disk's sequential write rate is measured in the same rounds (one file of the same size, 16 MB writes, fsync at the
end), and the save counts everything until its folder is committed: arrays, checksums read back, fsync. The training
step is a chain of matrix products with the state's own parameters, 2,048 tokens, backward pass and Adam, donated.
It runs with the launcher's malloc settings, as training does.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.records.checkpoint import Checkpointer, Keep, restore
from phi3_jax.study.workers import MALLOC

WIDTH, TOKENS = 1024, 2048


def init(gb: float) -> dict[str, Any]:
    """Parameters and two Adam moments in float32, `gb` GB (1e9 bytes) together."""
    layers = max(1, round(gb * 1e9 / (12 * WIDTH * WIDTH)))
    w = jax.random.normal(jax.random.key(0), (layers, WIDTH, WIDTH)) / WIDTH**0.5
    return {"params": w, "mu": w * 1e-3, "nu": w * w * 1e-6}


def loss_of(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.scan(lambda h, m: (jnp.tanh(h @ m), None), x, w)[0] ** 2)


def train_step(state: dict[str, Any], x: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    loss, g = jax.value_and_grad(loss_of)(state["params"], x)
    mu, nu = 0.9 * state["mu"] + 0.1 * g, 0.95 * state["nu"] + 0.05 * g * g
    return {"params": state["params"] - 1e-3 * mu / (jnp.sqrt(nu) + 1e-8), "mu": mu, "nu": nu}, loss


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def write_file(path: Path, size: int) -> None:
    block = os.urandom(16 << 20)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def disk_and_save(state: dict[str, Any], folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a plain file and of a whole checkpoint, alternating, each on an idle disk."""
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    saver, plain, saves = Checkpointer(folder / "save", Keep(1)), [], []
    for number in range(rounds + 1):
        os.sync()
        plain.append(seconds(lambda: write_file(folder / "plain", size)))
        (folder / "plain").unlink()
        os.sync()
        begin = time.perf_counter()
        saver.save(number, state, {})
        saver.wait()
        saves.append(time.perf_counter() - begin)
    return plain[1:], saves[1:]  # the first round warms up


def while_training(state: dict[str, Any], folder: Path, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of quiet steps, of `save` before it returns, and of the steps during which it is written."""
    step = jax.jit(train_step, donate_argnums=0)
    x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
    saver, quiet, blocked, busy = Checkpointer(folder / "async", Keep(1)), [], [], []

    def one() -> None:
        nonlocal state
        state, loss = step(state, x)
        jax.block_until_ready((state, loss))

    one()
    for number in range(rounds + 1):
        quiet.append(seconds(one))
        before = jax.tree.map(lambda a: np.asarray(a[-1]).copy(), state)
        blocked.append(seconds(lambda n=number: saver.save(n, state, {})))
        busy.append(seconds(one))
        saver.wait()
    found = restore(folder / "async", state).state
    assert all(np.array_equal(found[k][-1], before[k]) for k in before), "the saved state is not the one handed over"
    return quiet[1:], blocked[1:], busy[1:]


def main(flags: Mapping[str, Any]) -> None:
    if "GLIBC_TUNABLES" not in os.environ:  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    folder = Path(flags["folder"]) / f"checkpoint-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        state = init(flags["gb"])
        size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
        plain, saves = disk_and_save(state, folder, flags["rounds"])
        loads = [
            seconds(lambda: jax.block_until_ready(restore(folder / "save", state).state))
            for _ in range(flags["rounds"])
        ]
        quiet, blocked, busy = while_training(state, folder, flags["rounds"])
        small = {f"leaf{i}": jnp.ones((12_000,)) for i in range(45)}
        _, tiny = disk_and_save(small, folder / "tiny", 10)
        saver = Checkpointer(folder / "tiny" / "block", Keep(1))
        tiny_blocked = [(seconds(lambda n=n: saver.save(n, small, {})), saver.wait())[0] for n in range(10)]
    finally:
        shutil.rmtree(folder)
    m = statistics.median
    rows = [
        ("disk, plain file with fsync", plain, f"{size / m(plain):,.0f} MB/s"),
        ("save, until committed", saves, f"{size / m(saves):,.0f} MB/s, {m(plain) / m(saves):.2f} x the disk (target 0.5)"),
        ("restore, verified", loads, f"{size / m(loads):,.0f} MB/s"),
        ("training step, no save", quiet, ""),
        ("async save, blocking", blocked, f"{m(blocked) / m(quiet):.1%} of a step (target < 5%)"),
        ("training step, save in the background", busy, f"{m(busy) / m(quiet):.2f} x a quiet step"),
        ("2 MB state of 45 leaves, until committed", tiny, ""),
        ("2 MB state of 45 leaves, blocking", tiny_blocked, ""),
    ]  # fmt: skip
    print(
        f"python benchmarks/checkpoint.py --gb {flags['gb']:g} --rounds {flags['rounds']}   ({size:,.0f} MB of state)"
    )
    print(f"{'':42} {'median s':>9} {'min':>8} {'max':>8}")
    for name, times, note in rows:
        print(f"{name:42} {m(times):9.3f} {min(times):8.3f} {max(times):8.3f}  {note}")


COMMAND = Command(
    "benchmarks/checkpoint.py",
    __doc__,
    main,
    {
        "gb": Flag(keys.number("size of the state", 1.0, 1e-3, 1e4)),
        "rounds": Flag(keys.whole("rounds, of which medians are shown", 3, 1)),
        "folder": Flag(keys.local("where the files are written and removed again", "runs/benchmark"), "DIR"),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
