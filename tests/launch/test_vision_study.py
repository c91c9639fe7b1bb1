"""The study of experiments/vision.py: killed, gone on, and what its model sees in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3_jax.records.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
WORDS = f"{ROOT}/experiments/vision.py:quick,tokens=190k,arms=picture"
COMMAND = [
    sys.executable, str(ROOT / "launch/run.py"), "--config", WORDS, "--config.sizes=mini", "--workdir", "study",
    "--config.train.checkpoint_every=20", "--config.train.log_every=10",
]  # fmt: skip
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.mark.slow
def test_a_killed_study_goes_on_and_its_model_sees(tmp_path: Path) -> None:
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        limit = time.monotonic() + 600
        while not [*tmp_path.glob("study/picture-*/checkpoints/*20*")]:
            assert running.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
        os.killpg(running.pid, signal.SIGKILL)
    done = subprocess.run(COMMAND, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in tmp_path.glob("study/picture-*/evals.jsonl"))
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 190_000 // (18 * 42)
    found = {f"{row['task']} {row['metric']}": row["value"] for row in read_rows(folder / "evals.jsonl")}
    assert found["sums cells accuracy"] > 0.5  # of 40 digits in colours, where the likeliest is one of 40
    verdict = [sys.executable, "-m", "phi3_jax", "verdict", f"{ROOT}/experiments/vision.py", "study"]
    said = subprocess.run(verdict, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "1 of 3 planned runs ran." in said.stdout
    assert "Verdict: none, for a trial." in said.stdout
