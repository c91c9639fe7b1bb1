"""A study as a table of runs: from the words of a command to resolved `RunConfig`s and the folders they live in.

`training/train.py` executes what this file plans.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax import family
from phi3_jax.configs import DataConfig, ModelConfig, OptimConfig, RunConfig, model_from_dict
from phi3_jax.errors import UserError, nearest
from phi3_jax.models.spec import count_params
from phi3_jax.planning import memory
from phi3_jax.planning.memory import human, short_count
from phi3_jax.scaling.flops import train_flops_per_token
from phi3_jax.training.optimizer import decay_start

# Budgets from here on are those of the released models; a proxy trains the same share of its reference budget.
FULL_BUDGET = 10_000_000_000
DATA_CHOICES = (
    "facts (controlled corpora), pydocs (the Python documentation), a folder or file of .txt/.jsonl[.gz|.zst], "
    "tfds:<name>, mixture:phi3_phase1, mixture:phi3_phase2"
)
# Recipes; sources in experiments/scaling.py.
PROXY_OPTIM = OptimConfig()
FULL_OPTIM = OptimConfig(
    peak_lr=1.5e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0, warmup=0.02, decay=0.2, spike_factor=10.0
)
FACTS_BATCH = 44  # windows of 24 tokens: a multiple of 4, so that every batch holds 11 of facts and 33 of reasoning
TEXT_BATCH_TOKENS = 2048
FULL_BATCH_TOKENS = 4 * 2**20
K_FACTS = {"pico": 1, "nano": 4, "micro": 32}  # facts grow with the parameters
SOURCES = ("knowledge", "reasoning", "reading", "text")  # that an arm may give tokens to


# ------------------------------------------------------------------------------------------------ words


def parse_count(text: str, what: str = "a number of tokens") -> int:
    """`4M`, `3.3T`, `250k` or `1000000` as an integer."""
    powers = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    scale = powers.get(text[-1:], 1)
    try:
        value = float(text[:-1] if text[-1:] in powers else text) * scale
    except ValueError:
        value = -1
    if not (math.isfinite(value) and value >= 1):
        raise UserError(f"{text!r} is not {what}; write for example 500k, 4M, 3.3T or 1000000")
    return round(value)


def parse_arguments(argument: str, targets: Sequence[str], words: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits `medium,tokens=4.8T,budgets=1M,2M` into a target and typed words.

    A comma separates words; after a word whose value is a list it also continues the list.

    Raises:
      UserError: unknown target, word or value, naming the nearest valid ones.
    """
    target, values, last = targets[0], {}, None
    for i, piece in enumerate(p.strip() for p in argument.split(",")) if argument else ():
        key, equals, value = piece.partition("=")
        if not equals:
            if last and words.get(last) is list:
                values[last].append(parse_count(piece))
            elif i == 0:
                if piece not in targets:
                    raise UserError(f"unknown target {piece!r}{nearest(piece, targets)}")
                target = piece
            else:
                raise UserError(f"unknown word {piece!r}{nearest(piece, [f'{w}=' for w in words])}")
            continue
        if key not in words:
            raise UserError(f"unknown word {key!r}{nearest(key, words)}")
        last, kind = key, words[key]
        if kind is list:
            values[key] = [parse_count(value)]
        elif kind is int:
            if not value.isdigit():
                raise UserError(f"{key}={value!r} must be a whole number, 0 or more")
            values[key] = int(value)
        elif kind is str:
            if not value:
                raise UserError(f"{key}= needs a value")
            values[key] = value
        elif value not in kind:
            raise UserError(f"unknown {key} {value!r}{nearest(value, kind)}")
        else:
            values[key] = value
    return target, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


# ------------------------------------------------------------------------------------------------ full runs


@dataclasses.dataclass(frozen=True)
class FullRun:
    """What training one released member would take."""

    model: ModelConfig
    params: int
    tokens: float
    flops: float
    state_bytes: float
    needed_bytes: float

    @property
    def line(self) -> str:
        return (
            f"phi-3-{self.model.member}: {self.params:,} parameters, {short_count(self.tokens)} tokens, "
            f"{self.flops:.3g} FLOPs (causal matrix products at {self.model.context:,} tokens), "
            f"{human(self.state_bytes)} of training state (fp32 weights and two Adam moments; "
            f"{human(self.needed_bytes)} with gradients and activations)"
        )


