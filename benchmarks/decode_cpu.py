"""4-bit decoding on a CPU, compared with llama.cpp.

    python benchmarks/decode_cpu.py [--runs N] [--member mini] [--format q4_0]

A model of phi-3-mini's full shape with random weights is written as a quantised run, exported as GGUF, and run by both,
each in a process of its own, in turns, on the same number of threads: prompt tokens/s, decode tokens/s (batch 1), and the
largest resident memory beside the file's size. Beside them the machine's read bandwidth. Needs llama-cpp-python (extra
`peer`); without it only our side runs. Takes twice the model's size on the disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag

PROMPT, REPLY = 64, 48


def random_run(folder: Path, member: str, name: str, layers: int | None) -> None:
    """A quantised run with the member's shape and random blocks, about as large as trained weights."""
    from phi3_jax.family import published
    from phi3_jax.interop import quantized
    from phi3_jax.models.quantized import FORMATS

    cfg = published(member)
    cfg = dataclasses.replace(cfg, layers=layers or cfg.layers)
    rng, style = np.random.default_rng(0), FORMATS[name]
    folder.mkdir()

    def part(leaf: str, layer: int | None) -> np.ndarray:
        spec = specs[leaf]
        dtype, shape = quantized.form_of(leaf, spec, name)
        shape = shape if layer is None else shape[1:]
        if dtype == "F32":
            return np.ones(shape, np.float32)
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // style.group_bytes, style.group_bytes), np.uint8)
        scale = rng.uniform(0.5, 1.5, blocks.shape[:-1]) * (0.02 / (4.6 if style.bits == 4 else 74))
        blocks[..., :2] = scale.astype(np.float16)[..., None].view(np.uint8)
        return blocks.reshape(shape)

    specs = quantized.huggingface.leaves_of(cfg)
    record = {"name": cfg.name, "label": cfg.label, "config": {"model": dataclasses.asdict(cfg)}}
    (folder / "config.json").write_text(json.dumps(record))
    quantized.write(folder, cfg, name, part, {"method": "random"})


def serve_ours(path: str) -> None:
    """Answers each line with the seconds of a prompt, of a reply, and the process's largest memory in bytes."""
    start = time.perf_counter()
    from phi3_jax.inference.engine import Engine
    from phi3_jax.interop.loading import load
    from phi3_jax.models.kernels import grouped

    engine = Engine(load(path), batch=1)
    prompt = np.random.default_rng(1).integers(3, 32000, PROMPT).tolist()
    engine.generate([prompt], REPLY + 1, stop_ids=())
    print(grouped.version(), time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        engine.generate([prompt], 1, stop_ids=())
        first = time.perf_counter()
        engine.generate([prompt], REPLY + 1, stop_ids=())
        whole = time.perf_counter() - first
        print(
            first - begin,
            whole - (first - begin),
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            flush=True,
        )


def serve_theirs(path: str) -> None:
    """The same of llama.cpp, without its sampling."""
    start = time.perf_counter()
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    prompt = np.random.default_rng(1).integers(3, 32000, PROMPT).tolist()
    model.eval(prompt)
    print(f"llama-cpp-python {llama_cpp.__version__}", time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        first = time.perf_counter()
        for i in range(REPLY):
            model.eval([prompt[i]])
        second = time.perf_counter()
        print(first - begin, second - first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def bandwidth() -> float:
    """Bytes/s of the best of some readings of 1 GB by all cores."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((32768, 8192)), jnp.ones(8192)
    product, best = jax.jit(jnp.matmul), np.inf
    for _ in range(6):
        start = time.perf_counter()
        product(matrix, vector).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best


def main(flags: Mapping[str, Any]) -> None:
    if flags["serve"]:
        side, _, path = flags["serve"].partition(":")
        return (serve_ours if side == "phi3_jax" else serve_theirs)(path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags["folder"] or temporary)
        folder.mkdir(exist_ok=True)
        compare(folder, flags)


def compare(folder: Path, flags: Mapping[str, Any]) -> None:
    from phi3_jax.interop import gguf as exporter
    from phi3_jax.interop.quantized import WEIGHTS

    run, file = folder / "run", folder / f"model.{flags['format'].upper()}.gguf"
    if not run.exists():
        print(f"# writing a random {flags['member']} in {flags['format']}", file=sys.stderr, flush=True)
        random_run(run, flags["member"], flags["format"], flags["layers"])
    sides = {"phi3_jax": run}
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python is not here (pip install '.[peer]'): only our side\n")
    else:
        if flags["format"] != "int4_g128":
            if not file.exists():
                exporter.export_gguf(str(run), file, flags["format"])
            sides["llama.cpp"] = file
    size = (run / WEIGHTS).stat().st_size
    servers, heads = {}, {}
    for name, path in sides.items():
        print(f"# starting {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--serve", f"{name}:{path}"]
        servers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        heads[name] = servers[name].stdout.readline().rsplit(" ", 1)
    found: dict[str, list[list[float]]] = {name: [] for name in servers}
    for _ in range(flags["runs"]):
        for name, server in servers.items():
            server.stdin.write("\n")
            server.stdin.flush()
            found[name].append([float(x) for x in server.stdout.readline().split()])
    for server in servers.values():
        server.stdin.close()
        server.wait()
    rate = bandwidth()
    print(
        f"{flags['member']}, {flags['format']}, {size / 1e9:.3f} GB, {len(os.sched_getaffinity(0))} threads; reading "
        f"memory: {rate / 1e9:.1f} GB/s, which bounds decoding to {rate / size:.1f} tokens/s\n"
    )
    print(
        f"| engine | prompt ({PROMPT}), tokens/s | decode, tokens/s | GB/s | memory / file | start, s |\n|{' --- |' * 6}"
    )
    for name, rows in found.items():
        prompt, reply, memory = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"| {name} ({heads[name][0]}) | {PROMPT / prompt:.1f} | {REPLY / reply:.1f} | {size * REPLY / reply / 1e9:.1f} "
            f"| {memory / size:.2f} | {float(heads[name][1]):.1f} |"
        )
    if len(found) == 2:
        ratios = [
            statistics.median(b[i] / a[i] for a, b in zip(found["phi3_jax"], found["llama.cpp"], strict=True))
            for i in (0, 1)
        ]
        print(
            f"\nbeside llama.cpp: prompt {ratios[0]:.2f}x, decode {ratios[1]:.2f}x (medians of {flags['runs']} turns)"
        )


COMMAND = Command(
    "benchmarks/decode_cpu.py",
    __doc__,
    main,
    {
        "runs": Flag(keys.whole("turns of each side", 5, 1)),
        "member": Flag(keys.word("whose shape", "mini", "mini", "medium")),
        "format": Flag(keys.word("of the weights", "q4_0", "q4_0", "q8_0", "int4_g128")),
        "layers": Flag(keys.whole("fewer layers than the member has", None, 1)),
        "folder": Flag(keys.local("where the models are written; kept and used again"), "DIR"),
        "serve": Flag(keys.word("", None), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
