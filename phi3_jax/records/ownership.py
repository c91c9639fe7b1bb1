"""Who is writing a target: one record, made exclusively, that names a process and shows that it lives.

Owned are a run's folder, an exported data set, a converted, quantised or exported model, an evaluation's rows; never a
study, whose runs many jobs train at once. A job of several processes is one owner, its process 0.

Making, renewing, judging and removing a record happen here and nowhere else. What they need of a file system is an
exclusive creation and its clock; a bucket has both (a write that must not find an object, the time of its last change).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.records import files

HEARTBEAT = 30.0  # seconds between two signs of life
MISSED = 5  # heartbeats without one, after which an owner on another host is dead
TOKEN = "PHI3_JAX_OWNER"  # a process started with its parent's token may take over what the parent owns
INSIDE = ".owner"
LOOK = 0.25  # seconds between two looks at a record


@dataclasses.dataclass(frozen=True)
class Owner:
    """What a record says. `pid` and `started` (clock ticks after boot) mean something on `machine` only."""

    host: str
    machine: str
    pid: int
    started: int
    token: str
    job: str = ""  # the scheduler's number for it, the same after it was queued again
    restart: int = 0  # how often that happened
    beat: float = HEARTBEAT  # seconds

    @property
    def here(self) -> bool:
        return (self.host, self.machine) == (files.host(), _machine())

    @property
    def dead(self) -> bool:
        """Known at once: its process of this machine is gone, or its job was queued again, as this one."""
        if self.job and self.job == _job()[0]:
            return self.restart < _job()[1] or (self.here and not self._runs())
        return self.here and not self._runs()

    def _runs(self) -> bool:
        return files.alive(self.pid) and _started(self.pid) in (self.started, None)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def own(target: Path, way_out: str, *, inside: bool = False, wait: bool = False) -> Iterator[None]:
    """A context in which this process is the only one that writes `target`.

    Args:
      target: a folder or file, there or not.
      way_out: what a refused user can do but wait, for example "choose another --to".
      inside: the record lies in the folder `target`, which is made, and not beside it: for folders that are written in
        place.
      wait: wait until the owner ends, where there is one, instead of refusing. An owner on another host is in any case
        watched for a sign of life.

    Raises:
      UserError: a living process owns it; the folder cannot be written.
    """
    record = record_of(target, inside)
    me = _take(record, target, way_out, wait)
    _HELD[record] = me
    _keep_beating()
    try:
        yield
    finally:
        _HELD.pop(record, None)
        _remove(record, me)


def record_of(target: Path, inside: bool = False) -> Path:
    """Where the record of a target is."""
    return target / INSIDE if inside else target.with_name(f".{target.name}{INSIDE}")


def owner_of(target: Path, inside: bool = False) -> Owner | None:
    """The other process that owns a target and is not known to be dead; None where there is none."""
    found = _read(record_of(target, inside))
    if found is None or found[0] is None or found[0].dead or found[0].token == os.environ.get(TOKEN):
        return None
    return found[0]


def still_owned(target: Path, inside: bool = False) -> None:
    """Raises UserError where this process, held up for long, was taken for dead by another owner."""
    record = record_of(target, inside)
    found, me = _read(record), _HELD.get(record)
    if me is not None and (found is None or found[0] != me):
        by = f" by {found[0]}" if found and found[0] else ""
        raise UserError(f"{target} was taken over{by}, as no sign of life came from here; nothing more is written")


@contextlib.contextmanager
def shared_with_children() -> Iterator[None]:
    """A context in which this process and those it starts have one token: a child may take over what is owned here."""
    before = os.environ.get(TOKEN)
    os.environ[TOKEN] = before or uuid.uuid4().hex
    try:
        yield
    finally:
        if before is None:
            del os.environ[TOKEN]


# ------------------------------------------------------------------------------------------------ this process


def _me() -> Owner:
    job, restart = _job()
    token = os.environ.get(TOKEN) or uuid.uuid4().hex
    return Owner(files.host(), _machine(), os.getpid(), _started(os.getpid()) or 0, token, job, restart, beat=HEARTBEAT)


def _machine() -> str:
    """Boot and process-number space: containers of one host name have one of their own each."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process of this machine began, which tells it from a later one of the same number; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] not in "ZX" else -1  # ended, and not yet looked after by its parent
    except (OSError, ValueError, IndexError):
        return None


