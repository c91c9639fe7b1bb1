"""Adapter folders of PEFT: adapter_config.json and adapter_model.safetensors, in both directions.

A and B of a fused projection are stored as [rank, in] and [out, rank], rows of B in the published order of the fused
matrix. Adapters of its parts apart (q_proj, k_proj, v_proj; gate_proj, up_proj) become one of the fused matrix: their A
above one another, their B as blocks, of the sum of their ranks and exactly the same product. What an adapter brings that is
not understood here is refused, never left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from phi3_jax import finite
from phi3_jax.configs import LoraConfig, ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.foreign import Fields, is_neutral
from phi3_jax.interop import adapters, huggingface, safetensors
from phi3_jax.interop.adapters import Adapter
from phi3_jax.models import lora
from phi3_jax.models.spec import ParamSpec
from phi3_jax.records import files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields that change no product of a finished adapter: how it was trained, by what, and what its tensors say themselves.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Initialisations that write into the base's weights too (PiSSA, OLoRA, ..).
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_WHY = {
    "lora_magnitude_vector": "DoRA, which rescales the weights",
    "lora_embedding_A": "an adapter of the embeddings",
    "lora_embedding_B": "an adapter of the embeddings",
    "modules_to_save": "whole modules saved beside the adapters",
}


class Module(NamedTuple):
    """An adapter as it is stored: a [rank, in], b [out, rank]; `part` counts in a fused matrix, None is all of it."""

    part: int | None
    a: np.ndarray
    b: np.ndarray
    scale: float


# ------------------------------------------------------------------------------------------------ import


def read(folder: Path, cfg: ModelConfig, base: str, base_content: str) -> Adapter:
    """The adapters of a PEFT folder for a model.

    Args:
      folder: of PEFT's files.
      cfg: the model.
      base, base_content: the weights that it is taken to be for.

    Raises:
      UserError: no such folder, or an adapter that is not for this model or does more than low-rank adapters do.
    """
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} holds no adapter of PEFT ({CONFIG} and {WEIGHTS}); give a folder that does")
    given = _config(path, cfg)
    made_for = str(files.read_json(path).get("base_model_name_or_path") or "a model that it does not name")
    modules = _modules(folder / WEIGHTS, cfg, given, made_for)
    fused: dict[tuple[str, int], Module] = {
        (kind, layer): _fused(found, kind, cfg, layer) for (kind, layer), found in sorted(modules.items())
    }
    apart = any(module.part is not None for found in modules.values() for module in found)
    how = _described(fused, cfg) if apart else _as_given(fused, cfg, given)
    return Adapter(cfg, how, _stacked(fused, cfg, how), base, base_content)


def is_fused(folder: Path, cfg: ModelConfig) -> bool:
    """Whether all adapters of a folder are of whole projections."""
    places = dict(_places(cfg))
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in safetensors.header(folder / WEIGHTS)}
    return all(places[module][2] is None for module in modules)


def _config(path: Path, cfg: ModelConfig) -> LoraConfig:
    """The ranks and scales that adapter_config.json states, of all projections."""
    fields = Fields(files.read_json(path), path)
    kind = fields.text("peft_type", "LORA")
    if kind != "LORA":
        raise fields.refuse("peft_type", "is not supported; low-rank adapters (LORA) are")
    init = fields.raw("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise fields.refuse(
            "init_lora_weights", "changes the base's weights as well; convert it to a plain adapter with PEFT"
        )
    of_rank, of_alpha = fields.inside("rank_pattern"), fields.inside("alpha_pattern")
    found = LoraConfig(
        fields.whole("r", 8, low=1), fields.number("lora_alpha", 8.0, above=0), fields.flag("use_rslora", False),
        tuple(lora.projections(cfg, eyes=False)),
        tuple((key, of_rank.whole(key, low=1)) for key in of_rank.names()) if of_rank else (),
        tuple((key, of_alpha.number(key, above=0)) for key in of_alpha.names()) if of_alpha else (),
    )  # fmt: skip
    known = {*_HARMLESS, "init_lora_weights", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "use_rslora"}
    for name in fields.names():
        if name not in known and not is_neutral(name, fields.raw(name)):
            raise fields.refuse(
                name, "is not understood here, and an adapter is never read in part; merge it with PEFT"
            )
    return found


def _modules(path: Path, cfg: ModelConfig, given: LoraConfig, made_for: str) -> dict[tuple[str, int], list[Module]]:
    """{(projection, layer): its adapters} of a file, checked by name, shape and rank."""
    entries = safetensors.header(path)
    places = dict(_places(cfg))
    halves: dict[str, dict[str, np.ndarray]] = {}
    with safetensors.Files([path]) as opened:
        for name, entry in entries.items():
            module, _, rest = name.removeprefix(PREFIX).rpartition(".lora_")
            if not name.startswith(PREFIX) or rest not in ("A.weight", "B.weight"):
                why = next((why for part, why in _WHY.items() if part in name), "not a pair of low-rank matrices")
                raise UserError(f"{path} holds {name}: {why}; an adapter is never read in part, merge it with PEFT")
            if module in ("lm_head", "model.embed_tokens"):
                raise UserError(f"{path} holds an adapter of {module}, which has none here; merge it with PEFT")
            if module not in places:
                why = f"than {cfg.label}, which has no {module}{nearest(module, places)}"
                raise UserError(f"{path} is for another base ({made_for}) {why}")
            if entry.dtype not in safetensors.READ:
                raise UserError(f"{path}: {name} is {entry.dtype}; adapters are F32, BF16, F16 or F64")
            array = np.empty(entry.shape, safetensors.READ[entry.dtype])
            opened.read_into(entry.path, entry.offset, array)
            finite.require(array, path, name)
            halves.setdefault(module, {})[rest[0]] = array.astype(np.float32) if entry.dtype == "F64" else array
    if not halves:
        raise UserError(f"{path} holds no adapters; its target_modules matched nothing")
    found: dict[tuple[str, int], list[Module]] = {}
    for module, pair in halves.items():
        kind, layer, part, fan_in, fan_out = places[module]
        if len(pair) < 2:
            raise UserError(
                f"{path} holds half of the adapter of {module}: lora_{'B' if 'A' in pair else 'A'} is missing"
            )
        a, b = pair["A"], pair["B"]
        rank = lora.of_module(given.rank_pattern, module, given.rank)
        if a.shape != (rank, fan_in) or b.shape != (fan_out, rank):
            raise UserError(
                f"{path} is for another base ({made_for}) than {cfg.label}: the adapter of {module} is {list(a.shape)} and "
                f"{list(b.shape)} instead of {[rank, fan_in]} and {[fan_out, rank]}"
            )
        alpha = lora.of_module(given.alpha_pattern, module, given.alpha)
        scale = alpha / (math.sqrt(rank) if given.rslora else rank)
        found.setdefault((kind, layer), []).append(Module(part, a, b, scale))
    return found


def _places(cfg: ModelConfig) -> Iterator[tuple[str, tuple[str, int, int | None, int, int]]]:
    """(path, (projection, layer, part or None, inputs, outputs)) of every module that can have an adapter."""
    for kind, spec in lora.projections(cfg, eyes=False).items():
        fan_in = math.prod(spec.shape[i] for i in spec.inputs)
        fan_out = math.prod(spec.shape[i] for i in spec.outputs)
        names = lora.APART.get(kind, ()) if cfg.layout == "phi3" else ()
        for layer in range(cfg.layers):
            path = lora.published(spec, layer)
            yield path, (kind, layer, None, fan_in, fan_out)
            for part, (name, rows) in enumerate(zip(names, part_rows(cfg, kind), strict=False)):
                yield f"{path.rpartition('.')[0]}.{name}", (kind, layer, part, fan_in, rows)


def part_rows(cfg: ModelConfig, kind: str) -> tuple[int, ...]:
    """Rows of the parts of a published fused matrix, in their order."""
    keys = cfg.kv_heads * cfg.head_dim
    return {"qkv": (cfg.inner, keys, keys), "gate_up": (cfg.mlp, cfg.mlp)}.get(kind, ())


def _fused(found: list[Module], kind: str, cfg: ModelConfig, layer: int) -> Module:
    """One adapter of the adapters of a fused matrix's parts."""
    if found[0].part is None and len(found) == 1:
        return found[0]
    if any(module.part is None for module in found):
        where = lora.published(lora.projections(cfg, eyes=False)[kind], layer)
        raise UserError(f"the adapter has {where} and parts of it apart; save it with one of both")
    rows = part_rows(cfg, kind)
    rank, scale, dtype = sum(m.a.shape[0] for m in found), found[0].scale, np.result_type(*(m.b for m in found))
    b, at = np.zeros((sum(rows), rank), np.float32 if any(m.scale != scale for m in found) else dtype), 0
    for module in sorted(found, key=lambda m: m.part or 0):
        first, size = sum(rows[: module.part]), module.a.shape[0]
        factor = module.scale / scale
        b[first : first + rows[module.part or 0], at : at + size] = module.b if factor == 1 else module.b * factor
        at += size
    a = np.concatenate([m.a for m in sorted(found, key=lambda m: m.part or 0)])
    return Module(None, a, b, scale)


