"""`phi3_jax.load`: a model ready to ask, from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import ModelConfig, model_from_dict
from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.interop import hf_config, huggingface, quantized
from phi3_jax.models import decoder
from phi3_jax.models.spec import map_specs, param_specs
from phi3_jax.training import checkpoint, streaming

KEPT = "huggingface"  # folder of an imported run: config.json and tokenizer files as they came


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, config and tokenizer of one model.

    Attributes:
      params: tree of `param_specs(config)`.
      config: the architecture.
      tokenizer: or None where the folder brought none.
      dtype: in which `logits` computes.
    """

    params: Any
    config: ModelConfig
    tokenizer: tokenizers.Tokenizer | None
    dtype: Any

    def logits(
        self,
        inputs: str | Any,
        positions: Any = None,
        segment_ids: Any = None,
        *,
        rope_regime: str = "auto",
    ) -> jax.Array:
        """Float32 logits (batch, time, vocab).

        Args:
          inputs: a string (batch 1, without begin-of-text token), or token ids (batch, time) or (time,).
          positions: (batch, time); default 0, 1, .. in each document.
          segment_ids: (batch, time) document numbers; attention stays inside a document.
          rope_regime: LongRoPE list: "auto", "short" or "long".

        Raises:
          UserError: a string without a tokenizer, ids outside the vocabulary, more tokens than the context.
        """
        tokens = self._tokens(inputs)
        others = [self._like(tokens, x, name) for x, name in ((positions, "positions"), (segment_ids, "segment_ids"))]
        return _forward(self.params, tokens, *others, self.config, jnp.dtype(self.dtype).name, rope_regime)

    def _tokens(self, inputs: str | Any) -> np.ndarray:
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise UserError(f"{self.config.name} came without a tokenizer; give token ids (batch, time)")
            inputs = [self.tokenizer.encode(inputs)]
        tokens = np.atleast_2d(np.asarray(inputs))
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"inputs of shape {tokens.shape}, {tokens.dtype}; give a string or integers (batch, time)")
        low, high, vocab = tokens.min(), tokens.max(), self.config.vocab
        if low < 0 or high >= vocab:
            raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary: 0 to {vocab - 1}")
        if tokens.shape[1] > self.config.context:
            raise UserError(
                f"{tokens.shape[1]} tokens exceed the context of {self.config.context}; give at most that many"
            )
        return tokens.astype(np.int32)

    @staticmethod
    def _like(tokens: np.ndarray, values: Any, name: str) -> np.ndarray | None:
        if values is None:
            return None
        values = np.asarray(values)
        if not np.issubdtype(values.dtype, np.integer) or np.atleast_2d(values).shape[-1] != tokens.shape[-1]:
            raise UserError(f"{name} of shape {values.shape}, {values.dtype}; give integers of shape {tokens.shape}")
        return np.broadcast_to(values, tokens.shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _forward(params, tokens, positions, segments, cfg, dtype, regime):
    options = dict(positions=positions, segments=segments, dtype=jnp.dtype(dtype), rope_regime=regime)
    return decoder.forward(params, tokens, cfg, **options)


def load(path: str | Path, *, window_rule: str = "transformers", dtype: Any = None, shardings: Any = None) -> Model:
    """Loads a model.

    Args:
      path: "hf:FOLDER" with config.json and *.safetensors; or a run's folder, one of its checkpoints, or a quantised run.
      window_rule: for "hf:" folders, how many keys `sliding_window` means: "transformers" or "released"
        (`ModelConfig.window_keys`).
      dtype: in which to compute; default: that of the stored parameters.
      shardings: tree of shardings like the parameters; default: everything on the first device.

    Raises:
      UserError: nothing usable at `path`; says what is wrong with it.
    """
    text = str(path)
    if text.startswith("hf:"):
        folder = Path(text[3:])
        cfg = folder_config(folder, window_rule)
        source = huggingface.open_folder(folder, cfg)
        params = place(cfg, source.dtypes, functools.partial(huggingface.read_parts, source), shardings)
        kept = folder
    elif (Path(text) / quantized.RECORD).exists():
        run = Path(text)
        cfg, kept = run_config(run), run / KEPT
        if shardings is not None:
            raise UserError(f"{run} is quantised, which runs on one device; load the model it was made from")
        params, dtype = quantized.Reader(run, cfg).params(), dtype or jnp.float32
    else:
        run, step = find_run(Path(text))
        cfg, kept = run_config(run), run / KEPT
        reader = streaming.Reader(run / "checkpoints", "params.", step)
        reader.check({leaf: spec.shape for leaf, spec in huggingface.leaves_of(cfg).items()})
        params = place(cfg, reader.dtypes, reader.read_parts, shardings)
    stored = jax.tree.leaves(params)[0].dtype
    return Model(params, cfg, tokenizer_of(kept, None if text.startswith("hf:") else run), jnp.dtype(dtype or stored))


def folder_config(folder: Path, window_rule: str = "transformers") -> ModelConfig:
    """The model of a Hugging Face folder's config.json."""
    if not folder.is_dir():
        huggingface.safetensors.find(folder)  # raises: says what it is instead
    return hf_config.from_config(huggingface.read_json(folder / "config.json"), folder.resolve().name, window_rule)


def find_run(path: Path) -> tuple[Path, int | None]:
    """(run folder, step or None for the newest) of a run, its checkpoints folder or one checkpoint."""
    step = None
    if path.name.isdigit() and (path / checkpoint.RECORD).exists():
        path, step = path.parent, int(path.name)
    if path.name == "checkpoints":
        path = path.parent
    if (path / "config.json").exists() and (path / "checkpoints").is_dir():
        return path, step
    runs = sorted(p.parent.name for p in path.glob("*/checkpoints")) if path.is_dir() else []
    if runs:
        raise UserError(f"{path} is a study of several runs; name one: {', '.join(str(path / r) for r in runs)}")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        raise UserError(f"{path} is a Hugging Face folder; write hf:{path}")
    huggingface.safetensors.find(path)  # a pickle file, or no folder: says so
    raise UserError(f"{path} holds no run (config.json and checkpoints/)")


def run_config(run: Path) -> ModelConfig:
    """The model of a run's config.json."""
    tree = huggingface.read_json(run / "config.json")
    try:
        return model_from_dict(tree["config"]["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} names no model (config.model)") from error


Put = Callable[[int | None, np.ndarray], None]


def place(
    cfg: ModelConfig, dtypes: Mapping[str, np.dtype], read: Callable[[str, Put], None], shardings: Any = None
) -> Any:
    """Parameters, read part by part straight to where they belong.

    Args:
      cfg: the model.
      dtypes: of each leaf, by the names of `huggingface.leaves_of`.
      read: read(leaf, put) calls put(layer, array) for each layer of a leaf, or put(None, array) for all of it.
      shardings: tree of shardings like the parameters; default: all on the first device. A process holds what its own
        devices hold, and beside it one leaf's shards and a few layers on the host.
    """
    if shardings is None:
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = map_specs(lambda _: alone, param_specs(cfg))
    where = {_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
    arrays = {
        leaf: _place_leaf(leaf, spec.shape, dtypes[leaf], read, where[leaf])
        for leaf, spec in huggingface.leaves_of(cfg).items()
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], shardings)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _place_leaf(
    leaf: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    read: Callable[[str, Put], None],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    boxes = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {box: np.empty([b - a for a, b in box], dtype) for box in set(boxes.values())}

    def put(layer: int | None, part: np.ndarray) -> None:
        for box, buffer in buffers.items():
            index = tuple(slice(a, b) for a, b in box)
            if layer is None:
                buffer[...] = part[index]
            elif box[0][0] <= layer < box[0][1]:
                buffer[layer - box[0][0]] = part[index[1:]]

    read(leaf, put)
    shards = [jax.device_put(buffers[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(shards))


def tokenizer_of(kept: Path, run: Path | None) -> tokenizers.Tokenizer | None:
    """The tokenizer among the kept files; for a run trained on bytes, the byte tokenizer."""
    if kept.is_dir():
        if any(next(kept.glob(p), None) for p in ("tokenizer.json", "*.tiktoken", "*.model")):
            return tokenizers.load(kept)
        return None
    if run is None:
        return None
    data = huggingface.read_json(run / "config.json")["config"].get("data") or {}
    manifest = Path(data.get("folder", "")) / "manifest.json"
    kind = (huggingface.read_json(manifest).get("tokenizer") or {}).get("kind") if manifest.is_file() else None
    return tokenizers.load("bytes") if kind == "bytes" else None
