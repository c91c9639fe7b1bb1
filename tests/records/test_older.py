"""What an older commit left still resumes, loads and reports; and state files that are damaged stop no resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import phi3_jax
from phi3_jax.configs import fingerprint, run_from_dict
from phi3_jax.data import loader
from phi3_jax.records.rows import read_rows
from phi3_jax.records.table import read_study

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "tests" / "fixtures" / "4c29e1b" / "made.tar.gz"
DONE, STOPPED = "mini-pico-family-s0-7.17k", "mini-pico-family-s1-7.17k"
WORDS = (
    "launch/run.py", "--config", f"{ROOT}/experiments/scaling.py:mini,scale=pico,budgets=8k,data=texts",
    "--workdir", "study", "--config.seeds=2", "--config.data.window=64", "--config.train.batch_tokens=1024",
    "--config.train.checkpoint_every=2", "--config.train.log_every=1", "--config.train.keep_latest=1",
)  # fmt: skip
STATE = tuple(f"{run}/{name}" for run in (DONE, STOPPED) for name in ("config.json", "status.json", "plan.json"))
STATE += (f"{DONE}/done.json", "study.json", "data/manifest.json")
DAMAGE = {
    "absent": lambda path, content: path.unlink(),
    "empty": lambda path, content: path.write_bytes(b""),
    "half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "nul": lambda path, content: path.write_bytes(bytes(len(content))),
    "list": lambda path, content: path.write_bytes(b"[]"),
    "nothing": lambda path, content: path.write_bytes(b"{}"),
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder that the older commit's commands were typed in."""
    with tarfile.open(MADE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *((str(ROOT / words[0]), *words[1:]) if words[0].endswith(".py") else ("-m", *words))]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment)


def works(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:] + done.stdout[-1000:]


def is_whole(study: Path) -> None:
    for run_folder in (study / DONE, study / STOPPED):
        record = json.loads((run_folder / "config.json").read_text())
        assert record["fingerprint"] == fingerprint(run_from_dict(record["config"]))
        assert json.loads((run_folder / "done.json").read_text())["step"] == 7
        assert json.loads((run_folder / "status.json").read_text())["status"] == "done"
        assert json.loads((run_folder / "plan.json").read_text())["non_embedding"] == 110_592
        assert [row["step"] for row in read_rows(run_folder / "metrics.jsonl")] == list(range(1, 8))
    assert [r["name"] for r in json.loads((study / "study.json").read_text())["runs"]] == [DONE, STOPPED]
    assert not [p for p in study.rglob(".*") if p.is_file()], "neither temporary names nor owners are left"
    assert not read_study(study).missing


def test_the_archive_names_no_machine() -> None:
    with tarfile.open(MADE) as archive:
        content = b"".join(archive.extractfile(m).read() for m in archive if m.isfile())
    assert b"texts" in content and not any(word in content for word in (b"/work/", b"/home/", b"/root/"))


def test_an_older_study_resumes_and_reports_with_its_fingerprints(made: Path) -> None:
    before = {name: (made / "study" / name).stat().st_mtime_ns for name in (f"{DONE}/metrics.jsonl", "study.json")}
    record = (made / "study" / DONE / "config.json").read_bytes()
    old = json.loads((made / "study" / STOPPED / "config.json").read_text())["fingerprint"]
    works(run(made, *WORDS))
    is_whole(made / "study")
    assert json.loads((made / "study" / STOPPED / "config.json").read_text())["fingerprint"] == old
    assert (made / "study" / DONE / "config.json").read_bytes() == record
    assert (made / "study" / f"{DONE}/metrics.jsonl").stat().st_mtime_ns == before[f"{DONE}/metrics.jsonl"]
    attempts = [row["attempt"] for row in map(json.loads, (made / "study" / STOPPED / "goodput.jsonl").open())]
    assert max(attempts) == 2, "it went on and did not begin anew"
    works(run(made, "phi3_jax.scaling.report", "study"))
    times = {p: p.stat().st_mtime_ns for p in (made / "study").glob("*/*.json")}
    works(run(made, *WORDS))
    assert {p: p.stat().st_mtime_ns for p in (made / "study").glob("*/*.json")} == times, "equal files are left alone"


def test_an_older_data_set_run_and_quantised_model_load(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert loader.open_dataset("study/data").manifest["window"] == 64
    logits = [np.asarray(phi3_jax.load(p).logits(np.arange(9)[None])) for p in (f"study/{DONE}", "quantised")]
    assert logits[0].shape == logits[1].shape and np.isfinite(logits[1]).all()
    np.testing.assert_allclose(*logits, atol=0.3)
    done = run(made, "phi3_jax.data.export", "--out", "study/data", "--data", "texts", "--window", "64")
    works(done)
    assert "fingerprint" in done.stdout


@pytest.mark.parametrize(
    "turn", [0, 1, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(2, len(DAMAGE)))]
)
def test_damaged_state_files_stop_no_resume_and_are_written_again(made: Path, turn: int) -> None:
    """In turn k the i-th file is damaged in the (i + k)-th way; in every second turn done.json stays."""
    ways = list(DAMAGE.values())
    for i, name in enumerate(STATE):
        if name.endswith("done.json") and turn % 2 == 0:
            continue
        path = made / "study" / name
        ways[(i + turn) % len(ways)](path, path.read_bytes())
    works(run(made, *WORDS))
    is_whole(made / "study")
    attempts = [row["attempt"] for row in map(json.loads, (made / "study" / STOPPED / "goodput.jsonl").open())]
    assert max(attempts) == 2


def test_a_damaged_config_file_lets_no_other_experiment_in(made: Path) -> None:
    path = made / "study" / STOPPED / "config.json"
    path.write_bytes(b"")
    done = run(made, *WORDS, "--config.optim.peak_lr=0.01")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "peak_lr: 0.003 -> 0.01" in done.stderr
    assert path.read_bytes() == b""


def test_the_same_command_typed_twice_at_once_is_one_study(made: Path) -> None:
    """One of the two trains all of it; the other is refused in a line that names the owner, or comes after the end."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / WORDS[0]), *WORDS[1:], "--config.name=x"]
    pair = [
        subprocess.Popen(line, cwd=made, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) in ([0, 0], [0, 2]), errors
    for process, text in zip(pair, errors, strict=True):
        assert "Traceback" not in text
        if process.returncode:
            assert text.count("\n") == 1 and "is being written by process" in text and "--workdir" in text
    is_whole(made / "study")
    assert not list((made / "study").glob("*/error.txt"))
