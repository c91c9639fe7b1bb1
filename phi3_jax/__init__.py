"""phi3_jax: scaling studies of the Phi-3 family in JAX."""

from __future__ import annotations

__version__ = "0.1.0"

from phi3_jax.errors import UserError as UserError
from phi3_jax.family import proxy as proxy
from phi3_jax.family import published as published
