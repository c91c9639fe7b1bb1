"""A study as a table of runs: from the words of a command to resolved `RunConfig`s and the folders they live in.

`training/train.py` executes what this file plans.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.configs import DataConfig, LoraConfig, ModelConfig, OptimConfig, PreferenceConfig, RunConfig, decay_start
from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import drawn
from phi3_jax.errors import UserError, nearest
from phi3_jax.experiment import SOURCE, TABLE
from phi3_jax.family import FULL_OPTIM, PROXY_OPTIM, trained
from phi3_jax.keys import parse_count
from phi3_jax.models import lora
from phi3_jax.models.flops import train_flops_per_token, train_tile_flops
from phi3_jax.models.spec import count_params
from phi3_jax.planning import memory
from phi3_jax.records.files import read_state
from phi3_jax.study.arms import parts
from phi3_jax.study.data import called
from phi3_jax.study.full import FULL_BATCH_TOKENS, FULL_BUDGET, token_budget
from phi3_jax.study.grow import grown
from phi3_jax.units import human_count

FACTS_BATCH = 44  # windows of 24 tokens: a multiple of 4, so that every batch holds 11 of facts and 33 of reasoning
TEXT_BATCH_TOKENS = {"milli": 65_536, "centi": 262_144, "deci": 1_048_576}  # below milli SMALL_BATCH_TOKENS
SMALL_BATCH_TOKENS = 2048


def plan_study(
    config: Any,
    scale: str,
    manifests: Mapping[Path, Any],
    folder: Path,
    devices: int,
    content: str | None = None,
    on_cpu: bool = True,
) -> list[RunConfig]:
    """All runs of a study in `folder`; `manifests` are those of its parts' data, by `Part.data`.

    `content` is that of the weights `train.init`; by default what the study has written down. Products of a model of a
    released size are in bfloat16, of those that are given `on_cpu` in float32.
    """
    runs, init = [], config.train.init
    for part in parts(config, scale):
        data = manifests[part.data]
        runs += plan_runs(part.config, scale, data, folder / part.data, devices, part.arm, on_cpu)
    if init:
        content = recorded(folder, init) if content is None else content
        runs = [dataclasses.replace(run, init=init, init_content=content) for run in runs]
    return grown(_under_former_names(runs, folder), folder)


def _under_former_names(runs: Sequence[RunConfig], folder: Path) -> list[RunConfig]:
    """The runs; one whose folder an older version made, named by the whole batches of its budget, keeps that name."""
    names, former = {run.name for run in runs}, {}
    for run in runs:
        name = f"{run.name.rpartition('-')[0]}-{human_count(run.budget)}"
        if name not in names and (folder / name).is_dir() and not (folder / run.name).exists():
            former[run.name] = name
    return [
        dataclasses.replace(
            run, name=former.get(run.name, run.name), parent=run.parent and former.get(run.parent, run.parent)
        )
        for run in runs
    ]


def recorded(folder: Path, init: str) -> str:
    """The content that a study in `folder` has started from, of weights that lay at `init`; "" where it has not."""
    runs = read_state(folder / "study.json").get("runs")
    found = [r.get("init_content") for r in runs if r.get("init") == init] if isinstance(runs, list) else []
    return str(found[0] or "") if found else ""


def dtype_of(config: Any, half: bool) -> str:
    """The dtype of products: what is asked for, or bfloat16 where that halves the work."""
    return config.train.dtype or ("bfloat16" if half else "float32")


def is_large(model: ModelConfig) -> bool:
    """Whether a run of it is split over devices and recomputes, unless the config says otherwise: from deci on."""
    return not model.is_proxy or model.scale == "deci"


def strategy_of(config: Any, slices: int = 1) -> str:
    """The strategy of a full-size run: `auto` is fsdp, and multislice over several slices."""
    given = config.train.strategy
    return given if given != "auto" else "multislice" if slices > 1 else "fsdp"


# ------------------------------------------------------------------------------------------------ runs


def budgets_of(config: Any, scale: str, size: str) -> list[int]:
    """Token budgets of one size, smallest first; (0,) where the data decide, of which so many epochs are asked for."""
    if config.train.epochs:
        return [0]
    given = {"budgets": config.budgets, "ratios": config.ratios, "flops": config.flops}
    if len(named := [name for name, values in given.items() if values]) > 1:
        raise UserError(f"{' and '.join(named)} are both given; each decides the tokens of every size, so give one")
    if config.budgets:
        return sorted(set(config.budgets))
    if config.ratios or config.flops:
        params = model_of(config, scale, size, 320).matrix_params  # without the embedding, and so of any vocabulary
        return sorted({round(r * params) for r in config.ratios} | {round(c / (6 * params)) for c in config.flops})
    tokens = token_budget(config.tokens, size)
    if scale != "full" and tokens >= FULL_BUDGET:
        tokens = family.REFERENCE_TOKENS[scale] * tokens / family.MATCHED_TOKENS
    return sorted({max(1, round(tokens * share)) for share in config.budget_shares})


def budget_name(tokens: int) -> str:
    """A budget in the name of a run: 1M, or in full where the short form would round it."""
    short = human_count(tokens)
    return short if parse_count(short) == tokens else str(tokens)


def _optim(config: Any, full: bool) -> OptimConfig:
    given = {k: v for k, v in config.optim.to_dict().items() if v is not None}
    return dataclasses.replace(FULL_OPTIM if full else PROXY_OPTIM, **given)


def batch_windows(config: Any, scale: str, manifest: Mapping[str, Any], devices: int) -> int:
    """Windows of a batch: what is asked for or goes with the scale, in whole rows of the mesh."""
    window, train = manifest["window"], config.train
    if train.batch_tokens:
        windows = train.batch_tokens // window
    elif scale == "full":
        windows = FULL_BATCH_TOKENS // window
    elif manifest["kind"] == "facts":
        windows = FACTS_BATCH
    else:
        windows = max(1, TEXT_BATCH_TOKENS.get(scale, SMALL_BATCH_TOKENS) // window)
    unit = max(1, devices // (train.context * train.tensor)) * train.accumulation  # rows of the mesh
    return max(unit, -(-windows // unit) * unit)


def epoch(manifest: Mapping[str, Any]) -> float:
    """Windows of a pass over the first source, with what is drawn from the others meanwhile."""
    first, *others = manifest["sources"]
    return first["windows"] * (1 + sum(other["weight"] for other in others) / first["weight"])


def plan_runs(
    config: Any,
    scale: str,
    manifest: Mapping[str, Any],
    folder: Path,
    devices: int,
    arm: str = "",
    on_cpu: bool = True,
) -> list[RunConfig]:
    """All runs of a study without arms, or of one arm; trunks before their forks.

    With WSD, the largest budget is the trunk, and every smaller one a fork that leaves it where its own decay starts.
    With cosine every budget is a run of its own.
    """
    full, train = scale == "full", config.train
    batch = batch_windows(config, scale, manifest, devices)
    per_step = batch * manifest["window"]
    source = called(config.data.source or SOURCE, folder, manifest["fingerprint"])
    data = DataConfig(source, str(folder), manifest["fingerprint"], manifest["window"], manifest["vocab"])
    optim, runs = _optim(config, full), []
    own = manifests.weighting(manifest)
    if train.weighting and manifest.get("loss") == "preference":
        raise UserError(f"train.weighting={train.weighting} says nothing of preference pairs; leave it out")
    pairs = PreferenceConfig(**config.preference.to_dict()) if manifest.get("loss") == "preference" else None
    for seed in range(config.seed, config.seed + config.seeds):
        for size in config.sizes:
            model = model_of(config, scale, size, manifest["vocab"])
            if "pictures" in manifest and model.is_proxy:
                model = family.seeing(model, drawn.EYES)
            check_data(model, manifest)
            if train.epochs:
                windows = epoch(manifest)
                budgets = [per_step * max(1, round(train.epochs * windows / batch))]
            else:
                budgets = budgets_of(config, scale, size)
            if (config.ratios or config.flops) and not config.data.repeat:
                _require_unseen(size, max(budgets), manifest)
            if budgets[0] < per_step:
                raise UserError(
                    f"a budget of {budgets[0]:,} tokens is smaller than one batch of {per_step:,}; use a larger one"
                )
            asked = {b // per_step: 0 if train.epochs else b for b in budgets}  # the largest of those of as many steps
            large = is_large(model)
            stem = f"{arm}-{model.member}-s{seed}" if arm else _stem(model, seed)
            shared = dict(
                arm=arm, model=model, optim=optim, data=data, batch_windows=batch, seed=seed,
                accumulation=train.accumulation, preference=pairs,
                lora=lora_of(config, model), base_dtype=train.base_dtype,
                parts=tuple(train.parts),
                weighting=train.weighting if train.weighting != own else "",  # a run that says the same is the same run
                dtype=dtype_of(config, large and (full or not on_cpu)),
                remat=train.remat or ("full" if large else "none"),
                strategy=strategy_of(config, train.slices) if large or train.strategy != "auto" else "dp",
                context_parallel=train.context, tensor_parallel=train.tensor, slices=train.slices,
                attention=train.attention, unroll=not large,
                log_every=train.log_every, eval_points=train.eval_points, keep_latest=train.keep_latest,
                batch_timeout=train.batch_timeout, tensorboard=train.tensorboard,
                profile=tuple(train.profile) if train.profile else None,
            )  # fmt: skip
            runs += _budget_runs(stem, asked, per_step, shared, train.checkpoint_every)
    return runs


def _require_unseen(size: str, budget: int, manifest: Mapping[str, Any]) -> None:
    """UserError where text is passed over more than once; facts are, by design, and what is fresh never is."""
    if manifest["kind"] == "facts":
        return
    whole = sum(source["weight"] for source in manifest["sources"])
    for source in manifest["sources"]:
        wanted, there = budget * source["weight"] / whole, source["windows"] * manifest["window"]
        if wanted > there:
            raise UserError(
                f"{size} needs {wanted:,.0f} tokens of {source['name']}, which has {there:,}; ask for less, give more "
                "text, or allow repetition with --config.data.repeat=true"
            )


def require_frozen(config: Any) -> None:
    """UserError where adapters are asked for that have nothing to stand beside, or an optimiser of whole matrices."""
    if config.preference.on_the_fly and (config.lora.continued or config.lora.rank is None):
        what = "goes on with adapters" if config.lora.continued else "trains all weights"
        raise UserError(
            f"preference.on_the_fly reads the frozen weights as the reference, and this run {what}: the weights it starts "
            "from are nowhere in it; leave it out, and one pass before the first step makes the reference"
        )
    if config.lora.rank is None and not config.lora.continued:
        return
    if not config.train.init:
        raise UserError("adapters (lora) need weights to stand beside; name them with train.init")
    if config.optim.name == "muon":
        raise UserError("optim.name=muon learns whole matrices, not adapters; take optim.name=adamw")


def lora_of(config: Any, model: ModelConfig) -> LoraConfig | None:
    """The adapters that a study trains on a model; None where it trains all weights.

    Raises:
      UserError: an unknown projection, a pattern that is none; see `_continued`.
    """
    given = config.lora
    require_frozen(config)
    if given.continued:
        return _continued(config)
    if given.rank is None:
        if given.alpha or given.rslora or given.rank_pattern or given.alpha_pattern:
            raise UserError("lora.rank is not set, so that no adapters are trained; give it, such as lora=16")
        return None
    alpha = given.alpha or 2.0 * (math.sqrt(given.rank) if given.rslora else given.rank)
    return LoraConfig(
        given.rank, alpha, given.rslora, lora.targets_of(given.targets, model),
        tuple(_pattern("rank_pattern", text, model) for text in given.rank_pattern),
        tuple(_pattern("alpha_pattern", text, model) for text in given.alpha_pattern),
    )  # fmt: skip


def _pattern(name: str, text: str, model: ModelConfig) -> tuple[str, Any]:
    """`NAME:VALUE`; a name of ours stands for the published one, others are PEFT's patterns and must match a module."""
    where, colon, value = text.rpartition(":")
    if not colon:
        raise UserError(f"lora.{name}={text} must be NAME:VALUE, such as down:8")
    kinds = lora.projections(model)
    where = lora.published(kinds[where]) if where in kinds else where
    modules = [lora.published(spec, layer) for spec in kinds.values() for layer in range(model.layers)]
    if not any(lora.matches(where, module) for module in modules):
        known = [*kinds, *map(lora.published, kinds.values())]
        raise UserError(f"lora.{name}={text}: no module of {model.label} is called {where!r}{nearest(where, known)}")
    return where, TABLE[f"lora.{name.removesuffix('_pattern')}"].read(value, f"lora.{name}={text}")


