"""Hostile programs leave no trace under every choice of layers, honest ones pass; the harms are real without it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from phi3_jax.errors import UserError
from phi3_jax.evaluation import sandbox
from phi3_jax.evaluation.sandbox import Limits, Outcome, run, run_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")
QUICK = Limits(seconds=1.5, cpu_seconds=1, memory_bytes=1 << 28)
SOLUTION = """
from typing import List
def has_close_elements(numbers: List[float], threshold: float) -> bool:
    ordered = sorted(numbers)
    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))
def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == WRONG
check(has_close_elements)
"""
GOOD, BAD = SOLUTION.replace("WRONG", "False"), SOLUTION.replace("WRONG", "True, 'too far'")
TRY = """
import os, sys, contextlib, ctypes, shutil, socket, time
def attempt(act, *args):
    try: act(*args)
    except Exception as error: print(type(error).__name__, error, file=sys.stderr)
def write(path):
    with open(path, "w") as file: file.write("harm")
"""
# ARENA is a world-writable folder with two files of the test; every one of these does its harm when run as it is.
HARMS = {
    "write beside": "attempt(write, 'ARENA/new'); attempt(write, 'ARENA/all')",
    "write above": "attempt(write, '../new'); attempt(os.mkdir, '../../folder')",
    "delete": "attempt(os.unlink, 'ARENA/mine'); attempt(os.unlink, 'ARENA/all')",
    "delete tree": "attempt(shutil.rmtree, 'ARENA')",
    "truncate": "attempt(os.truncate, 'ARENA/all', 0); attempt(os.open, 'ARENA/all', os.O_RDONLY | os.O_TRUNC)",
    "rename and link": "attempt(os.rename, 'ARENA/all', 'ARENA/b'); attempt(os.symlink, '/', 'ARENA/c')",
    "chmod": "attempt(os.chmod, 'ARENA/mine', 0o777)",
    "through /proc": "[attempt(write, f'/proc/{pid}/root/ARENA/new') for pid in (1, 'self', os.getppid(), VICTIM)]",
    "tcp": "attempt(socket.create_connection, ('127.0.0.1', TCP), 1)",
    "udp": "attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP)))",
    "daemon": "attempt(lambda: os.fork() or (os.setsid(), os.fork() or time.sleep(20)))",
    "clone by number": "attempt(lambda: ctypes.CDLL(None).syscall(FORK, 17, 0, 0, 0, 0) or time.sleep(20))".replace(
        "FORK", "56 if os.uname().machine == 'x86_64' else 220"
    ),
    "spawn": "import subprocess as s; attempt(s.Popen, ['PYTHON', '-c', 'import time; time.sleep(20)', 'ARENA'])",
    "kill": "attempt(os.kill, VICTIM, 9)",
}
# Not shown to do harm, for they would; with the ways each may end.
WORSE = {
    "endless loop": ("while True: pass", "timed out"),
    "sleep": ("time.sleep(60)", "timed out"),
    "stubborn loop": (
        "import signal\nfor s in signal.Signals: attempt(signal.signal, s, signal.SIG_IGN)\nwhile True: pass",
        "timed out",
    ),
    "fork bomb": ("while True: os.fork()", "failed"),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", "failed"),
    "memory": ("x = bytearray(8 << 30)", "failed"),
    "memory by steps": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "failed"),
    "stdout": ("while True: print('x' * 9999)", "too much output"),
    "stderr": ("while True: os.write(2, b'x' * 9999)", "too much output"),
    "every descriptor": (
        "while True:\n  for fd in range(3, 64):\n    with contextlib.suppress(OSError): os.write(fd, b'x' * 4096)",
        "too much output",
    ),
    "huge file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", "failed"),
    "odd folder": (
        "for i in range(2000):\n  os.mkdir('deep'); os.chdir('deep')\nos.mkdir('locked', 0); 1 / 0",
        "failed",
    ),
    "odd files": (
        "os.close(os.open('locked', os.O_CREAT, 0)); os.mkfifo('pipe'); os.symlink('/', 'root'); 1 / 0",
        "failed",
    ),
    "kill parent": ("os.kill(os.getppid(), 9)", "failed"),
    "kill all": ("os.kill(-1, 9)", "failed"),
    "kill group": ("os.killpg(0, 9)", "failed"),
    "exit": ("sys.exit(0)\nassert False", "failed"),
    "hard exit": ("os._exit(0)\nassert False", "failed"),
    "exit at exit": ("import atexit; atexit.register(os._exit, 0)\nassert False", "failed"),
    "guess": (
        "t = os.urandom(16).hex()\nprint(t)\nfor fd in range(3, 64):\n  with contextlib.suppress(OSError): "
        "os.write(fd, t.encode() + b'\\nexit 0')\nos._exit(0)",
        "failed",
    ),
    "patched builtins": (
        "import builtins\nbuiltins.exec = builtins.compile = builtins.open = print\n"
        "os.write = os._exit = sys.exit = sys.excepthook = lambda *a: None\nassert False",
        "failed",
    ),
    "recursion": ("f = lambda n: f(n + 1)\nf(0)", "failed"),
    "deep recursion": ("sys.setrecursionlimit(10**9)\nf = lambda n: [*map(f, [n])]\nf(0)", "killed"),
    "crash": ("ctypes.string_at(0)", "killed"),
    "syntax": ("def f(:", "failed"),
    "null byte": ("\0", "failed"),
    "surrogate": ("'\ud800'", "failed"),
    "input": ("input()", "failed"),
    "exec": ("os.execv('/bin/true', ['true'])", "failed"),
    "io_uring": ("assert ctypes.CDLL(None).syscall(425, 1, 0) != -1", "failed"),
    "ptrace": ("assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) != -1", "failed"),
    "user namespace": ("assert ctypes.CDLL(None).unshare(0x10000000) != -1", "failed"),
}


@pytest.fixture(params=sandbox.CHOICES, ids="+".join)
def choice(request, monkeypatch):
    """Each choice of layers in its turn, so that none of them leans on another."""
    try:
        sandbox._launch("", Limits(), request.param)
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(sandbox, "layers", lambda: request.param)
    return request.param


@pytest.fixture
def arena(monkeypatch):
    """A folder that anybody may write, two files in it, and below it the place of the sandbox's directories."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="arena-") as name:
        path = Path(name)
        (path / "work").mkdir()
        for file, mode in {"mine": 0o644, "all": 0o666}.items():
            (path / file).write_text("precious")
            (path / file).chmod(mode)
        for folder in (path, path / "work"):
            folder.chmod(0o777)
        monkeypatch.setattr(tempfile, "tempdir", str(path / "work"))
        yield path
        path.mkdir(exist_ok=True)


