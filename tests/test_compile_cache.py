"""Programs are compiled once: kept between processes, never used when damaged, and the numbers do not change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax import compile_cache

REPO = Path(__file__).resolve().parents[1]
CHILD = """
import os, sys, jax, jax.numpy as jnp, numpy as np
from phi3_jax import compile_cache
compile_cache.MIN_COMPILE_SECONDS = 0
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(1) if event.endswith("/cache_hits") else None)
cache = compile_cache.enable()
assert compile_cache.enable() is cache
x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)
y = jax.jit(jax.grad(lambda x: jnp.sum(jax.nn.logsumexp(jnp.tanh(x @ x) @ x, axis=-1))))(x)
if cache:
    cache.publish()
if "kill" in sys.argv:
    os.kill(os.getpid(), 9)
print(len(hits) > 0, np.asarray(y).tobytes().hex()[:64], jax.config.jax_compilation_cache_dir)
"""


def start(home: Path, *words: str, **env: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **env,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        env=env,
        cwd=REPO,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[bool, str, str]:
    """(whether anything came from the cache, the numbers, jax's folder)."""
    out, err = process.communicate()
    assert process.returncode == 0 and not err, err
    hit, numbers, folder = out.split()
    return hit == "True", numbers, folder


def entries(home: Path) -> list[Path]:
    (folder,) = (home / "phi3_jax").iterdir()
    assert not [p for p in folder.iterdir() if p.is_dir()], "a process that has ended leaves no folder"
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, str]:
    """A cache with the entries of one process, and the numbers that it computed."""
    home = tmp_path_factory.mktemp("home")
    hit, numbers, _ = finish(start(home))
    assert not hit and entries(home)
    return home, numbers


def test_the_second_process_compiles_nothing_and_computes_the_same_bits(filled):
    home, numbers = filled
    before = {path: path.read_bytes() for path in entries(home)}
    assert finish(start(home))[:2] == (True, numbers)
    assert {path: path.read_bytes() for path in entries(home)} == before


@pytest.mark.parametrize("how", ["cut", "flip", "rename"])
def test_a_damaged_entry_is_compiled_again(filled, how):
    home, numbers = filled
    whole = {path: path.read_bytes() for path in entries(home)}
    for path, content in whole.items():
        path.unlink()  # a new file: other processes may hold links to the old one
        damaged = bytearray(content)
        damaged[len(content) // 2] ^= 4
        path.write_bytes({"cut": content[: len(content) // 2], "flip": bytes(damaged), "rename": content}[how])
        if how == "rename":
            path.rename(path.with_name(path.name[:-8] + "00000000"))
    assert finish(start(home))[:2] == (False, numbers)
    assert {path.stem for path in entries(home)} == {path.stem for path in whole}
    assert finish(start(home))[:2] == (True, numbers), "control: and is good from then on"


def test_many_processes_at_once_and_killed_ones_leave_only_whole_entries(tmp_path):
    killed = [start(tmp_path, "kill") for _ in range(2)]
    together = [start(tmp_path) for _ in range(2)]
    numbers = {finish(process)[1] for process in together}
    assert [process.wait() for process in killed] == [-9, -9]
    for process in killed:
        process.communicate()
    hit, again, _ = finish(start(tmp_path))
    assert hit and {again} == numbers
    assert all(path.name.endswith(compile_cache._crc(path)) for path in entries(tmp_path))


def test_the_folder_that_the_user_chose_is_used(tmp_path):
    *_, folder = finish(start(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")))
    assert folder == str(tmp_path / "mine") and not (tmp_path / "home").exists()


def test_without_a_place_for_it_training_goes_on_without_a_cache(tmp_path):
    (tmp_path / "file").write_text("")
    hit, _, folder = finish(start(tmp_path / "file"))
    assert not hit and folder == "None"


def test_the_oldest_entries_go_when_there_are_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 25)
    for age, name in enumerate("abc"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert [path.name for path in compile_cache._newest(tmp_path)] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
