"""Tokens/s, MFU and memory of phi-3-mini's training step on one GPU, compared with Hugging Face's Phi3ForCausalLM.

    python benchmarks/gpu_train.py [--size full|toy] [--layers N,...] [--batch WINDOWS] [--out FILE.md]

NO FIGURE HAS BEEN MEASURED WITH IT YET: no GPU was at hand. At `--size toy` it runs on a CPU, which checks the program and
says nothing of speed.

Both sides train phi-3-mini at full width (windows of 4,096 tokens, sliding window 2,047) with float32 masters, bfloat16
products and AdamW, on the same tokens. `phi3_jax` is the package's own step (`training/step.py`), at the fastest of the
remat policies that fit; the peer is transformers with torch.compile and PyTorch's fused attention, with gradient
checkpointing where it does not fit without (extra `[peer]` and a CUDA PyTorch; else its row says that it is not there).
The peer's attention is causal without the window, as its fused kernel knows none: `causal` counts the same FLOPs for both.
`--layers` are taken in turn; by default the complete 32 (3.8B, for 141 GB), then fewer, until a depth fits. Each
measurement is a process of its own, so that one that runs out of memory ends alone; the figures are medians of `RUNS` steps
after two that warm up. MFU is by the causal convention (`scaling/flops.py`) of the maker's dense bfloat16 peak
(`planning/chips.py`); for a CPU, which has no agreed peak, the nominal one of the plan.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax import commands, family, keys
from phi3_jax.chips import CHIPS, of_device
from phi3_jax.commands import Command, Flag
from phi3_jax.configs import DataConfig, ModelConfig, OptimConfig, RunConfig
from phi3_jax.models.flops import all_params, train_flops_per_token
from phi3_jax.records import files

ROOT = Path(__file__).resolve().parents[1]
RUNS, WARM = 7, 2
POLICIES = ("none", "dots", "names", "full")
DEPTHS = {"full": (32, 24, 16, 12, 8, 4), "toy": (2,)}
WINDOWS = {"full": 8, "toy": 2}
COLUMNS = ("side", "way", "layers", "parameters", "windows", "tokens/s", "MFU", "step s", "peak GiB")


def model_of(size: str, layers: int) -> ModelConfig:
    """phi-3-mini with `layers` layers; at size toy narrow and short as well, its proportions kept."""
    mini = family.published("mini")
    if size == "toy":
        mini = dataclasses.replace(
            mini, embed=96, heads=4, kv_heads=4, head_dim=24, mlp=256, vocab=512, context=64, sliding_window=31
        )
    return dataclasses.replace(mini, layers=layers)


def ours(model: ModelConfig, windows: int, remat: str) -> dict[str, Any]:
    """Measures the package's step; seconds of each, the device's kind, and its peak bytes (None where it does not say)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from phi3_jax.sharding import rules
    from phi3_jax.sharding.mesh import make_mesh
    from phi3_jax.training import step

    length = model.context
    data = DataConfig("", "", "", length, model.vocab)
    run = RunConfig(
        "gpu", model, OptimConfig(weight_decay=0.1), data, windows, 1000, dtype="bfloat16", remat=remat, unroll=False
    )
    ids = tokens_of(model, windows)
    ones = np.ones((windows, length))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": ones, "domains": ones}
    batch["positions"] = np.broadcast_to(np.arange(length), ones.shape)
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = jax.device_put({k: v.astype(np.int32) for k, v in batch.items()}, rules.batch_sharding("dp", mesh))
        state = step.init_state(run, mesh)
        train_step, _ = step.compile_steps(run, step.Loss(("text",), False))

        def go() -> float:
            nonlocal state
            state, metrics = train_step(state, batch, jnp.float32(1e-4))
            return float(jax.block_until_ready((state, metrics))[1]["loss"])

        found = timed(go)
    device = jax.devices()[0]
    return found | {
        "kind": device.device_kind if device.platform != "cpu" else "cpu",
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def peer(model: ModelConfig, windows: int, way: str) -> dict[str, Any]:
    """The same with transformers and PyTorch: `way` is "kept", or "checkpointed" (layers made again)."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = Phi3Config(
        vocab_size=model.vocab, hidden_size=model.embed, intermediate_size=model.mlp, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, max_position_embeddings=model.context,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    net = Phi3ForCausalLM(config).to("cuda").train()
    if way == "checkpointed":
        net.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(tokens_of(model, windows)).to("cuda")

    @torch.compile
    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = net(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def go() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return loss.item()

    return timed(go) | {"kind": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}


def tokens_of(model: ModelConfig, windows: int) -> Any:
    """(windows, context + 1) int64 random ids, the same for both sides."""
    import numpy as np

    return np.random.default_rng(0).integers(0, model.vocab, (windows, model.context + 1))


def timed(go: Callable[[], float]) -> dict[str, Any]:
    """Seconds of `RUNS` steps after `WARM`, and the last loss."""
    for _ in range(WARM):
        go()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        loss = go()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "loss": loss}


def peer_missing() -> str | None:
    """Why the peer cannot run here, or None."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (extra [peer])"
    import torch

    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def measured(size: str, layers: int, windows: int, side: str, way: str) -> dict[str, Any] | str:
    """The row of one measurement, made in a process of its own, or the last line of what it died of."""
    command = [sys.executable, str(Path(__file__).resolve()), "--size", size, "--layers", str(layers)]
    command += ["--batch", str(windows), "--serve", f"{side},{way}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # All of the memory but what CUDA's libraries take, as PyTorch has it; errors end with their own line.
    environment = (
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_TRACEBACK_FILTERING": "off"} | os.environ | {"PYTHONPATH": path}
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return next((line for line in lines if "out of memory" in line.lower()), lines[-1])[:200]
    return row_of(model_of(size, layers), windows, side, way, json.loads(done.stdout.strip().splitlines()[-1]))


def row_of(model: ModelConfig, windows: int, side: str, way: str, found: dict[str, Any]) -> dict[str, Any]:
    """One measurement as numbers: `tokens_per_s`, `flops_per_token` (causal), `peak_flops` and the `mfu` they give."""
    chip = CHIPS["cpu"] if found["kind"] == "cpu" else of_device(found["kind"])
    if chip is None:
        raise SystemExit(f"error: no peak is known of {found['kind']!r}; add it to phi3_jax/chips.py")
    seconds = statistics.median(found["seconds"])
    rate, per_token = windows * model.context / seconds, train_flops_per_token(model, model.context)
    return found | {
        "side": side, "way": way, "layers": model.layers, "params": all_params(model), "windows": windows,
        "window": model.context, "step_s": seconds, "tokens_per_s": rate, "flops_per_token": per_token, "chip": chip.name,
        "peak_flops": chip.peak_flops, "mfu": rate * per_token / chip.peak_flops,
    }  # fmt: skip


def best(size: str, layers: int, windows: int, side: str, ways: Sequence[str]) -> tuple[dict[str, Any] | None, list]:
    """The fastest of the ways that fit, or None; and (way, row or what it died of) of all."""
    tried = [(way, measured(size, layers, windows, side, way)) for way in ways]
    rows = [row for _, row in tried if isinstance(row, dict)]
    return max(rows, key=lambda row: row["tokens_per_s"], default=None), tried


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "not said"
        cells = (
            row["side"], row["way"], row["layers"], f"{row['params']:,}", f"{row['windows']} x {row['window']:,}",
            f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}", f"{row['step_s']:.4f}", peak,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def compare(size: str, depths: Sequence[int], windows: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, remarks) of the first depth at which the package's step fits."""
    remarks = []
    for layers in depths:
        mine, tried = best(size, layers, windows, "phi3_jax", POLICIES)
        for way, row in tried:
            said = f"{row['tokens_per_s']:,.0f} tokens/s" if isinstance(row, dict) else row
            remarks.append(f"phi3_jax, {layers} layers, remat {way}: {said}")
        if mine is None:
            continue
        if missing := peer_missing():
            return [mine], [*remarks, f"no peer in this run: {missing}"]
        theirs, tried = best(size, layers, windows, "transformers", ("kept", "checkpointed"))
        remarks += [f"transformers, {layers} layers, {way}: {row}" for way, row in tried if isinstance(row, str)]
        if theirs is None:
            return [mine], remarks
        ratio = mine["tokens_per_s"] / theirs["tokens_per_s"]
        return [mine, theirs], [*remarks, f"phi3_jax has {ratio:.2f} x the peer's tokens/s"]
    return [], remarks


def report(size: str, depths: Sequence[int], windows: int, out: str | None) -> list[dict[str, Any]]:
    """Prints the table, writes it to `out`, and returns its rows; none where no depth fits."""
    rows, remarks = compare(size, depths, windows)
    if not rows:
        print("\n".join(["error: nothing fits; give fewer --layers", *remarks]), file=sys.stderr)
        return []
    head = f"{rows[0]['kind']}, peak taken as {rows[0]['peak_flops'] / 1e12:g} TFLOP/s, size {size}"
    text = "\n\n".join([head, table(rows), "\n".join(f"- {remark}" for remark in remarks)])
    print(text)
    if out:
        files.write_text(Path(out), text + "\n")
    return rows


def main(flags: Mapping[str, Any]) -> int:
    depths, windows = flags["layers"] or DEPTHS[flags["size"]], flags["batch"] or WINDOWS[flags["size"]]
    if flags["serve"]:
        side, way = flags["serve"]
        print(json.dumps((ours if side == "phi3_jax" else peer)(model_of(flags["size"], depths[0]), windows, way)))
        return 0
    return 0 if report(flags["size"], depths, windows, flags["out"]) else 1


COMMAND = Command(
    "benchmarks/gpu_train.py",
    __doc__,
    main,
    {
        "size": Flag(keys.word("of the model", "full", *DEPTHS)),
        "layers": Flag(
            keys.Key(
                "depths to try, the first that fits is measured", None, tuple, 1, item=keys.whole("layers", None, 1)
            )
        ),
        "batch": Flag(keys.whole("windows per step; without, 8 of 4,096 tokens", None, 1)),
        "out": Flag(keys.local("a Markdown file for the table"), "FILE"),
        "serve": Flag(keys.Key("", None, tuple, item=keys.word("", None)), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
