"""A wheel, unpacked where no clone is near, does what the clone does: commands, experiments and tables are in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("phi3_jax", "experiments", "analysis", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from a copy, since building leaves folders behind."""
    pytest.importorskip("setuptools", "70.1")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / "clone" / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb")
            )
        else:
            shutil.copy(ROOT / name, folder / "clone" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder / "out"]
    done = subprocess.run([*build, folder / "clone"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "out").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def away(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, in which Python finds the wheel first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    return tmp_path


def run(*words: str) -> str:
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_commands_need(site: Path) -> None:
    assert "phi3-jax = phi3_jax.__main__:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    assert (site / "phi3_jax/py.typed").exists() and not (site / "launch").exists()
    for folder, pattern in (("experiments", "*.py"), ("analysis/published", "*.csv"), ("analysis/results", "*.csv")):
        ours = {path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern)}
        assert ours and ours == {
            path.relative_to(site / "phi3_jax/shipped") for path in (site / "phi3_jax/shipped" / folder).rglob(pattern)
        }


def test_published_tables_are_found_away_from_a_clone(away: Path, site: Path) -> None:
    code = "from phi3_jax import shipped; from phi3_jax.scaling import published; "
    out = run("-c", code + "print(shipped.__file__, len(published.benchmarks()), *shipped.script('run'))").split()
    assert Path(out[0]).is_relative_to(site) and int(out[1]) > 10 and out[2:] == ["-m", "phi3_jax", "run"]
    table = "analysis/results/laws/runs.csv"
    assert "not determined: 24 runs" in run("-m", "phi3_jax", "fit", table, "--d", "tokens", "--loss", "text/text/loss")
    (away / "analysis/results/laws").mkdir(parents=True)
    (away / table).write_text("a file of one's own\n")  # goes before the one that comes along
    done = subprocess.run([sys.executable, "-m", "phi3_jax", "fit", table], capture_output=True, text=True)
    assert done.returncode == 2 and table in done.stderr


def test_a_study_runs_away_from_a_clone(away: Path) -> None:
    words = ["--config", "experiments/scaling.py:mini,scale=pico,budgets=8k", "--workdir", "X"]
    out = run("-m", "phi3_jax", "run", *words)
    assert "report: X/report.html" in out and (away / "X/report.html").stat().st_size > 10_000
    assert '"python -m phi3_jax run --config experiments/scaling.py:mini' in (away / "X/study.json").read_text()
