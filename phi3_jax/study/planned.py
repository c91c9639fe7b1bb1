"""What a plan is about: the full runs of a config, its proxies, or the post-training run of a given model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.chips import Topology
from phi3_jax.configs import LoraConfig, ModelConfig
from phi3_jax.data import images
from phi3_jax.errors import UserError
from phi3_jax.models.spec import count_params
from phi3_jax.study import runs as studies
from phi3_jax.study.data import WINDOWS, data_arguments, full_window
from phi3_jax.study.full import full_runs, optimizer_of

UNSAID = 100_000_000  # tokens that a plan counts for where no data say how many there are
SHORTEST = 4096  # sequence length of such a plan, or the model's context where that is shorter


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of post-training as they are packed: training windows, of a length in tokens, with pairs and tiles in them."""

    windows: int
    window: int
    pairs: int
    tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to plan.

    Attributes:
      model: what is trained.
      params: its parameters.
      tokens: the run's budget, in positions.
      length: of a sequence, in tokens.
      batch_tokens: of a global batch; None: open.
      optimizer: its name.
      value_bytes: bytes of a value in the compute dtype.
      lora: adapters that are trained in the place of the parameters, or None.
      frozen_bytes: bytes of a value of those then.
      pairs: it learns from preference pairs.
      given: it is post-training, and so has `rows` where the data are named.
      reference: where the loss has its reference from: "kept", one pass over the data before the run; "frozen", one forward
        pass of each step; or nowhere.
      parts: of a phi-3-vision, what is trained; none: all.
      tiles: of pictures, in a sequence on average; where no data say, those of one square picture.
    """

    model: ModelConfig
    params: int
    tokens: float
    length: int
    batch_tokens: int | None
    optimizer: str
    value_bytes: int
    lora: LoraConfig | None = None
    frozen_bytes: int = 2
    pairs: bool = False
    given: bool = False
    rows: Rows | None = None
    reference: str = ""
    parts: tuple[str, ...] = ()
    tiles: float = 0.0

    @property
    def how(self) -> dict[str, Any]:
        """The fields of a `Setup` that no way to train it changes."""
        names = ("optimizer", "value_bytes", "lora", "frozen_bytes", "pairs", "parts", "tiles")
        return {name: getattr(self, name) for name in names}


def jobs(config: Any, topology: Topology) -> list[Job]:
    """What a config trains: proxies where it names their scale, else released models.

    Raises:
      UserError: a size without a released model; see `full_runs`, `proxied` and `given`.
    """
    if config.scale == family.GIVEN:
        return [given(config, topology)]
    if config.scale in family.SCALES:
        return [proxied(config, size, topology) for size in config.sizes]
    found = full_runs(config, "full")
    if not found:
        raise UserError(f"sizes={','.join(config.sizes)} have no released model to plan; use mini, small or medium")
    width = 4 if config.train.dtype == "float32" else 2
    batch, length, name = config.train.batch_tokens or None, full_window(config), optimizer_of(config)
    return [Job(run.model, run.params, run.tokens, length, batch, name, width) for run in found]


def proxied(config: Any, size: str, topology: Topology) -> Job:
    """The longest run of one proxy on text, with the vocabulary of phi-3-mini: a plan reads no data.

    Raises:
      UserError: a size that is not on the ladder; see `budgets_of`.
    """
    scale = config.scale
    model = studies.model_of(config, scale, size, family.published(family.TRIO[0]).vocab)
    length = config.data.window or WINDOWS[scale]
    batch = studies.batch_windows(config, scale, {"window": length, "kind": "text"}, topology.devices)
    half = studies.is_large(model) and topology.chip.platform != "cpu"
    width = 4 if studies.dtype_of(config, half) == "float32" else 2
    return Job(
        model, count_params(model), max(studies.budgets_of(config, scale, size)), length, batch * length,
        config.optim.name or family.PROXY_OPTIM.name, width,
    )  # fmt: skip


def given(config: Any, topology: Topology) -> Job:
    """The run that goes on from given weights, of which a plan needs config.json alone.

    `train.init` may be a member's name too, for weights that are not there yet. Data are read where they are named.

    Raises:
      UserError: no weights named; nothing usable there; data without the model's tokenizer; see `lora_of`.
    """
    init, train = config.train.init, config.train
    if not init:
        raise UserError("scale=given takes the model of train.init, which is not set; add init=RUN or hf:FOLDER")
    model = family.trained(named(init, config.context))
    rows = _packed(config) if config.data.source not in ("", "chats:") else None
    length = rows.window if rows else config.data.window or min(model.context, SHORTEST)
    batch = studies.batch_windows(config, config.scale, {"window": length, "kind": "chats"}, topology.devices)
    once = float(rows.windows * length if rows else UNSAID)
    if config.tokens != "matched":
        once = studies.token_budget(config.tokens, "")
    on_cpu, pairs = topology.chip.platform == "cpu", config.data.rows == "preferences"
    half = studies.dtype_of(config, studies.is_large(model) and not on_cpu) == "bfloat16"
    frozen = 4 if (train.base_dtype or ("float32" if on_cpu else "bfloat16")) == "float32" else 2
    return Job(
        model, count_params(model), math.ceil((train.epochs or 1) * once), length, batch * length,
        config.optim.name or family.PROXY_OPTIM.name, 2 if half else 4, studies.lora_of(config, model), frozen, pairs,
        True, rows, _reference(config) if pairs else "", tuple(train.parts), _tiles(config, model, rows),
    )  # fmt: skip


def _tiles(config: Any, model: ModelConfig, rows: Rows | None) -> float:
    """See `Job.tiles`."""
    if model.vision is None:
        return 0.0
    crops = config.data.crops or model.vision.crops
    return rows.tiles / rows.windows if rows else float(images.grid_of(1, 1, crops).tiles)


def _reference(config: Any) -> str:
    """See `Job.reference`."""
    if config.preference.loss in ("orpo", "simpo"):
        return ""
    return "frozen" if config.preference.on_the_fly else "kept"


def named(init: str, context: str = "") -> ModelConfig:
    """The model of a run or hf:FOLDER, or a released one by its member's name."""
    from phi3_jax.interop import loading  # brings orbax, which other plans do without

    if init in family.RELEASED and not Path(init).exists():
        return family.published(init, context or None)
    return loading.config_of(init)


def _packed(config: Any) -> Rows:
    """The rows of a config's data, read and packed, and nothing written."""
    from phi3_jax.data import sources

    if config.train.init in family.RELEASED and not Path(config.train.init).exists():
        raise UserError(
            f"model={config.train.init} has no tokenizer to count the data with; name hf:FOLDER or a run, or leave data out"
        )
    arguments: Mapping[str, Any] = data_arguments(config, config.scale, 0)
    recipe = sources.recipe(arguments["data"], **{k: v for k, v in arguments.items() if k != "data"})
    entries, pairs, tiles, seen = [], 0, 0, recipe.pictures
    for part in recipe.sources:
        entries.append({"windows": 0, "weight": part.weight})
        for some in part.windows:
            entries[-1]["windows"] += len(some)
            pairs += int((some.segments.max(axis=1, initial=0) // 2).sum()) if recipe.loss == "preference" else 0
            for one in some.seen if seen else ():
                assert seen
                tiles += images.grid_of(*seen.size(one.picture), seen.eyes.crops, seen.eyes.tile).tiles
    return Rows(round(studies.epoch({"sources": entries})), recipe.window, pairs, tiles)
