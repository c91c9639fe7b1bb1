"""Decoding on a CPU, compared with transformers.

    python benchmarks/decode.py [--runs N] [--batches 1,8] [--kinds slice:float32]

Random weights: phi-3-mini's full width with 4 layers (the true vocabulary), in float32 and bfloat16, and a pico proxy's
shape. Prompts of 64 tokens; time to the first token (prefill), then decode tokens/s of all rows together, greedy. Both
libraries stay loaded, each in a process of its own, and take turns; medians, and the median of each turn's ratio.
transformers is stepped by hand with its cache, without what `generate` does around a step. GB/s are parameters read a step
times steps per second, compared with the best reading of memory found here. Then the KV cache per token of each member.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from decode_cpu import bandwidth

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.study.workers import MALLOC

PROMPT, LAYERS = 64, 4
REPLY = {"slice": 32, "proxy": 256}


def ours(shape: str, dtype: str) -> tuple[Callable[[int], tuple[float, float]], int]:
    """(seconds of (prompt, reply) for a batch, bytes of parameters a step reads)."""
    import jax
    import jax.numpy as jnp

    from phi3_jax.family import proxy, published
    from phi3_jax.inference.engine import Engine
    from phi3_jax.interop.loading import Model
    from phi3_jax.models.spec import init_params

    cfg = (
        dataclasses.replace(published("mini"), layers=LAYERS) if shape == "slice" else proxy("medium", "pico", "clean")
    )
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(dtype), init_params(cfg, 0)))()
    size = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embedding"].nbytes
    engines: dict[int, Engine] = {}

    def run(batch: int) -> tuple[float, float]:
        engine = engines.setdefault(batch, Engine(Model(params, cfg, None, jnp.dtype(dtype)), batch=batch))
        prompts = np.random.default_rng(0).integers(3, cfg.vocab, (batch, PROMPT)).tolist()
        begin = time.perf_counter()
        engine.generate(prompts, 1, stop_ids=())
        first = time.perf_counter()
        engine.generate(prompts, 1 + REPLY[shape], stop_ids=())
        return first - begin, time.perf_counter() - first - (first - begin)

    return run, size


def theirs(shape: str, dtype: str) -> tuple[Callable[[int], tuple[float, float]], int]:
    """The same of transformers and torch."""
    import torch
    import transformers

    from phi3_jax.family import proxy

    config = transformers.Phi3Config(num_hidden_layers=LAYERS)
    if shape == "proxy":
        cfg = proxy("medium", "pico", "clean")
        config = transformers.Phi3Config(
            vocab_size=cfg.vocab, hidden_size=cfg.embed, intermediate_size=cfg.mlp, num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, pad_token_id=0, eos_token_id=1, bos_token_id=1,
        )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).to(getattr(torch, dtype)).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size -= model.model.embed_tokens.weight.numel() * model.model.embed_tokens.weight.element_size()

    @torch.inference_mode()
    def run(batch: int) -> tuple[float, float]:
        prompt = torch.from_numpy(np.random.default_rng(0).integers(3, config.vocab_size, (batch, PROMPT)))
        begin = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(REPLY[shape]):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return first - begin, time.perf_counter() - first

    return run, size


def serve(library: str, shape: str, dtype: str) -> None:
    """Answers each line (a batch) with the seconds of prompt and reply."""
    run, size = (ours if library == "phi3_jax" else theirs)(shape, dtype)
    print(size, flush=True)
    for line in sys.stdin:
        print(*run(int(line)), flush=True)


def compare(shape: str, dtype: str, batches: Sequence[int], turns: int, sides: list[str]) -> None:
    servers, size = {}, 0
    for name in sides:
        print(f"# {shape} {dtype}: starting {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--serve", f"{name},{shape},{dtype}"]
        servers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        size = int(servers[name].stdout.readline())
    for batch in batches:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for turn in range(turns + 1):
            what = f"turn {turn} of {turns}" if turn else "the turn that compiles"
            print(f"# {shape} {dtype}, batch {batch}: {what}", file=sys.stderr, flush=True)
            for name, server in servers.items():
                server.stdin.write(f"{batch}\n")
                server.stdin.flush()
                seconds = tuple(map(float, server.stdout.readline().split()))
                if turn:  # the first one compiles
                    found[name].append(seconds)
        for name, rows in found.items():
            prompt, reply = (statistics.median(column) for column in zip(*rows, strict=True))
            ratios, steps = ["1", "1"], REPLY[shape] / reply
            if name != sides[0]:
                pairs = zip(found[sides[0]], rows, strict=True)
                ratios = [f"{statistics.median(x):.2f}x" for x in zip(*((a / c, b / d) for (a, b), (c, d) in pairs))]
            print(
                f"| {shape} | {dtype} | {batch} | {name} | {prompt * 1e3:.1f} | {ratios[0]} | {batch * steps:.1f} "
                f"| {ratios[1]} | {size * steps / 1e9:.1f} |",
                flush=True,
            )
    for server in servers.values():
        server.stdin.close()
        server.wait()


def cache_table() -> None:
    from phi3_jax.family import published
    from phi3_jax.inference.cache import bytes_per_token, cache_bytes

    print(f"\n| KV cache, bfloat16 | a token | 4k or 8k context, one row | 128k context |\n|{' --- |' * 4}")
    for member in ("mini", "small", "medium"):
        cfg, long = published(member), published(member, "128k")
        whole, extended = cache_bytes(cfg, cfg.context) / 1e9, cache_bytes(long, 131072) / 1e9
        a_token = f"{bytes_per_token(cfg) / 1024:.0f} KiB"
        print(f"| phi-3-{member} | {a_token} | {whole:.2f} GB ({cfg.context:,}) | {extended:.1f} GB |")


def main(flags: Mapping[str, Any]) -> None:
    if flags["serve"]:
        return serve(*flags["serve"])
    if "GLIBC_TUNABLES" not in os.environ:  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    sides = ["transformers", "phi3_jax"]
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        print("transformers and torch are not here (pip install '.[peer]'): only our side\n")
        sides = sides[1:]
    print(f"reading memory: {bandwidth() / 1e9:.1f} GB/s, {len(os.sched_getaffinity(0))} threads\n")
    print("| shape | dtype | batch | library | first token, ms | beside | decode, tokens/s | beside | GB/s |")
    print(f"|{' --- |' * 9}")
    for kind in flags["kinds"]:
        compare(*kind.split(":"), flags["batches"], flags["runs"], sides)
    cache_table()


COMMAND = Command(
    "benchmarks/decode.py",
    __doc__,
    main,
    {
        "runs": Flag(keys.whole("turns of each side", 5, 1)),
        "batches": Flag(keys.Key("rows at a time", (1, 8, 32), tuple, 1, item=keys.whole("rows", None, 1))),
        "kinds": Flag(
            keys.Key(
                "SHAPE:DTYPE",
                ("slice:float32", "slice:bfloat16", "proxy:float32"),
                tuple,
                1,
                item=keys.word("a kind", None),
            )
        ),
        "serve": Flag(keys.Key("", None, tuple, item=keys.word("", None)), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