def _continued(config: Any) -> LoraConfig:
    """The adapters of the run `train.init`, which are trained on."""
    from phi3_jax.interop import loading  # brings orbax, which a plan does without

    if config.lora.rank:
        raise UserError("lora.continued goes on with the adapters of train.init, of their rank; leave lora.rank out")
    found = loading.open_weights(config.train.init).adapter if config.train.init else None
    if found is None:
        raise UserError(f"lora.continued: {config.train.init or 'train.init'} is no run of adapters; leave it out")
    return dataclasses.replace(found.how, base=found.base, base_content=found.base_content)


def _stem(model: ModelConfig, seed: int) -> str:
    """The beginning of a run's name."""
    return "-".join(filter(None, (model.member or "model", model.scale, model.ladder, f"s{seed}")))


def model_of(config: Any, scale: str, size: str, vocab: int) -> ModelConfig:
    """The model that a size is at a scale; the data's `vocab` is a proxy's."""
    if scale == family.GIVEN:
        from phi3_jax.interop import loading  # brings orbax, which a plan does without

        return trained(loading.open_weights(config.train.init).config)
    if scale == "full":
        return trained(family.published(size, config.context or None))
    model = family.proxy(size, scale, config.ladder, vocab=vocab, context=4096)
    return model if config.mup else dataclasses.replace(model, mup=None)


