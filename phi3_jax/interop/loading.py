"""`phi3_jax.load`: a model ready to ask, from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import checks
from phi3_jax.configs import ModelConfig, model_from_dict
from phi3_jax.data import manifest as manifests
from phi3_jax.data import pictured, stops, tokenizers
from phi3_jax.data.images import MOST_CROPS
from phi3_jax.errors import UserError
from phi3_jax.foreign import Fields
from phi3_jax.interop import adapters, hf_config, huggingface, peft, quantized
from phi3_jax.interop.content import content
from phi3_jax.models import decoder, lora, vision
from phi3_jax.models.spec import map_specs, named, named_tree, param_specs, shaped
from phi3_jax.records import checkpoint, files, streaming
from phi3_jax.records.folder import KEPT


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, config and tokenizer of one model.

    Attributes:
      params: tree of `param_specs(config)`, with `lora_a` and `lora_b` where there are adapters (`models.lora.joined`).
      config: the architecture.
      tokenizer: or None where the folder brought none.
      dtype: in which `logits` computes.
      stop_ids: tokens that end a reply, of `data.stops`; None stands for the tokenizer's.
      kept: the folder with the tokenizer files that the checkpoint brings, or None.
    """

    params: Any
    config: ModelConfig
    tokenizer: tokenizers.Tokenizer | None
    dtype: Any
    stop_ids: tuple[int, ...] | None = None
    kept: Path | None = None

    def __post_init__(self) -> None:
        if self.stop_ids is None:
            object.__setattr__(self, "stop_ids", stops.stop_ids(self.tokenizer))

    def logits(
        self,
        inputs: str | Any,
        positions: Any = None,
        segment_ids: Any = None,
        *,
        rope_regime: str = "auto",
        images: Sequence[Any] | None = None,
        crops: int | None = None,
    ) -> jax.Array:
        """Float32 logits (batch, time, vocab).

        Args:
          inputs: a string (batch 1, without begin-of-text token), or token ids (batch, time) or (time,).
          positions: (batch, time); default 0, 1, .. in each document.
          segment_ids: (batch, time) document numbers; attention stays inside a document. Padding takes a number that no
            document of its row has (by custom 0); without numbers all tokens of a row are one document.
          rope_regime: LongRoPE list: "auto" (of each document by its own last position), "short" or "long".
          images: of a phi-3-vision: the pictures (`data.images.Picture`) of a string, which says with `<|image_k|>` where
            each stands, or for each row of ids a list of them; ids are -k in the places of picture k.
          crops: tiles that a picture is cut into at most; default: what the model's files say.

        Raises:
          UserError: a string without a tokenizer, ids outside the vocabulary, more tokens than the context.
        """
        seen = None
        if images is None:
            tokens = self._tokens(inputs)
        else:
            tokens, seen = self._pictured(inputs, images, pictured.Album(self.config, crops))
        others = [self._like(tokens, x, name) for x, name in ((positions, "positions"), (segment_ids, "segment_ids"))]
        return _forward(self.params, tokens, *others, seen, self.config, jnp.dtype(self.dtype).name, rope_regime)

    def _pictured(
        self, inputs: str | Any, images: Sequence[Any], album: pictured.Album
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Tokens (batch, time), and tiles and index of their pictures."""
        if isinstance(inputs, str):
            opened = [album.open(images)]
            if self.tokenizer is None:
                raise UserError(f"{self.config.name} came without a tokenizer; give token ids (batch, time)")
            rows = np.array([pictured.text_ids(self.tokenizer, inputs, album.counts(opened[0]))])
        else:
            least = -pictured.MOST
            what = "a string or integers (batch, time)"
            rows = np.atleast_2d(
                checks.integers(inputs, "token id", least, self.config.vocab - 1, what=what, where="the vocabulary: ")
            )
            if rows.ndim != 2 or len(images) != len(rows):
                raise UserError(
                    f"{len(images)} lists of images for inputs of shape {rows.shape}; give a list for each row"
                )
            opened = [album.open(some) for some in images]
        prompts = [pictured.Prompt(row.tolist(), some) for row, some in zip(rows, opened, strict=True)]
        for prompt in prompts:
            pictured.check(prompt, album)
        tokens = self._tokens(pictured.tokens_of(rows))
        return tokens, pictured.batch(prompts, tokens.shape, album)

    def _tokens(self, inputs: str | Any) -> np.ndarray:
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise UserError(f"{self.config.name} came without a tokenizer; give token ids (batch, time)")
            inputs = [self.tokenizer.encode(inputs)]
        tokens = np.atleast_2d(token_ids(inputs, self.config, "a string or integers (batch, time)"))
        if tokens.ndim != 2 or tokens.size == 0:
            raise UserError(f"inputs of shape {tokens.shape}; give a string or integers (batch, time), one at least")
        if tokens.shape[1] > self.config.context:
            raise UserError(
                f"{tokens.shape[1]} tokens exceed the context of {self.config.context}; give at most that many"
            )
        return tokens

    @staticmethod
    def _like(tokens: np.ndarray, values: Any, name: str) -> np.ndarray | None:
        if values is None:
            return None
        what = f"integers of shape {tokens.shape}"
        least = 0 if name == "positions" else -(2**31)  # documents may have any number
        values = checks.integers(values, name.removesuffix("s"), least, 2**31 - 1, what=what)
        try:
            return np.broadcast_to(values, tokens.shape)
        except ValueError:
            raise UserError(f"{name} of shape {values.shape}; give {what}") from None


def token_ids(values: Any, cfg: ModelConfig, what: str) -> np.ndarray:
    """int32 token ids of a model.

    Raises:
      UserError: not whole numbers, or outside the vocabulary.
    """
    return checks.integers(values, "token id", 0, cfg.vocab - 1, what=what, where="the vocabulary: ")


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _forward(
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None,
    segments: jax.Array | None,
    seen: tuple[jax.Array, jax.Array] | None,
    cfg: ModelConfig,
    dtype: str,
    regime: str | None,
) -> jax.Array:
    wanted = jnp.dtype(dtype)
    pictures = None if seen is None else (vision.rows_of(params, seen[0], cfg, wanted), seen[1])
    return decoder.forward(
        params, tokens, cfg, positions=positions, segments=segments, dtype=wanted, rope_regime=regime, pictures=pictures
    )


def load(
    path: str | Path,
    *,
    window_rule: str = "transformers",
    dtype: Any = None,
    shardings: Any = None,
    adapter: str | Path | None = None,
) -> Model:
    """Loads a model.

    Args:
      path: "hf:FOLDER" with config.json and *.safetensors; or a run's folder, one of its checkpoints, or a quantised run.
        A run that trained adapters stands for its base with them.
      window_rule: for "hf:" folders, how many keys `sliding_window` means: "transformers" or "released"
        (`ModelConfig.window_keys`).
      dtype: in which to compute; default: that of the stored parameters.
      shardings: tree of shardings like the parameters; default: everything on the first device.
      adapter: a run, or "peft:FOLDER", whose adapters stand beside the weights of `path`, on which they were trained.

    Raises:
      UserError: nothing usable at `path`; says what is wrong with it; an adapter for other weights.
    """
    found = None
    if is_quantised(path):
        if adapter:
            raise UserError(f"{path} is quantised; quantise {adapter} with its base instead (quantize --adapter)")
        run: Path | None = Path(path)
        cfg, kept = run_config(Path(path)), Path(path) / KEPT
        if shardings is not None:
            raise UserError(f"{path} is quantised, which runs on one device; load the model it was made from")
        params, dtype = quantized.Reader(Path(path), cfg).params(), dtype or jnp.float32
    else:
        weights = open_weights(path, window_rule, adapter)
        cfg, kept, run, found = weights.config, weights.kept, weights.run, weights.adapter
        weights = weights.under or weights
        params = place(cfg, weights.dtypes, weights.read, shardings)
    stored = jax.tree.leaves(params)[0].dtype
    if found:
        params = lora.joined(params, _placed_adapters(found, shardings), cfg, found.how)
    tokenizer = tokenizer_of(kept, run)
    ends = stops.stop_ids(tokenizer, kept, cfg.vocab)
    return Model(params, cfg, tokenizer, jnp.dtype(dtype or stored), ends, kept)


def _placed_adapters(found: adapters.Adapter, shardings: Any) -> Any:
    """Their tree, whole on every device of the weights."""
    where = jax.tree.leaves(shardings)[0] if shardings is not None else None
    if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    values = {name: jax.device_put(np.asarray(value, np.float32), where) for name, value in found.values.items()}
    return shaped(lora.adapter_specs(found.model, found.how), values)


Put = Callable[[int | None, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a model where they lie: checked by name, shape and dtype, and not read yet.

    Attributes:
      config: the model.
      dtypes: of each leaf as it is stored, by the names of `huggingface.leaves_of`.
      read: read(leaf, put) calls put(layer, array) for each layer of a leaf, from any thread, or put(None, array) for all
        of it; UserError where they hold NaN or infinities.
      part: part(leaf, layer) is one layer of a leaf, or all of it where it has no layers.
      paths: the files they are read from.
      kept: where the files of the tokenizer lie, or would.
      run: the run's folder, None for a Hugging Face folder.
      adapter, under: of weights with adapters merged into them in float32: those, and the weights without.
    """

    config: ModelConfig
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str, Put], None]
    part: Callable[[str, int | None], np.ndarray]
    paths: tuple[Path, ...]
    kept: Path
    run: Path | None
    adapter: adapters.Adapter | None = None
    under: Weights | None = None

    @property
    def vocabulary(self) -> str | None:
        """Fingerprint of the tokenizer, or closed vocabulary, that the model's ids are of; None where nothing says it."""
        made = files.read_state(self.run / "config.json").get("tokenizer") if self.run else None
        if isinstance(made, dict) and made.get("fingerprint"):
            return str(made["fingerprint"])
        found = tokenizer_of(self.kept, self.run)
        return found.fingerprint if found else None


