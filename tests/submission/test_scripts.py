"""Shell scripts, run by bash: whatever a study is called, each word arrives as it was."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import UserError
from phi3_jax.submission import templates

HOSTILE = [
    "two words", "quote'quote\"", "$(touch pwned)", "`touch pwned`", "a;touch pwned", "a\ntouch pwned\n", "&& touch pwned",
    "--option", "-", "*", "~", "naïve-日本", "\\", "#x", "a=b", "@name@", "%j",
]  # fmt: skip
PRINTS = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit({{status}})\n"
QUIET = "#!/bin/sh\nexit 0\n"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_script(text: str, programs: Path, folder: Path) -> subprocess.CompletedProcess:
    """Runs a script in an empty folder, in which it must leave nothing."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, env=environment)
    assert list(folder.iterdir()) == [], done.stderr
    return done


@pytest.mark.parametrize("word", HOSTILE)
def test_a_slurm_script_runs_the_words_it_was_given(word: str, tmp_path: Path) -> None:
    root = tmp_path / f"-root {word.replace('/', '')}"
    root.mkdir()
    program(tmp_path / "bin", "srun", PRINTS.format(status=0))
    text = templates.script("slurm.sh", {"root": str(root), "command": ["python", word, f"--workdir={word}"]})
    done = run_script(text, tmp_path / "bin", tmp_path / "empty")
    assert done.returncode == 0 and not list(root.iterdir())
    assert json.loads(done.stdout) == ["--kill-on-bad-exit=1", "--", "python", word, f"--workdir={word}"]


def test_the_check_would_see_an_unquoted_word(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_script("echo $(touch pwned)", tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("status,requeued", [(0, False), (75, True), (2, False)])
def test_only_a_saved_stop_is_queued_again(status: int, requeued: bool, tmp_path: Path) -> None:
    program(tmp_path / "bin", "srun", PRINTS.format(status=status))
    program(tmp_path / "bin", "scontrol", PRINTS.format(status=0))
    text = templates.script("slurm.sh", {"root": str(tmp_path), "command": ["x"]})
    done = run_script(text, tmp_path / "bin", tmp_path / "empty")
    assert done.returncode == status
    assert ('["requeue", "17"]' in done.stdout) == requeued


@pytest.mark.parametrize("word", HOSTILE)
def test_a_startup_script_runs_the_words_it_was_given(word: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    for name in ("mountpoint", "gcloud", "sleep", "mount", "mount.nfs"):
        program(programs, name, QUIET)
    program(programs, "docker", PRINTS.format(status=0))
    program(programs, "mountpoint", "#!/bin/sh\nexit 1\n")
    program(programs, "mount", PRINTS.format(status=0))
    mount, logs = str(tmp_path / f"m{word}"), str(tmp_path / f"l{word}")
    values = dict(
        mount=mount, volume=word, logs=logs, registry=word, binding=f"{word}:{word}", image=word, command=["python", word],
        name="p-name",
    )  # fmt: skip
    done = run_script(templates.script("tpu_vm.sh", values), programs, tmp_path / "empty")
    assert json.loads(done.stdout.splitlines()[0]) == ["-t", "nfs", "--", word, mount]
    (log,) = Path(logs).iterdir()
    assert log.name.startswith("p-name-")
    words = json.loads(log.read_text())
    assert words[words.index("--") :] == ["--", word, "python", word] and f"{word}:{word}" in words


def test_a_field_without_a_value_is_named() -> None:
    with pytest.raises(UserError, match=r"slurm.sh needs 'root'; give it with --config.cluster.root=VALUE"):
        templates.script("slurm.sh", {"command": ["x"]})


@pytest.mark.parametrize("name", ["study; touch pwned", "$(touch pwned)", "-rf", "it's", "a\nb", "%j %A", "ünï"])
def test_a_dry_run_can_be_pasted_into_a_shell(name: str, submit: Callable, clients: Any, tmp_path: Path) -> None:
    """The printed command line, run by bash where the file is, calls sbatch with the words that sending would use."""
    workdir = tmp_path / name
    words = "mini,scale=pico,budgets=1M"
    status, out, err = submit(words, "--backend=slurm", "--dry_run", workdir=workdir)
    assert status == 0 and not workdir.exists() and not clients.calls(), err
    line = out[out.rindex("(cd --") :]
    status, _, err = submit(words, "--backend=slurm", workdir=workdir)
    assert status == 0, err
    subprocess.run(["/bin/bash", "-c", line], check=True, cwd=clients.folder)
    sent, pasted = clients.calls("sbatch")
    assert sent == pasted and sent[-1] == str(workdir / "submission")
    (script,) = (p for p in (workdir / "submission").iterdir())
    command = next(x for x in script.read_text().split("srun ", 1)[1:]).partition("\nstatus=")[0]
    assert f"--workdir={workdir}" in shlex.split(command)
