"""Clients of schedulers that only note how they were called."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = """#!{python}
import json, os, sys
folder = {folder!r}
with open(os.path.join(folder, "calls"), "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], os.getcwd()]) + "\\n")
answer = os.path.join(folder, os.path.basename(sys.argv[0]) + ".answer")
print(open(answer).read() if os.path.exists(answer) else {default!r})
"""


class Clients:
    """Programs on PATH: `calls` lists [program, *arguments, folder]; `answer` sets what one prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, default: str) -> None:
        path = self.folder / name
        path.write_text(CLIENT.format(python=sys.executable, folder=str(self.folder), default=default))
        path.chmod(0o755)

    def answer(self, name: str, text: str) -> None:
        (self.folder / f"{name}.answer").write_text(text)

    def calls(self, *beginning: str) -> list[list[str]]:
        """Calls so far that begin with these words."""
        path = self.folder / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if call[: len(beginning)] == list(beginning)]


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    folder = tmp_path / "clients"
    folder.mkdir()
    made = Clients(folder)
    for name, default in (("kubectl", '{"items": []}'), ("gcloud", "[]"), ("squeue", ""), ("sbatch", "17")):
        made.add(name, default)
    monkeypatch.setenv("PATH", str(folder))
    return made


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Runs launch/submit.py's main in the repository's root: (words, *arguments) -> (status, output, errors)."""
    from phi3_jax.__main__ import main

    monkeypatch.chdir(ROOT)

    def run(words: str, *arguments: str, workdir: Path | str = tmp_path / "study") -> tuple[int, str, str]:
        words = [f"--config=experiments/scaling.py:{words}", f"--workdir={workdir}", *arguments]
        status = main(["submit", *words])
        return status, *capsys.readouterr()

    return run
