"""Optimisers by name: `keys.OPTIMIZERS` is the table, and each of its names a file of this folder.

A new one is a file that assigns an `Optimizer` to OPTIMIZER, and its name in the table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from phi3_jax.errors import UserError, nearest
from phi3_jax.keys import OPTIMIZERS

if TYPE_CHECKING:
    from phi3_jax.training.optimizers.rule import Optimizer


def optimizer(name: str) -> Optimizer:
    """The optimiser of a name.

    Raises:
      UserError: no name of the table; the message has the nearest.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim.name={name} is unknown{nearest(name, OPTIMIZERS)}")
    found: Optimizer = importlib.import_module(f"{__name__}.{name}").OPTIMIZER
    return found
