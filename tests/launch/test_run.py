"""The command as a user types it: a small study, its errors, and kill -9 in the middle."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.errors import STOPPED
from phi3_jax.experiment import load_config, override
from phi3_jax.study import runs
from phi3_jax.study.full import choose_scale, full_runs
from phi3_jax.verbs import asked

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "experiments/scaling.py"
WORDS = "mini,budgets=60k"
OVERRIDES = ["--config.train.checkpoint_every=10", "--config.train.log_every=1"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "launch/run.py", *arguments]


def run(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == expect, done.stderr[-2000:] + done.stdout[-2000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken study of one run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run("--config", f"{EXPERIMENT}:{WORDS}", "--workdir", str(folder), *OVERRIDES)
    assert "3,821,079,552 parameters, 4.8T tokens" in done.stdout
    assert "too little for phi-3-mini-4k" in done.stdout
    return folder


def only_run(folder: Path) -> Path:
    (path,) = [p.parent for p in folder.glob("*/config.json")]
    return path


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    timing = {"tokens_per_s", "mfu", "compile_s", "first_step_s"}
    lines = (only_run(folder) / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def test_a_proxy_is_labelled_everywhere(whole: Path) -> None:
    record = json.loads((only_run(whole) / "config.json").read_text())
    assert record["label"] == "phi-3-mini proxy (pico, family shape)"
    assert "pico" in record["name"]
    assert "phi-3-mini proxy (pico, family shape)" in (whole / "report.html").read_text()
    assert json.loads((only_run(whole) / "plan.json").read_text())["non_embedding"] == 110_592


def test_rows_and_scores(whole: Path) -> None:
    steps = [row["step"] for row in rows(whole)]
    assert steps == list(range(1, 57))
    evals = rows(whole, "evals.jsonl")
    assert {row["suite"] for row in evals} >= {"knowledge", "reasoning"}
    for row in evals:
        if row["metric"] in ("recall", "exact", "accuracy"):
            assert row["low"] <= row["value"] <= row["high"] and row["n"] > 1000


def test_the_same_command_again_trains_nothing(whole: Path) -> None:
    before = (only_run(whole) / "metrics.jsonl").read_bytes()
    run("--config", f"{EXPERIMENT}:{WORDS}", "--workdir", str(whole), *OVERRIDES)
    assert (only_run(whole) / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_the_difference(whole: Path) -> None:
    done = run(
        "--config", f"{EXPERIMENT}:{WORDS}", "--workdir", str(whole), *OVERRIDES, "--config.optim.peak_lr=0.01", expect=2
    )  # fmt: skip
    assert "optim.peak_lr: 0.003 -> 0.01" in done.stderr and done.stderr.count("\n") == 1


def test_refused_data_leave_no_folder_behind(tmp_path: Path) -> None:
    words = ["--config", f"{EXPERIMENT}:{WORDS},data={tmp_path / 'nowhere'}", "--workdir"]
    run(*words, str(tmp_path / "new" / "study"), expect=2)
    assert list(tmp_path.iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    run(*words, str(mine), expect=2)
    assert list(tmp_path.iterdir()) == [mine] and not list(mine.iterdir()), "a folder of the user's stays"


def started(folder: Path, goal: int) -> subprocess.Popen:
    """The whole study's command in another folder, left running when `goal` rows are logged."""
    arguments = command("--config", f"{EXPERIMENT}:{WORDS}", "--workdir", str(folder), *OVERRIDES)
    environment = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        metrics = list(folder.glob("*/metrics.jsonl"))
        if metrics and metrics[0].read_bytes().count(b"\n") >= goal:
            break
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_kill_9_and_sigterm_then_the_same_command_equals_the_unbroken_run(whole: Path, tmp_path: Path) -> None:
    process = started(tmp_path, random.randint(12, 25))
    worker = subprocess.run(["pgrep", "-f", f"phi3_jax.study.worker {tmp_path}"], capture_output=True, text=True)
    for pid in worker.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert worker.stdout.strip(), "nothing was there to kill"
    assert process.returncode == 2 and not (only_run(tmp_path) / "done.json").exists()

    process = started(tmp_path, random.randint(30, 45))
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == STOPPED and "the same command goes on from here" in out
    assert not (only_run(tmp_path) / "done.json").exists()

    run("--config", f"{EXPERIMENT}:{WORDS}", "--workdir", str(tmp_path), *OVERRIDES)
    assert rows(tmp_path) == rows(whole)
    assert rows(tmp_path, "evals.jsonl") == rows(whole, "evals.jsonl")
    a, b = (final_state(f) for f in (tmp_path, whole))
    assert a.keys() == b.keys() and len(a) > 20
    for key, value in a.items():
        np.testing.assert_array_equal(value, b[key])


