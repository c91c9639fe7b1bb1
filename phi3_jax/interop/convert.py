"""The command `launch/convert.py`: Hugging Face folder <-> run folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phi3_jax import loading
from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.interop import hf_config, huggingface, safetensors
from phi3_jax.training import checkpoint, streaming

FLAGS = ("from", "to", "window_rule")


def main(arguments: Sequence[str], usage: str) -> int:
    """Runs the command; prints errors as one line. Exit status 0, or 2 for an error of the user's."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    try:
        flags = _flags(arguments)
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{cfg.label}: {cfg.name}, {size / 1e9:.2f} GB in {seconds:.1f} s, {target}")
    return 0


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in FLAGS:
            raise UserError(f"unknown argument {word!r}{nearest(word, [f'--{f}' for f in FLAGS])}")
        if not equals:
            if not words:
                raise UserError(f"--{name} needs a value")
            value = words.pop(0)
        flags[name] = value
    if lost := [f"--{f}" for f in ("from", "to") if not flags.get(f)]:
        raise UserError(f"{' and '.join(lost)} missing; for example --from hf:FOLDER --to runs/NAME")
    return flags


def import_folder(source: Path, target: Path, window_rule: str = "transformers") -> tuple[ModelConfig, int]:
    """Hugging Face folder -> run folder with one checkpoint; memory holds a few layers at a time.

    Returns the model and the bytes of its parameters. Raises UserError; the target then is as it was.
    """
    cfg = loading.folder_config(source, window_rule)
    folder = huggingface.open_folder(source, cfg)
    specs = huggingface.leaves_of(cfg)
    forms = {f"params.{leaf}": (spec.shape, folder.dtypes[leaf]) for leaf, spec in specs.items()}
    size = _size(forms.values())
    with _whole(target, size) as partial:
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
    with _whole(target, size) as partial:
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


class _whole:
    """Context of a folder that appears under its name only when the block ends well; `<name>.partial` until then."""

    def __init__(self, target: Path, size: int) -> None:
        self._target, self._partial = target.resolve(), target.resolve().with_name(target.resolve().name + ".partial")
        self._size = size

    def __enter__(self) -> Path:
        target, partial = self._target, self._partial
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty; choose another --to, or remove it")
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
        except OSError as error:
            raise UserError(f"cannot write to {target.parent}: {error.strerror}; choose another --to") from error
        if free < self._size:
            shutil.rmtree(partial)
            raise UserError(
                f"{target} needs {self._size / 1e9:.2f} GB and {target.parent} has {free / 1e9:.2f} GB free; free some "
                "space or choose another --to"
            )
        return partial

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None:
            try:
                if self._target.exists():
                    self._target.rmdir()
                os.rename(self._partial, self._target)
                return
            except OSError as problem:
                error = problem
        shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            reason = checkpoint.FULL if error.errno == 28 else error.strerror or str(error)
            raise UserError(f"writing {self._target} failed: {reason}; nothing was left there") from error
