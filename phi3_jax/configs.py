"""Frozen, validated descriptions of a model and of a training run (imports no jax).

`ml_collections` stays at the edge (`experiments/`, `launch/`); everything inside reads these dataclasses.
The fingerprint of a run covers what changes the science (model, data, optimiser, schedule, seed) and leaves
out where it ran (mesh, strategy, remat, logging), so that runs of different machines can be pooled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from phi3_jax.errors import UserError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE: per-frequency factors for short and long inputs (Phi-3 report section 2; facts sheet section 1).

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
    """phi-3-small's per-head block-sparse causal pattern; layer l is dense when (l + 1) % dense_every == 0.

    `per_document`: in packed rows the pattern counts from each document's start, so that a document is masked as it is
    alone; else from the row's start, as the released kernel counts, which knows no documents.
    """

    block: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    homo_head: bool = False
    dense_every: int = 2
    per_document: bool = True


@dataclasses.dataclass(frozen=True)
class Experts:
    """phi-3.5-MoE's mixture of SwiGLU experts, routed by SparseMixer as in evaluation (two experts a token).

    `jitter` is router_jitter_noise: experts whose score lies further than 2 jitter (relative) below the best are left out
    of its softmax. `head_bias`: the unembedding has a bias.
    """

    count: int = 16
    per_token: int = 2
    jitter: float = 0.01
    head_bias: bool = True


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

    `sliding_window` is the published field; `window_rule` says how many keys it means: "released" (the 2024
    code) w + 1, "transformers" (today's library) w, itself included.
    """

    name: str
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
    attention_multiplier: float = 1.0  # on the softmax scale (phi-3-small's mup_attn_multiplier)
    dummy_tokens: tuple[tuple[int, int], ...] = ()  # [start, stop) ranges whose logits are masked
    init_std: float = 0.02
    mup: Mup | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for field in ("vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "context"):
            _require(
                isinstance(getattr(self, field), int) and getattr(self, field) > 0,
                f"model.{field}={getattr(self, field)!r} must be a positive integer",
            )
        _require(
            self.heads % self.kv_heads == 0,
            f"model.kv_heads={self.kv_heads} does not divide heads={self.heads}; use a divisor: "
            f"{', '.join(str(d) for d in range(1, self.heads + 1) if self.heads % d == 0)}",
        )
        _require(
            self.heads * self.head_dim == self.embed,
            f"model.heads={self.heads} x head_dim={self.head_dim} is {self.heads * self.head_dim}, "
            f"not embed={self.embed}; make them equal",
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
        if self.experts:
            _require(
                self.experts.per_token == 2 <= self.experts.count,
                f"experts.per_token={self.experts.per_token} of {self.experts.count}; SparseMixer takes two a token",
            )
        if self.longrope:
            for which in ("short", "long"):
                factors = getattr(self.longrope, which)
                _require(
                    factors is None or len(factors) == self.head_dim // 2,
                    f"longrope.{which} has {len(factors or ())} factors; head_dim={self.head_dim} "
                    f"needs {self.head_dim // 2}",
                )

    @property
    def queries_per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def window_keys(self) -> int | None:
        """Number of keys a query sees, itself included, or None for all of them."""
        if self.sliding_window is None:
            return None
        return self.sliding_window + (1 if self.window_rule == "released" else 0)

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
        """Non-embedding parameters in matrices: attention, MLP and router weights, no norms, no biases."""
        attention = 2 * self.embed * self.heads * self.head_dim + 2 * self.embed * self.kv_heads * self.head_dim
        mlps, router = (self.experts.count, self.experts.count * self.embed) if self.experts else (1, 0)
        return self.layers * (attention + router + mlps * 3 * self.embed * self.mlp)

    @property
    def is_proxy(self) -> bool:
        return self.scale != "full"

    @property
    def label(self) -> str:
        """What a figure or file must call this model."""
        if not self.is_proxy:
            return "phi-3.5-MoE" if self.experts else f"phi-3-{self.member}"
        kind = "family shape" if self.ladder == "family" else f"{self.ladder} ladder"
        return f"phi-3-{self.member} proxy ({self.scale}, {kind})"


def model_from_dict(tree: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of `dataclasses.asdict` or its JSON; keys that are no field of it are left out.

    Raises:
      UserError: a field is missing or has no valid value.
    """
    model = {f.name: tree[f.name] for f in dataclasses.fields(ModelConfig) if f.name in tree}
    for name, kind in (("longrope", LongRope), ("blocksparse", BlockSparse), ("mup", Mup), ("experts", Experts)):
        if isinstance(model.get(name), Mapping):
            inner = {k: tuple(v) if isinstance(v, list) else v for k, v in model[name].items()}
            model[name] = kind(**inner)
    model["dummy_tokens"] = tuple((int(a), int(b)) for a, b in model.get("dummy_tokens", ()))
    try:
        return ModelConfig(**model)
    except TypeError as error:
        raise UserError(f"not a model's config: {error}") from error


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule; fractions are of the run's steps.

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

    def __post_init__(self) -> None:
        _require(self.schedule in ("wsd", "cosine"), f"optim.schedule={self.schedule!r}; valid: wsd, cosine")
        _require(self.peak_lr > 0, f"optim.peak_lr={self.peak_lr} must be positive")
        for field in ("warmup", "decay"):
            _require(
                0 <= getattr(self, field) <= 1,
                f"optim.{field}={getattr(self, field)} is a fraction of the steps: 0 to 1",
            )
        for field in ("b1", "b2"):
            _require(0 <= getattr(self, field) < 1, f"optim.{field}={getattr(self, field)} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on: a dataset folder and the identity of its content."""

    source: str  # "facts", "pydocs", a path, "tfds:...", "mixture:..."
    folder: str  # the exported dataset
    fingerprint: str  # of the manifest
    window: int
    vocab: int


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run: one model, one data order, one token budget.

    `steps` is the whole length; a fork (`parent` set) starts from the parent's checkpoint at `start_step`.
    """

    name: str
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    batch_windows: int
    steps: int
    seed: int = 0
    trunk_steps: int = 0  # steps of the largest budget: sets the warm-up
    start_step: int = 0
    parent: str | None = None
    keep_steps: tuple[int, ...] = ()
    accumulation: int = 1
    dtype: str = "float32"
    # below: where and how it runs; not part of the fingerprint
    arm: str = ""  # of a study that compares corpora or recipes; what it is shows in the fields above
    strategy: str = "dp"
    context_parallel: int = 1  # devices that share a sequence (fsdp_cp)
    tensor_parallel: int = 1  # devices that share a layer's heads and mlp (fsdp_tp)
    slices: int = 0  # groups of devices joined by slow links (multislice); 0: what the devices say of themselves
    attention: str = "auto"
    remat: str = "none"
    unroll: bool = True
    log_every: int = 20
    eval_points: int = 4
    checkpoint_every: int = 0
    keep_latest: int = 2
    keep_every: int = 0
    batch_timeout: float = 600.0  # seconds
    tensorboard: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _require(self.steps > 0, f"steps={self.steps}: the token budget is smaller than one batch; raise the budget")
        _require(self.dtype in ("float32", "bfloat16"), f"train.dtype={self.dtype!r}; valid: float32, bfloat16")
        _require(
            self.accumulation > 0 and self.batch_windows % self.accumulation == 0,
            f"train.accumulation={self.accumulation} does not divide the batch of {self.batch_windows} windows",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_windows * self.data.window

    @property
    def budget(self) -> int:
        """Tokens the run ends with."""
        return self.steps * self.tokens_per_step


_NOT_SCIENCE = {
    "arm", "strategy", "context_parallel", "tensor_parallel", "slices", "attention", "remat", "unroll", "log_every",
    "eval_points", "checkpoint_every", "keep_latest", "keep_every", "batch_timeout", "tensorboard", "profile", "folder",
    "keep_steps", "name", "parent",
}  # fmt: skip


def science(run: RunConfig) -> dict[str, Any]:
    """The part of a run that changes its numbers, as plain JSON types."""
    tree = json.loads(json.dumps(dataclasses.asdict(run)))

    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: strip(v) for k, v in node.items() if k not in _NOT_SCIENCE}
        return node

    stripped = strip(tree)
    stripped["model"].pop("name", None)
    for later, default in (("attention_multiplier", 1.0), ("experts", None)):
        if stripped["model"][later] == default:  # fields that came later leave the fingerprints of older runs alone
            del stripped["model"][later]
    pattern = stripped["model"]["blocksparse"]
    if pattern and pattern["per_document"]:
        del pattern["per_document"]
    return stripped


def fingerprint(run: RunConfig) -> str:
    """Twelve hex digits that are equal exactly when two runs are the same experiment."""
    return hashlib.sha256(json.dumps(science(run), sort_keys=True).encode()).hexdigest()[:12]
