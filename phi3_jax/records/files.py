"""Files that are whole or absent, and JSON read and written in one way.

A file is written under a temporary name of this process's own and renamed. A temporary name says who made it
(`.NAME.HOST.PID.N.partial`), so that what a dead process left can be told from another process's work and from a user's
files.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError

FULL = "no space left on device"
_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.\d+\.partial")


def host() -> str:
    """This machine's name, as temporary names and owners carry it."""
    return os.uname().nodename.split(".")[0] or "localhost"


def temporary(target: Path) -> Path:
    """A name beside `target` that no other process and no other call gives."""
    return target.with_name(f".{target.name}.{host()}.{os.getpid()}.{next(_COUNT)}.partial")


def alive(pid: int) -> bool:
    """Whether a process of this host lives (also one of another user's)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def left_behind(target: Path) -> Iterator[Path]:
    """Temporary files and folders of `target` whose process, of this host, is dead."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and found["name"] == target.name and found["host"] == host() and not alive(int(found["pid"])):
            yield path


def remove(path: Path) -> None:
    """Removes a file or a folder, there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Removes what dead processes of this host left of `target`, as far as that is allowed."""
    for path in left_behind(target):
        with contextlib.suppress(OSError):
            remove(path)


def require_writable(folder: Path) -> None:
    """Makes a folder, and a file in it that is removed again.

    Raises:
      UserError: it cannot be written.
    """
    probe = temporary(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --workdir") from error


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file atomically; leaves one that holds the same bytes alone. `durable`: it survives a power cut.

    What dead processes of this host left of the same file is removed.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    partial = temporary(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sweep(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically; leaves one that holds the same text alone."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, tree: Any, *, indent: int | None = 1, durable: bool = False) -> None:
    """Writes a JSON file atomically; leaves an equal one alone."""
    write_bytes(path, (json.dumps(tree, indent=indent, default=_plain) + "\n").encode("utf-8"), durable=durable)


def _plain(value: Any) -> Any:
    """numpy's numbers as JSON's; tuples of another kind as lists."""
    return float(value) if hasattr(value, "__float__") else list(value)


def as_json(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists, keys are text."""
    return json.loads(json.dumps(value, default=list))


def parse_json(content: bytes | str, where: object) -> Any:
    """The value of a JSON text.

    Args:
      content: UTF-8, with or without byte order mark.
      where: what to call it in errors.

    Raises:
      UserError: empty, cut short, not UTF-8, nested too deeply, or not JSON.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
        if not text.strip("\0 \t\r\n"):
            raise UserError(f"{where} is empty; write it again or remove it")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where} cannot be read as JSON: {reason}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where the file is missing, empty or damaged: for what is written anew anyway."""
    try:
        return read_json(path)
    except UserError:
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file is missing, unreadable, empty, damaged, or holds something else than an object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    found = parse_json(content, path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
