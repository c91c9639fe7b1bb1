"""Folders of quantised models: config.json and tokenizer files as in any run, `quantized.safetensors`, `quantized.json`.

Matrices are stored as uint8 (layers, rows, bytes): each row's blocks one after the other, for q4_0 and q8_0 those of a
GGUF file. Gains and biases are float32. `quantized.json` holds the format, how it was made, and a sha256 of each part, so
that a damaged file is found when it is read. Tower and projector of a phi-3-vision stay bfloat16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import finite
from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.foreign import Fields
from phi3_jax.interop import huggingface, safetensors
from phi3_jax.models.quantized import FORMATS, QuantizedTensor, to_tiles
from phi3_jax.models.spec import ParamSpec, param_specs, shaped
from phi3_jax.records import files

WEIGHTS, RECORD = "quantized.safetensors", "quantized.json"


def is_quantised(spec: ParamSpec) -> bool:
    """Whether a tensor is stored in groups: every matrix, and no gain or bias."""
    return spec.role in ("hidden", "embedding", "unembedding")


def inputs_of(leaf: str, spec: ParamSpec) -> int:
    """Contracted dimensions of a matrix (without its layer axis); 0 for the table of embeddings."""
    return 0 if spec.role == "embedding" else 3 if leaf.startswith("blocks.out") else 1


def as_matrix(leaf: str, spec: ParamSpec, part: np.ndarray) -> np.ndarray:
    """One layer of a leaf as (rows, columns), what is contracted in columns."""
    inputs = inputs_of(leaf, spec)
    if inputs == 0:
        return part.reshape(-1, part.shape[-1])
    return part.reshape(math.prod(part.shape[:inputs]), -1).T


def as_part(leaf: str, spec: ParamSpec, matrix: np.ndarray) -> np.ndarray:
    """The inverse of `as_matrix`."""
    shape = spec.shape[1:] if spec.axes[0] == "layers" else spec.shape
    return (matrix if inputs_of(leaf, spec) == 0 else matrix.T).reshape(shape)


def _parts(cfg: ModelConfig) -> Iterator[tuple[str, ParamSpec, int | None]]:
    """(leaf, spec, layer) of every part: what has no layers, which is largest, first, while little else is in memory."""
    for leaf, spec in sorted(huggingface.leaves_of(cfg).items(), key=lambda item: item[1].axes[0] == "layers"):
        for layer in spec.layers:
            yield leaf, spec, layer


def form_of(leaf: str, spec: ParamSpec, name: str) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a stored tensor."""
    if not is_quantised(spec):
        return "BF16" if spec.role == "picture" else "F32", spec.shape
    style, shape = FORMATS[name], spec.shape[1:] if spec.axes[0] == "layers" else spec.shape
    inputs = inputs_of(leaf, spec)
    columns = math.prod(shape[:inputs]) if inputs else shape[-1]
    rows = math.prod(shape) // columns
    lead = spec.shape[:1] if spec.axes[0] == "layers" else ()
    return "U8", (*lead, rows, -(-columns // style.group) * style.group_bytes)


def stored_bytes(cfg: ModelConfig, name: str) -> int:
    """Bytes of all tensors of a model in a format."""
    forms = (form_of(leaf, spec, name) for leaf, spec in huggingface.leaves_of(cfg).items())
    return sum(math.prod(shape) * _dtype(dtype).itemsize for dtype, shape in forms)


def _dtype(name: str) -> np.dtype:
    return np.dtype(np.uint8) if name == "U8" else safetensors.DTYPES[name]


def check_model(cfg: ModelConfig, name: str) -> None:
    """UserError for an unknown format or a model that is not quantised."""
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}{nearest(name, FORMATS)}")
    if cfg.experts:
        raise UserError(f"{cfg.name} is a mixture of experts, whose products are not quantised; take a dense model")


def write(
    folder: Path, cfg: ModelConfig, name: str, part: Callable[[str, int | None], np.ndarray], how: Mapping[str, Any]
) -> None:
    """Writes a quantised model, a layer at a time.

    Args:
      folder: exists.
      part: (leaf, layer) -> uint8 blocks (rows, bytes) of a matrix, floats of another tensor.
      how: what `quantized.json` says of how it was made.
    """
    forms = {leaf: form_of(leaf, spec, name) for leaf, spec in huggingface.leaves_of(cfg).items()}
    entries, sums = safetensors.plan(forms, folder, WEIGHTS), {}
    with safetensors.Files({folder / WEIGHTS}, write=True) as weights:
        for leaf, _, layer in _parts(cfg):
            array = np.ascontiguousarray(part(leaf, layer), _dtype(forms[leaf][0]))
            offset = entries[leaf].offset + (0 if layer is None else layer * array.nbytes)
            weights.write_at(folder / WEIGHTS, offset, array)
            sums[_key(leaf, layer)] = hashlib.sha256(array.view(np.uint8).data).hexdigest()
    files.write_json(folder / RECORD, {"format": name, **how, "sha256": sums})


def _key(leaf: str, layer: int | None) -> str:
    return leaf if layer is None else f"{leaf}[{layer}]"


class Reader:
    """Reads the parts of a quantised model, each checked against its sha256."""

    def __init__(self, folder: Path, cfg: ModelConfig) -> None:
        self.path, self._cfg = folder / WEIGHTS, cfg
        self.record = files.read_json(folder / RECORD)
        fields = Fields(self.record, folder / RECORD)
        self.format, sums = fields.text("format"), fields.inside("sha256")
        if sums is None:
            raise UserError(f"{folder / RECORD} names no sha256; quantise the model again")
        self._sums = {name: sums.text(name) for name in sums.names()}
        check_model(cfg, self.format)
        self._entries = safetensors.header(self.path)
        for leaf, spec in huggingface.leaves_of(cfg).items():
            found = self._entries.get(leaf)
            if found is None or (found.dtype, tuple(found.shape)) != form_of(leaf, spec, self.format):
                raise UserError(f"{self.path} does not hold {leaf} of the model in config.json; quantise it again")

    def read(self, leaf: str, layer: int | None) -> np.ndarray:
        """uint8 blocks (rows, bytes) of a matrix, float32 of another tensor, bfloat16 of a tower's matrices.

        Raises:
          UserError: the file is damaged, or holds NaN or infinities.
        """
        entry = self._entries[leaf]
        shape = entry.shape if layer is None else entry.shape[1:]
        array = np.empty(shape, _dtype(entry.dtype))
        with safetensors.Files({self.path}) as weights:
            weights.read_into(self.path, entry.offset + (0 if layer is None else layer * array.nbytes), array)
        if hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest() != self._sums.get(_key(leaf, layer)):
            raise UserError(f"{self.path} is damaged in {_key(leaf, layer)} (sha256 differs); quantise the model again")
        floats = array
        if entry.dtype == "U8":  # the scales; quants are whole numbers
            floats = array.reshape(-1, FORMATS[self.format].group_bytes)[:, :2].copy().view(np.float16)
        finite.require(floats, self.path, _key(leaf, layer))
        return array

    def params(self) -> dict[str, Any]:
        """The tree of parameters, layers unstacked (`inference.decode.unstack`), on the first device."""
        tree: dict[str, Any] = {"blocks": [{} for _ in range(self._cfg.layers)]}
        for leaf, spec, layer in _parts(self._cfg):
            if leaf.startswith("vision."):
                continue
            array: Any = self.read(leaf, layer)
            if is_quantised(spec):
                shape = spec.shape if layer is None else spec.shape[1:]
                tiles = to_tiles(array, self.format)
                stacked = jnp.asarray(tiles if layer is None else tiles[None])
                array = QuantizedTensor(stacked, self.format, shape, inputs_of(leaf, spec))
            else:
                array = jnp.asarray(array if layer is None else array[None])
            place = tree if layer is None else tree["blocks"][layer]
            *path, last = leaf.removeprefix("blocks.").split(".")
            for name in path:
                place = place.setdefault(name, {})
            place[last] = array
        return tree | self._eyes()

    def _eyes(self) -> dict[str, Any]:
        """Of a phi-3-vision, {"vision": its tree}; its layers are stacked."""
        if self._cfg.vision is None:
            return {}
        specs = {leaf: s for leaf, s in huggingface.leaves_of(self._cfg).items() if leaf.startswith("vision.")}
        values = {
            leaf: self.read(leaf, None)
            if spec.layers == (None,)
            else np.stack([self.read(leaf, i) for i in spec.layers])
            for leaf, spec in specs.items()
        }
        whole = {"vision": param_specs(self._cfg)["vision"]}
        return jax.tree.map(jnp.asarray, shaped(whole, values))
