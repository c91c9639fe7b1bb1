"""The top of every command: whatever a user, a shell or a machine causes is one line and the usual status."""

from __future__ import annotations

import ast
import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import entry, verbs
from phi3_jax.errors import STOPPED, Stopped, UserError

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path
    for folder in ("launch", "phi3_jax", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)


WORDS = {
    "submit": "--config experiments/scaling.py:mini,scale=pico --backend local --dry_run",
    "lm_eval": "--model phi3_jax --model_args path=x --tasks arc_easy",  # lm-eval's own flags: no verb of ours
}


def test_every_program_starts_at_the_top() -> None:
    assert len(PROGRAMS) >= 15
    for path in PROGRAMS:
        tree = ast.parse(path.read_text())
        (main,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "__name__ == '__main__'"]
        calls = [ast.unparse(n.func) for n in ast.walk(main) if isinstance(n, ast.Call)]
        starts = {"start", "commands.start", "main", "run"} & {*calls}
        assert "sys.exit" in calls and starts, f"{path} does not start in entry.py"
        if "start" in starts and path.parent.name != "launch":  # its own imports take seconds, in which Ctrl-C comes
            first = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            before = [ast.unparse(node) for node in first if node.lineno < main.lineno]
            assert before == ["from __future__ import annotations"], f"{path} imports before it can answer Ctrl-C"


@pytest.mark.parametrize(
    "error,status,said",
    [
        (UserError("x=3 is too much"), 2, "error: x=3 is too much\n"),
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), 2, "error: /a/b: No space left; free some space\n"),
        (OSError(errno.EXDEV, "Invalid link", "/a", None, "/b"), 2, "error: /a -> /b: Invalid link\n"),
        (TimeoutError("the server does not answer"), 2, "error: the server does not answer\n"),
        (MemoryError(), 2, "error: memory ran out"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 2, "error: memory"),
        (RecursionError(), 2, "error: an input is nested too deeply"),
        (RuntimeError("Could not determine home directory."), 2, "error: this user has no home"),
        (RuntimeError("Symlink loop from '/a/b'"), 2, "error: '/a/b': a symbolic link that leads to itself; choose"),
        (KeyError("getpwuid(): uid not found: 54321"), 2, "error: this user has no home"),
        (KeyboardInterrupt(), 130, "interrupted\n"), (BrokenPipeError(), 141, ""),
        (SystemExit(3), 3, ""), (SystemExit(), 0, ""),
        (Stopped(), STOPPED, "stopped; the same command goes on from here\n"),
    ],
)  # fmt: skip
def test_errors_are_one_line(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture) -> None:
    def body(_: object) -> None:
        raise error

    assert entry.run(["x"], body) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and err.count("\n") == bool(said)


def test_undecodable_text_is_one_line_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture) -> None:
    for body in (lambda _: b"a\xff".decode() and None, lambda _: "\udcff".encode() and None):
        assert entry.run(["x"], body) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        entry.run(["x"], lambda _: 1 // 0)


def test_statuses() -> None:
    assert entry.run(["x"], lambda _: None) == 0 and entry.run(["x"], lambda _: 7) == 7
    assert entry.run([], lambda words: len(words)) == 0
    assert entry.run(["x"], lambda _: (_ for _ in ()).throw(KeyboardInterrupt), stops=True) == STOPPED


def program(body: str, **options: object) -> subprocess.Popen:
    code = f"import sys, os, time, signal\nfrom phi3_jax import entry\ndef body(_):\n    {body}\n"
    code += "sys.exit(entry.run(['x'], body, stops=True))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


def test_a_closed_pipe_a_full_disk_and_closed_streams() -> None:
    read, write = os.pipe()
    os.close(read)
    child = program("print('x' * 100_000)", stdout=write)
    os.close(write)
    assert (child.communicate()[1], child.returncode) == ("", 141)
    with open("/dev/full", "w") as full:
        child = program("print('x')", stdout=full)
        assert "No space left" in child.communicate()[1] and child.returncode == 2
    child = program(
        "print('x'); open('/dev/null').fileno() > 2 or sys.exit(9)", preexec_fn=lambda: [os.close(i) for i in (0, 1)]
    )
    assert child.communicate()[1] == "" and child.returncode == 0


def test_sigterm_is_answered_before_anything_is_imported() -> None:
    child = program("print('up', flush=True); time.sleep(60)", stdout=subprocess.PIPE)
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGTERM)
    assert "goes on from here" in child.communicate()[1] and child.returncode == STOPPED


def test_a_worker_is_stopped_while_it_imports(tmp_path: Path) -> None:
    """A package that is imported on the way says when, and takes its time."""
    (tmp_path / "grain.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, "-m", "phi3_jax.study.worker", str(tmp_path), "run"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    while (line := child.stdout.readline()) and line != "importing\n":
        pass
    assert line, child.stderr.read()
    child.terminate()
    assert "Traceback" not in child.communicate()[1] and child.returncode == STOPPED


def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path: Path) -> None:
    """numpy, or what else comes first, says that it is there and takes its time; every program but the benchmarks."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    for name in ("numpy", "jax", "ml_collections"):
        (tmp_path / f"{name}.py").write_text(slow)
    waiting = []
    for path in (path for path in PROGRAMS if path.parent.name != "benchmarks" and path.name != "__main__.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        program = [str(path)] if module.startswith("launch.") else ["-m", module]
        verb = (
            {"export": "data", "retrieval_probe": "probe"}.get(path.stem, path.stem) if "-m" in program else path.stem
        )
        words = WORDS[verb] if verb in WORDS else verbs.TABLE[verb].example
        child = subprocess.Popen(
            [sys.executable, *program, *shlex.split(words)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
            # a shell's background job ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        waiting.append((path, child))
    try:
        for path, child in waiting:
            assert child.stdout.readline() == "importing\n", (path, child.communicate())
            child.send_signal(signal.SIGINT)
            err = child.communicate()[1]
            assert err.count("\n") == 1 and "Traceback" not in err, (path, err)
            assert child.returncode in (130, STOPPED), path
    finally:
        for _, child in waiting:
            child.kill()


def test_a_worker_that_was_killed_is_named_and_one_that_was_stopped_is_no_failure() -> None:
    from phi3_jax.study.workers import _why_ended

    assert "killed (SIGKILL), as happens where memory runs out" in _why_ended(-9, "x.log")
    assert _why_ended(-11, "x.log") == "the training process ended with SIGSEGV; see x.log"
    assert _why_ended(1, "x.log") == "the training process ended with status 1; see x.log"
