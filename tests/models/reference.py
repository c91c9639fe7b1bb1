"""Reads reference tensors: the committed ones, and the larger ones that maintainers have in ../shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from phi3_jax.interop import loading, safetensors

OWN = Path(__file__).resolve().parents[1] / "goldens"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "goldens"
_DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}


def golden(name: str) -> Any:
    """A test's parameter: a golden that is not committed marks its test `shared`."""
    return pytest.param(name, marks=() if (OWN / f"{name}.json").exists() else pytest.mark.shared("goldens"))


def text_models() -> list[Any]:
    """Goldens of text models that hold plain `logits`, as parameters: all that are here."""
    names = set()
    for path in (path for folder in (OWN, SHARED) if folder.is_dir() for path in folder.glob("*.json")):
        meta = json.loads(path.read_text())
        if path.stem.startswith(("mini", "medium", "small", "moe")) and "config" in meta:
            names |= {path.stem} if "logits" in meta.get("tensors", {}) else set()
    return [golden(name) for name in sorted(names)]


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, tensors) of one golden."""
    folder = OWN if (OWN / f"{name}.json").exists() else SHARED
    path = folder / f"{name}.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        begin, end = (8 + length + x for x in entry["data_offsets"])
        tensors[key] = np.frombuffer(raw[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return json.loads((folder / f"{name}.json").read_text()), tensors


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder of a golden's config and weights (the tensors with a dot in their name)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k: v for k, v in tensors.items() if "." in k}
    forms = {k: (safetensors.NAMES[v.dtype], v.shape) for k, v in weights.items()}
    entries = safetensors.plan(forms, folder)
    with safetensors.Files({e.path for e in entries.values()}, write=True) as files:
        for name, entry in entries.items():
            files.write_at(entry.path, entry.offset, np.ascontiguousarray(weights[name]))
    return folder


def load_golden(
    name: str, tmp_path: Path, window_rule: str = "transformers", config: str = "config"
) -> tuple[dict[str, Any], dict[str, np.ndarray], loading.Model]:
    """(description, tensors, model) through the same import that users take."""
    meta, tensors = read_golden(name)
    path = write_folder(tmp_path / name, meta[config], tensors)
    return meta, tensors, loading.load(f"hf:{path}", window_rule=window_rule)


def check(actual: jax.Array, expected: np.ndarray, meta: dict[str, Any], key: str) -> None:
    """Within the file's stated tolerance, itself at most 1e-4 of the logits' scale."""
    tolerance = meta["tolerance"][key]
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance["suggested_atol"])
