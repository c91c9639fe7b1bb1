"""The command `launch/convert.py`: Hugging Face folder <-> run folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phi3_jax import commands, loading
from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.interop import hf_config, huggingface, safetensors
from phi3_jax.training import streaming

FLAGS = {"from": str, "to": str, "window_rule": str}


def command(arguments: Sequence[str]) -> None:
    """The command: one way or the other, by which of its ends is a Hugging Face folder."""
    flags = commands.parse(arguments, FLAGS, ("from", "to"), "--from hf:FOLDER --to runs/NAME")
    start = time.perf_counter()
    source, target = flags["from"], flags["to"]
    if source.startswith("hf:") == target.startswith("hf:"):
        raise UserError(
            f"--from {source} --to {target}: one of them is a Hugging Face folder (hf:FOLDER), the other a run"
        )
    if source.startswith("hf:"):
        cfg, size = import_folder(Path(source[3:]), Path(target), flags.get("window_rule", "transformers"))
    else:
        if "window_rule" in flags:
            raise UserError("--window_rule says how to read a Hugging Face folder; it has no meaning for a run")
        cfg, size = export_run(Path(source), Path(target[3:]))
    seconds = time.perf_counter() - start
    print(f"{cfg.label}: {cfg.name}, {size / 1e9:.2f} GB in {seconds:.1f} s, {target}")


def import_folder(source: Path, target: Path, window_rule: str = "transformers") -> tuple[ModelConfig, int]:
    """Hugging Face folder -> run folder with one checkpoint; memory holds a few layers at a time.

    Returns the model and the bytes of its parameters. Raises UserError; the target then is as it was.
    """
    cfg = loading.folder_config(source, window_rule)
    folder = huggingface.open_folder(source, cfg)
    specs = huggingface.leaves_of(cfg)
    forms = {f"params.{leaf}": (spec.shape, folder.dtypes[leaf]) for leaf, spec in specs.items()}
    size = _size(forms.values())
    with commands.whole(target, size) as partial:
        kept = partial / loading.KEPT
        kept.mkdir()
        for path in huggingface.kept_files(source):
            shutil.copyfile(path, kept / path.name)
        record = {"name": cfg.name, "label": cfg.label, "config": {"model": dataclasses.asdict(cfg)}}
        (partial / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        with streaming.stream(partial / "checkpoints", 0, forms, {"imported": True}) as put:
            for leaf in specs:
                huggingface.read_parts(folder, leaf, lambda i, part, leaf=leaf: put(f"params.{leaf}", i, part))
    return cfg, size


def export_run(source: Path, target: Path) -> tuple[ModelConfig, int]:
    """Run folder (or one checkpoint of it) -> Hugging Face folder, in the dtype of the stored parameters.

    A folder that was imported gets its config.json and tokenizer files back as they came. For a model trained here the
    config is made, and muP's multipliers are folded into the weights.
    """
    run, step = loading.find_run(source)
    cfg = loading.run_config(run)
    reader = streaming.Reader(run / "checkpoints", "params.", step)
    shapes = {leaf: spec.shape for leaf, spec in huggingface.leaves_of(cfg).items()}
    reader.check(shapes)
    if odd := [f"{k} {d}" for k, d in reader.dtypes.items() if d not in safetensors.NAMES]:
        raise UserError(f"{reader.path} holds dtypes that are not exported: {', '.join(odd)}")
    size = _size((shapes[k], d) for k, d in reader.dtypes.items())
    with commands.whole(target, size) as partial:
        kept = run / loading.KEPT
        if kept.is_dir():
            for path in huggingface.kept_files(kept):
                shutil.copyfile(path, partial / path.name)
        else:
            dtype = str(next(iter(reader.dtypes.values())))
            (partial / "config.json").write_text(json.dumps(hf_config.to_config(cfg, dtype), indent=2) + "\n")
        huggingface.write_params(partial, cfg, reader.dtypes, reader.read, huggingface.folding(cfg))
    return cfg, size


def _size(forms) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in forms)