def token_budget(words: str, member: str) -> float:
    """Tokens of the full run of a member: matched 4.8T, the published number, or a given one."""
    if words == "matched":
        return family.MATCHED_TOKENS
    if words == "published":
        return family.PUBLISHED_TOKENS[member]
    return parse_count(words, "a token budget (matched, published or a number)")


def full_runs(config: Any) -> list[FullRun]:
    """The released members a study is about, and what each full run needs."""
    runs = []
    for size in config.sizes:
        if size not in family.MEMBERS:
            continue
        model = family.published(size, config.context or None)
        params = count_params(model)
        tokens = token_budget(config.tokens, size)
        tokens = tokens if tokens >= FULL_BUDGET or config.scale == "full" else family.MATCHED_TOKENS
        need = memory.needed_on_one_device(model, 1, model.context, remat="full", value_bytes=2, on_cpu=False)
        flops = tokens * train_flops_per_token(model, model.context)
        runs.append(FullRun(model, params, tokens, flops, need.state, need.total))
    return runs


def choose_scale(config: Any, full: Sequence[FullRun], device: tuple[str, int, float]) -> tuple[str, str]:
    """(scale, one line saying why).

    Raises:
      UserError: scale=full without the memory, naming bytes needed, bytes there and a mesh that would hold it; a
        full run without data.
    """
    kind, count, there = device
    have = f"{count} x {kind} with {human(there)}"
    needed = max((run.needed_bytes for run in full), default=0.0)
    biggest = max(full, key=lambda run: run.needed_bytes).model.name if full else ""
    fits = bool(full) and needed <= there
    if config.scale in family.SCALES:
        return config.scale, f"attached: {have}; scale={config.scale} asked for"
    if fits or config.scale == "full":
        if not full:
            raise UserError(f"sizes={','.join(config.sizes)} have no released model; use scale=pico, nano or micro")
        if not fits:
            raise UserError(
                f"scale=full: {biggest} needs {human(needed)}, there are {human(there)} ({count} x {kind}); "
                f"a mesh that would hold it: {memory.mesh_that_holds(needed)}; or use scale=pico"
            )
        if not config.data.source:
            raise UserError(f"a full-size run needs data=; choices: {DATA_CHOICES}")
        return "full", f"attached: {have}; it holds {biggest}: training the full model"
    return "pico", (
        f"attached: {have}, too little for {biggest} ({human(needed)}): training its shape-preserving "
        "proxy at pico scale instead, labelled so everywhere"
        if full
        else f"attached: {have}; training at pico scale"
    )


# ------------------------------------------------------------------------------------------------ arms


@dataclasses.dataclass(frozen=True)
class Arm:
    """One seed of one arm: a plain study of its own, of one budget, with its own data."""

    name: str  # "" for a study without arms
    data: Path  # folder of its data within the study's
    config: Any


def arms(config: Any, scale: str) -> list[Arm]:
    """A study as plain studies: itself, or where `config.arms` says so one a seed and arm, seeds outermost.

    An arm is {facts, knowledge, reasoning, reading, text}: facts in the corpus and tokens of each source, absolute
    numbers at pico scale (more by `K_FACTS` at others), and where it differs from the study also {sizes, seeds, ladder,
    mup, value_bits, frequency, peak_lr, budgets}; `seeds` is how many of the study's seeds it takes part in, `budgets`
    gives sizes other token counts than the sum. Every seed has a universe of facts and reasoning items of its own. All
    counts are multiplied by `config.size_factor`. Arms that differ in the training alone share their data.
    """
    if not config.get("arms"):
        return [Arm("", Path("data"), config)]
    from ml_collections import ConfigDict

    factor = K_FACTS.get(scale, 32) * config.size_factor
    found, folders = [], {}
    for i in range(config.seeds):
        for name, arm in config.arms.items():
            if i >= arm.get("seeds", config.seeds):
                continue
            one = ConfigDict(config.to_dict())
            counts = {key: arm.get(key, 0) * factor for key in ("facts", *SOURCES)}
            total = sum(counts[key] for key in SOURCES)
            one.arms, one.seed, one.seeds = {}, config.seed + i, 1
            for key in ("sizes", "ladder", "mup"):
                one[key] = arm.get(key, config[key])
            one.data.update(
                source="facts", universe=round(config.universe * factor), facts=round(counts["facts"]),
                share=counts["knowledge"] / total, text_share=counts["text"] / total, reading=counts["reading"] / total,
                seed=one.seed,
                value_bits=arm.get("value_bits", one.data.value_bits), frequency=arm.get("frequency", one.data.frequency),
            )  # fmt: skip
            if arm.get("peak_lr"):
                one.optim.peak_lr = arm.peak_lr
            one.budgets = (round(total),)
            key = json.dumps(one.data.to_dict(), sort_keys=True) + str(total)
            folder = folders.setdefault(key, Path("data") / f"{name}-s{one.seed}")
            special = arm.get("budgets", {})
            for budget in sorted({special.get(size, 0) for size in one.sizes}):
                part = ConfigDict(one.to_dict())
                part.sizes = tuple(size for size in one.sizes if special.get(size, 0) == budget)
                part.budgets = (round(budget * factor),) if budget else one.budgets
                found.append(Arm(name, folder, part))
    return found