@pytest.fixture
def world(arena):
    """What a program may harm, filled into it, and a function that tells what is left of it."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        victim = subprocess.Popen(["/bin/sleep", "60"])
        for server in (tcp, udp):
            server.setblocking(False)
        ports = {"TCP": str(tcp.getsockname()[1]), "UDP": str(udp.getsockname()[1]), "VICTIM": str(victim.pid)}

        def state():
            files = [
                (str(p), p.lstat().st_mode, p.lstat().st_size) for p in sorted([arena, *arena.rglob("*")]) if p.exists()
            ]
            files = [entry[:2] if os.path.isdir(entry[0]) else entry for entry in files]
            calls = []
            for receive in (tcp.accept, lambda: udp.recv(9)):
                with contextlib.suppress(BlockingIOError):
                    calls.append(str(receive()))
            return files, calls, [pid for pid, _ in alive(arena)], victim.poll()

        def fill(program):
            for word, value in (ports | {"ARENA": str(arena), "PYTHON": sys.executable}).items():
                program = program.replace(word, value)
            return TRY + program

        yield fill, state
        victim.kill()
        victim.wait()


def alive(arena: Path) -> list[tuple[int, str]]:
    """Processes whose command line names the arena, this one and zombies (which have none) apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(arena) in (line := path.read_text(errors="replace")) and int(path.parent.name) != os.getpid():
                found.append((int(path.parent.name), line))
    return found


@pytest.mark.parametrize("name", HARMS)
def test_without_the_sandbox_it_does_harm(name, world, arena):
    fill, state = world
    before = state()
    cwd = Path(tempfile.mkdtemp())
    subprocess.run([sys.executable, "-c", fill(HARMS[name]), arena], cwd=cwd, stderr=subprocess.DEVNULL, timeout=10)
    with contextlib.suppress(OSError):
        cwd.rmdir()  # or its being there would pass for harm
    time.sleep(0.1)  # for datagrams and processes to show
    after = state()
    for pid in after[2]:
        os.kill(pid, signal.SIGKILL)
    assert after != before


