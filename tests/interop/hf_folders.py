"""Small Hugging Face folders with random weights, shaped as the committed goldens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from phi3_jax.interop import hf_config, huggingface, safetensors

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file with `tensors`."""
    names = safetensors.NAMES | {np.dtype(np.float64): "F64"}
    entries = safetensors.plan({k: (names[v.dtype], v.shape) for k, v in tensors.items()}, folder)
    with safetensors.Files({e.path for e in entries.values()}, write=True) as files:
        for name, entry in entries.items():
            files.write_at(entry.path, entry.offset, np.ascontiguousarray(tensors[name]))


def random_folder(folder: Path, kind: str, dtype: type, **fields: object) -> Path:
    """A folder with the config of golden `kind`, changed by `fields`, and random weights."""
    config = json.loads((GOLDENS / f"{kind}.json").read_text())["config"] | fields
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(3)
    shapes = huggingface.published_tensors(hf_config.from_config(config, kind))
    write_tensors(folder, {k: (random.standard_normal(s) * 0.3).astype(dtype) for k, s in shapes.items()})
    return folder


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    entries = safetensors.find(folder)
    tensors = {k: np.empty(e.shape, safetensors.READ[e.dtype]) for k, e in entries.items()}
    with safetensors.Files({e.path for e in entries.values()}) as files:
        for name, entry in entries.items():
            files.read_into(entry.path, entry.offset, tensors[name])
    return tensors