def plan_study(config: Any, scale: str, manifests: Mapping[Path, Any], folder: Path, devices: int) -> list[RunConfig]:
    """All runs of a study in `folder`; `manifests` are those of its arms' data, by `Arm.data`."""
    runs = []
    for arm in arms(config, scale):
        data = manifests[arm.data]
        runs += plan_runs(arm.config, scale, data, folder / arm.data, devices, arm.name)
    return runs


# ------------------------------------------------------------------------------------------------ data


def data_arguments(config: Any, scale: str, largest: int) -> dict[str, Any]:
    """Arguments of `data.export` for the study's data."""
    data = config.data
    source = data.source or "facts"
    if source == "facts":
        unit = K_FACTS.get(scale, 32)
        universe = data.universe or 9000 * unit
        facts = universe // 2 if data.facts is None else data.facts
        # 65,536 names fit the pool of 256 ids; larger ladders draw names from 1,024.
        pool = 256 if universe <= 256**2 else 1024
        shares = {key: data[key] for key in ("share", "text_share", "reading") if data.get(key) is not None}
        return dict(
            data="facts", facts=facts, universe=universe, frequency=data.frequency, value_bits=data.value_bits,
            pool=pool, seed=data.seed, tokens=largest, **shares,
        )  # fmt: skip
    short = {"pico": 256, "nano": 256, "micro": 1024}
    window = data.window or short.get(scale) or full_window(config)
    return dict(data=source, tokenizer=data.tokenizer, window=window, text_field=data.text_field)


def full_window(config: Any) -> int:
    """Tokens in a window of a full-size run: data.window, or the shortest context of the study's members."""
    contexts = [family.published(size, config.context or None).context for size in config.sizes]
    return config.data.window or min(contexts)


def strategy_of(config: Any, slices: int = 1) -> str:
    """The strategy of a full-size run: `auto` is fsdp, and multislice over several slices."""
    given = config.train.strategy
    return given if given != "auto" else "multislice" if slices > 1 else "fsdp"


