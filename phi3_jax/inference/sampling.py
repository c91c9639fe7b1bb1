"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from phi3_jax import checks
from phi3_jax.errors import UserError

ALL = 2**30  # top_k: more than any vocabulary has, and within 32 bits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default is greedy.

    Applied in this order: repetition penalty on tokens of the prompt and of the reply (positive logits divided by it,
    negative ones multiplied; arXiv:1909.05858), temperature, then three filters on the same probabilities: the top_k most
    likely, the fewest that hold top_p of the mass (arXiv:1904.09751), those with at least min_p of the best one's
    probability (arXiv:2407.01082).

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: 0 = all. top_p: 1 = all. min_p: 0 = all.
      repetition_penalty: 1 = none.
      seed: 0 to 2**63 - 1; rows draw from streams of their own, which depend on seed, row number and position only.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (lambda x: x == 0 or 1e-30 <= x <= 1e30, "0 (greedy), or 1e-30 to 1e30"),
            "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "0 to 1"),
            "repetition_penalty": (lambda x: 1e-30 <= x <= 1e30, "above 0 (1 = none), 1e-30 to 1e30"),
        }
        for name, (ok, limit) in limits.items():
            value = checks.real(getattr(self, name), name, limit)
            if not ok(value):
                raise UserError(f"{name}={value:g} must be {limit}")
            object.__setattr__(self, name, value)
        for name, most in (("top_k", None), ("seed", 2**63 - 1)):
            object.__setattr__(self, name, checks.integer(getattr(self, name), name, 0, most))

    @property
    def kind(self) -> Kind:
        filters = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return Kind(self.temperature == 0, filters, self.repetition_penalty != 1)

    def numbers(self) -> Numbers:
        """The values, as arguments of a compiled program."""
        return Numbers(self.temperature, min(self.top_k or ALL, ALL), self.top_p, self.min_p, self.repetition_penalty)


class Kind(NamedTuple):
    """What a compiled program does; other values of the same kind need no new one."""

    greedy: bool
    filters: bool
    penalty: bool


class Numbers(NamedTuple):
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    penalty: float


def choose(
    logits: jax.Array, keys: jax.Array, kind: Kind, numbers: Numbers, seen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row.

    Args:
      logits: (batch, vocab) float32.
      keys: (batch,) random keys.
      seen: (batch, vocab) booleans, tokens that the penalty falls on.

    Returns:
      (tokens (batch,) int32; their log-probabilities (batch,) under the model, before all of the above, in nats).
    """
    scores = logits
    if kind.penalty:
        assert seen is not None  # what a penalty falls on comes with it
        punished = jnp.where(logits > 0, logits / numbers.penalty, logits * numbers.penalty)
        scores = jnp.where(seen, punished, logits)
    if kind.greedy:
        token = jnp.argmax(scores, axis=-1)
    else:
        scores = scores / numbers.temperature
        if kind.filters:
            scores = jnp.where(_kept(scores, numbers), scores, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, scores)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _kept(scores: jax.Array, numbers: Numbers) -> jax.Array:
    """(batch, vocab) tokens that pass all filters; the most likely one always does. Ties at a border all pass."""
    ranked = -jnp.sort(-scores, axis=-1)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    rank = jnp.arange(scores.shape[-1])
    ok = (rank < numbers.top_k) & (before < numbers.top_p) & (shares >= numbers.min_p * shares[..., :1])
    last = jnp.sum(ok.at[..., 0].set(True), axis=-1, keepdims=True) - 1  # each filter keeps a prefix
    return scores >= jnp.take_along_axis(ranked, last, axis=-1)
