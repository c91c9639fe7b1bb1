"""Frozen, validated descriptions of a model and of a training run (imports no jax).

`ml_collections` stays at the edge (`experiments/`, `launch/`); everything inside reads these dataclasses.
The fingerprint of a run covers what changes the science (model, data, optimiser, schedule, seed) and leaves
out where it ran (mesh, strategy, remat, logging), so that runs of different machines can be pooled.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import MOST_RANK, OPTIMIZERS, PREFERENCES, SCHEDULES, check_run
from phi3_jax.units import divisors

# What a field's metadata may say: `science` False: it changes no number of a run, but where and how it runs or what it is
# called; `since`: it came later, and where it has this value (or what this function makes of the config), fingerprints are
# those of before.
_ASIDE = {"science": False}

# How the released files of a model name and order its tensors, which is also what config.json calls the model.
LAYOUTS = ("phi3", "phi3small", "phimoe", "phi3_v")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _require_known(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"{name}={value!r} is unknown{nearest(str(value), valid)}")


def _require_finite(group: str, config: Any, above: tuple[str, ...], least: tuple[str, ...]) -> None:
    """Fields `above` must be finite numbers above 0, fields `least` finite and at least 0."""
    for field in (*above, *least):
        value = getattr(config, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
        limit = "above 0" if field in above else "of at least 0"
        _require(
            number and (value > 0 if field in above else value >= 0),
            f"{group}.{field}={value!r} must be a finite number {limit}",
        )


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE: per-frequency factors for short and long inputs (Phi-3 report, section 2; arXiv:2402.13753).

    `short`/`long` hold head_dim/2 factors, or None where no public source lists them (they then come with a
    checkpoint). `short_mscale`/`long_mscale` are a config's own attention factors (phi-3-small, phi-3.5-MoE); None means:
    derive.
    """

    original_context: int
    short: tuple[float, ...] | None = None
    long: tuple[float, ...] | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None
    mscale_when_short: bool = True  # mini, medium: derived at every length; phi-3-small: only in the long regime


