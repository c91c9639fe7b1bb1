"""What a command writes: whole or absent, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from phi3_jax.errors import UserError
from phi3_jax.records import ownership
from phi3_jax.records.files import FULL, remove, sweep, temporary


@contextlib.contextmanager
def whole(target: Path, size: int, *, flag: str = "--to", file: bool = False) -> Iterator[Path]:
    """A folder (or a file) that appears under its name only when the block ends well, and that no other process writes.

    Args:
      target: must not exist, or be an empty folder.
      size: bytes that will be written, which must be free.
      flag: what the user named it with, for errors.
      file: whether the block makes a file at the path it gets; a folder is made for it.

    Raises:
      UserError: something is there, another process is writing it, the disk is full or cannot be written.
    """
    target = target.resolve()
    partial, other = temporary(target), f"choose another {flag}"
    _refuse_there(target, file, other)
    with ownership.own(target, other):
        _refuse_there(target, file, other)
        try:
            sweep(target)
            if not file:
                partial.mkdir()
            free = shutil.disk_usage(target.parent).free
        except OSError as error:
            raise UserError(f"cannot write to {target.parent}: {error.strerror}; {other}") from error
        try:
            if free < size:
                raise UserError(
                    f"{target} needs {size / 1e9:.2f} GB and {target.parent} has {free / 1e9:.2f} GB free; free some "
                    f"space or {other}"
                )
            yield partial
            _refuse_there(target, file, other)
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
        except OSError as error:
            reason = FULL if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise UserError(f"writing {target} failed: {reason}; nothing was left there") from error
        finally:
            with contextlib.suppress(OSError):
                remove(partial)


def _refuse_there(target: Path, file: bool, other: str) -> None:
    try:
        there = target.exists() and (file or not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read {target}: {error.strerror}; {other}") from error
    if there:
        raise UserError(f"{target} exists{' and is not empty' if target.is_dir() else ''}; {other}, or remove it")
