"""Preference losses beside TRL's: from given log-probabilities, and in training from ids; packed equals padded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import phi3_jax
from phi3_jax.configs import DataConfig, ModelConfig, OptimConfig, PreferenceConfig, RunConfig
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh
from phi3_jax.training import objectives, preference, step
from phi3_jax.training.schedule import learning_rate

GOLDENS = Path(__file__).parents[3] / "shared/goldens/posttraining"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="needs the post-training goldens")


@needs_goldens
@pytest.mark.parametrize("name", preference.LOSSES)
def test_each_loss_of_given_log_probabilities(name: str) -> None:
    golden = json.loads((GOLDENS / "losses_from_logps.json").read_text())
    keys = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with jax.enable_x64(True):
        pairs = preference.Pairs(
            *(jnp.asarray(golden[k], jnp.float64) for k in (*keys, "chosen_tokens", "rejected_tokens"))
        )
        smoothed = {name: golden["label_smoothing"]} if name == "robust" else {}
        how = PreferenceConfig(name, golden["beta"], smoothed.get(name, 0.0), golden["simpo_gamma"])
        found = preference.LOSSES[name][0](pairs, how)
        if name == "sigmoid":
            smooth = dataclasses.replace(how, label_smoothing=golden["label_smoothing"])
            np.testing.assert_allclose(preference.LOSSES[name][0](pairs, smooth), golden["losses"]["cdpo"], rtol=1e-12)
    key = {"orpo": "orpo_odds_term"}.get(name, name)
    np.testing.assert_allclose(found, golden["losses"][key], rtol=1e-10)


def test_losses_by_hand() -> None:
    """One pair in float64 by the formulas of the papers, written out."""
    c, r, b, e, n, m = -12.0 + 10.0, -20.0 + 21.0, 0.3, 0.1, 4, 5  # log-ratios, beta, smoothing, counts of tokens
    logistic = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    d, gap = b * (c - r), c / n - r / m
    odds = lambda mean: np.exp(mean) / (1 - np.exp(mean))  # noqa: E731
    expected = {
        "sigmoid": -(1 - e) * np.log(logistic(d)) - e * np.log(logistic(-d)),
        "sigmoid_norm": -(1 - e) * np.log(logistic(b * gap)) - e * np.log(logistic(-b * gap)),
        "robust": (-(1 - e) * np.log(logistic(d)) + e * np.log(logistic(-d))) / (1 - 2 * e),
        "hinge": max(0.0, 1 - d),
        "ipo": (gap - 1 / (2 * b)) ** 2,
        "orpo": -b * np.log(logistic(np.log(odds(-12 / n) / odds(-20 / m)))),
        "simpo": -np.log(logistic(b * (-12 / n + 20 / m) - 0.7)),
    }
    assert expected.keys() == preference.LOSSES.keys()
    with jax.enable_x64(True):
        pairs = preference.Pairs(*(jnp.asarray(x, jnp.float64) for x in (-12, -20, -10, -21, n, m)))
        for name, value in expected.items():
            found = preference.LOSSES[name][0](pairs, PreferenceConfig(name, b, e, 0.7))
            assert float(found) == pytest.approx(value, rel=1e-12), name


# ------------------------------------------------------------------------------------------------ training


def rows_of(arrays: dict[str, np.ndarray], number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, response mask) of a step's sequences: chosen first, then rejected."""
    ids, mask, there = (arrays[k][number] for k in ("input_ids", "completion_mask", "attention_mask"))
    return [(i[a > 0], m[a > 0]) for i, m, a in zip(ids, mask, there, strict=True)]


