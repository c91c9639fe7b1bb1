"""Whole files: temporary names, what is swept, JSON in one place; and kill -9 at random moments of what writes models."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phi3_jax.errors import UserError
from phi3_jax.records import files, ownership, targets
from phi3_jax.records.rows import KEY, put_rows, read_rows

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "interop"))
DEAD = 999_999_999


def named(target: Path, host: str, pid: int) -> Path:
    return target.with_name(f".{target.name}.{host}.{pid}.0.partial")


@pytest.mark.parametrize("name", ["run", "run [1]", "a.b.c", "ü"])
def test_only_what_a_dead_process_of_this_host_left_is_swept(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    gone = [named(target, files.host(), DEAD), named(target, files.host(), DEAD - 1)]
    kept = [
        named(target, files.host(), os.getppid()),
        named(target, "elsewhere", DEAD),
        target.with_name(f"{name}.partial"),
    ]
    kept += [named(tmp_path / "another", files.host(), DEAD), tmp_path / f".{name}.partial", tmp_path / f"{name}.new"]
    for path in (*gone, *kept):
        path.mkdir()
        (path / "notes.txt").write_text("mine\n")
    with targets.whole(target, 1) as partial:
        assert partial.parent == tmp_path and partial not in kept
        (partial / "x").write_text("x")
    assert (target / "x").exists() and all((path / "notes.txt").exists() for path in kept)
    assert not any(path.exists() for path in gone), "control: something was there to sweep"
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


@pytest.mark.parametrize("file", [True, False])
def test_two_writers_of_one_target(tmp_path: Path, file: bool) -> None:
    target = tmp_path / "target"
    with targets.whole(target, 1, file=file) as partial:
        refused = pytest.raises(UserError, match=rf"is being written by process {os.getpid()} on .*wait until it ends")
        with refused, targets.whole(target, 1, file=file):
            pass
        partial.write_text("x") if file else (partial / "x").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    with pytest.raises(UserError, match="exists"), targets.whole(target, 1, file=file):
        pass


def test_an_equal_file_is_left_alone_and_a_failing_write_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": (1, 2)})
    os.utime(path, (1, 1))
    files.write_json(path, {"a": [1, 2]})
    assert path.stat().st_mtime == 1
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 3})
    assert files.read_json(path) == {"a": [1, 2]} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"\0" * 40, b'{"a": 1', b'{"a": \xff}', b"[" * 100_000, b"[]", b"3", b'{"a": 1}\0\0']
)
def test_json_that_is_none_is_one_line_with_the_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as found:
        files.read_json(path)
    assert "config.json" in str(found.value) and "\n" not in str(found.value) and files.read_state(path) == {}


def test_json_is_written_and_read_in_one_place() -> None:
    """No second writer or reader of a JSON file in the package; text from pipes, sockets and headers is no file."""
    pattern = re.compile(r"json\.dump\(|json\.load\(|write_text\(\s*json|json\.loads\([^#\n]*read_(text|bytes)\(")
    found = {
        str(path.relative_to(ROOT)): [m[0] for m in pattern.finditer(path.read_text())]
        for folder in ("phi3_jax", "launch")
        for path in (ROOT / folder).rglob("*.py")
    }
    allowed = {"phi3_jax/family.py"}  # a table that is part of the package
    assert {name for name, hits in found.items() if hits} - {"phi3_jax/data/tokenizers.py"} <= allowed
    for line in ("json.dump(x, file)", "path.write_text(json.dumps(x))", "json.loads(path.read_text('utf-8'))"):
        assert pattern.search(line), "control"


WRITERS = re.compile(
    r"open\([^)\n]*[\"'][wx]b?[\"']|\.write_text\(|\.write_bytes\(|\.savefig\(|to_csv\(|to_html\(|np\.save\w*\(|"
    r"csv\.(DictW|w)riter\(|json\.dump\("
)
# Whatever else writes a file, and why a reader can never meet half of it.
ELSEWHERE = {
    "phi3_jax/records/files.py": "the writer", "phi3_jax/records/tables.py": "into memory",
    "phi3_jax/records/ownership.py": "under a temporary name, or made exclusively",
    "phi3_jax/reporting/figures.py": "into memory", "analysis/drawing.py": "into memory",
    "phi3_jax/evaluation/retrieval_probe.py": "into memory", "phi3_jax/evaluation/sandbox.py": "/proc",
    "phi3_jax/interop/safetensors.py": "inside records.targets.whole", "phi3_jax/data/export.py": "inside targets.whole",
    "phi3_jax/data/gallery.py": "inside targets.whole, as part of an export",
    "phi3_jax/study/workers.py": "a process's log, which grows", "phi3_jax/training/reference.py": "into memory",
    "benchmarks/checkpoint.py": "a folder of its own", "benchmarks/convert.py": "a folder of its own",
    "benchmarks/decode_cpu.py": "a folder of its own", "benchmarks/loader.py": "a folder of its own",
    "benchmarks/curate.py": "a folder of its own", "benchmarks/mutants.py": "plants mutants, and takes them back",
}  # fmt: skip


def test_files_are_written_in_one_place() -> None:
    """Pages, tables, figures: whole or as they were. A new writer goes through `files`, `tables.write`, `figures.save`."""
    atomic = re.compile(r"files\.write_(text|bytes)\(")
    found = {
        str(path.relative_to(ROOT))
        for folder in ("phi3_jax", "launch", "benchmarks", "experiments", "analysis")
        for path in (ROOT / folder).rglob("*.py")
        if WRITERS.search(atomic.sub("", path.read_text("utf-8")))
    }
    assert found == set(ELSEWHERE), "a writer too many, or a reason that is no longer needed"
    for line in (
        "with path.open('w') as f",
        "open(p, 'wb')",
        "figure.savefig(path)",
        "path.write_text(x)",
        "np.savez(p)",
    ):
        assert WRITERS.search(line), "control"


@pytest.mark.parametrize("kind", ["figure", "table", "answers"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch, kind: str) -> None:
    from matplotlib.figure import Figure

    from phi3_jax.evaluation import retrieval_probe
    from phi3_jax.records import tables
    from phi3_jax.reporting import figures

    def write() -> list[Path]:
        if kind == "figure":
            figures.save(Figure(), tmp_path / "a.svg", tmp_path / "a.png")
            return [tmp_path / "a.svg", tmp_path / "a.png"]
        if kind == "table":
            tables.write(tmp_path / "a.csv", ["x", "y"], [{"x": 1, "z": 3}, {"x": "a,b", "y": None}])
            return [tmp_path / "a.csv"]
        import numpy as np

        monkeypatch.setattr(retrieval_probe, "predictor", lambda _: None)
        monkeypatch.setattr(retrieval_probe, "ask", lambda *_: {"closed": np.ones((2, 6), bool)})
        (tmp_path / retrieval_probe.KEPT).write_bytes(b"PK\x03\x04 cut by a crash")
        assert retrieval_probe._answers(tmp_path, None)["closed"].all()
        assert retrieval_probe._answers(tmp_path, None)["closed"].all(), "read again"
        return [tmp_path / retrieval_probe.KEPT]

    paths = write()
    assert all(path.stat().st_size > 20 or kind == "table" for path in paths)
    if kind == "table":
        assert paths[0].read_text() == 'x,y\n1,\n"a,b",\n'
    for path in paths:
        path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write()
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(left) == {path.name for path in paths}, "no temporary file stays"
    assert kind == "answers" or set(left.values()) == {b"old"}


def test_a_written_file_takes_along_what_dead_processes_left_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    gone = named(path, files.host(), DEAD)
    kept = [
        named(path, files.host(), os.getppid()),
        named(path, "elsewhere", DEAD),
        named(tmp_path / "b", files.host(), DEAD),
    ]
    for left in (gone, *kept, tmp_path / "a.json.partial"):
        left.write_text("mine")
    files.write_json(path, {"a": 1})
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept, tmp_path / "a.json.partial"])


def test_rows_keep_the_last_of_each_key_and_bear_cut_lines(tmp_path: Path) -> None:
    path, base = tmp_path / "evals.jsonl", dict.fromkeys(KEY, "x") | {"step": 1}
    lines = [
        base | {"value": 1},
        base | {"value": 2},
        base | {"value": 3, "model": "y"},
        base | {"value": 4, "step": 2},
    ]
    path.write_bytes(b"".join(json.dumps(x).encode() + b"\n" for x in lines) + b"\0" * 9 + b'\n[1]\n3\n{"step": 3, "va')
    assert [row["value"] for row in read_rows(path)] == [2, 3, 4]
    put_rows(path, [base | {"value": 5}])
    assert [row["value"] for row in read_rows(path)] == [3, 4, 5]
    assert b'{"step": 3, "va\n' in path.read_bytes(), "what is no row stays"


WRITE = """
import sys
from pathlib import Path
from phi3_jax.evaluation.command import write_rows
for i in range(20):
    write_rows(Path(sys.argv[1]) / "evals.jsonl", [{"step": 0, "suite": "s", "task": f"{sys.argv[2]}-{i}", "metric": "m"}])
