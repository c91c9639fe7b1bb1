"""What weights are, whatever they are called: a name made of their values.

The same values have the same name in another folder, as a run or as a Hugging Face folder, cut into other files, in float32
or in a narrower dtype that holds them exactly. All of them are read for it, part by part; the name is kept in the user's
cache, under the paths, sizes and times of the files, so that unchanged files are read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from typing import TYPE_CHECKING

import numpy as np

from phi3_jax import compile_cache
from phi3_jax.interop import huggingface
from phi3_jax.records import files

if TYPE_CHECKING:
    from phi3_jax.interop.loading import Weights

VERSION = 1  # of the name for given values
_NAME = re.compile(r"[0-9a-f]{16}")


def content(weights: Weights) -> str:
    """Sixteen hex digits of SHA-256 over the name, shape and float32 values of every leaf.

    Weights with adapters merged into them are known by what is merged, not by the sums.

    Raises:
      UserError: a value is NaN or infinite, or a file cannot be read.
    """
    if weights.adapter:
        return weights.adapter.content
    stats = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path in weights.paths for s in [path.stat()]]
    key = hashlib.sha256(json.dumps([VERSION, stats]).encode()).hexdigest()
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home directory
        if _NAME.fullmatch(found := (compile_cache.user_folder() / "contents" / key).read_text()):
            return found
    found = _hashed(weights)
    with contextlib.suppress(OSError, RuntimeError):
        kept = compile_cache.user_folder() / "contents" / key
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, found)
    return found


def _hashed(weights: Weights) -> str:
    parts: dict[tuple[str, int], str] = {}
    for leaf, spec in huggingface.leaves_of(weights.config).items():
        stacked = spec.axes[0] == "layers"

        def put(layer: int | None, part: np.ndarray, leaf: str = leaf, stacked: bool = stacked) -> None:
            for i, values in enumerate(part if stacked else [part]) if layer is None else [(layer, part)]:
                digest = hashlib.sha256(np.ascontiguousarray(values, np.float32).data)
                parts[leaf, i] = f"{leaf} {i} {list(values.shape)} {digest.hexdigest()}\n"

        weights.read(leaf, put)
    return hashlib.sha256("".join(parts[key] for key in sorted(parts)).encode()).hexdigest()[:16]
