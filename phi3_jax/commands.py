"""What the small commands share: flags as words, errors as one line, folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from phi3_jax.errors import UserError, nearest

FULL = "no space left on device"


def run(arguments: Sequence[str], usage: str, body: Callable[[Sequence[str]], None]) -> int:
    """Runs a command; prints an error of the user's as one line. Exit status 0, or 2 for such an error."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    try:
        body(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(
    arguments: Sequence[str], flags: Mapping[str, type], needed: Sequence[str], example: str
) -> dict[str, object]:
    """{flag: value} of "--flag value", "--flag=value" and, for flags of type bool, "--flag".

    Raises:
      UserError: an unknown flag, a flag without value or twice, a value that is no number where one is needed. A value
        that begins with "--" has to be written --flag=VALUE.
    """
    found: dict[str, object] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in flags:
            raise UserError(f"unknown argument {word!r}{nearest(word, [f'--{f}' for f in flags])}")
        if name in found and flags[name] is not list:
            raise UserError(f"--{name} is given twice")
        if flags[name] is bool:
            if equals:
                raise UserError(f"--{name} takes no value")
            found[name] = True
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value = words.pop(0)
        if not value.strip():
            raise UserError(f"--{name} is empty; give a value or leave it out")
        if flags[name] is list:
            found.setdefault(name, []).append(value)
            continue
        try:
            found[name] = flags[name](value)
        except ValueError as error:
            kind = {int: "a whole number", float: "a number"}[flags[name]]
            raise UserError(f"--{name} {value}: give {kind}") from error
    if lost := [f"--{f}" for f in needed if f not in found]:
        raise UserError(f"{' and '.join(lost)} missing; for example {example}")
    return found


@contextlib.contextmanager
def whole(target: Path, size: int, *, flag: str = "--to", file: bool = False) -> Iterator[Path]:
    """A folder (or a file) that appears under its name only when the block ends well; `<name>.partial` until then.

    Args:
      target: must not exist, or be an empty folder.
      size: bytes that will be written, which must be free.
      flag: what the user named it with, for errors.
      file: whether the block makes a file at the path it gets; a folder is made for it.
    """
    target = target.resolve()
    partial, other = target.with_name(target.name + ".partial"), f"choose another {flag}"
    if target.exists() and (file or not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists{' and is not empty' if target.is_dir() else ''}; {other}, or remove it")
    try:
        _remove(partial)
        (partial.parent if file else partial).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror}; {other}") from error
    try:
        if free < size:
            raise UserError(
                f"{target} needs {size / 1e9:.2f} GB and {target.parent} has {free / 1e9:.2f} GB free; free some space or "
                f"{other}"
            )
        yield partial
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except OSError as error:
        reason = FULL if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"writing {target} failed: {reason}; nothing was left there") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