def _job() -> tuple[str, int]:
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restart) if restart.isdigit() else 0


_HELD: dict[Path, Owner] = {}
_BEATING = threading.Lock()


def _keep_beating() -> None:
    """One thread for all records of this process; it ends when there are none."""
    if _BEATING.acquire(blocking=False):
        threading.Thread(target=_beat, name="ownership", daemon=True).start()


def _beat() -> None:
    last = time.monotonic()
    while _HELD:
        time.sleep(min(LOOK, HEARTBEAT))
        if time.monotonic() - last < HEARTBEAT:
            continue
        last = time.monotonic()
        for record, me in list(_HELD.items()):
            found = _read(record)
            if found and found[0] == me:
                with contextlib.suppress(OSError):
                    os.utime(record)
    _BEATING.release()
    if _HELD:  # taken between the last look and the release
        _keep_beating()


# ------------------------------------------------------------------------------------------------ records


def _take(record: Path, target: Path, way_out: str, wait: bool) -> Owner:
    me, told, seen = _me(), False, None
    while True:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            if _create(record, me):
                files.sweep(record)
                return me
            if (found := _read(record)) is None:
                continue
            owner, changed = found
            if owner is not None and owner.token == me.token:  # its own, or its parent's, which hands it over
                files.write_text(record, _text(me))
                return me
            if (owner and owner.dead) or (not (owner and owner.here) and _silent(record, owner, changed)):
                _remove(record, owner)
                continue
        except OSError as error:
            raise UserError(f"cannot write to {record.parent}: {error.strerror or error}; {way_out}") from error
        who, seen = owner or "another process", seen or changed
        if not wait and ((owner and owner.here) or changed != seen):
            raise UserError(f"{target} is being written by {who}; wait until it ends, or {way_out}")
        if not told:
            told = True
            until = "ends" if wait else "shows a sign of life"
            print(f"note: {target} is being written by {who}; waiting until it {until}", file=sys.stderr, flush=True)
        time.sleep(LOOK)


def _text(owner: Owner) -> str:
    return json.dumps(dataclasses.asdict(owner)) + "\n"


def _create(record: Path, me: Owner) -> bool:
    """Makes a record with all its content, unless there is one."""
    partial = files.temporary(record)
    try:
        partial.write_text(_text(me))
        os.link(partial, record)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
            raise
    finally:
        partial.unlink(missing_ok=True)
    try:  # a file system without hard links
        with open(record, "x") as file:
            file.write(_text(me))
        return True
    except FileExistsError:
        return False


def _read(record: Path) -> tuple[Owner | None, int] | None:
    """(owner, None where the record is damaged; time of its last change in ns), or None without a record."""
    try:
        with open(record, "rb") as file:
            content, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        return Owner(**files.parse_json(content, record)), changed
    except (UserError, TypeError):
        return None if not record.exists() else (None, changed)


def _silent(record: Path, owner: Owner | None, changed: int) -> bool:
    """Whether an owner missed its heartbeats, by the clock of the file system that the record is on."""
    probe = files.temporary(record)
    probe.touch()
    now = probe.stat().st_mtime_ns
    probe.unlink()
    return (now - changed) / 1e9 > MISSED * (owner.beat if owner else HEARTBEAT)


def _remove(record: Path, owner: Owner | None) -> None:
    """Removes a record if it is still that of `owner`; of several processes that want to, one does."""
    with contextlib.suppress(OSError), open(record, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        found = _read(record)
        if found and found[0] == owner and os.fstat(file.fileno()).st_ino == record.stat().st_ino:
            record.unlink()
