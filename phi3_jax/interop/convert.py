"""The command `launch/convert.py`: folders of Hugging Face and PEFT <-> run folders, whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.interop import adapters, endings, hf_config, huggingface, loading, peft, safetensors
from phi3_jax.records import files, streaming, targets
from phi3_jax.records.folder import KEPT


def command(flags: Mapping[str, Any]) -> None:
    """The command: what it does follows from the kinds of its ends: a Hugging Face folder, a folder of PEFT, or a run."""
    start = time.perf_counter()
    source, target, base, adapter = (flags[name] for name in ("from", "to", "base", "adapter"))
    kinds, merge = (_kind(source), _kind(target)), flags["merge"] or adapter is not None
    if flags["window_rule"] and "hf" not in (kinds[0], _kind(base or "")):
        raise UserError("--window_rule says how to read a Hugging Face folder; it has no meaning for a run")
    if base is not None and kinds[0] != "peft":
        raise UserError(f"--base is for --from peft:FOLDER; --from {source} is read without")
    rule, change = flags["window_rule"] or "transformers", ""
    if kinds[0] == "peft" or merge:
        cfg, size, change = _with_adapters(source, target, kinds, base, adapter, flags["merge"], rule)
    elif kinds == ("hf", "run"):
        cfg, size = import_folder(Path(source[3:]), Path(target), rule)
    elif kinds == ("run", "hf"):
        cfg, size = export_run(Path(source), Path(target[3:]))
    elif kinds == ("run", "peft"):
        cfg, size = export_adapter(Path(source), Path(target[5:]))
    else:
        raise UserError(
            f"--from {source} --to {target}: one of them is a Hugging Face folder (hf:FOLDER) or an adapter of PEFT "
            "(peft:FOLDER), the other a run; with --merge a run of adapters becomes one of a whole model"
        )
    seconds = time.perf_counter() - start
    print(f"{cfg.label}: {cfg.name}, {size / 1e9:.2f} GB in {seconds:.1f} s, {target}{change}")


def _kind(text: str) -> str:
    return next((kind for kind in ("hf", "peft") if text.startswith(f"{kind}:")), "run")


def _with_adapters(
    source: str, target: str, kinds: tuple[str, str], base: str | None, adapter: str | None, merge: bool, rule: str
) -> tuple[ModelConfig, int, str]:
    """The conversions that read adapters beside their base."""
    if kinds[0] == "peft":
        if base is None:
            raise UserError(f"--from {source} is an adapter alone; name its weights: --base RUN or --base hf:FOLDER")
        if not merge:
            if kinds[1] != "run":
                raise UserError(f"--to {target} takes a whole model; add --merge, or give a run")
            return *import_adapter(Path(source[5:]), base, Path(target), rule), ""
        weights = loading.open_weights(base, rule, source)
    else:
        weights = loading.open_weights(source, rule, adapter)
    if weights.adapter is None:
        raise UserError(f"--merge: {source} holds no adapters; name a run of lora=, or --adapter RUN")
    if kinds[1] == "peft":
        raise UserError(f"--to {target} takes adapters alone; leave --merge out")
    cfg, size = save_merged(weights, target)
    return cfg, size, f"; {_largest(weights)}"


def _largest(weights: loading.Weights) -> str:
    """A line on what merging did to the weights."""
    found = weights.adapter
    assert found is not None
    changes = {
        (leaf, layer): float(np.abs(found.change(leaf, layer)).max())
        for leaf in weights.dtypes if found.merges(leaf) for layer in found.layers(leaf)
    }  # fmt: skip
    leaf, layer = max(changes, key=lambda key: changes[key])
    place = leaf if layer is None else f"{leaf}[{layer}]"
    return f"adapters merged in float32, largest change {changes[leaf, layer]:.4g} in {place}"


def import_adapter(source: Path, base: str, target: Path, window_rule: str = "transformers") -> tuple[ModelConfig, int]:
    """PEFT folder -> run of adapters for the weights `base`; the model, and bytes of A and B.

    Raises:
      UserError: see `peft.read`; the target then is as it was.
    """
    weights = loading.open_weights(base, window_rule)
    found = loading.open_adapter(f"peft:{source}", weights, base)
    forms = {f"params.{name}": (value.shape, value.dtype) for name, value in found.values.items()}
    size = _size(forms.values())
    config: dict[str, Any] = {"model": dataclasses.asdict(found.model), "lora": dataclasses.asdict(found.how)}
    config |= {"init": base, "init_content": found.base_content}
    with targets.whole(target, size) as partial:
        _keep(weights.kept, partial / KEPT)
        if peft.is_fused(source, found.model):  # goes out again as it came
            shutil.copyfile(source / peft.CONFIG, partial / peft.CONFIG)
        record = {"name": found.model.name, "label": found.model.label, "config": config}
        files.write_json(partial / "config.json", record | _tokenizer(weights))
        with streaming.stream(partial / "checkpoints", 0, forms, {"imported": True}) as put:
            for name, value in found.values.items():
                put(f"params.{name}", None, value)
    return found.model, size


def export_adapter(source: Path, target: Path) -> tuple[ModelConfig, int]:
    """Run of adapters -> PEFT folder; the model, and bytes of A and B. What was imported comes out as it came."""
    run, step = loading.find_run(source)
    found = adapters.open_run(run, step)
    base = Path(found.base.removeprefix("hf:"))
    with targets.whole(target, _size((v.shape, v.dtype) for v in found.values.values())) as partial:
        size = peft.write(partial, found, base.name if base.is_absolute() else str(base))
        if (run / peft.CONFIG).exists():
            shutil.copyfile(run / peft.CONFIG, partial / peft.CONFIG)
    return found.model, size


def save_merged(weights: loading.Weights, target: str) -> tuple[ModelConfig, int]:
    """Weights with adapters merged in float32 -> run or "hf:FOLDER", in the dtypes of their base; see `export_run`."""
    under = weights.under or weights

    def part(leaf: str, layer: int | None) -> np.ndarray:
        return np.asarray(weights.part(leaf, layer), under.dtypes[leaf])

    if target.startswith("hf:"):
        return weights.config, _export(weights, under.dtypes, part, Path(target[3:]))
    cfg = weights.config
    forms = {f"params.{leaf}": (spec.shape, under.dtypes[leaf]) for leaf, spec in huggingface.leaves_of(cfg).items()}
    size = _size(forms.values())
    with targets.whole(Path(target), size) as partial:
        _keep(weights.kept, partial / KEPT)
        record = {"name": cfg.name, "label": cfg.label, "config": {"model": dataclasses.asdict(cfg)}}
        files.write_json(partial / "config.json", record | _tokenizer(weights))
        with streaming.stream(partial / "checkpoints", 0, forms, {"merged": True}) as put:
            for leaf, spec in huggingface.leaves_of(cfg).items():
                for layer in spec.layers:
                    put(f"params.{leaf}", layer, part(leaf, layer))
    return cfg, size


def _keep(source: Path, target: Path) -> None:
    """Copies the files that travel with weights, where there are any."""
    if source.is_dir():
        target.mkdir()
        for path in huggingface.kept_files(source):
            shutil.copyfile(path, target / path.name)


def _tokenizer(weights: loading.Weights) -> dict[str, Any]:
    """What a run's config.json says of its tokenizer, for another run of the same model."""
    found = files.read_state(weights.run / "config.json").get("tokenizer") if weights.run else None
    return {"tokenizer": found} if found else {}


