"""What a machine does to a curation: kills, a full disk, a damaged part. Nothing is half written, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3_jax import verbs
from phi3_jax.commands import call
from phi3_jax.curation import store
from phi3_jax.errors import UserError
from phi3_jax.records import files

pytest.importorskip("daft")
ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "examples" / "pages"


def words(out: Path, workers: int = 1) -> list[str]:
    config = f"experiments/curation.py:benchmarks={ROOT / 'examples/pages_benchmark'}"
    return ["--config", config, "--input", str(PAGES), "--output", str(out), "--workers", str(workers)]


def result(out: Path) -> dict[str, bytes]:
    """Every file of a result but the stages, and the engine's own."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "stages"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def count(out: Path) -> int:
    """Files there are, half written ones among them."""
    return sum(len(names) for _, _, names in os.walk(out))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "sample"
    assert call(verbs.CURATE, words(out)) == 0
    return out


def kill_again_and_again(out: Path, whole: int, kills: int, workers: int, seed: int) -> int:
    """Starts the command and kills all of it once it has written so many of `whole` files; how often it was under way."""
    draw, under_way = random.Random(seed), 0
    for target in sorted(draw.randrange(whole) for _ in range(kills)):
        before = count(out)
        process = subprocess.Popen(
            [sys.executable, "-m", "phi3_jax", "curate", *words(out, workers)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and count(out) <= max(target, before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.05))
        under_way += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (out / "manifest.json").exists():
            for part in files.read_json(out / "manifest.json")["parts"]:
                assert store.sha256(out / part["file"]) == part["sha256"]
    return under_way


def test_killed_and_typed_again_the_bytes_are_the_same(undisturbed: Path, tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path / "sample", count(undisturbed), 3, 1, 0) >= 1
    assert call(verbs.CURATE, words(tmp_path / "sample")) == 0
    assert result(tmp_path / "sample") == result(undisturbed)


@pytest.mark.slow
def test_twenty_kills_with_two_workers(undisturbed: Path, tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path / "sample", count(undisturbed), 20, 2, 1) >= 10
    assert call(verbs.CURATE, words(tmp_path / "sample", 2)) == 0
    assert result(tmp_path / "sample") == result(undisturbed)


def test_a_damaged_part_is_named_and_made_again(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "sample"
    assert call(verbs.CURATE, words(out)) == 0
    (out / "manifest.json").unlink()
    part = next((out / "stages").glob("01-*/part-*.parquet"), None) or next(
        (out / "stages").glob("00-*/part-*.parquet")
    )
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"part {part} is damaged .*; remove it and type the same command again"):
        call(verbs.CURATE, words(out))
    part.unlink()
    assert call(verbs.CURATE, words(out)) == 0 and result(out) == result(undisturbed)


def test_a_part_that_changed_is_no_corpus(undisturbed: Path, tmp_path: Path) -> None:
    from phi3_jax.data.corpora import files as listing

    out = tmp_path / "sample"
    assert call(verbs.CURATE, words(out)) == 0
    part = out / "parts" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"part .*part-00000.parquet' is damaged"):
        listing.account(out)
    assert call(verbs.CURATE, words(out)) == 0 and result(out) == result(undisturbed), "the same command mends it"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(
        UserError, match=r"cannot write .*: No space left on device; .* bytes are free there, make room"
    ):
        call(verbs.CURATE, words(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.parquet"))
    monkeypatch.undo()
    assert call(verbs.CURATE, words(tmp_path / "out")) == 0


@pytest.mark.slow
def test_ray_gives_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "phi3_jax", "curate", *words(tmp_path / "sample", 2), "--engine", "ray"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result(tmp_path / "sample") == result(undisturbed)