def export_data(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes (or finds) the dataset in a process of its own, so that TensorFlow never enters this one."""
    command = [sys.executable, "-m", "phi3_jax.data.export", "--out", str(folder)]
    for key, value in arguments.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "warning: "))]
    for line in errors:
        if line.startswith("warning: "):
            print(line, file=sys.stderr)
    if done.returncode:
        known = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(known[-1] if known else f"exporting the data failed: {last}")
    return json.loads((folder / "manifest.json").read_text())


# ------------------------------------------------------------------------------------------------ runs


def budgets_of(config: Any, scale: str, size: str) -> list[int]:
    """Token budgets of one size, smallest first."""
    if config.budgets:
        return sorted(set(config.budgets))
    member = size if size in family.MEMBERS else "medium"
    tokens = token_budget(config.tokens, member)
    if scale != "full" and tokens >= FULL_BUDGET:
        tokens = family.REFERENCE_TOKENS[scale] * tokens / family.MATCHED_TOKENS
    return sorted({max(1, round(tokens * share)) for share in config.budget_shares})


def _optim(config: Any, full: bool) -> OptimConfig:
    given = {k: v for k, v in config.optim.to_dict().items() if v is not None}
    return dataclasses.replace(FULL_OPTIM if full else PROXY_OPTIM, **given)


def _batch_windows(config: Any, scale: str, manifest: Mapping[str, Any], devices: int) -> int:
    window, train = manifest["window"], config.train
    if train.batch_tokens:
        windows = train.batch_tokens // window
    elif scale == "full":
        windows = FULL_BATCH_TOKENS // window
    elif manifest["kind"] == "facts":
        windows = FACTS_BATCH
    else:
        windows = max(1, TEXT_BATCH_TOKENS // window)
    unit = max(1, devices // (train.context * train.tensor)) * train.accumulation  # rows of the mesh
    return max(unit, -(-windows // unit) * unit)


def plan_runs(
    config: Any, scale: str, manifest: Mapping[str, Any], folder: Path, devices: int, arm: str = ""
) -> list[RunConfig]:
    """All runs of a study without arms, or of one arm; trunks before their forks.

    With WSD, the largest budget is the trunk, and every smaller one a fork that leaves it where its own decay starts.
    With cosine every budget is a run of its own.
    """
    full, train = scale == "full", config.train
    batch = _batch_windows(config, scale, manifest, devices)
    per_step = batch * manifest["window"]
    data = DataConfig(
        config.data.source or "facts", str(folder), manifest["fingerprint"], manifest["window"], manifest["vocab"]
    )
    optim, runs = _optim(config, full), []
    for seed in range(config.seed, config.seed + config.seeds):
        for size in config.sizes:
            if full:
                model = trained(family.published(size, config.context or None))
            else:
                model = family.proxy(size, scale, config.ladder, vocab=manifest["vocab"], context=4096)
                model = model if config.mup else dataclasses.replace(model, mup=None)
            check_data(model, manifest)
            budgets = budgets_of(config, scale, size)
            if budgets[0] < per_step:
                raise UserError(
                    f"a budget of {budgets[0]:,} tokens is smaller than one batch of {per_step:,}; use a larger one"
                )
            steps = [b // per_step for b in budgets]
            stem = f"{arm}-{model.member}-s{seed}" if arm else f"{model.member}-{model.scale}-{model.ladder}-s{seed}"
            shared = dict(
                arm=arm, model=model, optim=optim, data=data, batch_windows=batch, seed=seed,
                accumulation=train.accumulation,
                dtype=train.dtype or ("bfloat16" if full else "float32"), remat=train.remat or ("full" if full else "none"),
                strategy=strategy_of(config, train.slices) if full or train.strategy != "auto" else "dp",
                context_parallel=train.context, tensor_parallel=train.tensor, slices=train.slices,
                attention=train.attention, unroll=not full,
                log_every=train.log_every, eval_points=train.eval_points, keep_latest=train.keep_latest,
                keep_every=train.keep_every, batch_timeout=train.batch_timeout, tensorboard=train.tensorboard,
                profile=(train.profile_start, train.profile_start + train.profile_steps) if train.profile_steps else None,
            )  # fmt: skip
            runs += _budget_runs(stem, steps, per_step, shared, train.checkpoint_every)
    return runs


def trained(model: ModelConfig) -> ModelConfig:
    """A released model as a full-size run trains it: phi-3-small's block pattern counts from each row's start.

    So counts the released kernel, which knows no documents, and so can the kernels for TPU and GPU, whose tiles are fixed
    when the program is traced.
    """
    if model.blocksparse is None:
        return model
    return dataclasses.replace(model, blocksparse=dataclasses.replace(model.blocksparse, per_document=False))


def _budget_runs(
    stem: str, steps: Sequence[int], per_step: int, shared: dict[str, Any], every: int | None
) -> list[RunConfig]:
    """The trunk (largest budget) and its forks, or one run a budget under cosine."""
    name = lambda s: f"{stem}-{short_count(s * per_step)}"  # noqa: E731
    largest, optim = max(steps), shared["optim"]
    wsd = optim.schedule == "wsd"
    forks = {s: decay_start(s, optim.decay) for s in sorted(set(steps)) if s != largest} if wsd else {}
    forks = {s: start for s, start in forks.items() if start > 0}
    runs = []
    for s in sorted(set(steps), reverse=True):
        start = forks.get(s, 0)
        runs.append(
            RunConfig(
                name=name(s),
                steps=s,
                trunk_steps=largest if wsd else s,
                start_step=start,
                parent=name(largest) if start else None,
                keep_steps=tuple(forks.values()) if s == largest else (),
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
            f"windows of {manifest['window']:,} tokens exceed {model.name}'s context of {model.context:,}; "
            "set data.window lower"
        )


def plan_of(run: RunConfig, on_cpu: bool) -> dict[str, Any]:
    """What a run is predicted to need: parameters, FLOPs, memory by category."""
    params, window = count_params(run.model), run.data.window
    rows = run.batch_windows // run.accumulation
    size = 2 if run.dtype == "bfloat16" else 4
    need = memory.needed_on_one_device(run.model, rows, window, remat=run.remat, value_bytes=size, on_cpu=on_cpu)
    per_token = train_flops_per_token(run.model, window)
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
    pauses = {r.name: max(r.keep_steps) for r in runs if r.name in trunks}
    return [r for r in runs if r in left or r.name in trunks], pauses


# ------------------------------------------------------------------------------------------------ runs as asked for


@dataclasses.dataclass(frozen=True)
class AskedRun:
    """A run before the data say how many steps its budget is: what a scheduler can name on a machine without data.

    `trunk` is the name of the run it leaves (None for a run from scratch).
    """

    size: str
    seed: int
    budget: int
    trunk: str | None = None
    arm: str = ""

    @property
    def name(self) -> str:
        """`mini-s0-4M`, after the arm where there is one; the budget in full where the short form would round it."""
        short = short_count(self.budget)
        name = f"{self.size}-s{self.seed}-{short if parse_count(short) == self.budget else self.budget}"
        return f"{self.arm}-{name}" if self.arm else name


def asked_runs(config: Any, scale: str) -> list[AskedRun]:
    """All runs a config asks for, trunks before their forks; `config.scale` is not looked at, `scale` is."""
    asked, wsd = [], _optim(config, scale == "full").schedule == "wsd"
    for arm in arms(config, scale):
        for seed in range(arm.config.seed, arm.config.seed + arm.config.seeds):
            for size in arm.config.sizes:
                trunk, *smaller = reversed(budgets_of(arm.config, scale, size))
                root = AskedRun(size, seed, trunk, arm=arm.name)
                asked += [root, *(AskedRun(size, seed, b, root.name if wsd else None, arm.name) for b in smaller)]
    return asked


def resolve_runs(asked: Sequence[AskedRun], runs: Sequence[RunConfig]) -> dict[str, RunConfig]:
    """{asked name: planned run}; budgets less than one batch apart are one run, which the largest of them names."""
    resolved: dict[str, RunConfig] = {}
    for ask in sorted(asked, key=lambda a: -a.budget):
        for run in runs:
            steps = ask.budget // run.tokens_per_step
            same = (run.arm, run.model.member, run.seed, run.steps) == (ask.arm, ask.size, ask.seed, steps)
            if same and run not in resolved.values():
                resolved[ask.name] = run
    return resolved


def select_runs(names: Sequence[str], asked: Sequence[AskedRun], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs of some names (asked for, or as planned), in the order of `runs`.

    Raises:
      UserError: a name that is neither.
    """
    table = resolve_runs(asked, runs) | {run.name: run for run in runs}
    known = {ask.name for ask in asked} | table.keys()
    for name in names:
        if name not in known:
            raise UserError(f"--run {name!r} is no run of this study{nearest(name, sorted(known))}")
    wanted = {table[name].name for name in names if name in table}
    return [run for run in runs if run.name in wanted]


def run_from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """The inverse of `dataclasses.asdict` after JSON; keys that are no field, as a run's config.json has, are left out."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    fields = {k: v for k, v in tree.items() if k in known} | {
        "model": model_from_dict(tree["model"]),
        "optim": OptimConfig(**tree["optim"]),
        "data": DataConfig(**tree["data"]),
        "keep_steps": tuple(tree["keep_steps"]),
        "profile": tuple(tree["profile"]) if tree["profile"] else None,
    }
    return RunConfig(**fields)