def import_folder(source: Path, target: Path, window_rule: str = "transformers") -> tuple[ModelConfig, int]:
    """Hugging Face folder -> run folder with one checkpoint; memory holds a few layers at a time.

    Returns the model and the bytes of its parameters. Raises UserError; the target then is as it was.
    """
    cfg = loading.folder_config(source, window_rule)
    folder = huggingface.open_folder(source, cfg)
    specs = huggingface.leaves_of(cfg)
    forms = {f"params.{leaf}": (spec.shape, folder.dtypes[leaf]) for leaf, spec in specs.items()}
    size = _size(forms.values())
    with targets.whole(target, size) as partial:
        _keep(source, partial / KEPT)
        record = {"name": cfg.name, "label": cfg.label, "config": {"model": dataclasses.asdict(cfg)}}
        files.write_json(partial / "config.json", record)
        with streaming.stream(partial / "checkpoints", 0, forms, {"imported": True}) as put:
            for leaf in specs:
                huggingface.read_parts(folder, leaf, functools.partial(put, f"params.{leaf}"))
    return cfg, size


def export_run(source: Path | str, target: Path, adapter: str | None = None) -> tuple[ModelConfig, int]:
    """Run folder (or one checkpoint of it) -> Hugging Face folder, in the dtype of the stored parameters; adapters merged.

    A folder that was imported gets its config.json and tokenizer files back as they came. For a model trained here the
    config is made, with end ids, the files of its tokenizer and a chat template where its tokenizer has the turns
    (`endings`), and muP's multipliers are folded into the weights.
    """
    weights = loading.open_weights(source, adapter=adapter)
    if weights.under:
        return save_merged(weights, f"hf:{target}")
    return weights.config, _export(weights, weights.dtypes, weights.part, target)


def _export(
    weights: loading.Weights,
    dtypes: Mapping[str, np.dtype],
    part: Callable[[str, int | None], np.ndarray],
    target: Path,
) -> int:
    cfg, kept = weights.config, weights.kept
    shapes = {leaf: spec.shape for leaf, spec in huggingface.leaves_of(cfg).items()}
    if odd := [f"{k} {d}" for k, d in dtypes.items() if d not in safetensors.NAMES]:
        raise UserError(f"{weights.run} holds dtypes that are not exported: {', '.join(odd)}")
    size = _size((shapes[k], d) for k, d in dtypes.items())
    with targets.whole(target, size) as partial:
        if kept.is_dir():
            for path in huggingface.kept_files(kept):
                shutil.copyfile(path, partial / path.name)
        if not (partial / "config.json").exists():  # a model trained here
            tokenizer = loading.tokenizer_of(kept, weights.run)
            made = hf_config.to_config(cfg, str(next(iter(dtypes.values()))))
            files.write_json(partial / "config.json", made | endings.special_ids(tokenizer, cfg.vocab), indent=2)
            endings.write(partial, cfg, tokenizer)
        huggingface.write_params(partial, cfg, dtypes, part, huggingface.folding(cfg))
    return size


def _size(forms: Iterable[tuple[tuple[int, ...], Any]]) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in forms)