def packed(
    sequences: list[tuple[np.ndarray, np.ndarray]], references: np.ndarray, per_row: int
) -> dict[str, np.ndarray]:
    """A batch of rows of `per_row` pairs; `references` (2, pairs) are log-probabilities of responses."""
    count = len(sequences) // 2
    pairs = [(sequences[p], sequences[count + p]) for p in range(count)]
    width = max(sum(len(s[0]) - 1 for pair in pairs[i : i + per_row] for s in pair) for i in range(0, count, per_row))
    names = ("tokens", "targets", "segments", "domains", "positions")
    out: dict[str, Any] = {name: np.zeros((-(-count // per_row), width), np.int32) for name in names}
    out["reference"] = np.zeros(out["tokens"].shape, np.float32)
    for p, pair in enumerate(pairs):
        row, column = p // per_row, int((out["segments"][p // per_row] > 0).sum())
        for which, (ids, mask) in enumerate(pair):
            span = slice(column, column + len(ids) - 1)
            out["tokens"][row, span], out["targets"][row, span] = ids[:-1], ids[1:]
            out["segments"][row, span] = 2 * (p % per_row) + 1 + which
            out["domains"][row, span] = mask[1:] * (which + 1)
            out["positions"][row, span] = np.arange(len(ids) - 1)
            out["reference"][row, column] = references[which, p]
            column += len(ids) - 1
    return out


def run_of(model: ModelConfig, golden: dict[str, Any], rows: int, time: int, peak: float, **changes: Any) -> RunConfig:
    how = golden["optimizer"]
    optim = OptimConfig(
        peak, how["b1"], how["b2"], how["eps"], how["weight_decay"], how["clip"], "linear", warmup=0.0,
        warmup_from_zero=True, spike_factor=0.0,
    )  # fmt: skip
    data = DataConfig("pairs", "", "", time, model.vocab)
    return RunConfig("dpo", model, optim, data, rows, golden["steps"], unroll=False, **changes)


# Pairs in a row, and microbatches: neither changes anything.
CASES = [
    ("dpo_mini", "sigmoid", 1, 1),
    ("dpo_mini", "sigmoid", 2, 2),
    ("dpo_mini", "ipo", 4, 1),
    ("dpo_mini", "hinge", 2, 1),
]
CASES += [("dpo_mini", "robust", 2, 1), ("dpo_mini", "cdpo", 1, 4)]
CASES += [("dpo_medium", "sigmoid", 1, 1), ("dpo_medium", "sigmoid_sft", 2, 2)]


@needs_goldens
@pytest.mark.parametrize("case,kind,per_row,accumulation", CASES)
def test_training_on_pairs_from_ids_gives_what_trl_gives(case: str, kind: str, per_row: int, accumulation: int) -> None:
    golden, arrays = json.loads((GOLDENS / f"{case}.json").read_text()), load_file(GOLDENS / f"{case}.safetensors")
    tolerance = lambda name: golden["tolerance"].get(name, {"suggested_atol": 5e-5})["suggested_atol"]  # noqa: E731
    smoothing = golden.get("label_smoothing", {}) or {}
    how = PreferenceConfig(
        {"cdpo": "sigmoid", "sigmoid_sft": "sigmoid"}.get(kind, kind), golden["beta"],
        smoothing.get(kind, 0.0) if isinstance(smoothing, dict) else smoothing, sft=0.5 if kind == "sigmoid_sft" else 0.0,
    )  # fmt: skip
    model = phi3_jax.load(f"hf:{GOLDENS / golden['base']}")
    peak = float(arrays["learning_rates"][0])
    batches = [
        packed(rows_of(arrays, i), np.stack([arrays["ref_chosen_logps"][i], arrays["ref_rejected_logps"][i]]), per_row)
        for i in range(golden["steps"])
    ]
    time = max(b["tokens"].shape[1] for b in batches)
    batches = [{k: np.pad(x, ((0, 0), (0, time - x.shape[1]))) for k, x in b.items()} for b in batches]
    run = run_of(model.config, golden, len(batches[0]["tokens"]), time, peak, accumulation=accumulation)
    loss = objectives.Loss(("chosen", "rejected"), False, None, preference.preference(how))
    seen: list[dict[str, float]] = []
    mesh = make_mesh(jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = dataclasses.replace(step.init_state(run, mesh), params=jax.tree.map(jnp.asarray, model.params))
        train = jax.jit(lambda s, b, lr: step.train_step(s, b, lr, run, loss))
        for number, batch in enumerate(batches):
            batch = jax.device_put(batch, rules.batch_sharding(run.strategy, mesh))
            state, metrics = train(state, batch, np.float32(learning_rate(run, number)))
            seen.append({k: float(v) for k, v in metrics.items()})
    names = {
        "losses": "loss", "rewards_chosen": "rewards/chosen", "rewards_rejected": "rewards/rejected",
        "margins": "rewards/margin", "grad_norms": "grad_norm",
    }  # fmt: skip
    for theirs, ours in names.items():
        key = f"{theirs}_{kind}"
        if key in arrays:  # TRL logs no rewards of cdpo
            np.testing.assert_allclose([m[ours] for m in seen], arrays[key], rtol=0, atol=tolerance(key), err_msg=key)
    key = f"policy_chosen_logps_{kind}"
    np.testing.assert_allclose([m["logps/chosen"] for m in seen], arrays[key].mean(1), rtol=0, atol=tolerance(key))
    accuracies = [m["rewards/accuracy"] for m in seen]  # at first all pairs tie, to rounding
    if f"accuracies_{kind}" in arrays:
        np.testing.assert_allclose(accuracies[1:], arrays[f"accuracies_{kind}"][1:], atol=1e-6)
