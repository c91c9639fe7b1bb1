"""One owner of a target: who is refused, who waits, whose record a later process may remove."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phi3_jax.errors import UserError
from phi3_jax.records import files, ownership

OTHER = "choose another --to"
HOLD = """
import sys, time
from pathlib import Path
from phi3_jax.records import ownership
with ownership.own(Path(sys.argv[1]), "-", inside=True, wait="wait" in sys.argv):
    print("mine", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1], "order").open("a").write(sys.argv[-1])
"""


def holder(target: Path, *words: str, **environment: str) -> subprocess.Popen:
    """Another process that owns `target` until it gets a line."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip


def held(target: Path, *words: str, **environment: str) -> subprocess.Popen:
    process = holder(target, *words, **environment)
    assert process.stdout.readline() == "mine\n", process.stderr.read()
    return process


def record(target: Path, **changes: object) -> Path:
    """A record like that of another process, which lives as long as this test's: its parent."""
    path = ownership.record_of(target, inside=True)
    path.parent.mkdir(exist_ok=True)
    pid = os.getppid()
    owner = dataclasses.replace(ownership._me(), pid=pid, started=ownership._started(pid), token="other")
    path.write_text(json.dumps(dataclasses.asdict(owner) | changes))
    return path


def refused(target: Path) -> str:
    with pytest.raises(UserError) as found, ownership.own(target, OTHER, inside=True):
        pass
    return str(found.value)


def taken(target: Path) -> None:
    with ownership.own(target, OTHER, inside=True):
        assert json.loads(ownership.record_of(target, inside=True).read_text())["pid"] == os.getpid()
    assert not ownership.record_of(target, inside=True).exists()


def test_a_living_owner_is_named_and_not_hurt(tmp_path: Path) -> None:
    process = held(tmp_path / "run")
    before = ownership.record_of(tmp_path / "run", inside=True).read_bytes()
    message = refused(tmp_path / "run")
    assert f"process {process.pid} on {files.host()}" in message and f"wait until it ends, or {OTHER}" in message
    assert "\n" not in message and ownership.record_of(tmp_path / "run", inside=True).read_bytes() == before
    assert str(ownership.owner_of(tmp_path / "run", inside=True)) == f"process {process.pid} on {files.host()}"
    process.communicate("\n")
    taken(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["order"], "nothing else is left"


def test_after_kill_9_the_next_start_takes_over_at_once(tmp_path: Path) -> None:
    process = held(tmp_path / "run")
    process.kill()  # and not waited for: the dead process still has its number
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert ownership.record_of(tmp_path / "run", inside=True).exists(), "control: its record is still there"
    taken(tmp_path / "run")
    process.wait()


def test_a_later_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    record(tmp_path / "run")
    assert "is being written by" in refused(tmp_path / "run"), "control: the process lives"
    record(tmp_path / "run", started=1)
    taken(tmp_path / "run")


def test_an_owner_elsewhere_is_dead_after_missed_heartbeats_only(tmp_path: Path) -> None:
    """A job that is queued again on another node: the node of the record is never asked."""
    path = record(tmp_path / "run", host="node7", beat=0.2)
    begin = time.monotonic()
    taken(tmp_path / "run")
    assert time.monotonic() - begin >= 0.9, "not before five heartbeats were missed"
    path = record(tmp_path / "run", host="node7", beat=60)
    beating = threading.Timer(0.6, os.utime, [path])
    beating.start()
    assert "on node7; wait until it ends" in refused(tmp_path / "run"), "a sign of life"
    path = record(tmp_path / "run", host="node7", beat=60)
    os.utime(path, (1, 1))  # long ago: no wait
    taken(tmp_path / "run")
    record(tmp_path / "run", machine="another boot, or another container of this name", pid=1, started=1, beat=0.1)
    taken(tmp_path / "run")


def test_a_job_queued_again_is_its_own_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "run", host="node7", beat=1e9, job="41", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    taken(tmp_path / "run")


def test_an_owner_shows_that_it_lives_and_hears_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    with ownership.own(tmp_path / "run", OTHER, inside=True):
        path = ownership.record_of(tmp_path / "run", inside=True)
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline, "no heartbeat came"
            time.sleep(0.01)
        ownership.still_owned(tmp_path / "run", inside=True)
        record(tmp_path / "run", host="node7", beat=1e9)
        with pytest.raises(UserError, match="was taken over by process .* on node7"):
            ownership.still_owned(tmp_path / "run", inside=True)
    assert path.exists(), "the record of another is not removed"


@pytest.mark.parametrize("content", [b"", b'{"host": "no', b"\0" * 300, b"[]", b"{}"])
def test_a_damaged_record_counts_by_its_age(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.1)
    record(tmp_path / "run").write_bytes(content)
    taken(tmp_path / "run")


def test_those_who_wait_come_one_after_the_other(tmp_path: Path) -> None:
    first = held(tmp_path / "out")
    others = [holder(tmp_path / "out", "wait", name) for name in "abcd"]
    for process in (*others, first):
        process.stdin.write("\n")
        process.stdin.flush()
    notes = [other.communicate()[1] for other in others]
    first.communicate()
    assert sorted((tmp_path / "out" / "order").read_text().replace(str(tmp_path / "out"), "")) == list("abcd")
    assert all(not note or note.startswith("note: ") for note in notes)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["order"]


def test_of_many_who_find_a_dead_owner_one_becomes_the_next(tmp_path: Path) -> None:
    """Threads race for a dead record: whoever has the target is alone, and everyone gets it in the end."""
    inside, most, seen, lock = [0], [0], [], threading.Lock()

    def one(number: int) -> None:
        with ownership.own(tmp_path / "run", OTHER, inside=True, wait=True):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            with lock:
                inside[0] -= 1
                seen.append(number)

    for turn in range(3):
        record(tmp_path / "run", started=1)
        threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1 and len(seen) == 6 * (turn + 1)


def test_a_child_takes_over_and_a_stranger_does_not(tmp_path: Path) -> None:
    with ownership.shared_with_children(), ownership.own(tmp_path / "run", OTHER, inside=True):
        token = os.environ[ownership.TOKEN]
        stranger = holder(tmp_path / "run", **{ownership.TOKEN: "x"})
        assert "is being written by process" in stranger.communicate()[1]
        child = held(tmp_path / "run")
        found = json.loads(ownership.record_of(tmp_path / "run", inside=True).read_text())
        assert (found["pid"], found["token"]) == (child.pid, token)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert ownership.record_of(tmp_path / "run", inside=True).exists()
    assert ownership.TOKEN not in os.environ
    taken(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused(tmp_path / "file" / "run")