def open_weights(path: str | Path, window_rule: str = "transformers", adapter: str | Path | None = None) -> Weights:
    """The weights of "hf:FOLDER", a run, or one of its checkpoints; arguments and errors as `load`, but not quantised.

    Adapters are merged in float32.
    """
    text = str(path)
    if is_quantised(path):
        raise UserError(f"{path} is quantised; name the model it was made from")
    if adapter is not None:
        base = open_weights(path, window_rule)
        return merged(base, open_adapter(str(adapter), base, text))
    if text.startswith("hf:"):
        folder = Path(text[3:])
        source = huggingface.open_folder(folder, folder_config(folder, window_rule))
        paths = sorted({entry.path for entry in source.entries.values()})
        read, part = functools.partial(huggingface.read_parts, source), functools.partial(huggingface.read_part, source)
        return Weights(source.config, source.dtypes, read, part, tuple(paths), folder, None)
    run, step = find_run(Path(text))
    if adapters.record_of(run):
        base = base_of(run, window_rule)
        return merged(base, open_adapter(text, base, "the weights that are there now"), run)
    cfg = run_config(run)
    reader = streaming.Reader(run / "checkpoints", "params.", step)
    reader.check({leaf: spec.shape for leaf, spec in huggingface.leaves_of(cfg).items()})
    paths = sorted(p for p in reader.path.rglob("*") if p.is_file())
    return Weights(cfg, reader.dtypes, reader.read_parts, reader.read, tuple(paths), run / KEPT, run)