@pytest.mark.parametrize("name", HARMS)
def test_harm_is_kept_off(name, choice, world):
    fill, state = world
    before = state()
    assert run(fill(HARMS[name])).status == "passed"  # it was tried, to the end
    assert state() == before


@pytest.mark.parametrize("name", WORSE)
def test_hostile_programs_end_and_leave_nothing(name, choice, world):
    fill, state = world
    program, status = WORSE[name]
    before, memory = state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run(program if name in ("syntax", "null byte", "surrogate") else fill(program), QUICK)
    assert (outcome.passed, outcome.status) == (False, status), outcome
    assert len(outcome.detail) <= sandbox.DETAIL
    assert state() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB


def test_nothing_is_written_to_home_and_shared_folders(choice):
    name = f"sandbox-test-{os.getpid()}"
    places = [Path(p, name) for p in (Path.home(), "/tmp", "/var/tmp", "/dev/shm", "/") if os.access(p, os.W_OK)]
    run(TRY + f"for place in {[str(p) for p in places]!r}: attempt(write, place)")
    assert places and not [place for place in places if place.exists()]


def test_secrets_of_the_parent_stay_hidden(choice, monkeypatch, tmp_path):
    monkeypatch.setenv("API_SECRET", "do-not-tell")
    search = f"""
import glob
texts = [repr(os.environ)]
for path in glob.glob("/proc/[0-9]*/environ"):
    attempt(lambda: texts.append(open(path, errors="replace").read()))
print({{True: "leaked", False: "hidden"}}["do-not" + "-tell" in "".join(texts)], len(texts), {os.getpid()}, file=sys.stderr)
"""
    plain = subprocess.run([sys.executable, "-c", TRY + search], capture_output=True, text=True)
    assert "leaked" in plain.stderr
    outcome = run(TRY + search)
    assert outcome.passed and "hidden" in outcome.detail and "leaked" not in outcome.detail


def test_landlock_hides_files_of_others(arena):
    try:
        landlocked = "landlock" in sandbox.layers()
    except UserError as error:
        pytest.skip(str(error))
    outcome = run(f"print(open('{arena}/all').read())")
    assert outcome.passed != landlocked
    assert "PermissionError" in outcome.detail or not landlocked


def test_honest_programs(choice):
    assert run(GOOD) == Outcome(True, "passed", "")
    wrong = run(BAD)
    assert (wrong.passed, wrong.status) == (False, "failed")
    assert "AssertionError: too far" in wrong.detail


def test_what_solutions_need_works(choice):
    outcome = run("""
import bisect, cmath, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools
import json, math, operator, random, re, statistics, string, tempfile, typing
@dataclasses.dataclass
class Point:
    x: int
assert __name__ == "__main__" and Point(2) == Point(2) and hashlib.md5(b"").hexdigest().startswith("d41d8cd9")
with open("notes", "w") as file: file.write("latin")
assert open("notes", encoding="latin-1").read() == "latin" and random.random() < 1
print("quiet")
""")
    assert outcome.passed, outcome


def test_run_all_keeps_the_order():
    try:
        outcomes = run_all([f"assert {i} % 3, 'number {i}'" for i in range(20)])
    except UserError as error:
        pytest.skip(str(error))
    assert [outcome.passed for outcome in outcomes] == [i % 3 > 0 for i in range(20)]
    assert all(f"number {i}" in outcomes[i].detail for i in range(0, 20, 3))


def test_a_machine_that_cannot_isolate_is_refused(monkeypatch, arena):
    monkeypatch.setattr(sandbox, "MACHINES", {})  # no seccomp filter for this processor
    sandbox.layers.cache_clear()
    with pytest.raises(UserError, match=r"cannot isolate model-written code .*container"):
        run(f"open('{arena}/all', 'w')")
    assert (arena / "all").read_text() == "precious" and not list((arena / "work").iterdir())
    sandbox.layers.cache_clear()


def test_a_broken_layer_stops_the_program(monkeypatch, arena):
    monkeypatch.setattr(sandbox, "layers", lambda: ("namespaces", "landlock"))
    monkeypatch.setattr(sandbox, "MACHINES", {})
    with pytest.raises(UserError, match="did not start"):
        run(f"open('{arena}/all', 'w')")
    assert (arena / "all").read_text() == "precious"
