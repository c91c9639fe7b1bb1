"""Compiled programs kept on the disk from one process to the next, through jax's persistent compilation cache.

jax writes its entries in place and reads them unchecked. So each process gives jax a folder of its own inside the shared
one: whole entries, which carry their CRC-32 in their names there, are linked in, and what jax adds is linked out under
its final name. No process ever sees half an entry or a damaged one, however many there are and wherever they are killed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax

MIN_COMPILE_SECONDS = 0.1  # what compiles faster is hardly slower to compile than to read
MAX_BYTES = 2 << 30  # of all entries, which every start reads; the oldest go first


class CompileCache:
    """The entries in `folder`, and `private`, the folder inside it that jax is to use in this process.

    Raises OSError where the folder cannot be written or has no hard links.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        _clear_up_after_the_dead(folder)
        self.private = Path(tempfile.mkdtemp(prefix=f"{_owner(os.getpid())}-", dir=folder))
        atexit.register(shutil.rmtree, self.private, ignore_errors=True)
        self._known: set[str] = set()
        for entry in _newest(folder):
            self._adopt(entry)

    def publish(self) -> None:
        """Gives all processes what this one has compiled; a disk that cannot take it is no error."""
        with contextlib.suppress(OSError):
            for path in self.private.iterdir():
                if path.name not in self._known:
                    self._known.add(path.name)
                    os.link(path, self.folder / f"{path.name}.{_crc(path)}")

    def _adopt(self, entry: Path) -> None:
        name, _, crc = entry.name.rpartition(".")
        with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
            if name not in self._known and crc == _crc(entry):  # two processes may have compiled the same at once
                os.link(entry, self.private / name)
                self._known.add(name)
            else:
                entry.unlink()


@functools.cache
def enable() -> CompileCache | None:
    """Turns the cache on for this process, once; None where the disk does not let it, or the user has chosen a folder.

    `JAX_COMPILATION_CACHE_DIR` and jax's other settings of it are left to jax.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    try:
        cache = CompileCache(default_folder())
    except (OSError, RuntimeError, KeyError):  # RuntimeError: no home directory
        return None
    jax.config.update("jax_compilation_cache_dir", str(cache.private))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # those are folders, which are not shared
    return cache


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is compiled inside is kept for later processes: the next start of the same command is seconds faster."""
    cache = enable()
    try:
        yield
    finally:
        if cache is not None:
            cache.publish()


def default_folder() -> Path:
    """One folder a kind of CPU in the user's cache, for XLA's programs use the instructions of the CPU at hand."""
    kind = f"{platform.machine()} {platform.processor()} {_cpu_flags()}"
    return user_folder() / f"compiled-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def user_folder() -> Path:
    """This package's folder in the user's cache, which may not be there; RuntimeError without a home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax"


def _newest(folder: Path) -> list[Path]:
    """The entries that fit MAX_BYTES; the others, which are older, are deleted."""
    entries, room = [], MAX_BYTES
    for path in sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_mtime, reverse=True):
        room -= path.stat().st_size
        if room >= 0:
            entries.append(path)
        else:
            path.unlink(missing_ok=True)
    return entries


def _clear_up_after_the_dead(folder: Path) -> None:
    """Removes the private folders of this machine's processes that were killed."""
    for path in folder.iterdir():
        owner, _, _ = path.name.rpartition("-")
        _, _, number = owner.rpartition("-")
        if path.is_dir() and number.isdigit() and owner == _owner(int(number)) and not _alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _owner(process: int) -> str:
    return f"private-{socket.gethostname()}-{process}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _crc(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""
