"""How exact the model is: `python benchmarks/numerics.py [--goldens FOLDER,...] [--members mini,small,medium,moe]`.

1. The largest absolute difference of our float32 logits from each golden's (original implementations; default: the small
   ones under tests/goldens), beside the tolerance written in its file.
2. Each member's pico proxy of the family ladder and a slice at full width (one layer, the true vocabulary; both layers of
   phi-3-small's pattern; 4 of phi-3.5-MoE's 16 experts): relative error of logits, loss and gradients in float32 and in
   bfloat16 (float32 parameters, bfloat16 matrices: the trainer's arrangement) against float64. A kernel written later has
   to meet these.

Needs 21 GiB of memory for medium's slice; each case runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

MEMBERS = ("mini", "small", "medium", "moe")
TIME = {"proxy": 1280, "slice": 128}  # the proxies beyond the 1,024 tokens from which phi-3-small's pattern bites


def golden_rows(folder: Path) -> list[tuple[str, str, float, float, float]]:
    """(name, produced by, largest difference, tolerance, largest logit) of every text golden of a folder."""
    from reference import load_golden
    from test_goldens import with_logits

    rows = []
    for name in with_logits(folder):
        with tempfile.TemporaryDirectory() as scratch:
            meta, tensors, model = load_golden(name, Path(scratch), folder)
        ours = np.asarray(model.logits(tensors["input_ids"], segment_ids=tensors.get("segment_ids")))
        stated = meta["tolerance"]["logits"]
        difference = float(np.abs(ours - tensors["logits"]).max())
        by = meta["produced_by"].split(",")[0]
        rows.append((name, by, difference, stated["suggested_atol"], stated["max_abs"]))
    return rows


def model_of(member: str, kind: str) -> Any:
    """The config of a case."""
    from phi3_jax import family

    full = family.published(member)
    if member == "moe":  # its LongRoPE lists come with a checkpoint only
        full = dataclasses.replace(full, longrope=None)
    if kind == "slice":
        few = {"experts": dataclasses.replace(full.experts, count=4)} if full.experts else {}
        return dataclasses.replace(full, layers=full.blocksparse.dense_every if full.blocksparse else 1, **few)
    if member == "moe":
        return dataclasses.replace(
            full, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=512
        )  # fmt: skip
    return family.proxy(member, "pico", "family")


def case(member: str, kind: str) -> list[dict[str, Any]]:
    """Errors of one model in float32 and bfloat16."""
    from phi3_jax.models import decoder
    from phi3_jax.models.spec import init_params, named

    cfg = model_of(member, kind)
    with jax.enable_x64(False):
        params = jax.jit(lambda: init_params(cfg, 0))()
        if not cfg.tied and cfg.mup is not None:  # a head that starts at zero would hide the backward pass
            shape = params["unembedding"].shape
            params["unembedding"] = 0.02 * jax.random.normal(jax.random.key(1), shape)
    tokens = np.random.default_rng(0).integers(0, min(cfg.vocab, 32000), (2, TIME[kind] + 1)).astype(np.int32)

    def loss(params: Any, dtype: str) -> tuple[jax.Array, jax.Array]:
        logits = decoder.forward(params, tokens[:, :-1], cfg, dtype=jnp.dtype(dtype), unroll=True)
        right = jnp.take_along_axis(logits, jnp.asarray(tokens[:, 1:, None]), axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right), logits

    def run(params: Any, dtype: str) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
        if cfg.experts:  # inference only
            value, logits = jax.jit(loss, static_argnums=1)(params, dtype)
            return float(value), np.asarray(logits), {}
        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, dtype)
        return float(value), np.asarray(logits), named(grads)

    with jax.enable_x64(True):
        exact = run(jax.tree.map(lambda p: p.astype(jnp.float64), params), "float64")
        assert exact[1].dtype == np.float64
        exact = (*exact[:2], {name: np.asarray(g) for name, g in exact[2].items()})
    masked = exact[1] < -1e30  # unused ids
    rows = []
    for dtype in ("float32", "bfloat16"):
        with jax.enable_x64(False):
            value, logits, grads = run(params, dtype)
        off, kept = np.where(masked, 0, logits - exact[1]), np.where(masked, 0, exact[1])
        errors = {name: relative(np.asarray(g, np.float64), exact[2][name]) for name, g in grads.items()}
        worst = max(errors, key=errors.get, default="-")
        rows.append(
            {
                "model": f"{member} {kind}",
                "dtype": dtype,
                "logits": np.linalg.norm(off) / np.linalg.norm(kept),
                "largest": np.abs(off).max() / np.abs(kept).max(),
                "loss": abs(value - exact[0]) / abs(exact[0]),
                "gradient": float(np.median(list(errors.values()))) if errors else None,
                "worst": errors.get(worst),
                "where": worst,
            }
        )
    return rows


def relative(ours: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def main(flags: Mapping[str, Any]) -> None:
    if flags["case"]:
        print(json.dumps(case(*flags["case"]), default=float))
        return
    print("| golden | produced by | largest difference | tolerance | of the largest logit |")
    print("| --- | --- | --- | --- | --- |")
    for folder in flags["goldens"] or [ROOT / "tests" / "goldens"]:
        for name, by, difference, tolerance, scale in golden_rows(Path(folder)):
            print(
                f"| {name} | {by} | {show(difference)} | {show(tolerance)} | {show(difference / scale)} |", flush=True
            )
    print("\n| model | dtype | logits | largest logit error / largest logit | loss | gradients, median | worst | in |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind in ("proxy", "slice"):
        for member in flags["members"]:
            command = [sys.executable, __file__, "--case", f"{member},{kind}"]
            print(f"# {member} {kind}: float64, float32 and bfloat16", file=sys.stderr, flush=True)
            for row in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout):
                numbers = " | ".join(show(row[key]) for key in ("logits", "largest", "loss", "gradient", "worst"))
                print(f"| {row['model']} | {row['dtype']} | {numbers} | {row['where']} |", flush=True)


COMMAND = Command(
    "benchmarks/numerics.py",
    __doc__,
    main,
    {
        "goldens": Flag(
            keys.Key("folders of goldens; without, tests/goldens", None, tuple, 1, item=keys.local("a folder")),
            "FOLDER,...",
        ),
        "members": Flag(keys.Key("members", MEMBERS, tuple, 1, item=keys.word("a member", None, *MEMBERS))),
        "case": Flag(keys.Key("", None, tuple, item=keys.word("", None)), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
