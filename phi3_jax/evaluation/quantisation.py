"""The command `launch/quantize.py`, and what four bits cost a model."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import ModelConfig, RunConfig, run_from_dict
from phi3_jax.data import loader, sources
from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import text
from phi3_jax.errors import UserError
from phi3_jax.inference.quantize import LARGE, MEASURED, Batch, calibrated, dequantise, round_matrix
from phi3_jax.interop import huggingface, loading, quantized
from phi3_jax.models.decoder import hidden_states, logits_of
from phi3_jax.records import files, targets
from phi3_jax.records.folder import KEPT
from phi3_jax.training.step import eval_step
from phi3_jax.training.train import evaluate

WINDOW = 512  # tokens per window of text


@dataclasses.dataclass(frozen=True)
class Material:
    """What a model is calibrated on and measured with: its own data set, or windows of text.

    Attributes:
      what: a line that says so.
      calibration: batches.
      measure: params -> {(task, metric): value}.
    """

    what: str
    calibration: list[Batch]
    measure: Callable[[Any], dict[tuple[str, str], float]]


def material(source: Path, cfg: ModelConfig, tokenizer: Any, tokens: int, given: Path | None) -> Material | None:
    """Of a run with its data set at hand: that; else text, of `given` or of the Python documentation; None without either.

    Args:
      source: the run's folder.
      tokens: to calibrate on, and of text to measure on (at most MEASURED where the model is LARGE).
    """
    record = files.read_json(source / "config.json")["config"]
    folder = manifests.beside(source, record["data"]) if record.get("data") else None
    if given is None and folder and (folder / manifests.NAME).is_file():
        ds, run = loader.open_dataset(folder), dataclasses.replace(run_from_dict(record), strategy="dp")
        batches = loader.train_batches(ds, max(1, tokens // ds.window), seed=run.seed + 1)
        names = ("tokens", "segments", "positions")
        first = {k: jnp.asarray(v) for k, v in batches[0].items() if k in names}
        return Material(f"its own data set, {folder}", [first], functools.partial(_meters, ds, run))
    if tokenizer is None:
        return None
    windows = list(_windows(given, tokenizer, min(WINDOW, cfg.context), tokens))
    if cfg.matrix_params >= LARGE:
        windows[1] = windows[1][: max(1, MEASURED // windows[1].shape[1])]
    what = f"{windows[1].size:,} tokens of {given or 'the Python documentation'}"
    calibration = [{"tokens": jnp.asarray(w)} for w in np.array_split(windows[0], -(-len(windows[0]) // 4))]
    return Material(what, calibration, functools.partial(_text_loss, cfg, windows[1]))


def _windows(given: Path | None, tokenizer: Any, time: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows to calibrate on, others to measure on), (n, time) each."""
    count = max(1, tokens // time)
    kept: tuple[list[int], list[int]] = [], []
    for document in sources.texts("pydocs" if given is None else str(given)).documents:
        side = kept[text.is_held_out(document, 0.5)]
        if len(side) < count * time:
            side += [*tokenizer.encode(document), tokenizer.eos_id]
        if min(map(len, kept)) >= count * time:
            break
    if min(map(len, kept)) < time:
        raise UserError(f"{given} has too little text for a window of {time} tokens; give a longer one, or none")
    first, second = (
        np.array(side[: len(side) // time * time][: count * time], np.int32).reshape(-1, time) for side in kept
    )
    return first, second


def _meters(ds: loader.Dataset, run: RunConfig, params: Any) -> dict[tuple[str, str], float]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), ("replica", "data", "context", "tensor"))
    rows = evaluate(ds, run, mesh, jax.jit(functools.partial(eval_step, run=run)), params)
    return {(f"{r['suite']} {r['task']}", r["metric"]): r["value"] for r in rows if r and r["value"] is not None}


def _text_loss(cfg: ModelConfig, windows: np.ndarray, params: Any) -> dict[tuple[str, str], float]:
    @jax.jit
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = hidden_states(params, tokens, cfg)[:, :-1]
        logits = logits_of(hidden, params, cfg)
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    value = float(np.mean([loss(params, jnp.asarray(w[None])) for w in windows]))
    return {("text", "loss"): value, ("text", "perplexity"): math.exp(value)}


def command(flags: Mapping[str, Any]) -> None:
    """The command: quantises a run, prints size, error of the weights, and what became of losses and probes."""
    tokens = flags["tokens"]
    if str(flags["model"]).startswith("hf:"):
        raise UserError(
            f"--model {flags['model']}: make it a run first (launch/convert.py --from {flags['model']} --to runs/NAME)"
        )
    start = time.perf_counter()
    source, target, name = Path(flags["model"]), Path(flags["out"]), flags["format"]
    if (source / quantized.RECORD).exists():
        raise UserError(f"{source} is quantised already; name the run it was made from")
    run, adapter = loading.find_run(source)[0], flags["adapter"]
    cfg = loading.run_config(run)
    quantized.check_model(cfg, name)
    weights = loading.open_weights(source, adapter=adapter)
    stored, specs = (weights.under or weights).dtypes, huggingface.leaves_of(cfg)
    tokenizer = loading.tokenizer_of(run / KEPT, run)
    given = Path(flags["text"]) if flags["text"] else None
    found = material(run, cfg, tokenizer, tokens, given) if tokens else None
    if flags["calibrate"] and found is None:
        raise UserError(f"--calibrate needs tokens: {run} has neither data set nor tokenizer, or --tokens is 0")
    errors, powers = [0.0], [0.0]

    def compare(leaf: str, layer: int | None, blocks: np.ndarray) -> np.ndarray:
        if quantized.is_quantised(specs[leaf]):
            matrix = quantized.as_matrix(leaf, specs[leaf], np.asarray(weights.part(leaf, layer), np.float32))
            errors[0] += float(np.square(matrix - dequantise(blocks, name, matrix.shape[1])).sum(dtype=np.float64))
            powers[0] += float(np.square(matrix).sum(dtype=np.float64))
        return blocks

    def plain(leaf: str, layer: int | None) -> np.ndarray:
        part = weights.part(leaf, layer)
        if not quantized.is_quantised(specs[leaf]):
            return part
        return compare(leaf, layer, round_matrix(quantized.as_matrix(leaf, specs[leaf], part), name))

    how = {"method": "calibrated" if flags["calibrate"] else "rounded", "made_from": str(source)}
    how |= {"adapter": adapter} if adapter else {}
    with targets.whole(target, quantized.stored_bytes(cfg, name), flag="--out") as folder:
        if (run / KEPT).is_dir():
            shutil.copytree(run / KEPT, folder / KEPT)
        record = files.read_json(run / "config.json")
        record["config"] = {k: v for k, v in record["config"].items() if k != "lora"}  # adapters are in the weights now
        files.write_json(folder / "config.json", record | {"quantization": {"format": name, **how}})
        if flags["calibrate"] and found is not None:
            made = {
                (leaf, i): compare(leaf, i, part)
                for leaf, i, part in calibrated(cfg, weights.part, found.calibration, name)
            }
            quantized.write(folder, cfg, name, lambda leaf, i: made.pop((leaf, i)), how)
        else:
            quantized.write(folder, cfg, name, plain, how)
    size, count = quantized.stored_bytes(cfg, name), sum(s.size for s in specs.values())
    before = sum(s.size * stored[leaf].itemsize for leaf, s in specs.items())
    print(
        f"{cfg.label}: {name}, {how['method']}, {_bytes(size)} ({8 * size / count:.2f} bits per parameter, "
        f"{before / size:.1f} times smaller), error of the weights {math.sqrt(errors[0] / max(powers[0], 1e-300)):.2%}, "
        f"{time.perf_counter() - start:.1f} s, {target}"
    )
    if found is not None:
        _print_change(found, loading.load(source, adapter=adapter).params, loading.load(target).params)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def _print_change(found: Material, before: Any, after: Any) -> None:
    first, second = found.measure(before), found.measure(after)
    print(f"measured on {found.what}:\n| what | before | after | change |\n| --- | --- | --- | --- |")
    for key, value in first.items():
        after = second.get(key, math.nan)
        print(f"| {' '.join(key)} | {value:.4f} | {after:.4f} | {after - value:+.4f} |")
