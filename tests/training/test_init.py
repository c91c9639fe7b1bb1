"""Runs that start from given weights: the same on every mesh, named by content, refused before anything is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.configs import DataConfig, ModelConfig, OptimConfig, RunConfig, fingerprint, science
from phi3_jax.data import export
from phi3_jax.errors import UserError
from phi3_jax.experiment import load_config, override
from phi3_jax.family import proxy
from phi3_jax.interop import convert, huggingface, loading, safetensors
from phi3_jax.interop.content import content
from phi3_jax.models.spec import init_params, param_specs
from phi3_jax.records import checkpoint, streaming
from phi3_jax.records.files import write_json
from phi3_jax.records.rows import read_rows
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.study import initial, launch
from phi3_jax.study.worker import train
from phi3_jax.training import step
from phi3_jax.verbs import asked

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
from hf_folders import random_folder, tensors_in, write_tensors

ROOT = Path(__file__).resolve().parents[2]
SCALING = f"{ROOT}/experiments/scaling.py"
TIMING = {"tokens_per_s", "mfu", "compile_s", "first_step_s"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Sentences as bytes in windows of 32."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (json.dumps({"text": f"entry {i} says {i * 7919 % 1000}"}) for i in range(200))
    (folder / "a.jsonl").write_text("\n".join(lines))
    manifest = export.export(folder / "data", str(folder / "a.jsonl"), window=32, held_out=0.2)
    return DataConfig("texts", str(folder / "data"), manifest["fingerprint"], 32, manifest["vocab"])


def values_of(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters without the zeros of the initial ones, by the names of leaves."""
    random = np.random.default_rng(seed)
    leaves = huggingface.leaves_of(cfg).items()
    return {leaf: (random.standard_normal(spec.shape) * 0.2).astype(np.float32) for leaf, spec in leaves}


def save(run: Path, cfg: ModelConfig, values: Mapping[str, np.ndarray], tokenizer: Any = None) -> Path:
    """A run's folder with nothing but these parameters."""
    forms = {f"params.{leaf}": (x.shape, x.dtype) for leaf, x in values.items()}
    with streaming.stream(run / "checkpoints", 0, forms, {}) as put:
        for leaf, x in values.items():
            put(f"params.{leaf}", None, x)
    write_json(run / "config.json", {"config": {"model": dataclasses.asdict(cfg)}, "tokenizer": tokenizer})
    return run


def small_model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(proxy("mini", "pico", "family", vocab=260), layers=2, **changes)


def run_of(init: str, model: ModelConfig, data: DataConfig | None = None, **changes: Any) -> RunConfig:
    data = data or DataConfig("facts", "", "", 32, model.vocab)
    found = content(loading.open_weights(init)) if init else ""
    run = RunConfig("x", model, OptimConfig(), data, 8, 6, unroll=False, init=init, init_content=found)
    return dataclasses.replace(run, **changes)


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(path)]


# ------------------------------------------------------------------------------------------------ weights on a mesh


WAYS = {"dp": (1, {}), "fsdp": (8, {}), "fsdp_tp": (8, {"tensor_parallel": 2})}
GOLDENS = [
    ("mini_window", np.float32),
    ("mini_window", ml_dtypes.bfloat16),
    ("small", ml_dtypes.bfloat16),
    ("medium_longrope", np.float32),
]


