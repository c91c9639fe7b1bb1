"""What a run minimises: objectives over the fields of a batch, as values.

`step` takes the one that a run's `Loss` holds. Another objective is another `Objective` here, over fields that its data set
brings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax

from phi3_jax.configs import OptimConfig
from phi3_jax.training.losses import target_weights, weighted_cross_entropy

Fields = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
      matrix: (embed, vocab) in the compute dtype, whole on every device.
      mask: (vocab,) True for ids that never win, or None.
      scale: factor on the logits.
    """

    matrix: jax.Array
    mask: jax.Array | None
    scale: float


class Terms(NamedTuple):
    """What an objective makes of a batch, or of one microbatch or device's part of it; all of it adds up over the parts.

    Attributes:
      total: the sum to minimise, a scalar.
      nll: of every position in nats, (rows, positions); it carries no gradient.
      extra: further sums, by the names under which they are logged.
    """

    total: jax.Array
    nll: jax.Array
    extra: Mapping[str, jax.Array]


def _by_domain(batch: Fields, loss: Loss) -> dict[str, jax.Array]:
    return {"weights": target_weights(batch["domains"], len(loss.domains), loss.domain_mean, loss.per_token)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss of hidden states and batch fields.

    Attributes:
      name: of the objective.
      fields: arrays (rows, positions) of a batch, or of those that `weigh` adds, that `loss` reads.
      loss: loss(hidden, head, fields, optim) gives the `Terms`. hidden: (rows, positions, embed). No logits of a whole
        batch are ever made: an objective goes over chunks of positions, see `losses`.
      weigh: weigh(batch, loss) gives the fields that depend on a *global* batch, before it is cut into microbatches: by
        what its terms are divided. `weights` are there in every batch: 0 where there is no loss.
      gathers: whether the loss may be given those positions alone that carry one.
      reference: where its field `reference` comes from, if it reads one: "kept", from one pass of the weights that a run
        starts from (`training.reference`), or "frozen", from the frozen weights of a run of adapters in each step.
    """

    name: str
    fields: tuple[str, ...]
    loss: Callable[[jax.Array, Head, Fields, OptimConfig], Terms]
    weigh: Callable[[Fields, Loss], dict[str, jax.Array]] = _by_domain
    gathers: bool = True
    reference: Literal["", "kept", "frozen"] = ""


def _cross_entropy(hidden: jax.Array, head: Head, fields: Fields, optim: OptimConfig) -> Terms:
    targets, weights = fields["targets"], fields["weights"]
    total, nll = weighted_cross_entropy(hidden, head.matrix, targets, weights, head.mask, head.scale, optim.z_loss)
    return Terms(total, nll, {})


CROSS_ENTROPY = Objective("cross_entropy", ("targets", "weights"), _cross_entropy)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the loss of a batch is made of: the names of its domains, how they weigh, and the objective.

    Attributes:
      domain_mean: each domain of a batch weighs the same, and within it each target; else each target of the batch.
      capacity: upper bound of loss positions per batch and data shard; None = no gathering.
      per_token: targets are divided by the tokens of the batch, those without a loss too, instead of by its targets: a
        target then weighs the same whatever else is in the batch. Not with `domain_mean`.
    """

    domains: tuple[str, ...]
    domain_mean: bool
    capacity: int | None = None
    objective: Objective = CROSS_ENTROPY
    per_token: bool = False
