"""Hugging Face folders of the family: config.json and safetensors, in both directions, a layer at a time.

Every tensor's published name is in its `ParamSpec`; this module knows the layouts behind the names: which rows of a
published [out, in] matrix are which part of ours. `tensors_of` gives them as views of one layer of ours, so that the
same lines read and write.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phi3_jax import finite
from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.interop import safetensors
from phi3_jax.models.spec import ParamSpec, named_specs

BLOCK_BYTES = 32 << 20  # of a tensor in flight in each thread
THREADS = 2
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that early releases kept, and phi-3-vision's second name of its embedding.
_IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|vision_model\.embeddings\.position_ids|vision_embed_tokens\.wte\.weight)$"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor: its rows are the views' elements, one after the other."""

    name: str
    shape: tuple[int, ...]
    views: tuple[np.ndarray, ...]


def leaves_of(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """`named_specs`, the largest first, which keeps the peak of memory low."""
    return dict(sorted(named_specs(cfg).items(), key=lambda item: -item[1].size))


def tensors_of(leaf: str, spec: ParamSpec, cfg: ModelConfig, part: np.ndarray, layer: int | None) -> list[Tensor]:
    """The published tensors that `part` holds.

    Args:
      leaf: its name in our tree.
      spec: its declaration.
      cfg: the model.
      part: the leaf without its layer axis (the whole leaf where `layer` is None); what is written to the views lands
        here.
      layer: number for the published name.
    """
    name = spec.hf.replace("{layer}", str(layer))
    kind, matrix = leaf.split(".")[-2] if "." in leaf else leaf, not leaf.endswith((".bias", "_bias", ".scale"))
    if kind == "qkv":
        return _qkv(name, cfg.layout, part, matrix)
    if "{expert}" in name:
        named = ((name.replace("{expert}", str(e)), part[e]) for e in range(part.shape[0]))
        return [t for n, w in named for t in ([_matrix(n, w.T)] if kind == "down" else _gate_up(n, w))]
    if kind == "gate_up":
        interleaved = cfg.layout == "phi3small"
        view = part.transpose(
            ((2, 1, 0) if interleaved else (1, 2, 0)) if matrix else (1, 0) if interleaved else (0, 1)
        )
        return [_joined(name, [view], matrix)]
    if kind == "out" and matrix and part.ndim == 4:
        return [Tensor(name, (part.shape[-1], math.prod(part.shape[:-1])), (part.transpose(3, 0, 1, 2),))]
    if spec.inputs or spec.role in ("unembedding", "adapter"):
        part = part.T
    return [Tensor(name, spec.published or part.shape, (part,))]


def _matrix(name: str, view: np.ndarray) -> Tensor:
    return Tensor(name, view.shape, (view,))


def _joined(name: str, views: list[np.ndarray], matrix: bool) -> Tensor:
    """Rows of several views in one tensor; the last axis is the input where it is a matrix."""
    size = sum(v.size for v in views)
    columns = views[0].shape[-1]
    return Tensor(name, (size // columns, columns) if matrix else (size,), tuple(views))


def _gate_up(name: str, part: np.ndarray) -> list[Tensor]:
    """Gate (w1) and linear part (w3) of one expert from (embed, 2, mlp)."""
    return [_matrix(name.replace("{w1,w3}", n), part[:, i].T) for i, n in enumerate(("w1", "w3"))]


def _qkv(name: str, layout: str, part: np.ndarray, matrix: bool) -> list[Tensor]:
    """Queries, keys and values: by kv head in phi-3-small, all queries first in mini and medium, apart in MoE and tower."""
    r, rows = part.shape[-2] - 2, part.transpose(1, 2, 3, 0) if matrix else part
    split = [rows[:, :r], rows[:, r], rows[:, r + 1]]
    if "{q,k,v}" in name:
        return [_joined(name.replace("{q,k,v}", n), [v], matrix) for n, v in zip("qkv", split, strict=True)]
    return [_joined(name, [rows] if layout == "phi3small" else split, matrix)]


def published_tensors(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of the published folder, in the order of our tree's layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, leaf, spec in parts_of(cfg):
        shape = spec.shape if layer is None else spec.shape[1:]
        empty = np.broadcast_to(np.zeros((), np.float32), shape)
        shapes |= {t.name: t.shape for t in tensors_of(leaf, spec, cfg, empty, layer)}
    return shapes


def parts_of(cfg: ModelConfig) -> Iterator[tuple[int | None, str, ParamSpec]]:
    """(layer or None, leaf, spec) in published order: embedding, layer by layer, the rest."""
    leaves = leaves_of(cfg)
    yield None, "embedding", leaves.pop("embedding")
    for layer in range(cfg.layers):
        for leaf in sorted(k for k in leaves if k.startswith("blocks.")):
            yield layer, leaf, leaves[leaf]
    for leaf in sorted(k for k in leaves if not k.startswith("blocks.")):
        for number in leaves[leaf].layers:
            yield number, leaf, leaves[leaf]


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, a few rows at a time where it transposes (3x faster: the rows stay in the cache)."""
    rows = math.prod(target.shape[1:-1])
    if target.ndim < 2 or target.shape[0] * rows <= 16 or target.strides[-1] == source.strides[-1]:
        target[...] = source
        return
    step = max(1, 16 // rows)
    for i in range(0, target.shape[0], step):
        if rows > 16:
            copy_into(target[i], source[i])
        else:
            target[i : i + step] = source[i : i + step]


def blocks_of(tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first byte in the tensor, view of at most BLOCK_BYTES) over the tensor, in order."""
    start = 0
    for view in tensor.views:
        row = view[:1].nbytes
        step = max(1, BLOCK_BYTES // max(row, 1))
        for i in range(0, view.shape[0], step):
            yield start + i * row, view[i : i + step]
        start += view.nbytes


def read_tensor(files: safetensors.Files, entry: safetensors.Entry, tensor: Tensor) -> None:
    """Reads a published tensor to where its views are, in their dtype; the stored one may be narrower, or float64.

    Raises:
      UserError: it holds NaN or infinities.
    """
    stored, odd = safetensors.READ[entry.dtype], 0
    for offset, view in blocks_of(tensor):
        if view.flags.c_contiguous and view.dtype == stored:
            block = view
            files.read_into(entry.path, entry.offset + offset, view)
        else:
            block = np.empty(view.shape, stored)
            files.read_into(entry.path, entry.offset + offset // view.itemsize * stored.itemsize, block)
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and found below
                block = block.astype(view.dtype, copy=False)
            copy_into(view, block)
        if not finite.is_finite(block):
            odd += finite.count_odd(block)
    if odd:
        raise finite.error(entry.path, tensor.name, odd, math.prod(tensor.shape))


# ------------------------------------------------------------------------------------------------ import


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checked Hugging Face folder: nothing of the weights is read yet.

    Attributes:
      path: the folder.
      config: our config of it.
      entries: where each published tensor lies.
      dtypes: dtype of each leaf of ours.
    """

    path: Path
    config: ModelConfig
    entries: Mapping[str, safetensors.Entry]
    dtypes: Mapping[str, np.dtype]


def open_folder(path: str | Path, config: ModelConfig) -> Folder:
    """Checks every tensor of the folder against the model, by name, shape and dtype.

    A leaf whose layers are stored in several dtypes gets one that holds them all (bfloat16 and float16: float32), and
    float64 becomes float32; a line on stderr says so. A tied model may store either name of its table.

    Raises:
      UserError: naming every tensor that is missing, not part of the model, misshapen or of a dtype that is no float of 16,
        32 or 64 bits.
    """
    path = Path(path)
    entries = {k: v for k, v in safetensors.find(path).items() if not _IGNORED.match(k)}
    wanted = published_tensors(config)
    if config.tied and HEAD in entries:
        if TABLE not in entries:
            entries[TABLE] = entries[HEAD]
        _check_tied(path, entries)
        del entries[HEAD]
    both = [k for k in wanted if k in entries]
    lists = {
        "missing": [k for k in wanted if k not in entries],
        "not in this model": [k for k in entries if k not in wanted],
        "misshapen": [
            f"{k} {list(entries[k].shape)} instead of {list(wanted[k])}" for k in both if entries[k].shape != wanted[k]
        ],
        "of a dtype other than F64, F32, BF16, F16": [
            f"{k} {entries[k].dtype}" for k in both if entries[k].dtype not in safetensors.READ
        ],
    }
    problems = [f"{len(names)} tensors {what}: {', '.join(names)}" for what, names in lists.items() if names]
    if problems:
        raise UserError(f"{path} does not fit its config.json ({config.name}): {'; '.join(problems)}")
    return Folder(path, config, entries, _leaf_dtypes(path, config, entries))


def _leaf_dtypes(path: Path, cfg: ModelConfig, entries: Mapping[str, safetensors.Entry]) -> dict[str, np.dtype]:
    """The dtype of each leaf; a line on stderr where it is not the stored one."""
    found: dict[str, set[str]] = {}
    for layer, leaf, spec in parts_of(cfg):
        shape = spec.shape if layer is None else spec.shape[1:]
        empty = np.broadcast_to(np.zeros((), np.float32), shape)
        names = (t.name for t in tensors_of(leaf, spec, cfg, empty, layer))
        found.setdefault(leaf, set()).update(entries[n].dtype for n in names)
    for what, leaves in (
        ("float64, and are read as float32", [leaf for leaf, kinds in found.items() if "F64" in kinds]),
        ("several dtypes, and are read as the wider one", [leaf for leaf, kinds in found.items() if len(kinds) > 1]),
    ):
        if leaves:
            print(f"note: {path}: weights of {', '.join(leaves)} are stored in {what}", file=sys.stderr)
    return {
        leaf: safetensors.DTYPES[min(kinds)] if len(kinds) == 1 and min(kinds) in safetensors.DTYPES else np.dtype("f4")
        for leaf, kinds in found.items()
    }


def _check_tied(path: Path, entries: Mapping[str, safetensors.Entry]) -> None:
    """A stored output matrix of a tied model must be the embedding."""
    head, table = entries[HEAD], entries[TABLE]
    if head is table:
        return
    same = (head.dtype, head.shape) == (table.dtype, table.shape) and head.dtype in safetensors.READ
    if same:
        with safetensors.Files({head.path, table.path}) as files:
            step = max(1, BLOCK_BYTES // (head.shape[1] * 4))
            for row in range(0, head.shape[0], step):
                parts = []
                for entry in (head, table):
                    dtype = safetensors.READ[entry.dtype]
                    part = np.empty((min(step, head.shape[0] - row), head.shape[1]), dtype)
                    files.read_into(entry.path, entry.offset + row * head.shape[1] * dtype.itemsize, part)
                    parts.append(part.view(np.uint8))
                same = same and np.array_equal(parts[0], parts[1])
    if not same:
        raise UserError(
            f"{path}: config.json ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight; set "
            "tie_word_embeddings to false"
        )


def read_part(folder: Folder, leaf: str, layer: int | None) -> np.ndarray:
    """One layer of a leaf; all of a leaf without layers where `layer` is None."""
    spec = leaves_of(folder.config)[leaf]
    part = np.empty(spec.shape if layer is None else spec.shape[1:], folder.dtypes[leaf])
    with safetensors.Files({e.path for e in folder.entries.values()}) as files:
        for tensor in tensors_of(leaf, spec, folder.config, part, layer):
            read_tensor(files, folder.entries[tensor.name], tensor)
    return part


def read_parts(folder: Folder, leaf: str, put: Callable[[int | None, np.ndarray], None]) -> None:
    """Reads a leaf layer by layer, in a few threads, and gives each layer (or, unstacked, the whole) to `put`."""
    layers = leaves_of(folder.config)[leaf].layers
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda layer: put(layer, read_part(folder, leaf, layer)), layers):
            pass


# ------------------------------------------------------------------------------------------------ export


def write_params(
    folder: Path,
    cfg: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    read: Callable[[str, int | None], np.ndarray],
    factors: Mapping[str, float] | None = None,
) -> None:
    """Writes the published safetensors of a model into `folder`, a layer at a time.

    Args:
      folder: exists; gets `model.safetensors`, or shards and their index.
      cfg: the model.
      dtypes: of each leaf.
      read: (leaf, layer) -> that part of the parameters, C-contiguous.
      factors: of `folding`, multiplied into the leaves they name.
    """
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts = list(parts_of(cfg))
    for layer, leaf, spec in parts:
        empty = np.broadcast_to(np.zeros((), dtypes[leaf]), spec.shape if layer is None else spec.shape[1:])
        for tensor in tensors_of(leaf, spec, cfg, empty, layer):
            names[tensor.name] = (safetensors.NAMES[np.dtype(dtypes[leaf])], tensor.shape)
    entries = safetensors.plan(names, folder)

    def one(item: tuple[int | None, str, ParamSpec]) -> None:
        layer, leaf, spec = item
        part = scaled(leaf, read(leaf, layer), cfg, factors or {})
        for tensor in tensors_of(leaf, spec, cfg, part, layer):
            entry = entries[tensor.name]
            for offset, view in blocks_of(tensor):
                block = view
                if not view.flags.c_contiguous:
                    block = np.empty(view.shape, view.dtype)
                    copy_into(block, view)
                files.write_at(entry.path, entry.offset + offset, block)

    paths = {e.path for e in entries.values()}
    with safetensors.Files(paths, write=True) as files, ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(one, parts):
            pass


def folding(cfg: ModelConfig) -> dict[str, float]:
    """muP's multipliers that the published formats cannot state, as factors on leaves: {leaf: factor}.

    "queries" is the query part of qkv. Exact up to rounding, for every multiplier acts on something linear. A tied table
    cannot take two factors: those models state theirs in the config (phi-3-small), or have none.
    """
    if cfg.mup is None:
        return {}
    plain = dataclasses.replace(cfg, mup=None).softmax_scale
    factors = {"queries": cfg.softmax_scale / plain, "blocks.out": cfg.residual_multiplier}
    factors["blocks.down"] = cfg.residual_multiplier
    if cfg.layout != "phi3small":
        factors |= {"embedding": cfg.embed_multiplier, "unembedding": 1.0 / (cfg.logit_divisor * cfg.width_ratio)}
    return {k: v for k, v in factors.items() if v != 1.0}


def scaled(leaf: str, part: np.ndarray, cfg: ModelConfig, factors: Mapping[str, float]) -> np.ndarray:
    factor = factors.get(leaf.rsplit(".", 1)[0] if leaf.startswith("blocks.") else leaf, 1.0)
    if leaf.startswith("blocks.qkv") and "queries" in factors:
        part = part.copy()
        part[..., : cfg.queries_per_kv, :] *= np.asarray(factors["queries"], part.dtype)
    return part if factor == 1.0 else part * np.asarray(factor, part.dtype)


def kept_files(folder: Path) -> Iterable[Path]:
    """What travels with the weights: config, tokenizer, template, code of the model; no weights, indexes or adapters."""
    kinds = {".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md"}
    for path in sorted(folder.iterdir()):
        if (
            path.is_file()
            and path.suffix in kinds
            and not path.name.endswith(".index.json")
            and not (safetensors.is_adapter(path.name))
        ):
            yield path
