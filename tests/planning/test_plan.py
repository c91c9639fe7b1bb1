"""The command as a user types it: the page, the JSON object, errors, and what it must not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.__main__ import main
from phi3_jax.experiment import load_config
from phi3_jax.family import published
from phi3_jax.models.flops import train_flops_per_token, train_tile_flops
from phi3_jax.study.plan import plans
from phi3_jax.study.runs import plan_study

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/goldens/plan_medium_v5p.txt"
EXPERIMENT = "experiments/scaling.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


POSTTRAIN = "experiments/posttrain.py"
VISION = "experiments/vision.py"


def plan(words: str, *more: str, experiment: str = EXPERIMENT) -> int:
    return main(["plan", "--config", f"{experiment}:{words}", *more])


def answer(capsys: pytest.CaptureFixture, words: str, *more: str, experiment: str = EXPERIMENT) -> dict:
    assert plan(words, *more, "--json", experiment=experiment) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_the_page(capsys: pytest.CaptureFixture) -> None:
    """Remade by `python launch/plan.py --config experiments/scaling.py:medium,topology=v5p:4x4x8 > GOLDEN`."""
    assert plan("medium,topology=v5p:4x4x8") == 0
    assert capsys.readouterr().out == GOLDEN.read_text()


def test_the_object(capsys: pytest.CaptureFixture) -> None:
    got = answer(capsys, "medium,topology=v5p:4x4x8")
    assert got["params"] == 13_960_238_080 and got["devices"] == got["chips"] == 128
    assert got["flops_per_token"] == pytest.approx(87.81e9, rel=1e-4)
    sizes = dict(got["bytes_per_device"])
    room, total = sizes.pop("limit"), sizes.pop("total")
    assert set(sizes) == {
        "parameters", "optimizer", "batch", "gradients", "activations", "logits", "collectives", "runtime",
    }  # fmt: skip
    assert sum(sizes.values()) == pytest.approx(total) and total < room
    assert got["argument_bytes"] < total < got["argument_bytes"] + got["temp_bytes"]
    assert got["fits"] is True and got["bound_by"] == "compute" and 0.6 <= got["mfu_bound"] <= 1
    assert got["tokens_per_s"] == pytest.approx(got["batch_tokens"] / got["step_time_s"])
    assert got["chip_hours"] == pytest.approx(4.8e12 / got["tokens_per_s"] / 3600 * 128)
    assert got["days"] == pytest.approx(got["chip_hours"] / 24 / 128)
    assert {"name", "op", "axes", "link", "bytes", "seconds"} <= set(got["collectives"][0])
    assert got["proposal"]["speedup"] >= 1 and got["proposal"]["fits"]


def test_a_sweep_is_three_runs(capsys: pytest.CaptureFixture) -> None:
    got = answer(capsys, "sweep,topology=v6e:16x16")
    assert [run["model"] for run in got["runs"]] == ["phi-3-mini-4k", "phi-3-small-8k", "phi-3-medium-4k"]
    assert [run["window"] for run in got["runs"]] == [
        4096,
        4096,
        4096,
    ]  # one data set, in windows that every member takes
    hours = [run["proposal"]["chip_hours"] for run in got["runs"]]
    assert hours == sorted(hours)  # at matched tokens
    assert plan("sweep,topology=v6e:16x16") == 0
    assert capsys.readouterr().out.count("memory a device") == 3


def test_words_and_overrides_reach_the_plan(capsys: pytest.CaptureFixture) -> None:
    got = answer(
        capsys, "mini,topology=v5p:4x4x8,strategy=fsdp_cp,tokens=3.3T", "--config.train.context=8", "--config.context=128k",
        "--config.train.remat=names", "--config.train.accumulation=2", "--config.train.batch_tokens=8388608",
    )  # fmt: skip
    assert got["mesh"] == {"replica": 1, "data": 16, "context": 8, "tensor": 1}
    assert (got["strategy"], got["remat"], got["accumulation"]) == ("fsdp_cp", "names", 2)
    assert (got["window"], got["batch_tokens"], got["tokens"]) == (131072, 2**23, 3.3e12)
    assert got["proposal"]["batch_tokens"] == 2**23  # as given


def test_slices_come_from_the_topology(capsys: pytest.CaptureFixture) -> None:
    got = answer(capsys, "medium,topology=2xv5p:4x4x4")
    assert got["strategy"] == "multislice" and got["mesh"]["replica"] == 2
    assert {c["link"] for c in got["collectives"]} == {"ICI", "DCN"} and got["seconds"]["dcn"] > 0


def test_the_proposal_is_what_its_overrides_say(capsys: pytest.CaptureFixture) -> None:
    first = answer(capsys, "mini,topology=v5e:16x16", "--config.context=128k")
    assert not first["fits"] and first["proposal"]["fits"]
    again = answer(capsys, "mini,topology=v5e:16x16", "--config.context=128k", *first["proposal"]["overrides"].split())
    for key in ("mesh", "strategy", "remat", "accumulation", "step_time_s", "bytes_per_device"):
        assert again[key] == first["proposal"][key]
    assert again["fits"] and again["proposal"]["speedup"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        ("medium,topology=v5q:4x4x4", (), "unknown chip 'v5q'"),
        ("medium,topology=v5p:4x4x7", (), "nearest: 4x4x8"),
        ("medium", (), "topology= is missing"),
        ("medium,topolgy=v5p:4x4x8", (), "did you mean 'topology'"),
        ("medium,topology=v5p:4x4x8,strategy=fspd", (), "unknown strategy 'fspd'; did you mean 'fsdp'"),
        ("medium,topology=v5p:4x4x8,strategy=fsdp_tp", ("--config.train.tensor=3",), "does not divide 128 devices"),
        ("medium,topology=v5p:4x4x8,strategy=fsdp_tp", ("--config.train.tensor=4",), "kv_heads=10; use 1, 2, 5, 10"),
        ("medium,topology=v5p:4x4x8", ("--config.train.context=4",), "use strategy=fsdp_cp"),
        ("medium,topology=v5p:4x4x8", ("--config.train.batch_tokens=1000000",), "use a multiple of 524,288"),
        ("medium,topology=v5p:4x4x8", ("--config.train.remat=ful",), "did you mean 'full'"),
        ("medium,topology=v5p:4x4x8", ("--config.train.accumulation=0",), "must be an integer, 1 to"),
        ("medium,topology=v5p:4x4x8", ("--config.data.window=8192",), "exceeds phi-3-medium-4k's context"),
        ("medium,topology=2xv5p:4x4x4", ("--config.train.slices=4",), "train.slices=4 on 2 slices"),
        ("medium,topology=v5p:4x4x8,scale=pica", (), "did you mean 'pico'"),
        ("medium,topology=h200:1", (), "does not fit h200:1"),
        ("medium,topology=v5p:4x4x8", ("--jsn",), "did you mean '--json'"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture, words: str, more: tuple[str, ...], said: str
) -> None:
    assert plan(words, *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err


def test_the_command_starts_no_backend_and_imports_no_trainer() -> None:
    code = (
        "import sys, jax, json; from phi3_jax.__main__ import main;"
        "from jax._src import xla_bridge as b;"
        f"rc = main(['plan', '--config', '{EXPERIMENT}:mini,topology=v5p:4x4x8', '--json']);"
        "heavy = ('tensorflow', 'orbax', 'grain', 'flax', 'torch', 'matplotlib');"
        "print(json.dumps([rc, sorted(m for m in heavy if m in sys.modules), len(b._backends)]));"
        "jax.devices(); print(len(b._backends))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    _, found, control = done.stdout.strip().splitlines()
    assert json.loads(found) == [0, [], 0], done.stderr
    assert int(control) > 0, "positive control: a started backend shows"


def test_the_script_itself() -> None:
    command = [sys.executable, "launch/plan.py", "--config", f"{EXPERIMENT}:mini,topology=h200:8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "3,821,079,552 parameters" in done.stdout and "NVLink" in done.stdout


def test_user_keys_stay_few() -> None:
    def leaves(node: dict) -> int:
        return sum(leaves(v) if isinstance(v, dict) else 1 for v in node.values())

    assert 30 < leaves(load_config(EXPERIMENT).to_dict()) < 93


def test_a_plan_hands_its_setup_to_what_compiles_it() -> None:
    (one,) = plans(load_config(f"{EXPERIMENT}:medium,topology=v5p:4x4x8"))
    assert one.configured.setup.degrees.data == 128 and one.configured.setup.topology.text == "v5p:4x4x8"


def test_a_proposal_that_is_slower_is_not_called_better(capsys: pytest.CaptureFixture) -> None:
    words = ("mini,topology=h200:16x8", "--config.context=128k")
    speedup = answer(capsys, *words)["proposal"]["speedup"]
    assert speedup < 0.995 and plan(*words) == 0
    page = capsys.readouterr().out
    assert "better:" not in page and "slower, but with a batch of 4.19M tokens: --config" in page
    assert f"  {speedup:.2f} x the tokens a second" in page


# ------------------------------------------------------------------------------------------------ post-training

WEIGHTS, ADAPTERS = 3_821_079_552, 25_165_824  # of mini, and of its adapters of rank 16
MATRICES = WEIGHTS - 32064 * 3072 - (2 * 32 + 1) * 3072  # in products: without the embedding and the gains


def test_frozen_weights_have_neither_gradient_nor_state_nor_their_product(capsys: pytest.CaptureFixture) -> None:
    words = "sft,model=mini,topology=h200:1"
    full, lora = (
        answer(capsys, words + more, "--config.train.remat=none", experiment=POSTTRAIN) for more in ("", ",lora=16")
    )
    assert full["params"] == full["trained_params"] == WEIGHTS and lora["trained_params"] == ADAPTERS
    one, other = full["bytes_per_device"], lora["bytes_per_device"]
    assert (one["parameters"], one["optimizer"]) == (4 * WEIGHTS, 8 * WEIGHTS)
    assert (other["parameters"], other["optimizer"]) == (2 * WEIGHTS + 4 * ADAPTERS, 8 * ADAPTERS)
    assert other["gradients"] <= 4 * ADAPTERS and other["total"] < one["total"] / 2
    saved = full["hardware_flops_per_token"] - lora["hardware_flops_per_token"]
    assert saved == pytest.approx(2 * MATRICES - 6 * ADAPTERS, rel=1e-6)
    assert lora["flops_per_token"] - full["flops_per_token"] == pytest.approx(6 * ADAPTERS - 2 * MATRICES, rel=1e-6)
    assert lora["step_time_s"] < 0.72 * full["step_time_s"] and lora["mfu_bound"] <= 1 and full["fits"]


def test_adapters_alone_are_reduced_over_devices(capsys: pytest.CaptureFixture) -> None:
    got = answer(capsys, "sft,model=medium,lora=16,topology=h200:8", experiment=POSTTRAIN)
    reduced = {c["name"]: c["bytes"] for c in got["collectives"] if "gradients" in c["name"]}
    assert reduced == {"adapters: gradients": pytest.approx(4 * 55_705_600 * 7 / 8)}
    assert got["proposal"]["batch_tokens"] == got["batch_tokens"]  # another batch is another experiment


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """config.json and tokenizer of a small model: a plan needs no weights."""
    source = ROOT.parent / "shared/goldens/posttraining/base_mini"
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return f"hf:{folder}"


@pytest.mark.shared("goldens")
def test_pairs_are_counted_from_the_data_with_the_reference_pass(capsys: pytest.CaptureFixture, tiny: str) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples/data/preferences.jsonl").read_text().splitlines()]
    words = f"dpo,model={tiny},data=examples/data/preferences.jsonl,lora=4,topology=h200:1,epochs=3"
    more = "--config.data.held_out=0", "--config.data.window=256"
    got = answer(capsys, words, *more, experiment=POSTTRAIN)
    assert got["rows"]["pairs"] == len(rows) and got["rows"]["window"] == got["window"] == 256
    assert got["tokens"] == 3 * 256 * got["rows"]["windows"] and got["pairs"]
    forward = got["flops_per_token"] / 3 * 256 * got["rows"]["windows"]
    assert 0 < got["reference_s"] < forward / 500e12  # at less than an H200's peak
    assert got["bytes_per_device"]["batch"] == 6 * 4 * got["batch_tokens"]  # a field more than of conversations
    simpo = answer(capsys, words, *more, "--config.preference.loss=simpo", experiment=POSTTRAIN)
    assert simpo["reference_s"] == 0 and simpo["step_time_s"] == got["step_time_s"]
    assert plan(words, *more, experiment=POSTTRAIN) == 0
    page = capsys.readouterr().out
    assert f"{len(rows)} pairs, each two segments" in page and "one pass over the data for the reference" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sft,topology=h200:1", "sft needs model="),
        ("sft,model=mini", "sft needs data="),
        ("sft,model=mni,topology=h200:1", "mni"),
        ("sft,model=mini,lora=16,topology=h200:1,data=examples/data/chats.jsonl", "has no tokenizer to count the data"),
        ("sft,model=moe,lora=16,topology=h200:1", "mixture of experts"),
        ("sft,model=medium,topology=h200:1", "does not fit h200:1"),
    ],
)
def test_errors_of_post_training_plans(capsys: pytest.CaptureFixture, words: str, said: str) -> None:
    assert plan(words, experiment=POSTTRAIN) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err


@pytest.mark.parametrize(
    ("words", "strategy", "remat", "sizes"),
    [("sweep,scale=centi,ratio=20,160", "dp", "none", 3), ("mini,scale=deci,ratio=20", "fsdp", "full", 1)],
)
def test_a_proxy_is_planned_as_it_is_trained(
    capsys: pytest.CaptureFixture, words: str, strategy: str, remat: str, sizes: int
) -> None:
    found = answer(capsys, f"{words},topology=h200:8")
    runs = found.get("runs", [found])
    assert len(runs) == sizes and all(run["fits"] for run in runs)
    assert all((run["strategy"], run["remat"]) == (strategy, remat) for run in runs)
    ratio = max(float(r) for r in words.partition("ratio=")[2].split(","))
    for run in runs:
        assert run["tokens"] / run["params"] < ratio, "the vocabulary's parameters do not count"
    # The run itself: the same batch, strategy and recomputation.
    config = load_config(f"{EXPERIMENT}:{words}")
    manifest: dict = {"window": 2048, "vocab": 32064, "kind": "text", "fingerprint": "0" * 64}
    manifest["sources"] = [{"name": "text", "weight": 1, "windows": 10**9}]
    planned = plan_study(config, config.scale, {Path("data"): manifest}, Path("none"), 8)[0]
    assert (planned.strategy, planned.remat, planned.batch_windows * 2048) == (strategy, remat, runs[0]["batch_tokens"])


def test_a_plan_of_training_on_pictures_counts_their_tiles(capsys: pytest.CaptureFixture) -> None:
    words = "model=vision,topology=h200:8"
    whole = answer(capsys, f"sft,{words}", experiment=VISION)
    model = published("vision")
    assert whole["tiles_per_window"] == 17  # a square picture at 16 crops
    text = train_flops_per_token(model, whole["window"])
    assert whole["flops_per_token"] == pytest.approx(text + 17 * train_tile_flops(model) / whole["window"])
    assert whole["trained_params"] == 4_146_621_440 - 12_598_272  # without what never runs
    few = answer(capsys, f"sft,{words},crops=4", experiment=VISION)
    assert few["tiles_per_window"] == 5 and few["step_time_s"] < whole["step_time_s"]
    assert few["bytes_per_device"]["batch"] < whole["bytes_per_device"]["batch"]
    one = answer(capsys, f"pretrain,{words}", experiment=VISION)
    assert one["trained_params"] == 22_026_240 + 8_192 and one["flops_per_token"] < 0.7 * whole["flops_per_token"]
    assert one["bytes_per_device"]["optimizer"] == pytest.approx(8 * one["trained_params"] / 8, rel=0.01)
    assert one["bytes_per_device"]["parameters"] == pytest.approx(4 * 4_146_621_440 / 8, rel=0.01)
    assert plan(f"pretrain,{words}", experiment=VISION) == 0
    said = capsys.readouterr().out
    assert "projector: 22,034,432 parameters are trained" in said and "17.0 tiles of pictures a window" in said
