"""Every parameter's and key activation's sharding, of each released member under each strategy, as a golden file.

`python tests/sharding/shardings.py` writes it anew; look at the difference before it is committed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from phi3_jax.family import MEMBERS, published
from phi3_jax.models import decoder
from phi3_jax.models.spec import param_specs
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "shardings.json"
MESHES: dict[str, dict[str, int]] = {
    "dp": {}, "fsdp": {}, "fsdp_tp": {"tensor": 2}, "fsdp_cp": {"context": 2}, "multislice": {"slices": 2},
}  # fmt: skip


def shardings(member: str, strategy: str) -> dict[str, dict[str, str]]:
    """Stored parameters, those that a layer computes with, and activations by name; nothing is computed."""
    cfg, mesh = published(member), make_mesh(jax.devices()[:8], strategy, **MESHES[strategy])
    found: dict[str, dict[str, str]] = {"stored": {}, "used": {}, "activations": {}}
    layer, name = decoder.layer, decoder.checkpoint_name

    def spy_layer(x: jax.Array, params: Any, *rest: Any) -> jax.Array:
        found["activations"]["residual"] = _text(jax.typeof(x).sharding.spec)
        _note(found["used"], params)
        return layer(x, params, *rest)

    def spy_name(x: jax.Array, label: str) -> jax.Array:
        found["activations"][label] = _text(jax.typeof(x).sharding.spec)
        return name(x, label)

    def abstract(spec: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)

    specs = param_specs(cfg)
    placed = rules.param_shardings(specs, strategy, mesh)
    params = jax.tree.map(abstract, specs, placed, is_leaf=lambda x: hasattr(x, "axes"))
    tokens = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=rules.batch_sharding(strategy, mesh))
    with jax.set_mesh(mesh), mock.patch.multiple(decoder, layer=spy_layer, checkpoint_name=spy_name):
        out = jax.eval_shape(
            lambda p, t: decoder.hidden_states(p, t, cfg, dtype=jnp.bfloat16, layout=rules.layout_of(strategy)),
            params, tokens,
        )  # fmt: skip
    _note(found["stored"], params)
    found["activations"] |= {"tokens": _text(tokens.sharding.spec), "final": _text(out.sharding.spec)}
    return found


def _text(spec: jax.P) -> str:
    """Mesh axes of each dimension; behind a bar those over which a gradient is still in parts."""
    parts = ["+".join([axes] if isinstance(axes, str) else axes) if axes else "-" for axes in spec.partitions]
    return " ".join(parts) + (f" | {' '.join(sorted(spec.reduced))}" if spec.reduced else "")


def _note(into: dict[str, str], tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        into[jax.tree_util.keystr(path, simple=True, separator=".")] = _text(jax.typeof(leaf).sharding.spec)


def every() -> dict[str, Any]:
    return {member: {strategy: shardings(member, strategy) for strategy in rules.STRATEGIES} for member in MEMBERS}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(every(), indent=1) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")
