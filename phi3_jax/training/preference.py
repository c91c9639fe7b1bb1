"""Losses of preference pairs: what a chosen response gains over a rejected one of the same prompt.

A pair lies whole in one row, as two segments: chosen has the odd number 2 p + 1, rejected 2 p + 2; `domains` is positive
on the tokens of a response. Each loss is a function of four sums of log-probabilities and two counts of tokens per pair,
so that packing, microbatches and meshes change nothing. Symbols: c = log pi - log ref of a chosen response (sum over its
tokens), r of the rejected, d = c - r.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from phi3_jax.configs import OptimConfig, PreferenceConfig
from phi3_jax.data.windows import most_segments
from phi3_jax.training.losses import token_nll
from phi3_jax.training.objectives import Head, Loss, Objective, Terms


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sums over the responses of pairs; all arrays have one shape.

    Attributes:
      chosen, rejected: log-probability under the policy, in nats.
      chosen_ref, rejected_ref: the same under the reference; 0 where a loss needs none.
      chosen_tokens, rejected_tokens: their counts.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_ref: jax.Array
    rejected_ref: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array

    @property
    def c(self) -> jax.Array:
        return self.chosen - self.chosen_ref

    @property
    def r(self) -> jax.Array:
        return self.rejected - self.rejected_ref

    @property
    def chosen_mean(self) -> jax.Array:
        return self.chosen / jnp.maximum(self.chosen_tokens, 1)

    @property
    def rejected_mean(self) -> jax.Array:
        return self.rejected / jnp.maximum(self.rejected_tokens, 1)


def _sigmoid(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """DPO (arXiv:2305.18290, equation 7); with label smoothing cDPO (Mitchell 2023)."""
    z = how.beta * (x.c - x.r)
    return -(1 - how.label_smoothing) * log_sigmoid(z) - how.label_smoothing * log_sigmoid(-z)


def _normalised(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """The sigmoid loss of log-ratios per token."""
    z = how.beta * (x.c / jnp.maximum(x.chosen_tokens, 1) - x.r / jnp.maximum(x.rejected_tokens, 1))
    return -(1 - how.label_smoothing) * log_sigmoid(z) - how.label_smoothing * log_sigmoid(-z)


def _robust(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """Unbiased under labels flipped with probability `label_smoothing` (arXiv:2403.00409, equation 12)."""
    z, e = how.beta * (x.c - x.r), how.label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def _hinge(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """SLiC's hinge on the margin (arXiv:2305.10425) with DPO's log-ratios."""
    return jnp.maximum(0.0, 1 - how.beta * (x.c - x.r))


def _ipo(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """IPO (arXiv:2310.12036, equation 17) on means per token, as its authors and TRL have it."""
    gap = x.c / jnp.maximum(x.chosen_tokens, 1) - x.r / jnp.maximum(x.rejected_tokens, 1)
    return (gap - 1 / (2 * how.beta)) ** 2


def _orpo(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """The odds-ratio term (arXiv:2403.07691, equation 7) on means per token; the whole loss adds `sft=1`."""
    a, b = x.chosen_mean, x.rejected_mean
    log_odds = (a - b) - (jnp.log1p(-jnp.exp(a)) - jnp.log1p(-jnp.exp(b)))
    return -how.beta * log_sigmoid(log_odds)


def _simpo(x: Pairs, how: PreferenceConfig) -> jax.Array:
    """SimPO (arXiv:2405.14734, equation 6); `gamma` is the target margin."""
    return -log_sigmoid(how.beta * (x.chosen_mean - x.rejected_mean) - how.gamma)


# By name: loss(pairs, config) gives the loss of each pair; whether it reads a reference.
LOSSES: dict[str, tuple[Callable[[Pairs, PreferenceConfig], jax.Array], bool]] = {
    "sigmoid": (_sigmoid, True),
    "sigmoid_norm": (_normalised, True),
    "robust": (_robust, True),
    "hinge": (_hinge, True),
    "ipo": (_ipo, True),
    "orpo": (_orpo, False),
    "simpo": (_simpo, False),
}


def pair_sums(values: jax.Array, segments: jax.Array) -> jax.Array:
    """Sums of (rows, positions) over each response: (rows, pairs, 2), chosen first. Pairs that are not there are 0."""
    count = min(most_segments(values.shape[1]), values.shape[1]) // 2
    member = segments[..., None] == jnp.arange(1, 2 * count + 1)
    return jnp.sum(jnp.where(member, values[..., None], 0.0), axis=1).reshape(values.shape[0], count, 2)


def _weigh(batch: Mapping[str, jax.Array], _: Loss) -> dict[str, jax.Array]:
    """1 / pairs of the global batch on every response token; 1 / chosen tokens of it on those of chosen responses."""
    answer = batch["domains"] > 0
    chosen = answer & (batch["segments"] % 2 == 1)
    pairs = jnp.sum(jnp.max(batch["segments"], axis=1) // 2)
    return {
        "weights": answer / jnp.maximum(pairs, 1).astype(jnp.float32),
        "sft_weights": chosen / jnp.maximum(jnp.sum(chosen), 1).astype(jnp.float32),
    }


@functools.lru_cache
def preference(how: PreferenceConfig) -> Objective:
    """The objective of preference pairs.

    Its fields: `reference`, (rows, positions) float32, whose sum over a response is the reference's log-probability of it
    (losses without a reference do not read it). Its terms, means over pairs: rewards (beta c, beta r), their margin, how
    often it is positive, and the absolute log-probability of chosen responses, whose fall is DPO's known failure.
    """
    pair_loss, reads = LOSSES[how.loss]

    def loss(hidden: jax.Array, head: Head, fields: Mapping[str, jax.Array], optim: OptimConfig) -> Terms:
        del optim
        nll = token_nll(hidden, head.matrix, fields["targets"], head.mask, head.scale)
        segments, weights = fields["segments"], fields["weights"]
        sums = functools.partial(pair_sums, segments=segments)
        policy = sums(jnp.where(weights > 0, -nll, 0.0))
        reference = sums(fields["reference"]) if reads else jnp.zeros_like(policy)
        tokens = sums((weights > 0).astype(jnp.float32))
        there = jnp.max(weights) * (tokens[..., 0] > 0)  # 1 / pairs of the global batch, 0 for a pair that is not there
        pairs = Pairs(*(x[..., i] for x in (policy, reference, tokens) for i in (0, 1)))
        total = jnp.sum(jnp.where(there > 0, pair_loss(pairs, how), 0.0) * there)
        if how.sft:
            total += how.sft * jnp.sum(fields["sft_weights"] * nll)
        mean = lambda x: jnp.sum(jax.lax.stop_gradient(x) * there)  # noqa: E731
        c, r = (pairs.c, pairs.r) if reads else (pairs.chosen, pairs.rejected)
        extra = {
            "rewards/chosen": mean(how.beta * c),
            "rewards/rejected": mean(how.beta * r),
            "rewards/margin": mean(how.beta * (c - r)),
            "rewards/accuracy": mean((c > r).astype(jnp.float32)),
            "logps/chosen": mean(pairs.chosen),
            "logps/rejected": mean(pairs.rejected),
        }
        return Terms(total, jax.lax.stop_gradient(nll), extra)

    source: Literal["", "kept", "frozen"] = "" if not reads else "frozen" if how.on_the_fly else "kept"
    fields = ("targets", "segments", "weights", "sft_weights", *(("reference",) if reads else ()))
    return Objective(f"preference {how.loss}", fields, loss, _weigh, gathers=False, reference=source)
