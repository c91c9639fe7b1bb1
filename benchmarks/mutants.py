"""Plants one-line mistakes in a copy of the code, one at a time, and says which of them the tests do not notice.

    python benchmarks/mutants.py                     # all of mutants.toml, two at a time: about an hour
    python benchmarks/mutants.py 3 7 20-31 laws.py   # by number, or by a word of the file's path or of the meaning

The checkout is copied to a temporary folder and never changed. First the tests that the chosen mutants name are run on the
unchanged copy (all must pass), then each mutant with its own tests. A mutant is killed where a test fails or does not
end; it lives where all pass. Where the text to be replaced is not there exactly once, or the tests cannot be collected, the
list is out of date: that counts as a failure, too. Exit status 1 where any mutant lives or any entry is out of date.

Each entry of mutants.toml: `file`, `old` (a fragment that is in the file once), `new`, `means` (what such a change would do
to a study) and `tests` (below tests/). `equivalent` says why no test can see it; such an entry is listed, not run.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag

REPO = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "runs", "*.egg-info")
PASSED, FAILED = 0, 1  # pytest's exit statuses; others: the tests did not run


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake: `old` becomes `new` in `file`; `tests` must see it."""

    number: int
    file: str
    old: str
    new: str
    means: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def label(self) -> str:
        return f"{self.number:3d}  {Path(self.file).name:14s} {self.means}"


def read(path: Path) -> list[Mutant]:
    """The entries of a list, numbered from 1."""
    entries = tomllib.loads(path.read_text("utf-8"))["mutant"]
    return [Mutant(i, **entry | {"tests": tuple(entry.get("tests", ()))}) for i, entry in enumerate(entries, 1)]


def chosen(mutants: Sequence[Mutant], words: Sequence[str]) -> list[Mutant]:
    """Those that a number, a range of numbers or a word names; all without any."""

    def named(mutant: Mutant, word: str) -> bool:
        first, _, last = word.partition("-")
        if first.isdigit() and (last or first).isdigit():
            return int(first) <= mutant.number <= int(last or first)
        return word in mutant.file or word in mutant.means

    for word in words:
        if not any(named(mutant, word) for mutant in mutants):
            raise SystemExit(f"no mutant is called {word!r}; give numbers of 1 to {len(mutants)}, or a word")
    return [mutant for mutant in mutants if not words or any(named(mutant, word) for word in words)]


def mutated(mutant: Mutant, text: str) -> str | None:
    """The file's text with the mistake; None where `old` is not in it exactly once."""
    return text.replace(mutant.old, mutant.new) if text.count(mutant.old) == 1 and mutant.old != mutant.new else None


def run_tests(root: Path, tests: Sequence[str], limit: float, *options: str) -> tuple[int | None, str]:
    """(pytest's exit status, its last words) in one copy; None where the tests did not end in time."""
    paths = dict.fromkeys(f"tests/{test}" for test in tests)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *options, *paths]
    env = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # bytecode knows times by the second only
    try:
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"not ended after {limit:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, lines[0] if lines else (done.stdout + done.stderr)[-300:]


def copy_of(folder: Path, number: int) -> Path:
    """A copy of the checkout, from which Python imports."""
    root = folder / f"copy{number}"
    shutil.copytree(REPO, root, ignore=LEFT_OUT)
    code = "import phi3_jax; print(phi3_jax.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
                           capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    if not Path(found).is_relative_to(root):
        raise SystemExit(f"Python imports {found}, not the copy in {root}; the mutants would not be seen")
    return root


def plant(mutant: Mutant, root: Path, limit: float) -> str:
    """ "killed", "LIVES" or "BROKEN" with a reason; the copy is as before."""
    path = root / mutant.file
    before = path.read_text("utf-8")
    after = mutated(mutant, before)
    if after is None:
        return f"BROKEN {mutant.old!r} is {before.count(mutant.old)} times in {mutant.file}, not once"
    path.write_text(after, "utf-8")
    try:
        status, words = run_tests(root, mutant.tests, limit, "-x")
    finally:
        path.write_text(before, "utf-8")
    if status == PASSED:
        return "LIVES"
    return "killed" if status in (FAILED, None) else f"BROKEN its tests did not run: {words}"


def main(flags: Mapping[str, Any]) -> int:
    mutants = chosen(read(LIST), flags["which"])
    if flags["list"]:
        print("\n".join(m.label + (f" (equivalent: {m.equivalent})" if m.equivalent else "") for m in mutants))
        return 0
    planted, begin = [m for m in mutants if not m.equivalent], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        roots = [copy_of(Path(folder), i) for i in range(flags["jobs"])]
        status, words = run_tests(roots[0], [test for m in planted for test in m.tests], 10 * flags["limit"])
        if status != PASSED:
            print(f"control failed: the tests do not pass on the unchanged code: {words}")
            return 1
        print(f"control: the tests pass on the unchanged code ({time.monotonic() - begin:.0f} s)", flush=True)
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for root in roots:
            free.put(root)

        def one(mutant: Mutant) -> str:
            root, start = free.get(), time.monotonic()
            try:
                found = plant(mutant, root, flags["limit"])
            finally:
                free.put(root)
            print(f"{mutant.label}: {found} ({time.monotonic() - start:.0f} s)", flush=True)
            return found

        with ThreadPoolExecutor(len(roots)) as pool:
            results = list(pool.map(one, planted))
    killed, lives = results.count("killed"), results.count("LIVES")
    print(f"{killed} killed, {lives} live, {len(results) - killed - lives} broken, "
          f"{len(mutants) - len(planted)} equivalent; {(time.monotonic() - begin) / 60:.0f} min")  # fmt: skip
    return int(killed < len(results))


COMMAND = Command(
    "benchmarks/mutants.py",
    __doc__,
    main,
    {
        "which": Flag(keys.word("numbers, ranges or words; without, all", None), "WHICH", repeated=True, bare=True),
        "jobs": Flag(keys.whole("mutants at a time, each in a copy of its own", 2, 1)),
        "limit": Flag(keys.number("seconds after which a mutant's tests count as failed", 240.0, 1.0, 1e6)),
        "list": Flag(keys.switch("prints the mutants and runs nothing")),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