def final_state(folder: Path) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    newest = max(only_run(folder).glob("checkpoints/[0-9]*"), key=lambda p: int(p.name))
    return {k: np.asarray(v) for k, v in ocp.load(newest / "state").items()}


def test_training_never_imports_tensorflow() -> None:
    code = (
        "import sys; sys.modules['torch'] = None;"  # an import fails; tensorboardX, which takes torch where it is, goes on
        "import tempfile, phi3_jax.study.launch, phi3_jax.study.worker, phi3_jax.data.export;"
        "import phi3_jax.reporting.page;"
        "from phi3_jax.training.metrics import RunLog; RunLog(tempfile.mkdtemp(), 0, tensorboard=True).close();"
        "print([m for m in ('tensorflow', 'seqio', 'tensorflow_datasets', 'torch') if sys.modules.get(m)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config", f"{EXPERIMENT}:medim"], "did you mean 'medium'"),
        (["--config", f"{EXPERIMENT}:medium,budgts=1M"], "did you mean 'budgets'"),
        (["--config", f"{EXPERIMENT}:medium,scale=pika"], "did you mean 'pico'"),
        (["--config", f"{EXPERIMENT}:medium,tokens=lots"], "'lots' is not a token budget"),
        (["--config", f"{EXPERIMENT}:medium,scale=full"], "a mesh that would hold it: data="),
        (["--config", f"{EXPERIMENT}:mini", "--config.optim.peak_lrr=1"], "did you mean 'peak_lr'"),
        (["--config", f"{EXPERIMENT}:mini", "--config.optm.peak_lr=1"], "did you mean 'optim'"),
        (["--config", f"{EXPERIMENT}:mini", "--config.optim.schedule=wsdd"], "valid: wsd, cosine"),
        (["--config", f"{EXPERIMENT}:mini,budgets=10"], "smaller than one batch"),
        (["--config", f"{EXPERIMENT}:mini,data=/no/such/folder"], "/no/such/folder"),
        (["--config", "experiments/scalng.py"], "no experiment file"),
        (["--confg", f"{EXPERIMENT}:mini"], "did you mean '--config'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, "--workdir", str(tmp_path / "out"), expect=2)
    assert message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*/checkpoints"))


def test_read_only_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run("--config", f"{EXPERIMENT}:mini", "--workdir", str(blocked / "study"), expect=2)
    assert "choose another --workdir" in done.stderr


def test_full_size_without_data_lists_the_choices() -> None:
    config = load_config(str(ROOT / f"{EXPERIMENT}:mini"))
    with pytest.raises(UserError, match="data=; choices: facts"):
        choose_scale(config, full_runs(config), ("NVIDIA H200", 8, 8 * 141e9))
    override(config, "data.source", "pydocs")
    assert choose_scale(config, full_runs(config), ("NVIDIA H200", 8, 8 * 141e9))[0] == "full"


def test_a_context_of_the_released_models_is_not_ignored_by_proxies() -> None:
    config = load_config(str(ROOT / f"{EXPERIMENT}:mini"))
    override(config, "context", "128k")
    for scale in ("auto", "pico"):
        override(config, "scale", scale)
        with pytest.raises(UserError, match="context=128k names a released model, and scale=pico trains none"):
            choose_scale(config, full_runs(config), ("CPU", 1, 16e9))


def test_budgets() -> None:
    def budgets(words: str, size: str) -> list[int]:
        config = load_config(str(ROOT / f"{EXPERIMENT}:{words}"))
        return runs.budgets_of(config, "pico", size)

    assert budgets("sweep", "mini") == budgets("sweep", "medium") == [1_000_000, 2_000_000, 4_000_000]
    assert budgets("sweep,tokens=published", "mini")[-1] == 2_750_000  # 3.3T of 4.8T
    assert budgets("sweep,tokens=published", "small")[-1] == 4_000_000
    assert budgets("medium,budgets=1M,250k", "medium") == [250_000, 1_000_000]
    assert budgets("medium,tokens=2M", "medium") == [2_000_000]


def test_overrides_keep_their_types() -> None:
    config = asked(
        ["--config", str(ROOT / EXPERIMENT), "--config.optim.clip=1", "--config.budgets=1M,2M", "--config.seeds=3",
         "--config.train.tensorboard=true", "--config.data.facts=9000"]
    ).config  # fmt: skip
    assert (config.optim.clip, config.budgets, config.seeds) == (1.0, (1_000_000, 2_000_000), 3)
    assert config.train.tensorboard is True and config.data.facts == 9000


@pytest.mark.slow
def test_a_study_of_arms_ends_in_the_verdict_of_its_rule(tmp_path: Path) -> None:
    words = "quick,tokens=30k,seeds=2"
    done = run("--config", f"experiments/data_optimal.py:{words}", "--workdir", str(tmp_path / "s"))
    assert "12 runs" in done.stdout and "power: 2 seeds" in done.stdout
    page = (tmp_path / "s" / "report.html").read_text()
    assert "By the rule written before the runs" in page and "filtered-medium-s11-" in page
    # The same corpus for the two sizes of an arm and seed, another one for the other seed.
    data = {p.parent.name: json.loads(p.read_text())["config"]["data"] for p in tmp_path.glob("s/*/config.json")}
    prints = {name: entry["fingerprint"] for name, entry in data.items()}
    for arm, seed in itertools.product(("filtered", "loose"), ("s10", "s11")):
        assert len({v for k, v in prints.items() if k.startswith(arm) and seed in k}) == 1
    assert len(prints) == 12 and len(set(prints.values())) == 4
    run("--config", f"experiments/data_optimal.py:{words},arms=lose", "--workdir", str(tmp_path / "t"), expect=2)
    assert not (tmp_path / "t").exists()


# The command, where runs of seconds obey a law: their own losses determine none.
LAWFUL = """
import sys
from phi3_jax.__main__ import main
from phi3_jax.scaling import forecast, laws
def fit_runs(runs, endpoint):
    done = [run for run in runs if run.finals]
    n, d = [run.size for run in done], [run.budget for run in done]
    return laws.fit(n, d, [1 + 200 / a**0.5 + 300 / b**0.5 for a, b in zip(n, d)]), [run.name for run in done]
forecast.fit_runs = fit_runs
sys.exit(main(["run", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_largest_runs_start_after_their_forecast_and_carry_its_hash(tmp_path: Path) -> None:
    words = "budgets=15k,30k,45k,60k"
    sizes = "--config.sizes=below,mini,small,medium"
    given = ["--config", f"experiments/laws.py:{words}", sizes, "--workdir", str(tmp_path)]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", LAWFUL, *given], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "forecast of 7 runs from 9, before they start" in done.stdout
    content = json.loads((tmp_path / "forecast.json").read_text())
    assert not [n for n in content["fitted_to"] if n.startswith("medium") or n.endswith("61.4k")]
    started = {p.parent.name: json.loads(p.read_text())["forecast"] for p in tmp_path.glob("*/config.json")}
    held = {row["name"] for row in content["forecasts"]}
    assert len(held) == 7 and {started[name] for name in held} == {content["sha256"]}
    assert {started[name] for name in content["fitted_to"]} == {None}
    assert "Forecasts, written down before" in (tmp_path / "report.html").read_text()