"""


def test_no_row_of_several_evaluations_is_lost(tmp_path: Path) -> None:
    pair = [subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path / "out"), name]) for name in "abc"]
    assert [p.wait() for p in pair] == [0, 0, 0]
    assert sorted(r["task"] for r in read_rows(tmp_path / "out" / "evals.jsonl")) == sorted(
        f"{name}-{i}" for name in "abc" for i in range(20)
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["evals.jsonl"]


# ------------------------------------------------------------------------------------------------ kill -9

KILLED = """
import os, sys, time
from phi3_jax.__main__ import main
from phi3_jax.interop import convert, gguf
from phi3_jax.evaluation import quantisation
for line in sys.stdin:  # for each line, arguments, a child that may be killed; nothing is imported twice
    words = line.split()
    child = os.fork()
    if child == 0:
        if words[0] == "hold":  # the write waits at its end, for a kill that is sure to come in the middle
            os.replace = os.rename = lambda *names: time.sleep(600)
            del words[0]
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        os._exit(main([sys.argv[1], *words]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""


@pytest.mark.parametrize("name", ["convert", "export", "quantize"])
def test_kill_9_at_twenty_random_moments_leaves_the_target_whole_or_absent(tmp_path: Path, name: str) -> None:
    from test_convert import random_folder

    if name == "export":
        pytest.importorskip("gguf")
    import numpy as np

    source = random_folder(tmp_path / "source", "mini_window", np.float32)
    if name == "convert":
        words = lambda target: ["--from", f"hf:{source}", "--to", str(target)]  # noqa: E731
    elif name == "export":
        words = lambda target: ["--model", f"hf:{source}", "--to", f"gguf:{target}", "--format", "f16"]  # noqa: E731
    else:
        run = [sys.executable, "launch/convert.py", "--from", f"hf:{source}", "--to", str(tmp_path / "model")]
        subprocess.run(run, check=True, cwd=ROOT, capture_output=True)
        words = lambda t: ["--model", str(tmp_path / "model"), "--format", "q8_0", "--out", str(t), "--tokens", "0"]  # noqa: E731
    place = tmp_path / "place"
    place.mkdir()
    forks = subprocess.Popen(
        [sys.executable, "-c", KILLED, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip

    def start(target: Path, *before: str) -> int:
        forks.stdin.write(" ".join([*before, *words(target)]) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline())

    start(place / "first")
    begin = time.monotonic()
    assert forks.stdout.readline() == "over\n"
    span = time.monotonic() - begin
    whole = content(place / "first")
    others = [place / "t.partial", place / ".t.partial", named(place / "t", "elsewhere", DEAD)]
    for path in others:
        path.mkdir()
        (path / "notes.txt").write_text("mine\n")
    rng, target = random.Random(name), place / "t"
    for turn in range(21):
        child = start(target, *["hold"] * (turn == 20))
        if turn < 20:
            time.sleep(rng.uniform(0, span))
        else:  # the control: one kill that is known to come in the middle of a write
            until = time.monotonic() + 120
            while not any(place.glob(f".t.{files.host()}.{child}.*")) and time.monotonic() < until:
                time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child, signal.SIGKILL)
        assert forks.stdout.readline() == "over\n"
        if turn == 20:
            assert any(place.glob(f".t.{files.host()}.{child}.*")), "control: something was left to sweep"
        if target.exists():
            assert content(target) == whole, f"turn {turn}: not whole"
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        assert all((path / "notes.txt").exists() for path in others)
    start(target)
    forks.stdin.close()
    assert forks.stdout.readline() == "over\n" and forks.wait() == 0
    assert content(target) == whole
    left = {p.name for p in place.iterdir()} - {"first", "t"} - {p.name for p in others}
    assert not left, "the next start removes what the killed ones left"
    assert ownership.owner_of(target) is None


def content(path: Path) -> dict[str, bytes]:
    """Every file's bytes; of a checkpoint, whose files name their folder and time, those of the arrays."""
    if path.is_file():
        return {"": path.read_bytes()}
    paths = [p for p in path.rglob("*") if p.is_file() and "CHECKPOINT_METADATA" not in p.name]
    named = {str(p.relative_to(path)): p for p in paths if p.name not in ("commit_success.txt", "checkpoint.json")}
    return {name: p.read_bytes() for name, p in named.items()}