def _as_given(fused: Mapping[tuple[str, int], Module], cfg: ModelConfig, given: LoraConfig) -> LoraConfig:
    """The stated ranks and scales, and rank 0 of what the file does not hold."""
    kinds = tuple(kind for kind in lora.projections(cfg, eyes=False) if any(k == kind for k, _ in fused))
    missing = tuple((path, 0) for path in _absent(fused, cfg, kinds))
    return LoraConfig(
        given.rank, given.alpha, given.rslora, kinds, (*missing, *given.rank_pattern), given.alpha_pattern
    )


def _described(fused: Mapping[tuple[str, int], Module], cfg: ModelConfig) -> LoraConfig:
    """Ranks and scales as the adapters have them."""
    kinds = tuple(kind for kind in lora.projections(cfg, eyes=False) if any(k == kind for k, _ in fused))
    paths = {where: lora.published(lora.projections(cfg, eyes=False)[where[0]], where[1]) for where in fused}
    ranks = {paths[where]: module.a.shape[0] for where, module in fused.items()}
    alphas = {paths[where]: module.scale * module.a.shape[0] for where, module in fused.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    absent = tuple((path, 0) for path in _absent(fused, cfg, kinds))
    return LoraConfig(
        rank, alpha, False, kinds,
        (*absent, *((path, r) for path, r in ranks.items() if r != rank)),
        tuple((path, x) for path, x in alphas.items() if x != alpha),
    )  # fmt: skip


def _absent(fused: Mapping[tuple[str, int], Module], cfg: ModelConfig, kinds: tuple[str, ...]) -> list[str]:
    specs = lora.projections(cfg, eyes=False)
    places = [(kind, layer) for kind in kinds for layer in range(cfg.layers)]
    return [lora.published(specs[kind], layer) for kind, layer in places if (kind, layer) not in fused]


def _stacked(fused: Mapping[tuple[str, int], Module], cfg: ModelConfig, how: LoraConfig) -> dict[str, np.ndarray]:
    """The values of our tree; zeros past the rank of a layer. muP's multipliers leave B as they leave the weights."""
    values, unfold = {}, {name: 1 / factor for name, factor in huggingface.folding(cfg).items()}
    for leaf, spec in adapters.specs_of(cfg, how).items():
        _, kind, which = leaf.split(".")
        stored = {layer: m.a if which == lora.A else m.b for (k, layer), m in fused.items() if k == kind}
        value = np.zeros(spec.shape, np.result_type(*stored.values()))
        for layer, array in stored.items():
            tensor, start = tensor_of(leaf, spec, cfg, value[layer], layer, array.shape[which == lora.B]), 0
            for view in tensor.views:
                stop = start + view.size // array.shape[1]
                view[...] = array[start:stop].reshape(view.shape)
                start = stop
        values[leaf] = huggingface.scaled(leaf, value, cfg, unfold) if which == lora.B else value
    return values


# ------------------------------------------------------------------------------------------------ export


def tensor_of(
    leaf: str, spec: ParamSpec, cfg: ModelConfig, part: np.ndarray, layer: int, rank: int
) -> huggingface.Tensor:
    """The stored matrix of one layer of A or B, as views of `part`."""
    _, kind, which = leaf.split(".")
    part = part[..., :rank] if which == lora.A else part[:rank]
    named = (
        leaf if (kind in ("qkv", "gate_up") and which == lora.B) or (kind == "out" and which == lora.A) else "matrix"
    )
    (tensor,) = huggingface.tensors_of(named, spec, cfg, part, layer)
    return tensor


def matrices(found: Adapter, factors: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
    """{PEFT's name: matrix} of adapters, sorted; `factors` are those of `huggingface.folding`."""
    arrays: dict[str, np.ndarray] = {}
    for layer in range(found.model.layers):
        for leaf, spec in adapters.specs_of(found.model, found.how).items():
            rank = lora.ranks(found.model, found.how, leaf.split(".")[1])[layer]
            if not rank:
                continue
            part = found.values[leaf][layer]
            part = huggingface.scaled(leaf, part, found.model, factors or {}) if leaf.endswith(lora.B) else part
            tensor = tensor_of(leaf, spec, found.model, part, layer, rank)
            rows = [view.reshape(-1, tensor.shape[1]) for view in tensor.views]
            arrays[PREFIX + tensor.name] = np.ascontiguousarray(np.concatenate(rows).reshape(tensor.shape))
    return dict(sorted(arrays.items()))


def write(folder: Path, found: Adapter, base_name: str) -> int:
    """Writes adapters as PEFT's files into a folder; bytes of the matrices. muP's multipliers go where the weights' go."""
    if blind := [kind for kind in found.how.targets if "." in kind]:
        raise UserError(
            f"adapters of {', '.join(blind)} have no form in PEFT's files here; write the model with them merged: convert "
            "--merge"
        )
    arrays = matrices(found, huggingface.folding(found.model))
    forms = {name: (safetensors.NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    entries = safetensors.plan(forms, folder, single=WEIGHTS)
    with safetensors.Files([folder / WEIGHTS], write=True) as opened:
        for name, entry in entries.items():
            opened.write_at(entry.path, entry.offset, arrays[name])
    files.write_json(folder / CONFIG, config_of(found, base_name), indent=2)
    return sum(array.nbytes for array in arrays.values())


def config_of(found: Adapter, base_name: str) -> dict[str, Any]:
    """adapter_config.json, which PEFT reads."""
    cfg, how = found.model, found.how
    kinds = lora.projections(cfg, eyes=False)
    places = [(kind, layer) for kind in how.targets for layer in range(cfg.layers)]
    there = [lora.published(kinds[kind], layer) for kind, layer in places if lora.ranks(cfg, how, kind)[layer]]
    whole = len(there) == len(places)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": how.rank,
        "lora_alpha": int(how.alpha) if how.alpha == int(how.alpha) else how.alpha, "use_rslora": how.rslora,
        "target_modules": [lora.published(kinds[kind]) for kind in how.targets] if whole else there,
        "rank_pattern": {key: rank for key, rank in how.rank_pattern if rank}, "alpha_pattern": dict(how.alpha_pattern),
        "lora_dropout": 0.0, "bias": "none", "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
