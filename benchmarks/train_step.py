"""Tokens/s of a training step compared with Hugging Face's Phi3ForCausalLM on PyTorch, on all cores given.

    python benchmarks/train_step.py [--shapes sweep,pico,7.5M,69M] [--runs 7] [--dtype float32]

All do forward, backward and AdamW on the same shapes and batch (the peer: eager attention, fused AdamW; install it with
`pip install -e '.[peer]'`, without it its columns are empty). `phi3_jax` runs as the launcher runs it, with the launcher's
malloc settings; `transformers` as its users do; `tuned` is the same with our malloc settings. One process each, with all
cores, except for `sweep`: there phi3_jax and tuned are one pinned process per core, as in a sweep, and their rates add up.
The sides take turns; medians are shown. `others` is the part of a core that other processes took meanwhile: the figures
mean something only where it is near 0. GFLOP/s follow `phi3_jax.models.flops`; `of peak` is beside the same library's
matrix product of 2048 x 2048 in --dtype (on one core, times the processes, for `sweep`). What is being done is said on
stderr; a CPU without units for bfloat16 takes minutes for one such product.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.configs import ModelConfig
from phi3_jax.models.flops import train_flops_per_token
from phi3_jax.study.workers import MALLOC

# width, layers, heads, mlp, vocab, windows, time
SHAPES = {
    "sweep": (48, 4, 3, 128, 320, 44, 24),
    "pico": (48, 4, 3, 128, 320, 44, 24),
    "7.5M": (256, 8, 4, 704, 2048, 8, 256),
    "69M": (768, 8, 12, 2048, 8192, 4, 512),
}
COLUMNS = ("phi3_jax", "transformers", "tuned")
STEPS = {"sweep": 20, "pico": 20, "7.5M": 1, "69M": 1}  # steps a turn
SIDE = 2048
ENOUGH = 20.0  # seconds of one product, after which its fastest run is known well enough


def model_of(shape: str) -> ModelConfig:
    width, layers, heads, mlp, vocab, _, _ = SHAPES[shape]
    return ModelConfig(
        name=shape, member="mini", scale="benchmark", ladder="family", vocab=vocab, embed=width, layers=layers,
        heads=heads, kv_heads=heads, head_dim=width // heads, mlp=mlp, context=4096,
    )  # fmt: skip


def note(*words: object) -> None:
    """Says what is being done, where the table does not go."""
    print("#", *words, file=sys.stderr, flush=True)


def fastest(product: Callable[[], Any]) -> float:
    """GFLOP/s of the fastest of several runs of a SIDE x SIDE product; fewer of one that takes long."""
    times = []
    while len(times) < 7 and sum(times) < ENOUGH:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times) / 1e9


def ours(shape: str, dtype: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """(step() -> loss, ceiling() -> GFLOP/s of a product in `dtype`): the package's own step, compiled."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from phi3_jax.configs import DataConfig, OptimConfig, RunConfig
    from phi3_jax.sharding import rules
    from phi3_jax.sharding.mesh import make_mesh
    from phi3_jax.training import step

    _, _, _, _, vocab, windows, length = SHAPES[shape]
    optim = OptimConfig(b2=0.999, eps=1e-8, weight_decay=0.01)
    run = RunConfig(shape, model_of(shape), optim, DataConfig("", "", "", length, vocab), windows, 100, dtype=dtype)
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, vocab, (windows, length)) for name in ("tokens", "targets")}
    ones = np.ones((windows, length))
    batch = ids | {"segments": ones, "domains": ones, "positions": np.broadcast_to(np.arange(length), ones.shape)}
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = jax.device_put({k: v.astype(np.int32) for k, v in batch.items()}, rules.batch_sharding("dp", mesh))
        state = step.init_state(run, mesh)
        train_step, _ = step.compile_steps(run, step.Loss(("text",), False))

    def go() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch, jnp.float32(1e-3))
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    def ceiling() -> float:
        a = jnp.ones((SIDE, SIDE), dtype)
        product = jax.jit(lambda a: a @ a)
        return fastest(lambda: product(a).block_until_ready())

    return go, ceiling


