"""The same model as a Flax NNX module, for libraries that work on modules: qwix (quantisation, LoRA), tunix.

    model = phi3_jax.load("runs/phi3-mini")
    module = Phi3(model.params, model.config)
    module(tokens)                                             # the logits of model.logits(tokens)
    rules = [qwix.QuantizationRule(module_path=LINEARS, weight_qtype=jax.numpy.int4, tile_size=32)]
    small = qwix.quantize_model(module, qwix.PtqProvider(rules), tokens)
    adapted = qwix.apply_lora_to_model(module, qwix.LoraProvider(module_path=LINEARS, rank=16, alpha=32), tokens)
    module.params()                                            # back to the tree that everything else here takes

Layers are apart here (`blocks.0.qkv.weight`), where the functional model stacks them, so the module holds a copy. Each
projection is one `jnp.einsum` of its input and its own weight, which is what qwix looks for. phi-3.5-MoE's experts work,
but their grouped products are not seen by qwix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from phi3_jax.configs import ModelConfig
from phi3_jax.errors import UserError
from phi3_jax.models import decoder, experts
from phi3_jax.models.attention import Mask, attend
from phi3_jax.models.layers import activate, norm
from phi3_jax.models.rotary import rope_table, rotate
from phi3_jax.models.spec import param_specs

LINEARS = r"blocks/\d+/(qkv|out|gate_up|down)"  # qwix's module_path of every projection


class _Weights(nnx.Module):
    """The tensors of one entry of the parameter tree, under their names there."""

    def __init__(self, tensors: dict[str, jax.Array]) -> None:
        for name, value in tensors.items():
            setattr(self, name, nnx.Param(value))

    def tensors(self) -> dict[str, jax.Array]:
        """The tree's entry again."""
        return {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Variable)}


class Linear(_Weights):
    """A projection: weight, maybe bias (as in `param_specs`), and the einsum that applies it."""

    weight: nnx.Param
    bias: nnx.Param  # maybe

    def __init__(self, tensors: dict[str, jax.Array], equation: str) -> None:
        super().__init__(tensors)
        self.equation = equation

    def __call__(self, x: jax.Array) -> jax.Array:
        # flax's own cast, which lets a weight that qwix has quantised pass as it is
        _, weight = dtypes.promote_dtype((x, self.weight[...]), dtype=x.dtype)
        y = jnp.einsum(self.equation, x, weight)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Block(nnx.Module):
    """One layer, of one layer's slice of the tree's `blocks`; the same computation as `decoder.layer`."""

    def __init__(self, params: dict[str, Any], cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.attention_norm, self.mlp_norm = _Weights(params["attention_norm"]), _Weights(params["mlp_norm"])
        self.qkv = Linear(params["qkv"], "btd,dgrk->btgrk")
        self.out = Linear(params["out"], "btgrk,grkd->btd")
        if cfg.experts:
            self.router, self.gate_up, self.down = (_Weights(params[name]) for name in ("router", "gate_up", "down"))
        else:
            self.gate_up = Linear(params["gate_up"], "btd,dcf->btcf")
            self.down = Linear(params["down"], "btf,fd->btd")

    def __call__(self, x: jax.Array, table: jax.Array, mask: Mask) -> jax.Array:
        """x (batch, time, embed) -> the same; table: `rope_table`."""
        cfg = self.cfg
        h = self.qkv(norm(x, self.attention_norm.tensors(), cfg))
        q, k, v = h[:, :, :, :-2], h[:, :, :, -2:-1], h[:, :, :, -1]
        a = attend(rotate(q, table), rotate(k, table)[:, :, :, 0], v, mask, cfg.softmax_scale)
        x = x + cfg.residual_multiplier * self.out(a)
        h = norm(x, self.mlp_norm.tensors(), cfg)
        if cfg.experts:
            tensors = {name: getattr(self, name).tensors() for name in ("router", "gate_up", "down")}
            return x + cfg.residual_multiplier * experts.mixture(h, tensors, cfg.experts)
        h = self.gate_up(h)
        return x + cfg.residual_multiplier * self.down(activate(h[:, :, 0], h[:, :, 1], cfg))


class Phi3(nnx.Module):
    """A model of the family.

    Args:
      params: tree of `param_specs(cfg)`.
      cfg: the architecture.
      dtype: compute dtype; default: that of the parameters.
    """

    def __init__(self, params: dict[str, Any], cfg: ModelConfig, dtype: Any = None) -> None:
        if cfg.vision:
            raise UserError(f"{cfg.name} has eyes, which are no module here; use the functions of phi3_jax.models")
        self.cfg = cfg
        self.dtype = jnp.dtype(dtype or params["embedding"].dtype)
        self.blocks = nnx.List(
            [Block(jax.tree.map(lambda w: w[i], params["blocks"]), cfg) for i in range(cfg.layers)]  # noqa: B023
        )
        self.final_norm = _Weights(params["final_norm"])
        self.outer = _Weights({name: value for name, value in params.items() if not isinstance(value, dict)})

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        rope_regime: str = "auto",
    ) -> jax.Array:
        """Float32 logits (batch, time, vocab) of tokens (batch, time); arguments as `decoder.hidden_states`."""
        cfg, outer = self.cfg, self.outer.tensors()
        if positions is None:
            positions = decoder.default_positions(tokens, segments)
        x = decoder.embed(outer["embedding"], tokens, cfg, self.dtype)
        table = rope_table(positions, cfg, rope_regime, self.dtype, segments)
        for index, block in enumerate(self.blocks):
            sparse = None if cfg.is_dense(index) else cfg.blocksparse
            x = block(x, table, Mask(cfg.window_keys, sparse, segments, positions))
        return decoder.logits_of(norm(x, self.final_norm.tensors(), cfg), outer, cfg)

    def params(self) -> dict[str, Any]:
        """The functional model's tree: layers stacked."""
        layers = [
            {name: getattr(block, name).tensors() for name in param_specs(self.cfg)["blocks"]} for block in self.blocks
        ]
        stacked = jax.tree.map(lambda *layer: jnp.stack(layer), *layers)
        return {**self.outer.tensors(), "blocks": stacked, "final_norm": self.final_norm.tensors()}
