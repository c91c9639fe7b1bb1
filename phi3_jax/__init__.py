"""phi3_jax: scaling studies of the Phi-3 family in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from phi3_jax.errors import UserError as UserError

if TYPE_CHECKING:
    from phi3_jax.family import proxy as proxy
    from phi3_jax.family import published as published
    from phi3_jax.interop.loading import Model


def __getattr__(name: str) -> Any:
    """`proxy` and `published` when they are asked for: a command must be up soon, or Ctrl-C finds nobody to answer it."""
    if name in ("proxy", "published"):
        from phi3_jax import family

        return getattr(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: Any, **options: Any) -> Model:
    """A model from a run, a checkpoint or "hf:FOLDER": params, config, tokenizer, `.logits`. See `loading.load`."""
    from phi3_jax.interop.loading import load as load_model  # imports jax, which `import phi3_jax` does not

    return load_model(path, **options)
