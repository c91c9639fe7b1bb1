"""Low-rank adapters beside frozen weights: x W + s (x A) B for projections of the layers (arXiv:2106.09685).

A and B are declared from the declaration of W: A (layers, *inputs, rank), B (layers, rank, *outputs), so that they lie on a
mesh as W does, but for the rank, which is never split. A layer whose rank is smaller than the largest of its stack has
zeros in the place of the rest, which no gradient reaches. Scale, initial values and patterns are PEFT's. Of a phi-3-vision
the layers of the tower that run and the projector, which is not stacked, can have adapters too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.configs import LoraConfig, ModelConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.models.spec import ParamSpec, Tree, initial, param_specs

A, B = "lora_a", "lora_b"
# Names of parts of a fused projection, as other code bases have them apart.
APART = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


def projections(cfg: ModelConfig, eyes: bool = True) -> dict[str, ParamSpec]:
    """{"qkv": the declaration of its weight, ..} of what can have an adapter; "tower.qkv" and "projector.in" of `eyes`.

    Raises:
      UserError: a mixture of experts, which takes none here.
    """
    if cfg.experts:
        raise UserError(f"{cfg.name} is a mixture of experts, which takes no adapter here; name another model")
    kinds = ["qkv", "out", "gate_up", "down"]
    if cfg.vision and eyes:
        kinds += [*(f"tower.{kind}" for kind in ("qkv", "out", "up", "down")), "projector.in", "projector.out"]
    specs = param_specs(cfg)
    return {kind: functools.reduce(lambda node, key: node[key], path_of(kind), specs)["weight"] for kind in kinds}


def path_of(kind: str) -> tuple[str, ...]:
    """Where a projection lies in the tree of parameters."""
    part, dot, own = kind.partition(".")
    return ("blocks", kind) if not dot else ("vision", "blocks", own) if part == "tower" else ("vision", own)


def leaf_of(kind: str) -> str:
    """The name of a projection's weight in `spec.named_specs`."""
    return ".".join((*path_of(kind), "weight"))


def stacked(spec: ParamSpec) -> bool:
    """Whether a weight has layers."""
    return spec.axes[0] == "layers"


def published(spec: ParamSpec, layer: int | None = None) -> str:
    """The published name of a projection, `qkv_proj`; in a layer the module's path, `model.layers.0.self_attn.qkv_proj`."""
    path = spec.hf.removesuffix(".weight")
    return path.rpartition(".")[2] if layer is None else path.replace("{layer}", str(layer))


def targets_of(names: Sequence[str], cfg: ModelConfig) -> tuple[str, ...]:
    """The projections that names say: ours, published ones, those of the parts of a fused one, those of a part of a
    phi-3-vision ("lm", "tower", "projector"), or "all-linear".

    Raises:
      UserError: an unknown name, with the nearest; some parts of a fused projection without the others.
    """
    kinds = projections(cfg)
    of_text = projections(cfg, eyes=False)
    fused = {kind: kind for kind in kinds} | {published(spec): kind for kind, spec in of_text.items()}
    groups = {}
    if cfg.vision:
        groups = {part: [k for k in kinds if k.startswith(f"{part}.")] for part in ("tower", "projector")}
        groups["lm"] = [*of_text]
    parts = {name: kind for kind, names in APART.items() for name in names if name not in fused}
    found = set(kinds) if "all-linear" in names else set()
    for name in names:
        if name in groups:
            found |= {*groups[name]}
            continue
        kind = fused.get(name) or parts.get(name)
        if kind is None and name != "all-linear":
            known = [*fused, *parts, *groups, "all-linear"]
            raise UserError(f"{cfg.label} has no projection {name!r} for an adapter{nearest(name, known)}")
        if name in parts and (missing := [other for other in APART[parts[name]] if other not in names]):
            raise UserError(
                f"{name} is a part of {published(kinds[parts[name]])}, which has one adapter here; name that, or "
                f"{', '.join(missing)} too"
            )
        found |= {kind} if kind else set()
    return tuple(kind for kind in kinds if kind in found)


def matches(pattern: str, module: str) -> bool:
    """Whether one of PEFT's patterns means the module of a path."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def of_module(patterns: Sequence[tuple[str, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that means the module of a path."""
    return next((value for pattern, value in patterns if matches(pattern, module)), default)


def ranks(cfg: ModelConfig, how: LoraConfig, kind: str) -> tuple[int, ...]:
    """The rank of a projection's adapter in each layer (of one that is not stacked, once); 0 where it has none."""
    spec = projections(cfg)[kind]
    return tuple(
        of_module(how.rank_pattern, published(spec, layer), how.rank) if kind in how.targets else 0
        for layer in range(_depth(spec))
    )