def base_of(run: Path, window_rule: str = "transformers") -> Weights:
    """The weights under the adapters of a run, where its config.json says that they lay.

    Raises:
      UserError: they are not there any more.
    """
    record = adapters.record_of(run) or {}
    base = str(record.get("lora", {}).get("base") or record.get("init") or "")
    if not base or not Path(base.removeprefix("hf:")).exists():
        raise UserError(f"{run} is an adapter of {base or 'weights it does not name'}, which is not there; name them: "
                        f"--model BASE --adapter {run}")  # fmt: skip
    return open_weights(base, window_rule)


def open_adapter(text: str, base: Weights, label: str) -> adapters.Adapter:
    """The adapters of a run, or of "peft:FOLDER", for weights.

    Args:
      text: which.
      base: those weights.
      label: what the user called them.

    Raises:
      UserError: nothing usable there, or adapters for other weights.
    """
    if text.startswith("peft:"):
        return peft.read(Path(text[5:]), base.config, label, content(base))
    run, step = find_run(Path(text))
    found = adapters.open_run(run, step)
    adapters.require_base(found, text, base.config, label, lambda: content(base))
    return found


def merged(base: Weights, found: adapters.Adapter, run: Path | None = None) -> Weights:
    """Weights with adapters merged into them in float32; `run` is that of the adapters where it stands for both."""

    def read(leaf: str, put: Put) -> None:
        base.read(leaf, lambda layer, part: put(layer, found.merged(leaf, layer, part)))

    def part(leaf: str, layer: int | None) -> np.ndarray:
        return found.merged(leaf, layer, base.part(leaf, layer))

    dtypes = {leaf: np.dtype(np.float32) if found.merges(leaf) else dtype for leaf, dtype in base.dtypes.items()}
    whole = dataclasses.replace(base, dtypes=dtypes, read=read, part=part, adapter=found, under=base)
    if run is None:
        return whole
    kept = run / KEPT if (run / KEPT).is_dir() else base.kept
    return dataclasses.replace(whole, config=found.model, kept=kept, run=run)


def is_quantised(path: str | Path) -> bool:
    """Whether a path is a quantised run's."""
    return not str(path).startswith("hf:") and (Path(path) / quantized.RECORD).exists()


def kept_folder(path: str | Path) -> Path:
    """Where the tokenizer files of a model lie, or would: its Hugging Face folder, or a folder of its run."""
    text = str(path)
    if text.startswith("hf:"):
        return Path(text[3:])
    return (Path(text) if is_quantised(path) else find_run(Path(text))[0]) / KEPT


