"""Studies of one run whose worker processes are started, disturbed and compared with an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import quick
from hf_folders import random_folder
from orbax.checkpoint import v1 as ocp

from phi3_jax.data import tokenizers
from phi3_jax.experiment import load_config, override
from phi3_jax.family import GIVEN
from phi3_jax.records.checkpoint import newest_whole
from phi3_jax.records.rows import read_rows
from phi3_jax.study import initial
from phi3_jax.study import runs as studies
from phi3_jax.study.data import data_arguments, export_data
from phi3_jax.training.metrics import TIMING_FIELDS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # until a process that should have ended is called hung


@dataclasses.dataclass
class Faulty:
    """A study folder with one planned run, at `run`."""

    folder: Path
    name: str

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def start(self, faults: str = "") -> subprocess.Popen:
        """The worker process, as a study starts it, or with faults of `injected.py`."""
        program = [str(Path(__file__).with_name("injected.py")), faults] if faults else ["-m", "phi3_jax.study.worker"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.flags()}
        environment |= {"PYTHONPATH": str(ROOT), "PHI3_JAX_STARTED": str(time.monotonic())}
        with open(self.folder / "stderr", "a") as errors:
            return subprocess.Popen(
                [sys.executable, *program, str(self.folder), self.name],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    def finish(self, faults: str = "") -> list[dict]:
        """Runs a worker to its end; what it said."""
        return said(self.start(faults))

    def steps(self) -> int:
        """Steps with a row."""
        return len(read_rows(self.run / "metrics.jsonl"))

    def checkpoint(self) -> int:
        """The step from which the next attempt goes on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return newest_whole(self.run / "checkpoints")[0] or 0

    def saving(self) -> bool:
        """Whether a save is, or was when the process died, half done."""
        return any((self.run / "checkpoints").glob("*.partial"))

    def state(self) -> dict[str, np.ndarray]:
        step, _ = newest_whole(self.run / "checkpoints")
        return {k: np.asarray(v) for k, v in ocp.load(self.run / "checkpoints" / str(step) / "state").items()}


def plan(folder: Path, words: str, **train: object) -> Faulty:
    """Plans the study of `words` of the scaling experiment with `train` settings, without training it."""
    config = load_config(str(ROOT / f"experiments/scaling.py:{words}"))
    for key, value in ({"log_every": 1, "eval_points": 2} | train).items():
        override(config, f"train.{key}", str(value))
    data = folder.parent / f"data-{config.scale}"
    if not data.exists():
        export_data(data_arguments(config, config.scale, max(config.budgets)), data)
    manifest = json.loads((data / "manifest.json").read_text())
    (run,) = studies.plan_runs(config, config.scale, manifest, data, 1)
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"runs": [dataclasses.asdict(run)]}))
    return Faulty(folder, run.name)


def tuned(folder: Path, words: str, rows: list[dict], **keys: object) -> Faulty:
    """Plans a study of `words` of the post-training experiment on rows, from a small base with random weights beside it."""
    base, file = folder.parent / "base", folder.parent / f"{words.partition(',')[0]}.jsonl"
    if not base.exists():
        random_folder(base, "mini_window", np.float32, vocab_size=1024, max_position_embeddings=512)
        for path in tokenizers.TINY.iterdir():
            shutil.copyfile(path, base / path.name)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(f"{ROOT}/experiments/posttrain.py:{words},model=hf:{base},data={file}")
    for key, value in ({"train.log_every": 1, "train.eval_points": 2, "data.window": 128} | keys).items():
        override(config, key, str(value))
    folder.mkdir()
    manifest = export_data(data_arguments(config, GIVEN, 0), folder / "data")
    content, _ = initial.check(config, GIVEN, folder)
    (run,) = studies.plan_study(config, GIVEN, {Path("data"): manifest}, folder, 1, content)
    (folder / "study.json").write_text(json.dumps({"runs": [dataclasses.asdict(run)]}))
    return Faulty(folder, run.name)


def said(process: subprocess.Popen) -> list[dict]:
    """Waits for a process and returns the lines that it printed, the first of them its exit status."""
    out, _ = process.communicate(timeout=SECONDS)
    return [{"exit": process.returncode}, *map(json.loads, out.splitlines())]


def wait_until(process: subprocess.Popen, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert process.poll() is None, f"the process ended too soon, with status {process.returncode}"
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.002)


def untimed(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_rows(path)]


def assert_equal(one: Faulty, other: Faulty) -> None:
    """Every row, every score and every bit of the final state."""
    assert (one.run / "done.json").exists() and (other.run / "done.json").exists()
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert untimed(one.run / name) == untimed(other.run / name) != [], name
    a, b = one.state(), other.state()
    assert a.keys() == b.keys() and len(a) > 10
    for key, value in a.items():
        assert value.tobytes() == b[key].tobytes(), key
