"""4 and 8 bits: GGUF's blocks bit for bit, the kernel, forward and decoding, calibration, the quantised run's folder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.family import published
from phi3_jax.inference import quantize
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import huggingface, quantized
from phi3_jax.interop.convert import import_folder
from phi3_jax.models import decoder, layers
from phi3_jax.models.kernels import grouped
from phi3_jax.models.quantized import FORMATS, QuantizedTensor, to_tiles

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
from hf_folders import random_folder

ROOT = Path(__file__).resolve().parents[2]
needs_kernel = pytest.mark.skipif(not grouped.available(), reason="no C++ compiler: the kernel cannot be built")


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random weights with zeros, a constant group, tiny and large groups among them."""
    found = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    found[1] *= 1e-6
    found[2] *= 300
    found[3, :32], found[0, 32:64] = 0, 0.5
    return found


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_blocks_are_gguf_s_own_bit_for_bit(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    for seed in range(3):
        weights = matrix(40, 96, seed)
        blocks = quantize.round_matrix(weights, name)
        np.testing.assert_array_equal(blocks, gguf.quants.quantize(weights, kind))
        np.testing.assert_array_equal(quantize.dequantise(blocks, name, 96), gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (37, 384), (259, 100)])
def test_tiles_hold_the_same_numbers(name: str, rows: int, columns: int) -> None:
    """Also where rows do not fill a tile and columns do not fill a group."""
    weights = matrix(rows, columns)
    blocks = quantize.round_matrix(weights, name)
    assert blocks.shape == (rows, -(-columns // FORMATS[name].group) * FORMATS[name].group_bytes)
    tiles = to_tiles(blocks, name)
    tensor = QuantizedTensor(jnp.asarray(tiles), name, (columns, rows), 1)
    values = quantize.dequantise(blocks, name, columns)
    np.testing.assert_array_equal(tensor.matrix(), values)
    np.testing.assert_array_equal(tensor.dense(), values.T)
    table = QuantizedTensor(jnp.asarray(tiles), name, (rows, columns), 0)
    ids = jnp.asarray([[0, rows - 1, 5], [3, 1, 0]])
    np.testing.assert_array_equal(table.lookup(ids), values[np.asarray(ids)])
    step = np.abs(weights).max() / (7 if FORMATS[name].bits == 4 else 127)
    assert 0 < np.abs(values - weights).max() <= step


@needs_kernel
@pytest.mark.parametrize("version", ["plain", "avx2", "vnni"])
@pytest.mark.parametrize("name", FORMATS)
def test_kernel_against_float64(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rounding of activations to 8 bits stands between it and exact products."""
    monkeypatch.setenv("PHI3_JAX_KERNEL", version)
    if grouped.version() != version:
        pytest.skip(f"this CPU has no {version}")
    rng = np.random.default_rng(0)
    for rows, columns, m in ((16, 128, 1), (40, 256, 3), (259, 384, 70), (1000, 100, 9)):
        weights = rng.standard_normal((rows, columns)).astype(np.float32)
        blocks = quantize.round_matrix(weights, name)
        exact = quantize.dequantise(blocks, name, columns).astype(np.float64)
        tensor = QuantizedTensor(jnp.asarray(to_tiles(blocks, name)), name, (columns, rows), 1)
        x = rng.standard_normal((m, columns)).astype(np.float32)
        x[0, :32] = 0
        padded = np.pad(x, ((0, 0), (0, -columns % 32))).reshape(m, -1, 32)
        top = np.abs(padded).max(axis=-1, keepdims=True)
        inverse = np.divide(np.float32(127), top, where=top > 0, out=np.zeros_like(top))
        rounded = np.rint(padded * inverse) * (top / np.float32(127)).astype(np.float64)
        rounded = rounded.reshape(m, -1)[:, :columns]
        y = np.asarray(tensor.apply(jnp.asarray(x)))
        assert np.abs(y - rounded @ exact.T).max() <= 1e-5 * np.abs(exact).max() * np.abs(x).max() * columns**0.5
        assert np.abs(y - x @ exact.T).max() <= 0.02 * np.abs(x @ exact.T).max()


@needs_kernel
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_few_rows_are_added_up_in_float32(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    for rows, depth, width in ((1, 3, 5), (2, 7, 63), (1, 3072, 200), (8, 129, 4097), (3, 64, 64)):
        x = jnp.asarray(rng.standard_normal((rows, depth)), dtype)
        w = jnp.asarray(rng.standard_normal((depth, width)), dtype)
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        found = grouped.multiply_few(x.astype(jnp.float32), w)
        np.testing.assert_allclose(found, exact, atol=2e-6 * depth, rtol=1e-6)
        again = layers.linear(x[:, None], {"weight": w})[:, 0]  # rounded to x's dtype once, at the end
        rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(again.astype(jnp.float32), exact, rtol=rounding, atol=2e-6 * depth)


@needs_kernel
def test_a_few_rows_have_the_gradient_of_the_plain_product() -> None:
    rng = np.random.default_rng(0)
    x, w, d_y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 9), (9, 70), (4, 70)))
    assert layers.has_kernel(x, 1, w) and not layers.has_kernel(x[:1], 1, w)
    assert not layers.has_kernel(x.astype(jnp.bfloat16), 1, w)
    gradient = jax.jit(jax.grad(lambda x, w: (layers.times(x, w) * d_y).sum(), (0, 1)))(x, w)
    np.testing.assert_allclose(gradient[0], d_y @ w.T, atol=1e-5)
    np.testing.assert_allclose(gradient[1], x.T @ d_y, atol=1e-5)
    _, change = jax.jvp(layers.product, (x, w), (2 * x, 3 * w))
    np.testing.assert_allclose(change, 5 * x @ w, atol=1e-4)
    both = jax.vmap(layers.product)(jnp.stack([x, 2 * x]), jnp.stack([w, w]))
    np.testing.assert_allclose(both, jnp.stack([x @ w, 2 * x @ w]), atol=1e-5)


def test_without_the_kernel_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_JAX_KERNEL", "off")
    weights, x = matrix(40, 256), np.random.default_rng(1).standard_normal((2, 3, 256)).astype(np.float32)
    blocks = quantize.round_matrix(weights, "int4_g128")
    tensor = QuantizedTensor(jnp.asarray(to_tiles(blocks, "int4_g128")), "int4_g128", (256, 5, 8), 1)
    expected = x @ quantize.dequantise(blocks, "int4_g128", 256).T
    np.testing.assert_allclose(
        np.asarray(tensor.apply(jnp.asarray(x))).reshape(2, 3, 40), expected, rtol=2e-5, atol=2e-3
    )


def test_a_machine_without_compiler_falls_back_with_one_notice(tmp_path: Path) -> None:
    code = (
        "import numpy as np, jax.numpy as jnp\n"
        "from phi3_jax.models.quantized import *; from phi3_jax.inference import quantize\n"
        "tiles = to_tiles(quantize.round_matrix(np.eye(64, dtype='f4'), 'q8_0'), 'q8_0')\n"
        "t = QuantizedTensor(jnp.asarray(tiles), 'q8_0', (64, 64), 1)\n"
        "print(*(float(t.apply(jnp.eye(1, 64))[0, i]) for i in range(2)))\n"
    )
    env = os.environ | {"PATH": str(tmp_path), "CXX": "none", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert np.allclose([float(x) for x in done.stdout.split()], [1, 0], atol=1e-3), done.stderr
    assert done.stderr.count("note: no compiled CPU kernel") == 1 and "no C++ compiler" in done.stderr


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny phi-3-mini with random weights, as a run."""
    folder = tmp_path_factory.mktemp("float")
    import_folder(random_folder(folder / "hf", "medium_longrope", np.float32), folder / "run")
    return folder / "run"


def quantised(source: Path, target: Path, name: str = "q4_0", *more: str) -> Path:
    arguments = ["--model", str(source), "--format", name, "--out", str(target), *more]
    assert main(["quantize", *arguments]) == 0
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_decoding_take_a_quantised_run(
    float_run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = quantised(float_run, tmp_path / "q", name, "--tokens", "0")
    said = capsys.readouterr().out
    model, original = phi3_jax.load(folder), phi3_jax.load(float_run)
    cfg = model.config
    assert f"{name}, rounded" in said and "bits per parameter" in said
    assert (folder / quantized.WEIGHTS).stat().st_size == pytest.approx(quantized.stored_bytes(cfg, name), abs=20_000)
    assert f"{quantized.stored_bytes(cfg, name) / 1e6:.3f} MB" in said

    def widen(x):
        return x.dense() if isinstance(x, QuantizedTensor) else x

    wide = jax.tree.map(widen, model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab, (2, 30))
    exact = decoder.forward(wide, jnp.asarray(tokens), cfg)
    monkeypatch.setenv("PHI3_JAX_KERNEL", "off")
    np.testing.assert_allclose(model.logits(tokens), exact, atol=1e-4 * float(jnp.abs(exact).max()))
    jax.clear_caches()
    monkeypatch.setenv("PHI3_JAX_KERNEL", "auto")
    logits = model.logits(tokens)
    assert float(jnp.abs(logits - exact).max()) < 0.05 * float(jnp.abs(exact).max())
    error = float(jnp.abs(exact - original.logits(tokens)).mean() / jnp.abs(original.logits(tokens)).mean())
    assert (0.001 < error < 0.02) if name == "q8_0" else (0.02 < error < 0.5)
    reply = Engine(model).generate([tokens[0].tolist()], 5, stop_ids=())[0]
    ids = [*tokens[0].tolist(), *reply.ids]
    again = model.logits(np.array([ids]))[0]
    best = jnp.argmax(again, -1).tolist()[29:-1]
    assert sum(a == b for a, b in zip(best, reply.ids)) >= 4  # batches of rows round activations alike


def test_sizes_of_the_published_models() -> None:
    mini = published("mini")
    assert quantized.stored_bytes(mini, "q4_0") / 1e9 == pytest.approx(2.15, abs=0.005)
    assert quantized.stored_bytes(mini, "int4_g128") / 1e9 == pytest.approx(1.97, abs=0.005)
    assert quantized.stored_bytes(mini, "q8_0") / 1e9 == pytest.approx(4.06, abs=0.005)


def test_calibration_keeps_products_that_rounding_changes() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64, 128)).astype(np.float32)
    mixing = rng.standard_normal((128, 128)) * np.exp(-np.arange(128) / 12)  # inputs that lie in few directions
    x = rng.standard_normal((2000, 128)) @ mixing.T
    for name in FORMATS:
        plain = quantize.dequantise(quantize.round_matrix(weights, name), name, 128)
        fitted = quantize.dequantise(quantize.calibrate_matrix(weights, x.T @ x, name), name, 128)
        errors = [np.square(x @ (weights - w).T).mean() for w in (plain, fitted)]
        assert errors[1] < 0.5 * errors[0], name
        # Inputs that earlier rounding has moved: the aim is the product of the unmoved ones.
        moved = x + 0.05 * x.std() * rng.standard_normal(x.shape) + 0.1 * x[:, ::-1]
        towards = quantize.calibrate_matrix(weights, moved.T @ moved, name, (x - moved).T @ moved)
        aims = [
            np.square(x @ weights.T - moved @ quantize.dequantise(w, name, 128).T).mean()
            for w in (quantize.calibrate_matrix(weights, moved.T @ moved, name), towards)
        ]
        assert aims[1] < 0.7 * aims[0], name


def test_parts_and_matrices_are_inverse_and_contract_alike() -> None:
    cfg = dataclasses.replace(
        published("medium"), embed=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=40, layers=2
    )
    for leaf, spec in huggingface.leaves_of(cfg).items():
        if quantized.is_quantised(spec):
            part = np.random.default_rng(0).standard_normal(spec.shape[spec.axes[0] == "layers" :])
            there = quantized.as_matrix(leaf, spec, part)
            np.testing.assert_array_equal(quantized.as_part(leaf, spec, there), part)
            assert there.shape[1] == {"blocks.down.weight": 96}.get(leaf, 64)


def test_bad_input(float_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    done = quantised(float_run, tmp_path / "done", "q4_0", "--tokens", "0")
    cases = [
        (["--format", "q5"], "--format q5 is unknown"),
        (["--model", str(tmp_path / "nowhere")], "no folder"),
        (["--model", str(done)], "is quantised already"),
        (["--model", "hf:x"], "make it a run first"),
        (["--out", str(done)], "exists and is not empty; choose another --out"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--tokens", "many"], "--tokens many must be an integer"),
        (["--calibrate", "--tokens", "0"], "--calibrate needs tokens"),
        (["--fromat", "q4_0"], "did you mean '--format'"),
    ]
    base = {"--model": str(float_run), "--format": "q4_0", "--out": str(tmp_path / "new")}
    for change, words in cases:
        flags = [x for k, v in base.items() if k not in change for x in (k, v)] + change
        assert main(["quantize", *flags]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and err.startswith("error: "), err
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_a_damaged_file_is_found(float_run: Path, tmp_path: Path) -> None:
    folder = quantised(float_run, tmp_path / "q", "q4_0", "--tokens", "0")
    path = folder / quantized.WEIGHTS
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) // 2, len(whole) // 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"damaged in .*sha256"):
            phi3_jax.load(folder)
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="truncated"):
        phi3_jax.load(folder)
    path.write_bytes(whole)
    phi3_jax.load(folder)
    record = json.loads((folder / quantized.RECORD).read_text())
    (folder / quantized.RECORD).write_text(json.dumps(record | {"format": "q3"}))
    with pytest.raises(UserError, match="unknown format 'q3'"):
        phi3_jax.load(folder)


def test_a_disk_that_fills_leaves_nothing(float_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    arguments = ["--model", str(float_run), "--format", "q4_0", "--out", str(tmp_path / "q"), "--tokens", "0"]
    assert main(["quantize", *arguments]) == 2
    assert "nothing was left there" in capsys.readouterr().err and not list(tmp_path.iterdir())
