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
from phi3_jax.study.plan import plans

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/goldens/plan_medium_v5p.txt"
EXPERIMENT = "experiments/scaling.py"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan(words: str, *more: str) -> int:
    return main(["plan", "--config", f"{EXPERIMENT}:{words}", *more])


def answer(capsys: pytest.CaptureFixture, words: str, *more: str) -> dict:
    assert plan(words, *more, "--json") == 0
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
        ("medium,topology=v5p:4x4x8,scale=pico", (), "plans are for the released models"),
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

    assert 30 < leaves(load_config(EXPERIMENT).to_dict()) < 80


def test_a_plan_hands_its_setup_to_what_compiles_it() -> None:
    (one,) = plans(load_config(f"{EXPERIMENT}:medium,topology=v5p:4x4x8"))
    assert one.configured.setup.degrees.data == 128 and one.configured.setup.topology.text == "v5p:4x4x8"


def test_a_proposal_that_is_slower_is_not_called_better(capsys: pytest.CaptureFixture) -> None:
    words = ("mini,topology=v5p:4x4x8", "--config.context=128k")
    speedup = answer(capsys, *words)["proposal"]["speedup"]
    assert speedup < 0.995 and plan(*words) == 0
    page = capsys.readouterr().out
    assert "better:" not in page and "slower, but with a batch of 4.19M tokens: --config" in page
    assert f"  {speedup:.2f} x the tokens a second" in page