def _depth(spec: ParamSpec) -> int:
    return spec.shape[0] if stacked(spec) else 1


def scales(cfg: ModelConfig, how: LoraConfig, kind: str) -> np.ndarray:
    """(layers,) float32, (1,) of what is not stacked: what B A is multiplied with."""
    spec, found = projections(cfg)[kind], ranks(cfg, how, kind)
    alphas = [of_module(how.alpha_pattern, published(spec, layer), how.alpha) for layer in range(_depth(spec))]
    return np.array(
        [a / (math.sqrt(r) if how.rslora else r) if r else 0.0 for a, r in zip(alphas, found, strict=True)], np.float32
    )


def _at(values: tuple[Any, ...], dims: tuple[int, ...]) -> list[Any]:
    return [values[i] for i in dims]


def adapter_specs(cfg: ModelConfig, how: LoraConfig) -> Tree:
    """Tree of `ParamSpec` of the adapters, {"blocks": {"qkv": {"lora_a": .., "lora_b": ..}, ..}}, as `path_of` says.

    A starts uniform within 1 / sqrt(fan_in), PEFT's (Kaiming's with a = sqrt 5), B at zero.
    """
    tree: Tree = {}
    for kind, spec in projections(cfg).items():
        rank = max(ranks(cfg, how, kind))
        if not rank:
            continue
        fan_in = math.prod(spec.shape[i] for i in spec.inputs)
        lead, named = ((spec.shape[0],), ("layers",)) if stacked(spec) else ((), ())
        a_shape, b_shape = (
            (*lead, *_at(spec.shape, spec.inputs), rank),
            (*lead, rank, *_at(spec.shape, spec.outputs)),
        )
        a_axes, b_axes = (*named, *_at(spec.axes, spec.inputs), None), (*named, None, *_at(spec.axes, spec.outputs))
        *above, own = path_of(kind)
        functools.reduce(lambda node, key: node.setdefault(key, {}), above, tree)[own] = {
            A: ParamSpec(
                a_shape, a_axes, "adapter", "uniform", fan_in**-0.5, spec.hf.replace("weight", "lora_A.weight")
            ),
            B: ParamSpec(b_shape, b_axes, "adapter", "zeros", 0.0, spec.hf.replace("weight", "lora_B.weight")),
        }
    return tree


def init_adapters(cfg: ModelConfig, how: LoraConfig, seed: int) -> Tree:
    """Initial float32 adapters; what lies past a layer's rank is 0."""
    tree = initial(adapter_specs(cfg, how), seed)
    for kind, spec in projections(cfg).items():
        pair = functools.reduce(lambda node, key: node.get(key, {}), path_of(kind), tree)
        if pair and stacked(spec):
            there = np.arange(pair[A].shape[-1]) < np.array(ranks(cfg, how, kind))[:, None]
            pair[A] = pair[A] * there.reshape(spec.shape[0], *[1] * (pair[A].ndim - 2), -1)
    return tree


def joined(frozen: Tree, adapters: Tree, cfg: ModelConfig, how: LoraConfig) -> Tree:
    """The parameters of the model with the adapters beside their weights, as `layers.linear` reads them: B times s."""
    whole = frozen
    for kind in projections(cfg):
        if pair := functools.reduce(lambda node, key: node.get(key, {}), path_of(kind), adapters):
            scale = scales(cfg, how, kind)
            same = float(scale[0]) if np.all(scale == scale[0]) else scale.reshape(-1, *[1] * (pair[B].ndim - 1))
            whole = _with(whole, path_of(kind), {A: pair[A], B: pair[B] * jnp.asarray(same, pair[B].dtype)})
    return whole


def _with(tree: Tree, path: Sequence[str], more: Tree) -> Tree:
    """The tree with more entries in the mapping at a path."""
    if not path:
        return {**tree, **more}
    return {**tree, path[0]: _with(tree[path[0]], path[1:], more)}


def delta(spec: ParamSpec, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """s A B in float32 in the shape of one layer of the weight `spec`; a (*inputs, rank), b (rank, *outputs)."""
    product = np.matmul(
        np.asarray(a, np.float32).reshape(-1, a.shape[-1]), np.asarray(b, np.float32).reshape(b.shape[0], -1)
    )
    return (product * np.float32(scale)).reshape(spec.shape[1:] if stacked(spec) else spec.shape)
