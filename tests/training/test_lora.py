"""Adapters beside PEFT's and TRL's: logits, gradients and five steps of training; layouts change nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_preference import GOLDENS, needs_goldens, packed, rows_of, run_of

import phi3_jax
from phi3_jax.configs import LoraConfig, ModelConfig, PreferenceConfig, RunConfig
from phi3_jax.family import proxy
from phi3_jax.interop import peft
from phi3_jax.models import lora
from phi3_jax.models.decoder import forward
from phi3_jax.models.flops import train_flops_per_token
from phi3_jax.models.spec import init_params, named, param_specs, shaped
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import objectives, preference, step
from phi3_jax.training.schedule import learning_rate


def chats(arrays: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """A batch of a golden's rows, one conversation each."""
    ids, labels, there = (arrays[name][number] for name in ("input_ids", "labels", "attention_mask"))
    tokens, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens, "targets": targets, "segments": there[:, :-1].astype(np.int32), "positions": positions,
        "domains": (labels[:, 1:] != -100).astype(np.int32),
    }  # fmt: skip


def pairs(arrays: dict[str, np.ndarray], number: int, model: phi3_jax.load) -> dict[str, np.ndarray]:
    """A batch of a golden's preferences, whose reference is the model without adapters."""
    rows = rows_of(arrays, number)
    logps = []
    for ids, mask in rows:
        logits = np.asarray(jax.nn.log_softmax(model.logits(ids[None, :-1])), np.float64)[0]
        logps.append((logits[np.arange(len(logits)), ids[1:]] * mask[1:]).sum())
    return packed(rows, np.array(logps).reshape(2, -1), 1)


@needs_goldens
@pytest.mark.parametrize(
    ("case", "on_the_fly"),
    [("lora_mini", False), ("lora_medium", False), ("lora_dpo_mini", False), ("lora_dpo_mini", True)],
)
def test_training_gives_what_peft_and_trl_give(case: str, on_the_fly: bool) -> None:
    golden, arrays = json.loads((GOLDENS / f"{case}.json").read_text()), load_file(GOLDENS / f"{case}.safetensors")
    tolerance = {name: entry["suggested_atol"] for name, entry in golden["tolerance"].items()}

    def close(found: Any, name: str) -> None:
        np.testing.assert_allclose(found, arrays[name], rtol=0, atol=tolerance[name], err_msg=name)

    base = phi3_jax.load(f"hf:{GOLDENS / golden['base']}")
    cfg, probe = base.config, jnp.asarray(arrays["probe_ids"])
    first = peft.read(GOLDENS / golden["adapter"], cfg, "", "")

    def logits(values: Any) -> jax.Array:
        tree = shaped(lora.adapter_specs(cfg, first.how), {k: jnp.asarray(v) for k, v in values.items()})
        return forward(lora.joined(base.params, tree, cfg, first.how), probe, cfg)

    close(base.logits(probe), "logits_base")
    close(logits(first.values), "logits_adapter")
    sums = {
        name: np.stack([first.merged(name, i, np.asarray(part)) for i, part in enumerate(value)])
        if name.startswith("blocks.")
        else value
        for name, value in named(base.params).items()
    }
    close(forward(shaped(param_specs(cfg), sums), probe, cfg), "logits_merged")

    dpo = case == "lora_dpo_mini"
    batches = [pairs(arrays, i, base) if dpo else chats(arrays, i) for i in range(golden["steps"])]
    time = max(b["tokens"].shape[1] for b in batches)
    made = {"reference"} if on_the_fly else set()  # in the step itself
    batches = [{k: np.pad(x, ((0, 0), (0, time - x.shape[1]))) for k, x in b.items() if k not in made} for b in batches]
    run = run_of(cfg, golden, len(batches[0]["tokens"]), time, float(arrays["learning_rates"][0]), lora=first.how)
    loss = objectives.Loss(("chat",), False)
    if dpo:
        how = PreferenceConfig("sigmoid", golden["beta"], on_the_fly=on_the_fly)
        loss = objectives.Loss(("chosen", "rejected"), False, None, preference.preference(how))
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        values = shaped(step.specs_of(run), {k: jnp.asarray(v, jnp.float32) for k, v in first.values.items()})
        state = dataclasses.replace(step.init_state(run, mesh), params=values)
        frozen = jax.device_put(base.params, rules.param_shardings(param_specs(cfg), run.strategy, mesh))
        placed = [jax.device_put(batch, rules.batch_sharding(run.strategy, mesh)) for batch in batches]
        grads = jax.jit(lambda p, b: step.loss_and_grads(p, b, run, loss, frozen)[2])(state.params, placed[0])
        train = jax.jit(lambda s, b, lr: step.train_step(s, b, lr, run, loss, frozen))
        seen = []
        for number, batch in enumerate(placed):
            state, metrics = train(state, batch, np.float32(learning_rate(run, number)))
            seen.append({k: float(v) for k, v in metrics.items()})
    close([m["loss"] for m in seen], "losses")
    close([m["grad_norm"] for m in seen], "grad_norms")
    if dpo:
        np.testing.assert_allclose([m["rewards/margin"] for m in seen], arrays["margins"], atol=1e-4)
    found = dataclasses.replace(first, values={k: np.asarray(v) for k, v in named(grads).items()})
    theirs = {k.removeprefix("grad."): v for k, v in arrays.items() if k.startswith("grad.")}
    ours = peft.matrices(found)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance["grad.*"], err_msg=name)
    after = {k: np.asarray(v) for k, v in named(state.params).items()}
    close(logits(after), "logits_adapter_after")