def _budget_runs(
    stem: str, asked: Mapping[int, int], per_step: int, shared: dict[str, Any], every: int | None
) -> list[RunConfig]:
    """The trunk (largest budget) and its forks, or one run per budget under cosine; `asked`: {steps: tokens asked for}.

    A trunk keeps the states that its forks leave from, and the one before its own decay, from which it can be gone on.
    """
    name = lambda s: f"{stem}-{budget_name(asked[s]) if asked[s] else human_count(s * per_step)}"  # noqa: E731
    largest, optim = max(asked), shared["optim"]
    wsd = optim.schedule == "wsd"
    forks = {s: decay_start(s, optim.decay) for s in sorted(asked) if s != largest} if wsd else {}
    forks = {s: start for s, start in forks.items() if start > 0}
    kept = tuple(sorted({*forks.values(), decay_start(largest, optim.decay)} - {0})) if wsd else ()
    runs = []
    for s in sorted(asked, reverse=True):
        start = forks.get(s, 0)
        runs.append(
            RunConfig(
                name=name(s),
                steps=s,
                asked=asked[s],
                trunk_steps=largest if wsd else s,
                start_step=start,
                parent=name(largest) if start else None,
                keep_steps=kept if s == largest else (),
                checkpoint_every=every or max(1, -(-s // 10)),
                **shared,
            )
        )
    return runs


def check_data(model: ModelConfig, manifest: Mapping[str, Any]) -> None:
    """A dataset's ids must fit the model's vocabulary and its windows the model's context."""
    if manifest["vocab"] > model.vocab:
        raise UserError(
            f"the data's vocabulary of {manifest['vocab']:,} ids exceeds {model.name}'s {model.vocab:,}; export it "
            "with that model's tokenizer"
        )
    if manifest["window"] > model.context:
        raise UserError(
            f"sequences of {manifest['window']:,} tokens exceed {model.name}'s context of {model.context:,}; "
            "set data.window lower"
        )


def plan_of(run: RunConfig, on_cpu: bool, tiles: float = 0.0) -> dict[str, Any]:
    """What a run is predicted to need: parameters, FLOPs, memory by category; `tiles` of pictures come with a token."""
    params, window = count_params(run.model), run.data.window
    rows = run.batch_windows // run.accumulation
    size = 2 if run.dtype == "bfloat16" else 4
    frozen = 4 if (run.base_dtype or ("float32" if on_cpu else "bfloat16")) == "float32" else 2
    need = memory.needed_on_one_device(
        run.model, rows, window, remat=run.remat, value_bytes=size, on_cpu=on_cpu, optimizer=run.optim.name,
        lora=run.lora, frozen_bytes=frozen,
    )  # fmt: skip
    per_token = train_flops_per_token(run.model, window, lora=run.lora, parts=run.parts)
    per_token += tiles * train_tile_flops(run.model, run.lora, run.parts)
    return {
        "parameters": params,
        "non_embedding": run.model.matrix_params,
        "published_parameters": family.published_params(run.model.member),
        "tokens": run.budget,
        "flops_per_token": per_token,
        "flops": per_token * run.budget,
        "memory_bytes": need.total,
        "memory": dataclasses.asdict(need),
    }


def groups(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Runs that must follow one another (a trunk and its forks): seed by seed, the costliest group first."""
    by_root: dict[str, list[RunConfig]] = {}
    for run in runs:
        by_root.setdefault(run.parent or run.name, []).append(run)

    def key(group: list[RunConfig]) -> tuple[int, float]:
        cost = sum((r.steps - r.start_step) * r.tokens_per_step * (r.model.matrix_params + 1e5) for r in group)
        return group[0].seed, -cost

    return sorted(by_root.values(), key=key)


def before_forecast(runs: Sequence[RunConfig]) -> tuple[list[RunConfig], dict[str, int]] | None:
    """(runs that a forecast is fitted to, steps at which their trunks pause), or None for a study that allows none.

    Held out are the largest size and the largest budget. A loss law of five parameters needs three sizes and three budgets
    that are left. A trunk, whose end is the largest budget, goes on only up to where its last fork leaves it.
    """
    if any(run.arm for run in runs):
        return None
    largest, longest = max(r.model.matrix_params for r in runs), max(r.budget for r in runs)
    left = [r for r in runs if r.model.matrix_params < largest and r.budget < longest]
    if min(len({r.model.matrix_params for r in left}), len({r.budget for r in left})) < 3:
        return None
    trunks = {r.parent for r in left if r.parent}
    pauses = {name: max(r.start_step for r in left if r.parent == name) for name in trunks if name}
    return [r for r in runs if r in left or r.name in trunks], pauses
