"""Prefill compared with transformers, and block-sparse with dense attention: `python benchmarks/prefill.py [--runs N]`.

1. A full-width slice of phi-3-mini (hidden 3072, 32 heads, 4 layers, the true vocabulary, logits of every token), one
   prompt of 512 tokens, in each of --dtypes (float32 and bfloat16; CPUs without units for bfloat16 take minutes for it):
   tokens/s here and of transformers' Phi3ForCausalLM (eager attention), beside
   each library's own product of two matrices of the MLP's shape in that dtype. Both libraries stay loaded in one process
   each, and take turns; medians. Needs torch and transformers (extra `peer`).
2. The forward pass of the pico proxy of phi-3-mini at 1,024 and 4,096 tokens a row, which a search of RoPE factors
   repeats: CPU seconds here and of transformers (sdpa attention), in turns; medians, with the median of the ratios.
3. One layer's attention of phi-3-small's shape at 8,192 tokens: the block-sparse pattern compared with chunked dense
   attention.
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

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.study.workers import MALLOC

LAYERS, TIME = 4, 512
DTYPES = ("float32", "bfloat16")


def median_seconds(run: Callable[[], object], turns: int) -> float:
    """Median seconds of `turns` runs after one that is not counted."""
    run()
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ours(dtype: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """(prefill, product of the MLP's shape), compiled."""
    import jax
    import jax.numpy as jnp

    from phi3_jax.family import published
    from phi3_jax.models import decoder
    from phi3_jax.models.spec import init_params

    cfg = dataclasses.replace(published("mini"), layers=LAYERS)
    params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(dtype), init_params(cfg, 0)))()
    tokens = jax.random.randint(jax.random.key(1), (1, TIME), 0, cfg.vocab)
    forward = jax.jit(lambda p, t: decoder.forward(p, t, cfg, dtype=jnp.dtype(dtype)))
    a, b = jnp.ones((TIME, cfg.embed), dtype), jnp.ones((cfg.embed, 2 * cfg.mlp), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: forward(params, tokens).block_until_ready(), lambda: product(a, b).block_until_ready()


def theirs(dtype: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same of transformers and torch."""
    import torch
    import transformers

    config = transformers.Phi3Config(num_hidden_layers=LAYERS, attn_implementation="eager")
    model = transformers.Phi3ForCausalLM(config).to(getattr(torch, dtype)).eval()
    tokens = torch.randint(0, config.vocab_size, (1, TIME))
    a = torch.ones(TIME, config.hidden_size, dtype=getattr(torch, dtype))
    b = torch.ones(2 * config.intermediate_size, config.hidden_size, dtype=getattr(torch, dtype))

    def run(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: torch.inference_mode()(call)()

    return run(lambda: model(tokens, use_cache=False).logits), run(lambda: torch.nn.functional.linear(a, b))


def serve(library: str, dtype: str) -> None:
    """Answers each line on stdin with the seconds of one prefill and of one product."""
    prefill, product = (ours if library == "phi3_jax" else theirs)(dtype)
    prefill(), product()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(median_seconds(prefill, 1), median_seconds(product, 3), flush=True)


def note(*words: object) -> None:
    """Says what is being done, where the tables do not go."""
    print("#", *words, file=sys.stderr, flush=True)


def prefill_table(turns: int, dtypes: Sequence[str]) -> None:
    print(
        f"| dtype | library | tokens/s | GFLOP/s | its matrix product, GFLOP/s | beside transformers |\n|{' --- |' * 6}"
    )
    matrices = LAYERS * (4 * 3072**2 + 3 * 3072 * 8192) + 32064 * 3072
    work, product_work = 2 * matrices * TIME, 2 * TIME * 3072 * 16384
    for dtype in dtypes:
        servers = {}
        note(f"{dtype}: starting transformers and phi3_jax, which compiles, one product and one prompt each")
        for library in ("transformers", "phi3_jax"):
            command = [sys.executable, __file__, "--serve", f"{library},{dtype}"]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            servers[library] = subprocess.Popen(command, **pipes)
        for server in servers.values():
            server.stdout.readline()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        for turn in range(turns):
            note(f"{dtype}: turn {turn + 1} of {turns}")
            for name, server in servers.items():
                server.stdin.write("\n")
                server.stdin.flush()
                seconds[name].append(tuple(map(float, server.stdout.readline().split())))
        for server in servers.values():
            server.stdin.close()
            server.wait()
        medians = {n: [statistics.median(column) for column in zip(*rows, strict=True)] for n, rows in seconds.items()}
        ratios = [t[0] / o[0] for t, o in zip(seconds["transformers"], seconds["phi3_jax"], strict=True)]
        for name, (whole, product) in medians.items():
            ratio = f"{statistics.median(ratios):.2f}x" if name == "phi3_jax" else "1"
            rates = f"{TIME / whole:,.0f} | {work / whole / 1e9:.0f} | {product_work / product / 1e9:.0f}"
            print(f"| {dtype} | {name} | {rates} | {ratio} |", flush=True)


def long_table(turns: int) -> None:
    """CPU seconds of the forward pass of a small model over 8,192 tokens in rows of two lengths."""
    import jax
    import torch
    import transformers

    from phi3_jax.family import proxy
    from phi3_jax.models import decoder
    from phi3_jax.models.spec import init_params

    cfg = dataclasses.replace(proxy("mini", "pico"), context=8192)
    params = jax.jit(lambda: init_params(cfg, 0))()
    forward = jax.jit(lambda p, t: decoder.forward(p, t, cfg))
    config = transformers.Phi3Config(
        vocab_size=cfg.vocab, hidden_size=cfg.embed, intermediate_size=cfg.mlp, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=8192,
        original_max_position_embeddings=8192, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    print("\n| tokens a row | here, CPU s | transformers, CPU s | beside transformers |\n| --- | --- | --- | --- |")
    for row in (1024, 4096):
        note(f"forward pass, rows of {row:,}: {turns} turns")
        tokens = torch.randint(0, cfg.vocab, (8192 // row, row))
        ours_, theirs_ = tokens.numpy(), lambda t=tokens: torch.inference_mode()(model)(t, use_cache=False)
        runs = (lambda t=ours_: forward(params, t).block_until_ready(), theirs_)
        seconds: list[list[float]] = [[], []]
        for turn in range(turns + 1):  # the first compiles, and is not counted
            for of, run in zip(seconds, runs, strict=True):
                start = time.process_time()
                run()
                of += [time.process_time() - start] if turn else []
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        here, there = map(statistics.median, seconds)
        print(f"| {row:,} | {here:.3f} | {there:.3f} | {ratio:.2f}x |", flush=True)


def sparse_table(turns: int) -> None:
    import jax

    from phi3_jax.configs import BlockSparse
    from phi3_jax.models.attention import Mask, attend

    time_, g, r, k = 8192, 2, 4, 128
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, time_, g, r, k), (1, time_, g, k), (1, time_, g, k)
    q, *kv = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    kinds = {"chunked": Mask(), "blocksparse": Mask(blocksparse=BlockSparse())}
    forward = {n: jax.jit(lambda *x, n=n, m=m: attend(*x, m, 1 / k, n)) for n, m in kinds.items()}
    both = {n: jax.jit(jax.grad(lambda *x, f=f: f(*x).sum(), argnums=(0, 1, 2))) for n, f in forward.items()}
    print(
        f"\n| attention, {time_:,} tokens, {g * r} heads of {k} | dense, s | block-sparse, s | ratio |\n|{' --- |' * 4}"
    )
    for label, runs in (("forward", forward), ("forward and backward", both)):
        note(f"attention, {label}: {turns} turns")
        for run in runs.values():
            jax.block_until_ready(run(q, *kv))
        seconds = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(q, *kv))
                seconds[name].append(time.perf_counter() - start)
        dense, sparse = (statistics.median(seconds[name]) for name in kinds)
        print(f"| {label} | {dense:.2f} | {sparse:.2f} | {dense / sparse:.2f}x |", flush=True)


def main(flags: Mapping[str, Any]) -> None:
    if flags["serve"]:
        return serve(*flags["serve"])
    if "GLIBC_TUNABLES" not in os.environ:  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        print("transformers and torch are not here (pip install '.[peer]'): only the third table\n")
    else:
        prefill_table(flags["runs"], flags["dtypes"])
        long_table(flags["runs"])
    sparse_table(max(3, flags["runs"] // 2))


COMMAND = Command(
    "benchmarks/prefill.py",
    __doc__,
    main,
    {
        "runs": Flag(keys.whole("turns of each side", 5, 1)),
        "dtypes": Flag(keys.Key("of products", DTYPES, tuple, 1, item=keys.word("a dtype", None, *DTYPES))),
        "serve": Flag(keys.Key("", None, tuple, item=keys.word("", None)), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