# ------------------------------------------------------------------------------------------------ properties


def tiny(**changes: Any) -> ModelConfig:
    return dataclasses.replace(proxy("mini", "pico", "family", vocab=97, context=64), **changes)


def batch_of(cfg: ModelConfig, rows: int = 8, time: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab, (rows, time + 1)).astype(np.int32)
    segments = np.repeat(np.arange(1, 3, dtype=np.int32), time // 2)[None].repeat(rows, 0)
    positions = np.tile(np.arange(time // 2, dtype=np.int32), 2)[None].repeat(rows, 0)
    domains = (rng.random((rows, time)) < 0.5).astype(np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions,
        "domains": domains,
    }  # fmt: skip


def plain_run(cfg: ModelConfig, how: LoraConfig | None, **changes: Any) -> RunConfig:
    golden = {"optimizer": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}, "steps": 4}
    return run_of(cfg, golden, 8, 32, 1e-2, lora=how, **changes)


def two_steps(
    run: RunConfig, devices: int, drawn: bool = True, **axes: int
) -> tuple[list[float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Losses and gradient norms of two steps, with drawn A and B or as runs begin; first gradients; adapters at the end."""
    mesh = make_mesh(jax.devices()[:devices], run.strategy, **axes)
    loss = objectives.Loss(("text",), False)
    with jax.set_mesh(mesh):
        frozen = jax.jit(
            lambda: init_params(dataclasses.replace(run.model, mup=None), 1),
            out_shardings=rules.param_shardings(param_specs(run.model), run.strategy, mesh),
        )()
        state = step.init_state(run, mesh)
        if drawn:
            more = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size).reshape(x.shape)), state.params)
            where = jax.tree.map(lambda x: x.sharding, state.params)
            state = dataclasses.replace(state, params=jax.device_put(more, where))
        batch = jax.device_put(batch_of(run.model), rules.batch_sharding(run.strategy, mesh))
        train, _ = step.compile_steps(run, loss)
        grads = jax.jit(lambda p, b, f: step.loss_and_grads(p, b, run, loss, f)[2])(state.params, batch, frozen)
        seen = []
        for number in range(2):
            state, metrics = train(state, batch, np.float32(learning_rate(run, number)), frozen)
            seen += [float(metrics["loss"]), float(metrics["grad_norm"])]
        return seen, *({k: np.asarray(v) for k, v in named(tree).items()} for tree in (grads, state.params))


HOW = LoraConfig(4, 8.0, rank_pattern=(("layers.0.mlp.down_proj", 2),), alpha_pattern=(("o_proj", 3.0),))


@pytest.mark.parametrize(
    "strategy,axes,accumulation",
    [("fsdp", {}, 1), ("fsdp_tp", {"tensor": 2}, 1), ("fsdp_cp", {"context": 2}, 1), ("dp", {}, 2)],
)
def test_eight_devices_train_as_one(strategy: str, axes: dict[str, int], accumulation: int) -> None:
    cfg = tiny(vocab=96, heads=4, kv_heads=2, head_dim=12)
    devices = 2 if accumulation > 1 else 8
    one, alone, _ = two_steps(plain_run(cfg, HOW), 1)
    names = {"tensor": "tensor_parallel", "context": "context_parallel"}
    run = plain_run(cfg, HOW, strategy=strategy, accumulation=accumulation, **{names[k]: v for k, v in axes.items()})
    many, together, _ = two_steps(run, devices, **axes)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_a_fresh_adapter_changes_nothing_and_a_smaller_rank_stays_small() -> None:
    cfg = tiny()
    tree = lora.init_adapters(cfg, HOW, seed=3)
    params, tokens = init_params(dataclasses.replace(cfg, mup=None), 0), jnp.arange(20)[None]
    np.testing.assert_array_equal(
        forward(lora.joined(params, tree, cfg, HOW), tokens, cfg), forward(params, tokens, cfg)
    )
    a = np.asarray(tree["blocks"]["down"]["lora_a"])
    assert np.all(a[0, ..., 2:] == 0) and np.all(a[0, ..., :2] != 0) and np.all(a[1] != 0)
    assert 0.9 * cfg.mlp**-0.5 < np.abs(a).max() <= cfg.mlp**-0.5  # PEFT's range
    _, _, after = two_steps(plain_run(cfg, HOW), 1, drawn=False)
    for name, first in (("lora_a", np.s_[0, :, 2:]), ("lora_b", np.s_[0, 2:])):
        value = after[f"blocks.down.{name}"]
        assert np.all(value[first] == 0) and np.any(value[0] != 0) and np.all(value[1] != 0)


def flops_of(run: RunConfig, loss: objectives.Loss) -> float:
    """FLOPs of the compiled training step, as XLA counts them."""
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = step.abstract_state(run, mesh)
        frozen = jax.eval_shape(lambda: init_params(run.model, 0)) if run.lora else None
        train, _ = step.compile_steps(run, loss)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(run.model))
        sharding = rules.batch_sharding(run.strategy, mesh)
        batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for k, x in batch.items()}
        if frozen is not None:
            shardings = rules.param_shardings(param_specs(run.model), run.strategy, mesh)
            frozen = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), frozen, shardings)
        compiled = train.lower(state, batch, np.float32(0), frozen).compile()
    return float(compiled.cost_analysis()["flops"])


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_no_frozen_matrix_has_a_gradient(kind: str) -> None:
    """The compiled step's FLOPs leave no room for one: that of the smallest matrix, and the head's, would show."""
    cfg = tiny(vocab=512)
    how = LoraConfig(1, 2.0)
    run = dataclasses.replace(plain_run(cfg, how), unroll=True, attention="reference")
    loss = objectives.Loss(("text",), False)
    if kind == "pairs":
        loss = objectives.Loss(("chosen", "rejected"), False, None, preference.preference(PreferenceConfig("simpo")))
    full = flops_of(dataclasses.replace(run, lora=None), loss)
    found, tokens = flops_of(run, loss), run.tokens_per_step
    saved = (full - found) / tokens
    frozen = 2 * (cfg.matrix_params + cfg.vocab * cfg.embed)  # a token's FLOPs of all gradients of matrices
    adapters_cost = train_flops_per_token(cfg, 32, lora=how) - (train_flops_per_token(cfg, 32) - frozen)
    smallest = 2 * cfg.embed * cfg.embed
    assert saved + adapters_cost > frozen - smallest / 2, (saved, adapters_cost, frozen)