@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """phi-3-small's per-head block-sparse causal pattern (Microsoft's block-sparse attention layer).

    Layer l is dense when (l + 1) % dense_every == 0; 0: no layer is. `per_document`: in packed rows the pattern counts
    from each document's start, so that a document is masked as it is alone; else from the row's start, as the released
    kernel counts, which knows no documents.
    """

    block: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    homo_head: bool = False
    dense_every: int = 2
    per_document: bool = dataclasses.field(default=True, metadata={"since": True})

    def shift(self, head: Any, heads: int) -> Any:
        """Blocks by which head `head` of `heads` (of the whole layer) shifts the distant blocks that it keeps."""
        return head * (0 if self.homo_head else max(1, self.vert_stride // heads))

    def first_far(self, head: Any, heads: int) -> Any:
        """The first of the distant blocks that a head keeps; every vert_stride-th from there on is another."""
        return (-1 - self.shift(head, heads)) % self.vert_stride

    def keeps(self, query: Any, key: Any, shift: Any) -> Any:
        """Whether a head with that shift keeps block `key` for block `query`, causality aside; numbers or arrays."""
        return (query - key < self.local_blocks) | ((key + shift + 1) % self.vert_stride == 0)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer attends densely."""
        return bool(self.dense_every) and (layer + 1) % self.dense_every == 0


@dataclasses.dataclass(frozen=True)
class Experts:
    """phi-3.5-MoE's mixture of SwiGLU experts, routed by SparseMixer as in evaluation (two experts per token).

    `jitter` is router_jitter_noise: experts whose score lies further than 2 jitter (relative) below the best are left out
    of its softmax. `head_bias`: the unembedding has a bias.
    """

    count: int = 16
    per_token: int = 2
    jitter: float = 0.01
    head_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Vision:
    """phi-3-vision's eyes: a CLIP tower over square tiles of a picture, and how many tiles a picture is cut into.

    The tower is a pre-norm transformer over patches; its last layer is stored and never runs. A picture becomes a grid of
    at most `crops` tiles, and the whole of it one tile more (`data.images`).

    Attributes:
      embed, layers, heads, mlp: of the tower.
      tile: side of a tile, patch: of a patch, in pixels. Two by two patches make one token.
      crops: the most tiles in a picture's grid, where a call names no other number (preprocessor_config.json); 0: a picture
        has no grid, and is one tile.
    """

    embed: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    tile: int = 336
    patch: int = 14
    norm_eps: float = 1e-5
    crops: int = 16

    def __post_init__(self) -> None:
        for field in ("embed", "layers", "heads", "mlp", "tile", "patch", "crops"):
            value, least = getattr(self, field), int(field != "crops")
            _require(
                type(value) is int and value >= least, f"vision.{field}={value!r} must be an integer, {least} or more"
            )
        _require(self.layers > 1, f"vision.layers={self.layers} must be 2 or more: the last one never runs")
        _require(self.embed % self.heads == 0, f"vision.heads={self.heads} does not divide embed={self.embed}")
        _require(
            self.tile % (2 * self.patch) == 0,
            f"vision.tile={self.tile} is no multiple of two patches of {self.patch} pixels",
        )
        _require_finite("vision", self, (), ("norm_eps",))

    @property
    def norm(self) -> str:
        return "layer"

    @property
    def side(self) -> int:
        """Tokens along a side of a tile."""
        return self.tile // self.patch // 2

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.tile // self.patch) ** 2

    @property
    def at_once(self) -> int:
        """Tiles in the tower at once: as many as have the attention scores of 16 of the released tower's."""
        return max(1, 16 * 16 * 577**2 // (self.heads * (self.patches + 1) ** 2))

    @property
    def width(self) -> int:
        """Of what the projector reads: the features of four patches."""
        return 4 * self.embed


@dataclasses.dataclass(frozen=True)
class Mup:
    """muP in width and CompleteP in depth, relative to a base shape (arXiv:2505.01618, table 1).

    `alpha` is the depth exponent (1 = CompleteP). `head_zero_init` sets the unembedding to zero at the start.
    """

    base_embed: int = 48
    base_layers: int = 4
    base_head_dim: int = 16
    alpha: float = 1.0
    embed_std: float = 1.0
    head_zero_init: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder of the family; sizes in elements, contexts in tokens.

    heads x head_dim is `inner`, the width of attention; it is `embed` in every published member, and need not be.

    `sliding_window` is the published field; `window_rule` says how many keys it means: "released" (the 2024
    code) w + 1, "transformers" (today's library) w, itself included.

    `layout` is how the released files name and order the tensors: "phi3" (mini and medium), "phi3small", "phimoe" or
    "phi3_v" (phi-3-vision, the only one with `vision`).
    `member` is the released model that this is, or the size it stands for; "" for a model from elsewhere.
    """

    name: str = dataclasses.field(metadata=_ASIDE)
    member: str
    scale: str
    ladder: str
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    gegelu_limit: float | None = None
    bias: bool = False
    tied: bool = False
    rope_base: float = 10000.0
    longrope: LongRope | None = None
    sliding_window: int | None = None
    window_rule: str = "released"
    blocksparse: BlockSparse | None = None
    embed_multiplier: float = 1.0
    logit_divisor: float = 1.0
    attention_divisor: str = "sqrt"  # softmax scale 1/sqrt(head_dim), or "linear": 1/head_dim (phi-3-small)
    # on the softmax scale (phi-3-small's mup_attn_multiplier)
    attention_multiplier: float = dataclasses.field(default=1.0, metadata={"since": 1.0})
    dummy_tokens: tuple[tuple[int, int], ...] = ()  # [start, stop) ranges whose logits are masked
    init_std: float = 0.02
    mup: Mup | None = None
    experts: Experts | None = dataclasses.field(default=None, metadata={"since": None})
    layout: str = dataclasses.field(default="phi3", metadata={"since": lambda model: _layout_before(vars(model))})
    vision: Vision | None = dataclasses.field(default=None, metadata={"since": None})

    def __post_init__(self) -> None:
        _require_known("model.layout", self.layout, LAYOUTS)
        for field in ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "context"):
            _require(
                type(getattr(self, field)) is int and getattr(self, field) > 0,
                f"model.{field}={getattr(self, field)!r} must be a positive integer",
            )
        _require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide heads={self.heads}; use a divisor: {divisors(self.heads)}",
        )
        _require_finite("model", self, ("rope_base", "embed_multiplier", "logit_divisor"), ("norm_eps", "init_std"))
        _require(
            self.sliding_window is None or (type(self.sliding_window) is int and self.sliding_window > 0),
            f"model.sliding_window={self.sliding_window!r} must be a positive number of tokens, or None for no window",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even (RoPE rotates pairs)")
        _require(self.norm in ("rms", "layer"), f"model.norm={self.norm!r}; valid: rms, layer")
        _require(
            self.activation in ("swiglu", "gegelu"), f"model.activation={self.activation!r}; valid: swiglu, gegelu"
        )
        _require(
            self.window_rule in ("released", "transformers"),
            f"model.window_rule={self.window_rule!r}; valid: released, transformers",
        )
        _require(
            self.attention_divisor in ("sqrt", "linear"),
            f"model.attention_divisor={self.attention_divisor!r}; valid: sqrt, linear",
        )
        _require(
            (self.layout == "phi3small") == (self.activation == "gegelu"),
            f"model.layout={self.layout} has no tensors of activation={self.activation}; gegelu is phi3small's",
        )
        _require(
            (self.layout == "phimoe") == (self.experts is not None),
            f"model.layout={self.layout} {'needs' if self.experts is None else 'has no'} experts; they are phimoe's",
        )
        _require(
            (self.layout == "phi3_v") == (self.vision is not None),
            f"model.layout={self.layout} {'needs' if self.vision is None else 'has no'} vision; it is phi3_v's",
        )
        if self.experts:
            _require(
                self.experts.per_token == 2 <= self.experts.count,
                f"experts.per_token={self.experts.per_token} of {self.experts.count}; SparseMixer takes two per token",
            )
        if self.longrope:
            original = self.longrope.original_context
            _require(
                type(original) is int and original > 1,
                f"longrope.original_context={original!r} must be an integer of at least 2",
            )
            for which in ("short", "long"):
                factors = getattr(self.longrope, which)
                _require(
                    factors is None or len(factors) == self.head_dim // 2,
                    f"longrope.{which} has {len(factors or ())} factors; head_dim={self.head_dim} "
                    f"needs {self.head_dim // 2}",
                )

    @property
    def inner(self) -> int:
        """Width of all queries of a token, which is that of attention's output."""
        return self.heads * self.head_dim

    @property
    def queries_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def window_keys(self) -> int | None:
        """Number of keys a query sees, itself included, or None for all of them."""
        if self.sliding_window is None:
            return None
        return self.sliding_window + (1 if self.window_rule == "released" else 0)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer attends densely (phi-3-small's odd ones; all layers of the others)."""
        return self.blocksparse is None or self.blocksparse.is_dense(layer)

    @property
    def dense_layers(self) -> int:
        """How many layers attend densely."""
        return sum(self.is_dense(layer) for layer in range(self.layers))

    @property
    def period(self) -> int:
        """Layers after which the pattern of layers repeats (2 for phi-3-small's dense/sparse alternation)."""
        return max(1, self.blocksparse.dense_every) if self.blocksparse else 1

    @property
    def width_ratio(self) -> float:
        """m_N of muP: embed over the base shape's (1 without muP)."""
        return self.embed / self.mup.base_embed if self.mup else 1.0

    @property
    def depth_ratio(self) -> float:
        """m_L of CompleteP: layers over the base shape's (1 without muP)."""
        return self.layers / self.mup.base_layers if self.mup else 1.0

    @property
    def residual_multiplier(self) -> float:
        """Factor on each residual branch: m_L^-alpha."""
        return self.depth_ratio**-self.mup.alpha if self.mup else 1.0

    @property
    def softmax_scale(self) -> float:
        """Scale of q.k: published rule, or sqrt(base_head_dim)/head_dim under muP."""
        if self.mup and self.attention_divisor == "sqrt":
            return math.sqrt(self.mup.base_head_dim) / self.head_dim
        divisor = self.head_dim if self.attention_divisor == "linear" else math.sqrt(self.head_dim)
        return self.attention_multiplier / divisor

    @property
    def matrix_params(self) -> int:
        """Non-embedding parameters in matrices: attention, MLP and router weights, no norms, no biases.

        `spec.count_params(self, "hidden")`, for those who know no jax.
        """
        attention = 2 * self.embed * self.inner + 2 * self.embed * self.kv_heads * self.head_dim
        mlps, router = (self.experts.count, self.experts.count * self.embed) if self.experts else (1, 0)
        return self.layers * (attention + router + mlps * 3 * self.embed * self.mlp)

    @property
    def is_proxy(self) -> bool:
        return self.scale != "full"

    @property
    def label(self) -> str:
        """What a figure or file must call this model."""
        if not self.is_proxy:
            named = {"moe": "phi-3.5-MoE", "vision-3.5": "phi-3.5-vision"}
            return named.get("moe" if self.layout == "phimoe" else self.member) or (
                f"phi-3-{self.member}" if self.member else self.name
            )
        kind = "family shape" if self.ladder == "family" else f"{self.ladder} ladder"
        return f"phi-3-{self.member} proxy ({self.scale}, {kind})"


def _layout_before(model: Mapping[str, Any]) -> str:
    """The layout of a config that was written before configs named it: there were three, and two fields told them apart."""
    return "phimoe" if model.get("experts") else "phi3small" if model.get("activation") == "gegelu" else "phi3"


def model_from_dict(tree: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of `dataclasses.asdict` or its JSON; keys that are no field of it are left out.

    Raises:
      UserError: a field is missing or has no valid value.
    """
    model = {f.name: tree[f.name] for f in dataclasses.fields(ModelConfig) if f.name in tree}
    model.setdefault("layout", _layout_before(model))
    for name, kind in (
        ("longrope", LongRope),
        ("blocksparse", BlockSparse),
        ("mup", Mup),
        ("experts", Experts),
        ("vision", Vision),
    ):
        if isinstance(model.get(name), Mapping):
            inner: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model[name].items()}
            model[name] = kind(**inner)
    model["dummy_tokens"] = tuple((int(a), int(b)) for a, b in model.get("dummy_tokens", ()))
    try:
        return ModelConfig(**model)
    except TypeError as error:
        raise UserError(f"not a model's config: {error}") from error


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule; fractions are of the run's steps.

    The report publishes no optimiser settings. Sources of the defaults are in `experiments/scaling.py`.
    """

    peak_lr: float = 3e-3
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-12
    weight_decay: float = 0.0
    clip: float = 0.0  # global gradient norm; 0 = off
    schedule: str = "wsd"
    warmup: float = 0.02  # of the largest budget's steps
    decay: float = 0.3  # of each budget's own steps
    final_lr: float = 0.0  # fraction of the peak
    z_loss: float = 0.0
    spike_factor: float = 20.0  # a step whose gradient norm exceeds this multiple of its running mean is skipped
    name: str = dataclasses.field(default="adamw", metadata={"since": "adamw"})
    # rates step by step as transformers counts them: the first is 0, and the last not yet the floor
    warmup_from_zero: bool = dataclasses.field(default=False, metadata={"since": False})

    def __post_init__(self) -> None:
        _require_known("optim.name", self.name, OPTIMIZERS)
        _require(self.schedule in SCHEDULES, f"optim.schedule={self.schedule!r}; valid: {', '.join(SCHEDULES)}")
        least = ("eps", "weight_decay", "clip", "final_lr", "z_loss", "spike_factor", "warmup", "decay", "b1", "b2")
        _require_finite("optim", self, ("peak_lr",), least)
        for field in ("warmup", "decay"):
            _require(
                0 <= getattr(self, field) <= 1,
                f"optim.{field}={getattr(self, field)} is a fraction of the steps: 0 to 1",
            )
        for field in ("b1", "b2"):
            _require(0 <= getattr(self, field) < 1, f"optim.{field}={getattr(self, field)} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """A loss of preference pairs; see `training.preference`.

    Attributes:
      loss: its name there.
      beta: strength of the pull to the reference; IPO's tau.
      label_smoothing: share of pairs whose label is taken to be wrong; sigmoid, sigmoid_norm and robust read it.
      gamma: SimPO's target margin.
      sft: weight of the mean nll of chosen responses, added to the loss.
      on_the_fly: the reference is the frozen weights of a run of adapters, read in each step, not a pass before the first.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    sft: float = 0.0
    on_the_fly: bool = dataclasses.field(default=False, metadata={"since": False})

    def __post_init__(self) -> None:
        _require_known("preference.loss", self.loss, PREFERENCES)
        _require_finite("preference", self, ("beta",), ("label_smoothing", "gamma", "sft"))
        _require(
            self.label_smoothing < 0.5,
            f"preference.label_smoothing={self.label_smoothing} must be below 0.5: half of the labels say nothing",
        )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of frozen weights (arXiv:2106.09685); see `models.lora`.

    Patterns are PEFT's: regular expressions that match the end of a published module's path, such as
    `model.layers.0.mlp.down_proj`, from a dot on; the first that matches counts.

    Attributes:
      rank: of the products B A.
      alpha: they count alpha / rank times, alpha / sqrt(rank) times with `rslora` (arXiv:2312.03732).
      targets: the projections that have them: "qkv", "out", "gate_up", "down".
      rank_pattern, alpha_pattern: of some modules, ((pattern, value), ..); of rank 0 a module has none.
      base, base_content: of a run that trains on the adapters of the run it starts from: the weights under them.
    """

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = ("qkv", "out", "gate_up", "down")
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    base: str = dataclasses.field(default="", metadata=_ASIDE)
    base_content: str = ""

    def __post_init__(self) -> None:
        for name, rank, least in (("rank", self.rank, 1), *((f"rank_pattern {k}", r, 0) for k, r in self.rank_pattern)):
            number = type(rank) is int and least <= rank <= MOST_RANK
            _require(number, f"lora.{name}={rank!r} must be a whole number, {least} to {MOST_RANK}")
        for name, alpha in (("alpha", self.alpha), *((f"alpha_pattern {k}", a) for k, a in self.alpha_pattern)):
            number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            _require(number and 0 < alpha < math.inf, f"lora.{name}={alpha!r} must be a finite number above 0")
        for key, _ in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                raise UserError(f"lora: the pattern {key!r} is no regular expression ({error})") from error
        _require(bool(self.targets), "lora.targets is empty; name one projection or more")


def lora_from_dict(tree: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig of `dataclasses.asdict` or its JSON."""
    patterns = {name: tuple((k, v) for k, v in tree.get(name, ())) for name in ("rank_pattern", "alpha_pattern")}
    return LoraConfig(**{**tree, "targets": tuple(tree["targets"]), **patterns})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on: a dataset folder and the identity of its content."""

    source: str  # as --data of phi3_jax.data.export names it
    folder: str = dataclasses.field(metadata=_ASIDE)  # the exported dataset
    fingerprint: str  # of the manifest
    window: int  # sequence length; the name is part of saved configs and of fingerprints
    vocab: int


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: one model, one data order, one token budget.

    `steps` is the whole length; a fork (`parent` set) starts from the parent's checkpoint at `start_step`. `init_content`
    names the weights that a run (or its trunk) starts from by what they are; none: random ones of the seed.
    """

    name: str = dataclasses.field(metadata=_ASIDE)
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    batch_windows: int
    steps: int
    seed: int = 0
    trunk_steps: int = 0  # steps of the largest budget: sets the warm-up
    start_step: int = 0
    # tokens that were asked for, of which a run takes whole batches; 0: passes over the data were
    asked: int = dataclasses.field(default=0, metadata=_ASIDE)
    parent: str | None = dataclasses.field(default=None, metadata=_ASIDE)
    keep_steps: tuple[int, ...] = dataclasses.field(default=(), metadata=_ASIDE)
    accumulation: int = 1
    dtype: str = "float32"
    init_content: str = dataclasses.field(default="", metadata={"since": ""})
    preference: PreferenceConfig | None = dataclasses.field(default=None, metadata={"since": None})  # for data of pairs
    # frozen weights with adapters that are trained; None: all weights are trained
    lora: LoraConfig | None = dataclasses.field(default=None, metadata={"since": None})
    # of frozen weights; None: bfloat16 on accelerators, float32 on CPUs
    base_dtype: str | None = dataclasses.field(default=None, metadata={"since": None})
    # of the loss, where it is not the one that the data set names: "token" or "domain"
    weighting: str = dataclasses.field(default="", metadata={"since": ""})
    # of a phi-3-vision, what is trained, with factors of its rate (`keys.rates_of`); none: all parts
    parts: tuple[str, ...] = dataclasses.field(default=(), metadata={"since": ()})
    # where those weights lay
    init: str = dataclasses.field(default="", metadata=_ASIDE)
    # of a study that compares corpora or recipes; what it is shows in the fields above
    arm: str = dataclasses.field(default="", metadata=_ASIDE)
    strategy: str = dataclasses.field(default="dp", metadata=_ASIDE)
    # devices that share a sequence (fsdp_cp)
    context_parallel: int = dataclasses.field(default=1, metadata=_ASIDE)
    # devices that share a layer's heads and mlp (fsdp_tp)
    tensor_parallel: int = dataclasses.field(default=1, metadata=_ASIDE)
    # groups of devices joined by slow links (multislice); 0: what the devices say of themselves
    slices: int = dataclasses.field(default=0, metadata=_ASIDE)
    attention: str = dataclasses.field(default="auto", metadata=_ASIDE)
    remat: str = dataclasses.field(default="none", metadata=_ASIDE)
    unroll: bool = dataclasses.field(default=True, metadata=_ASIDE)
    log_every: int = dataclasses.field(default=20, metadata=_ASIDE)
    eval_points: int = dataclasses.field(default=4, metadata=_ASIDE)
    checkpoint_every: int = dataclasses.field(default=0, metadata=_ASIDE)
    keep_latest: int = dataclasses.field(default=2, metadata=_ASIDE)
    batch_timeout: float = dataclasses.field(default=600.0, metadata=_ASIDE)  # seconds
    tensorboard: bool = dataclasses.field(default=False, metadata=_ASIDE)
    profile: tuple[int, int] | None = dataclasses.field(default=None, metadata=_ASIDE)

    def __post_init__(self) -> None:
        check_run(self)
        _require(self.steps > 0, f"steps={self.steps}: the token budget is smaller than one batch; raise the budget")
        _require(
            self.batch_windows % self.accumulation == 0,
            f"train.accumulation={self.accumulation} does not divide the batch of {self.batch_windows} sequences",
        )
        _require(
            not self.parts or self.model.vision is not None,
            f"train.parts={','.join(self.parts)} are of a phi-3-vision, and {self.model.label} is none; leave them out",
        )
        _require(
            not (self.parts and self.lora),
            "train.parts and adapters (lora) are both given; adapters stand beside frozen weights: lora.targets says where",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_windows * self.data.window

    @property
    def budget(self) -> int:
        """Tokens the run ends with: the whole batches of what was asked for."""
        return self.steps * self.tokens_per_step


def science(run: RunConfig) -> dict[str, Any]:
    """The part of a run that changes its numbers, as plain JSON types.

    What a field says of itself decides: `science: False` leaves it out, and `since: DEFAULT` where it has that value.
    """

    def part(config: Any) -> dict[str, Any]:
        tree = {}
        for field in dataclasses.fields(config):
            value, about = getattr(config, field.name), field.metadata
            since = about["since"](config) if callable(about.get("since")) else about.get("since", dataclasses.MISSING)
            if about.get("science", True) and since != value:
                tree[field.name] = part(value) if dataclasses.is_dataclass(value) else value
        return tree

    import json  # here and below: the help of a command, which needs the names of this file, does without

    plain: dict[str, Any] = json.loads(json.dumps(part(run)))
    return plain


def fingerprint(run: RunConfig) -> str:
    """Twelve hex digits that are equal exactly when two runs are the same experiment."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(science(run), sort_keys=True).encode()).hexdigest()[:12]


def config_diff(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two nested JSON values, as lines `model.d_model: 48 -> 64`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        gone = "(absent)"
        parts = (config_diff(old.get(k, gone), new.get(k, gone), f"{path}.{k}" if path else str(k)) for k in keys)
        return [line for part in parts for line in part]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and list(old) == list(new):
        return []
    return [] if old == new else [f"{path}: {old} -> {new}"]


def shown_changes(changes: Sequence[str]) -> str:
    """Lines of `config_diff` in one, the first eight of many."""
    return "; ".join(changes[:8]) + (f" and {len(changes) - 8} more" if len(changes) > 8 else "")


def decay_start(steps: int, decay: float) -> int:
    """First step of the final decay of a WSD run; forks leave the trunk here."""
    return steps - max(1, round(decay * steps))


def run_from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """The inverse of `dataclasses.asdict` after JSON; keys that are no field, as a run's config.json has, are left out."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    fields = {k: v for k, v in tree.items() if k in known} | {
        "model": model_from_dict(tree["model"]),
        "optim": OptimConfig(**tree["optim"]),
        "data": DataConfig(**tree["data"]),
        "keep_steps": tuple(tree["keep_steps"]),
        "profile": tuple(tree["profile"]) if tree["profile"] else None,
        "parts": tuple(tree.get("parts", ())),
        "preference": PreferenceConfig(**tree["preference"]) if tree.get("preference") else None,
        "lora": lora_from_dict(tree["lora"]) if tree.get("lora") else None,
    }
    return RunConfig(**fields)