def peer(shape: str, dtype: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """The same step with transformers and PyTorch; bfloat16 by autocast."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    width, layers, heads, mlp, vocab, windows, length = SHAPES[shape]
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager", tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens, targets = (torch.randint(0, vocab, (windows, length)) for _ in range(2))

    def go() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, vocab).float(), targets.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def ceiling() -> float:
        a = torch.ones(SIDE, SIDE, dtype=getattr(torch, dtype))
        return fastest(lambda: a @ a)

    return go, ceiling


def serve(side: str, shape: str, dtype: str) -> None:
    """A measuring process: says what it has, then runs as many steps as each line of stdin asks for."""
    go, ceiling = ours(shape, dtype) if side == "phi3_jax" else peer(shape, dtype)
    note(shape, f"{side}: a matrix product in {dtype}, {SIDE} x {SIDE}")
    product = ceiling()
    note(shape, f"{side}: the first step, which compiles")
    start = time.perf_counter()
    go()
    first = time.perf_counter() - start
    go()
    print(json.dumps({"product": product, "first": first}), flush=True)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            loss = go()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)


def busy() -> float:
    """CPU seconds of the whole machine since it started, without idling; 0 where the system does not say."""
    try:
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:8]]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Side:
    """The measuring processes of one column, seen from the parent."""

    def __init__(self, name: str, shape: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--serve", name, "--shapes", shape, "--dtype", dtype]
        tuned = {"GLIBC_TUNABLES": MALLOC} if name != "transformers" else {}
        cores = sorted(os.sched_getaffinity(0))
        pins = [{core} for core in cores] if shape == "sweep" and name != "transformers" else [set(cores)]
        self.name, self.processes = name, []
        for pin in pins:
            os.sched_setaffinity(0, pin)  # inherited
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, env=os.environ | tuned, **pipes))
        os.sched_setaffinity(0, cores)
        hellos = [self._answer(process) for process in self.processes]
        self.first = max(hello["first"] for hello in hellos)
        self.product = sum(hello["product"] for hello in hellos)
        self.walls, self.others = [], []

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {process.args} ended with status {process.wait()}")
        return json.loads(line)

    def turn(self, steps: int) -> None:
        """Runs `steps` steps in each process at the same time; keeps the seconds per step of all of them together."""
        time.sleep(0.3)  # the other side's threads go to sleep
        before = busy()
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        rows = [self._answer(process) for process in self.processes]
        self.walls.append(1 / sum(steps / row["wall"] for row in rows))
        elapsed, cpu = max(row["wall"] for row in rows), sum(row["cpu"] for row in rows)
        self.others.append(max(0.0, busy() - before - cpu) / elapsed)

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()


def compare(shape: str, dtype: str, runs: int) -> str:
    """Runs one shape; returns its row."""
    names = COLUMNS if importlib.util.find_spec("torch") else COLUMNS[:1]
    sides = [Side(name, shape, dtype) for name in names]
    for turn in range(runs):
        note(shape, f"turn {turn + 1} of {runs}, {STEPS[shape]} steps of each side")
        for side in sides:
            side.turn(STEPS[shape])
    _, _, _, _, _, windows, length = SHAPES[shape]
    cells, ratios = [f"{shape:6}"], []
    for side in sides:
        side.close()
        rate = windows * length / statistics.median(side.walls)
        gflops = rate * train_flops_per_token(model_of(shape), length) / 1e9
        cells.append(f"{rate:10,.0f} {gflops:8.0f} {gflops / side.product:8.0%} {side.first:8.1f}")
        ratios.append(statistics.median(b / a for a, b in zip(sides[0].walls, side.walls, strict=True)))
        print(f"# {shape} {side.name}: matrix product {dtype} {side.product:.0f} GFLOP/s", flush=True)
    cells += [" " * 37] * (len(COLUMNS) - len(sides))
    cells += [f"{ratio:6.2f}x" for ratio in ratios[1:]] + [" " * 7] * (len(COLUMNS) - len(sides))
    cells.append(f"{statistics.median(x for side in sides for x in side.others):7.0%}")
    return "  ".join(cells)


def main(flags: Mapping[str, Any]) -> None:
    if flags["serve"]:
        return serve(flags["serve"], flags["shapes"][0], flags["dtype"])
    rows = [compare(shape, flags["dtype"], flags["runs"]) for shape in flags["shapes"]]
    columns = f"{'tokens/s':>10} {'GFLOP/s':>8} {'of peak':>8} {'first s':>8}"
    print(f"{'':6}", *(f"{name:^37}" for name in COLUMNS), f"{'phi3_jax beside':^16}", sep="  ")
    print(f"{'shape':6}", *[columns] * 3, f"{'plain':>7}  {'tuned':>7}  {'others':>7}", sep="  ")
    print("\n".join(rows))
    print(f"{flags['dtype']}, {len(os.sched_getaffinity(0))} cores: python {' '.join(sys.argv)}")


COMMAND = Command(
    "benchmarks/train_step.py",
    __doc__,
    main,
    {
        "shapes": Flag(keys.Key("which to time", tuple(SHAPES), tuple, 1, item=keys.word("a shape", None, *SHAPES))),
        "runs": Flag(keys.whole("turns of each side", 7, 1)),
        "dtype": Flag(keys.word("of products", "float32", "float32", "bfloat16")),
        "serve": Flag(keys.word("", None, *COLUMNS), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
