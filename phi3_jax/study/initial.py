"""Weights that the runs of a study start from: checked before anything is written, and known by their content."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax import distributed
from phi3_jax.configs import ModelConfig, RunConfig
from phi3_jax.errors import UserError
from phi3_jax.family import GIVEN, RELEASED
from phi3_jax.interop import loading
from phi3_jax.interop.content import content
from phi3_jax.models.decoder import logit_scale
from phi3_jax.models.lora import adapter_specs
from phi3_jax.models.spec import shaped
from phi3_jax.study.arms import parts
from phi3_jax.study.data import data_arguments, vocabulary_of
from phi3_jax.study.runs import lora_of, model_of, recorded, require_frozen

# What the numbers of a model stand for: the same weights under others are another model.
_SAME = (
    "vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "tied", "bias", "norm", "norm_eps", "activation",
    "gegelu_limit", "embed_multiplier", "residual_multiplier", "softmax_scale", "dummy_tokens", "experts", "vision",
)  # fmt: skip
# What a model attends to, which a run may change on purpose.
_FREE = ("context", "window_keys", "rope_base", "longrope", "blocksparse")


def check(config: Any, scale: str, folder: Path) -> tuple[str, str]:
    """(content of the weights `train.init`, a line about them), both empty where the runs start from random ones.

    Writes nothing. Weights that are gone are known by what the study in `folder` has written down of them.

    Raises:
      UserError: no usable weights there; of another shape, function or vocabulary than a run of the study; not finite.
    """
    init = config.train.init
    require_frozen(config)
    if not init:
        return "", ""
    gone = not Path(init.removeprefix("hf:")).exists()
    if gone and scale == GIVEN:
        if init in RELEASED:
            raise UserError(f"{init} is a name to plan with; to train, name a run or hf:FOLDER with its weights")
        raise UserError(
            f"{init} is gone: scale=given takes model, tokenizer and template from it; put it back to go on"
        )
    if gone and (known := recorded(folder, init)):
        return known, f"start: {init} is gone; the study goes on from its checkpoints"
    weights, notes = loading.open_weights(init), []
    for part in parts(config, scale):
        vocabulary = vocabulary_of(data_arguments(part.config, scale, 1))
        for size in part.config.sizes:
            model = model_of(part.config, scale, size, vocabulary["vocab_size"])
            notes += require_fit(weights.config, model, init)
            lora_of(part.config, model)
        if weights.vocabulary not in (None, vocabulary["fingerprint"]):
            raise UserError(
                f"train.init={init} has another vocabulary than the data: its ids stand for other tokens; give data of its "
                "own tokenizer (config.data.tokenizer), or other weights"
            )
    found = content(weights)
    changes = f"; changed: {'; '.join(dict.fromkeys(notes))}" if notes else ""
    return found, f"start: weights {found} of {init}; optimiser and schedule start anew{changes}"


def require_fit(source: ModelConfig, model: ModelConfig, init: str) -> list[str]:
    """What a run of `model` attends to otherwise than the source of its weights did, as lines `window_keys: 9 -> None`.

    Raises:
      UserError: the weights have another shape, or the model computes something else with them; names each difference.
    """

    def all_of(cfg: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(cfg, name) for name in names}

    old, new = (all_of(cfg, _SAME) | {"logit_scale": logit_scale(cfg)} for cfg in (source, model))
    wrong = [f"{name}={old[name]} instead of {new[name]}" for name in old if not _equal(old[name], new[name])]
    if wrong:
        raise UserError(
            f"train.init={init} ({source.label}) does not fit {model.label}, which is to start from it: "
            f"{', '.join(wrong)}; say the words of the run that made it, or name other weights"
        )
    old, new = all_of(source, _FREE), all_of(model, _FREE)
    return [f"{name}: {old[name]} -> {new[name]}" for name in _FREE if old[name] != new[name]]


def _equal(a: Any, b: Any) -> bool:
    """Equal, for multipliers up to the rounding of their formulas."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-12 * max(abs(a), abs(b))
    return bool(a == b)


def reader(run: RunConfig) -> Callable[[Any], Any] | None:
    """What gives a run the weights of `train.init`, for `train_run`; None where it takes none.

    They are its first parameters, which forks have from their trunk, or the frozen ones under its adapters.
    """
    if run.lora and run.init:
        base = (run.lora.base, run.lora.base_content) if run.lora.base else (run.init, run.init_content)
        return functools.partial(_read, run, *base)
    return functools.partial(_read, run, run.init, run.init_content) if run.init and not run.parent else None


def adapter_reader(run: RunConfig) -> Callable[[Any], Any] | None:
    """What gives a run the adapters that it goes on with, for `train_run`; None where it begins with new ones."""
    goes_on = run.lora and run.lora.base and not run.parent
    return functools.partial(_read_adapters, run) if goes_on else None


def _read(run: RunConfig, init: str, expected: str, shardings: Any) -> Any:
    weights = loading.open_weights(init)
    require_fit(weights.config, run.model, init)
    _require_content(run, init, distributed.from_first(lambda: content(weights)), expected)
    dtype = jnp.float32
    if run.lora:
        dtype = jnp.dtype(run.base_dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    return loading.place(run.model, weights.dtypes, weights.read, shardings, dtype)


def _read_adapters(run: RunConfig, shardings: Any) -> Any:
    """The adapters that a run goes on with."""
    weights = loading.open_weights(run.init)
    _require_content(run, run.init, content(weights), run.init_content)
    assert weights.adapter and run.lora
    values = {name: np.asarray(value, np.float32) for name, value in weights.adapter.values.items()}
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
        shaped(adapter_specs(run.model, run.lora), values), shardings,
    )  # fmt: skip


def _require_content(run: RunConfig, init: str, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{init} holds other weights ({found}) than {run.name} starts from ({expected}); put those back, "
            "or choose another --workdir"
        )