def folder_config(folder: Path, window_rule: str = "transformers") -> ModelConfig:
    """The model of a Hugging Face folder's config.json."""
    if not folder.is_dir():
        huggingface.safetensors.find(folder)  # raises: says what it is instead
    config, beside = files.read_json(folder / "config.json"), folder / "preprocessor_config.json"
    crops = None
    if beside.is_file():
        crops = Fields(files.read_json(beside), beside).whole("num_crops", None, low=1, high=MOST_CROPS)
    return hf_config.from_config(config, folder.resolve().name, window_rule, crops)


def config_of(path: str | Path) -> ModelConfig:
    """The model of "hf:FOLDER", a run or a quantised folder, from its config.json alone."""
    text = str(path)
    if text.startswith("hf:"):
        return folder_config(Path(text[3:]))
    return run_config(Path(text) if is_quantised(text) else find_run(Path(text))[0])


def find_run(path: Path) -> tuple[Path, int | None]:
    """(run folder, step or None for the newest) of a run, its checkpoints folder, one checkpoint, or a study of one run."""
    step = None
    if path.name.isdigit() and (path / checkpoint.RECORD).exists():
        path, step = path.parent, int(path.name)
    if path.name == "checkpoints":
        path = path.parent
    if (path / "config.json").exists() and (path / "checkpoints").is_dir():
        return path, step
    runs = _runs_of(path)
    if len(runs) == 1:
        run = path / runs[0]
        if (run / "config.json").exists() and (run / "checkpoints").is_dir():
            return run, step
        raise UserError(f"{path} is a study whose run {runs[0]} has not started; train it first")
    if runs:
        raise UserError(f"{path} is a study of several runs; name one: {', '.join(str(path / r) for r in runs)}")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        raise UserError(f"{path} is a Hugging Face folder; write hf:{path}")
    huggingface.safetensors.find(path)  # a pickle file, or no folder: says so
    raise UserError(f"{path} holds no run (config.json and checkpoints/)")


def _runs_of(study: Path) -> list[str]:
    """Names of the runs of a study, those that are planned and those that are there; none of another folder."""
    planned = files.read_state(study / "study.json").get("runs")
    named = [r.get("name") for r in planned if isinstance(r, dict)] if isinstance(planned, list) else []
    there = [p.parent.name for p in study.glob("*/checkpoints")] if study.is_dir() else []
    return sorted({*there, *(name for name in named if isinstance(name, str))})


def run_config(run: Path) -> ModelConfig:
    """The model of a run's config.json."""
    tree = files.read_json(run / "config.json")
    try:
        return model_from_dict(tree["config"]["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} names no model (config.model)") from error


def place(
    cfg: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str, Put], None],
    shardings: Any = None,
    dtype: Any = None,
) -> Any:
    """Parameters, read part by part straight to where they belong.

    Args:
      cfg: the model.
      dtypes: of each leaf, by the names of `huggingface.leaves_of`.
      read: read(leaf, put) calls put(layer, array) for each layer of a leaf, or put(None, array) for all of it.
      shardings: tree of shardings like the parameters; default: all on the first device. A process holds what its own
        devices hold, and besides one leaf's shards and a few layers on the host.
      dtype: that the arrays get, in memory of their own, which may be donated; default: the stored ones.
    """
    if shardings is None:
        alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = map_specs(lambda _: alone, param_specs(cfg))
    where = named(shardings)

    def one(leaf: str, shape: tuple[int, ...]) -> jax.Array:
        array = _place_leaf(leaf, shape, dtypes[leaf], read, where[leaf])
        return array if dtype is None else jnp.array(array, dtype, copy=True)

    return named_tree(cfg, {leaf: one(leaf, spec.shape) for leaf, spec in huggingface.leaves_of(cfg).items()})


def _place_leaf(
    leaf: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    read: Callable[[str, Put], None],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    boxes = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
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
    """The tokenizer among the kept files; for a run trained on bytes, the byte tokenizer.

    A run says in its config.json what it was trained with; of older ones the data set's manifest does.
    """
    if kept.is_dir() and any(next(kept.glob(p), None) for p in ("tokenizer.json", "*.tiktoken", "*.model")):
        return tokenizers.load(kept)
    if run is None:
        return None
    record = files.read_json(run / "config.json")
    made = record.get("tokenizer")
    if made is None and (data := record["config"].get("data")):
        manifest = manifests.beside(run, data) / manifests.NAME
        made = files.read_json(manifest).get("tokenizer") if manifest.is_file() else None
    return tokenizers.load("bytes") if (made or {}).get("kind") == "bytes" else None