def batch_of(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Rows of one document each, with a loss everywhere."""
    barred = {i for start, stop in cfg.dummy_tokens for i in range(start, stop)}
    ids = np.random.default_rng(0).choice([i for i in range(cfg.vocab) if i not in barred], (8, 33)).astype(np.int32)
    one = np.ones((8, 32), np.int32)
    positions = np.tile(np.arange(32, dtype=np.int32), (8, 1))
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], segments=one, positions=positions, domains=one)


def on_mesh(run: RunConfig, devices: int) -> tuple[Any, Any, jax.sharding.Mesh]:
    """(what `initial.reader` gives a run, the shardings it was asked for, the mesh)."""
    mesh = mesh_of(run, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        shardings = rules.param_shardings(param_specs(run.model), run.strategy, mesh)
        return initial.reader(run)(shardings), shardings, mesh


@pytest.mark.parametrize(("kind", "dtype"), GOLDENS)
def test_on_every_mesh_the_weights_are_those_that_load_gives(kind: str, dtype: type, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if kind == "medium_longrope" else {}
    source = f"hf:{random_folder(tmp_path / 'source', kind, dtype, **heads)}"
    model = phi3_jax.load(source)
    wanted = jax.tree.map(lambda x: np.asarray(x, np.float32), model.params)
    for strategy, (devices, degrees) in WAYS.items():
        run = run_of(source, model.config, strategy=strategy, **degrees)
        params, shardings, mesh = on_mesh(run, devices)
        for x, sharding, want in zip(*map(jax.tree.leaves, (params, shardings, wanted)), strict=True):
            assert x.dtype == jnp.float32 and x.sharding == sharding
            np.testing.assert_array_equal(np.asarray(x), want)
    batch = batch_of(model.config)
    logits = dataclasses.replace(model, dtype=jnp.dtype(jnp.float32)).logits(batch["tokens"])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    with jax.set_mesh(mesh):
        data = jax.device_put(batch, rules.batch_sharding(strategy, mesh))
        nll = jax.jit(lambda p, b: step.eval_step(p, b, run))(params, data)["nll"]
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-4)


def test_on_every_mesh_training_goes_the_same_way(tmp_path: Path) -> None:
    source = f"hf:{random_folder(tmp_path / 'source', 'small', ml_dtypes.bfloat16)}"
    cfg, losses = loading.folder_config(tmp_path / "source"), []
    for strategy, (devices, degrees) in WAYS.items():
        run = run_of(source, cfg, strategy=strategy, **degrees)
        params, _, mesh = on_mesh(run, devices)
        with jax.set_mesh(mesh):
            state = jax.jit(lambda p, run=run: step._fresh(run, p))(params)
            data = jax.device_put(batch_of(cfg), rules.batch_sharding(strategy, mesh))
            train_step, _ = step.compile_steps(run, step.Loss(("text",), False))
            for _ in range(3):
                state, metrics = train_step(state, data, np.float32(1e-3))
                losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, losses[:3] * len(WAYS), rtol=1e-4)
    assert losses[2] < losses[0]


@pytest.mark.usefixtures("compiled_anew")
def test_no_more_than_a_leaf_and_a_few_layers_is_on_the_host(tmp_path: Path) -> None:
    """The mesh of this test is host memory too, but not numpy's, which alone is traced."""
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=32, vocab_size=256)
    source = f"hf:{random_folder(tmp_path / 'source', 'mini_window', ml_dtypes.bfloat16, **shape)}"
    weights = loading.open_weights(source)
    specs = huggingface.leaves_of(weights.config)
    total, largest = (f(2 * spec.size for spec in specs.values()) for f in (sum, max))
    run = run_of(source, weights.config, strategy="fsdp")
    mesh = mesh_of(run)
    shardings = rules.param_shardings(param_specs(run.model), "fsdp", mesh)
    # Before it is measured: what is imported and compiled counts once.
    loading.place(run.model, weights.dtypes, weights.read, shardings, jnp.float32)
    # The least of several: threads that earlier tests left are traced as well. A name of values is remembered, so that it
    # is made once. A transfer to the mesh runs beside the next read, so that two leaves can be there on a busy machine.
    for bound, times, use in (
        (0.25 * largest + 6_000_000, 1, lambda: content(dataclasses.replace(weights, paths=()))),
        (0.8 * total, 3, lambda: loading.place(run.model, weights.dtypes, weights.read, shardings, jnp.float32)),
    ):
        peaks = []
        for _ in range(times):
            tracemalloc.start()
            use()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert min(peaks) < bound <= 0.8 * total, (peaks, largest, total)


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def source(texts: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A run from random weights, and its study."""
    study = tmp_path_factory.mktemp("source")
    run = run_of("", small_model(), texts, name="first", checkpoint_every=3)
    assert train(run, study).status == "done"
    return run, study


def test_a_run_from_its_own_first_weights_is_the_same_run(source: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Data, optimiser and schedule start anew: every row, score and bit is that of the run whose weights they were."""
    run, study = source
    params = jax.tree_util.tree_leaves_with_path(init_params(run.model, run.seed))
    values = {jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(x) for k, x in params}
    init = save(tmp_path / "weights", run.model, values)
    again = run_of(str(init), run.model, run.data, name="again", checkpoint_every=3)
    result = train(again, tmp_path)
    assert untimed(tmp_path / "again" / "metrics.jsonl") == untimed(study / "first" / "metrics.jsonl")
    evals = untimed(tmp_path / "again" / "evals.jsonl")
    assert [r for r in evals if r["step"]] == untimed(study / "first" / "evals.jsonl") != evals
    old = checkpoint.restore(study / "first" / "checkpoints", result.state).state
    for a, b in zip(*map(jax.tree.leaves, (result.state, old)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert fingerprint(again) != fingerprint(run)


def test_the_scores_at_step_0_are_the_source_s_last(source: tuple[RunConfig, Path], tmp_path: Path) -> None:
    run, study = source
    second = run_of(str(study), run.model, run.data, name="second", steps=2, seed=5)  # the study is its one run
    train(second, tmp_path)

    def scores(folder: Path, step: int) -> list[Any]:
        rows = [r for r in read_rows(folder / "evals.jsonl") if r["step"] == step]
        return [(r["suite"], r["task"], r["metric"], r["value"]) for r in rows]

    assert scores(tmp_path / "second", 0) == scores(study / "first", 6) != []
    assert scores(tmp_path / "second", 0) != scores(study / "first", 3)
    first = read_rows(tmp_path / "second" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(read_rows(study / "first" / "metrics.jsonl")[-1]["loss"], rel=0.2)
    assert first["lr"] == OptimConfig().peak_lr and first["step"] == 1, "of one step of warm-up, the first"


def worker(study: Path) -> subprocess.Popen:
    line = [sys.executable, "-m", "phi3_jax.study.worker", str(study), "x"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_after_kill_9_it_goes_on_without_the_weights_it_started_from(
    source: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    run, study = source
    init = shutil.copytree(study / "first", tmp_path / "weights")
    long = run_of(str(init), run.model, run.data, steps=150, checkpoint_every=5, eval_points=1, log_every=1)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "study.json", {"runs": [dataclasses.asdict(long)]})
    process = worker(tmp_path / "broken")
    deadline = time.monotonic() + 300
    while not checkpoint.list_steps(tmp_path / "broken" / "x" / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "broken" / "x" / "done.json").exists(), "it was over before it was killed"
    whole = worker(tmp_path / "whole")
    assert whole.communicate() and whole.returncode == 0
    shutil.rmtree(init)
    again = worker(tmp_path / "broken")
    out, _ = again.communicate()
    assert again.returncode == 0, out
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert untimed(tmp_path / "broken" / "x" / name) == untimed(tmp_path / "whole" / "x" / name) != []
    newest = [tmp_path / name / "x" / "checkpoints" / "150" for name in ("whole", "broken")]
    records = [json.loads((path / checkpoint.RECORD).read_text())["files"] for path in newest]
    arrays = [{k: v for k, v in record.items() if "/c/" in k} for record in records]
    assert arrays[0] == arrays[1] and len(arrays[0]) > 20
    shutil.rmtree(tmp_path / "broken" / "x")
    out, _ = worker(tmp_path / "broken").communicate()  # without a checkpoint they are needed
    assert json.loads(out.splitlines()[-1])["error"].startswith(f"no folder {init}")


def test_a_run_that_was_handed_no_weights_does_not_train_random_ones(texts: DataConfig, tmp_path: Path) -> None:
    from phi3_jax.training.train import train_run

    run = dataclasses.replace(run_of("", small_model(), texts), init="gone", init_content="0123456789abcdef")
    with pytest.raises(ValueError, match="starts from the weights 0123456789abcdef"):
        train_run(run, tmp_path, {})


def test_weights_that_changed_since_the_plan_are_refused(texts: DataConfig, tmp_path: Path) -> None:
    cfg = small_model()
    init = save(tmp_path / "weights", cfg, values_of(cfg))
    run = run_of(str(init), cfg, texts)
    shutil.rmtree(init)
    save(init, cfg, values_of(cfg, seed=1))
    with pytest.raises(UserError, match=f"{init} holds other weights .* than x starts from \\({run.init_content}\\)"):
        train(run, tmp_path)
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------------ a name by content


def test_the_name_is_of_the_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = random_folder(tmp_path / "narrow", "mini_window", ml_dtypes.bfloat16)
    wide = Path(shutil.copytree(narrow, tmp_path / "wide"))
    write_tensors(wide, {k: v.astype(np.float32) for k, v in tensors_in(narrow).items()})
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 20_000)
    cut = Path(shutil.copytree(narrow, tmp_path / "cut"))
    (cut / "model.safetensors").unlink()
    write_tensors(cut, tensors_in(narrow))
    assert (cut / safetensors.INDEX).exists()
    convert.import_folder(narrow, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copied")
    places = [*(f"hf:{tmp_path / name}" for name in ("narrow", "wide", "cut")), tmp_path / "run", tmp_path / "copied"]
    names = {str(place): content(loading.open_weights(place)) for place in places}
    assert len(set(names.values())) == 1, names
    tensors = tensors_in(wide)
    tensors["model.norm.weight"][3] = np.nextafter(tensors["model.norm.weight"][3], np.float32(9))
    write_tensors(wide, tensors)
    assert content(loading.open_weights(f"hf:{wide}")) not in names.values()
    swapped = dict(tensors_in(narrow))
    a, b = (f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    write_tensors(narrow, swapped)
    os.utime(narrow / "model.safetensors")
    assert content(loading.open_weights(f"hf:{narrow}")) not in names.values()


def test_the_name_is_read_from_the_cache_until_a_file_changes(tmp_path: Path, cache: Path) -> None:
    folder = random_folder(tmp_path / "source", "small", np.float32)
    weights, reads = loading.open_weights(f"hf:{folder}"), []
    counting = dataclasses.replace(weights, read=lambda leaf, put: reads.append(leaf) or weights.read(leaf, put))
    name = content(counting)
    assert reads and content(counting) == name and len(reads) == len(set(reads)), "the second time nothing is read"
    os.utime(folder / "model.safetensors", (1, 1))
    assert content(counting) == name and len(reads) == 2 * len(set(reads))
    for entry in (cache / "phi3_jax" / "contents").iterdir():
        entry.write_text("half")  # as no process of ours leaves it
    assert content(counting) == name and len(reads) == 3 * len(set(reads))
    shutil.rmtree(cache)
    cache.write_text("")  # a cache that cannot be written is no error
    assert content(counting) == name


def test_a_run_is_the_same_wherever_its_weights_lay(texts: DataConfig) -> None:
    plain = run_of("", small_model(), texts)
    assert "init_content" not in science(plain) and "init" not in science(plain)
    here, there = (dataclasses.replace(plain, init=p, init_content="0123456789abcdef") for p in ("a", "b"))
    assert fingerprint(here) == fingerprint(there) != fingerprint(plain)
    assert fingerprint(dataclasses.replace(here, init_content="f" * 16)) != fingerprint(here)
    before = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.name.startswith("init")}
    assert before == {"init": "", "init_content": ""}, "runs of before there were such fields read so"


# ------------------------------------------------------------------------------------------------ words and refusals


def config_of(words: str, **changes: Any) -> Any:
    config = load_config(f"{SCALING}:{words}")
    for key, value in changes.items():
        override(config, key.replace("__", "."), str(value))
    return config


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the pico proxies, trained on facts by what they say, and as Hugging Face folders."""
    folder = tmp_path_factory.mktemp("pico")
    from phi3_jax.data.corpora.facts import closed

    for size in ("mini", "small", "medium"):
        cfg = proxy(size, "pico", "family")
        save(folder / size, cfg, values_of(cfg), closed(256))
        convert.export_run(folder / size, folder / f"hf-{size}")
    return folder


def test_what_fits_is_known_before_anything_is_written(pico: Path, tmp_path: Path) -> None:
    for words, changes in (
        (f"mini,init={pico}/mini", {}),
        (f"mini,init={pico}/mini/checkpoints/0", {}),
        (f"mini,init=hf:{pico}/hf-mini", {}),
        (f"small,init={pico}/small", {}),
        (f"small,init=hf:{pico}/hf-small", {}),
        (f"medium,init={pico}/medium", {}),
        (f"medium,init=hf:{pico}/hf-medium", {"mup": "false"}),  # whose multipliers are folded into the weights
    ):
        found, line = initial.check(config_of(words, **changes), "pico", tmp_path / "out")
        assert line.startswith(f"start: weights {found} of ") and "changed" not in line
    _, line = initial.check(config_of(f"mini,init={pico}/mini", ladder="clean"), "pico", tmp_path / "out")
    assert line.endswith("changed: window_keys: 2048 -> None")
    assert initial.check(config_of("mini"), "pico", tmp_path / "out") == ("", "")
    assert not (tmp_path / "out").exists()


def damaged(pico: Path, folder: Path) -> None:
    """Copies of weights that each miss something."""
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        values = values_of(proxy("mini", "pico", "family"))
        values["blocks.out.weight"][1, 0, 0, 0] = value
        save(folder / name, proxy("mini", "pico", "family"), values)
    tensors = tensors_in(pico / "hf-mini")
    for name, change in (("lacking", None), ("hf-nan", np.nan)):
        shutil.copytree(pico / "hf-mini", folder / name)
        tensor = tensors.pop("model.layers.2.mlp.down_proj.weight")
        kept = {} if change is None else {"model.layers.2.mlp.down_proj.weight": np.full_like(tensor, change)}
        write_tensors(folder / name, tensors | kept)
        tensors["model.layers.2.mlp.down_proj.weight"] = tensor
    cut = values_of(proxy("mini", "pico", "family"))
    del cut["final_norm.scale" if "final_norm.scale" in cut else sorted(cut)[0]]
    save(folder / "cut", proxy("mini", "pico", "family"), cut)
    (folder / "empty").mkdir()


def test_what_does_not_fit_is_one_line_and_nothing_is_written(pico: Path, tmp_path: Path) -> None:
    damaged(pico, tmp_path)
    (tmp_path / "a.txt").write_text("a text " * 99)
    text, out = f"data={tmp_path / 'a.txt'}", tmp_path / "out"
    for words, options, message in (
        (f"medium,init={pico}/mini", [], "embed=48 instead of 80, layers=4 instead of 5"),
        (f"sweep,init={pico}/mini", ["ladder=family"], "does not fit phi-3-small proxy"),
        (f"mini,scale=nano,init={pico}/mini", [], "embed=48 instead of 96"),
        (f"mini,init={pico}/mini,{text}", [], "vocab=320 instead of 259"),
        (f"medium,init=hf:{pico}/hf-medium", [], "residual_multiplier=1.0 instead of 0.8"),
        (f"mini,init={tmp_path}/gone", [], f"no folder {tmp_path}/gone"),
        (f"mini,init={tmp_path}/empty", [], "holds no *.safetensors files"),
        (f"mini,init={pico}/hf-mini", [], f"write hf:{pico}/hf-mini"),
        (f"mini,init={pico}", [], "is a study of several runs; name one"),
        (f"mini,init=hf:{tmp_path}/lacking", [], "missing: model.layers.2.mlp.down_proj.weight"),
        (f"mini,init={tmp_path}/cut", [], "does not hold the model of its config.json"),
        (f"mini,init={tmp_path}/nan", [], "blocks.out.weight holds 48 of 9216 values that are NaN or infinite"),
        (f"mini,init={tmp_path}/infinite", [], "blocks.out.weight"),
        (f"mini,init=hf:{tmp_path}/hf-nan", [], "values that are NaN or infinite"),
        ("mini,init=gs://bucket/run", [], "gs:// is no place"),
    ):
        arguments = ["--config", f"{SCALING}:{words}", "--workdir", str(out), *(f"--config.{o}" for o in options)]
        with pytest.raises(UserError) as caught:
            launch.launch(asked(arguments), "")
        assert message in str(caught.value) and "\n" not in str(caught.value), (words, str(caught.value))
        assert not out.exists()


def test_the_same_number_of_other_tokens_is_another_vocabulary(pico: Path, tmp_path: Path) -> None:
    cfg = proxy("mini", "pico", "family")
    init = save(tmp_path / "other", cfg, values_of(cfg), {"kind": "huggingface", "fingerprint": "0" * 64})
    with pytest.raises(UserError, match="has another vocabulary than the data: .*config.data.tokenizer"):
        initial.check(config_of(f"mini,init={init}"), "pico", tmp_path)
    save(tmp_path / "silent", cfg, values_of(cfg))
    initial.check(config_of(f"mini,init={tmp_path / 'silent'}"), "pico", tmp_path)


@pytest.mark.slow
def test_the_command_names_its_folder_and_knows_the_weights_again(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["budgets=3k", "train.eval_points=1", "data.facts=16", "data.universe=32", "train.checkpoint_every=1"]

    def command(words: str, *more: str) -> subprocess.CompletedProcess:
        settings = [f"--config.{option}" for option in (*options, *more)]
        line = [sys.executable, f"{ROOT}/launch/run.py", "--config", f"{SCALING}:mini,scale=pico,{words}", *settings]
        return subprocess.run(line, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})

    shutil.copytree(pico / "mini", "weights")
    done = command("init=weights,name=mine")
    assert done.returncode == 0, done.stderr
    (run,) = Path("runs/mine").glob("*/config.json")
    record, rows = json.loads(run.read_text()), untimed(run.parent / "metrics.jsonl")
    assert record["identity"]["init_content"] == content(loading.open_weights("weights"))
    assert {row["step"] for row in read_rows(run.parent / "evals.jsonl")} == {0, 2}
    assert "started from the weights of weights" in Path("runs/mine/report.html").read_text()
    times = {p: p.stat().st_mtime_ns for p in run.parent.glob("*.json*")}
    shutil.move("weights", "elsewhere")
    for words in ("init=weights,name=mine", "init=elsewhere,name=mine"):  # gone and known; the same under another name
        done = command(words)
        assert done.returncode == 0, done.stderr
        assert {p: p.stat().st_mtime_ns for p in times} == times and untimed(run.parent / "metrics.jsonl") == rows
    other = proxy("mini", "pico", "family")
    save(tmp_path / "others", other, values_of(other, seed=9))
    for words in ("init=others,name=mine", "name=mine"):
        done = command(words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "holds another run; changed: init_content: " in done.stderr


# ------------------------------------------------------------------------------------------------ a study of one run


def test_a_study_of_one_run_is_that_run(source: tuple[RunConfig, Path], tmp_path: Path) -> None:
    from phi3_jax.evaluation import command as evaluate
    from phi3_jax.interop import gguf
    from phi3_jax.records.folder import KEPT

    study = shutil.copytree(source[1], tmp_path / "study")
    run = study / "first"
    ids = np.arange(8)[None]
    np.testing.assert_array_equal(phi3_jax.load(study).logits(ids), phi3_jax.load(run).logits(ids))
    assert loading.kept_folder(study) == run / KEPT
    assert evaluate.locate(str(study)) == evaluate.locate(str(run))
    assert gguf._source(str(study)).cfg == gguf._source(str(run)).cfg
    for name, path in (("a", study), ("b", run)):
        assert main(["convert", "--from", str(path), "--to", f"hf:{tmp_path / 'hf'}{name}"]) == 0
        words = ["--model", str(path), "--format", "q8_0", "--out", str(tmp_path / f"q{name}"), "--tokens", "0"]
        assert main(["quantize", *words]) == 0
    assert (tmp_path / "hfa/model.safetensors").read_bytes() == (tmp_path / "hfb/model.safetensors").read_bytes()
    assert content(loading.open_weights(study)) == content(loading.open_weights(run))
    write_json(study / "study.json", {"runs": [{"name": "first"}, {"name": "second"}]})  # the second has not started
    with pytest.raises(UserError, match="is a study of several runs; name one: .*first, .*second"):
        loading.find_run(study)
    shutil.rmtree(run)
    write_json(study / "study.json", {"runs": [{"name": "first"}]})
    with pytest.raises(UserError, match="is a study whose run first has not started; train it first"):
        loading.find_run(study)
