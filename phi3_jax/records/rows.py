"""Rows of numbers, a JSON object per line: metrics.jsonl, evals.jsonl and their like, written and read in one way.

Rows are appended by the one owner of a run. A line that a crash has cut, or whose bytes are gone, is no row; of several
rows that say the same thing, the last counts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.records import files, ownership

Row = dict[str, Any]
# What a row is about; `model` where several models are evaluated into one folder. A later row of the same replaces it.
KEY = ("step", "suite", "task", "metric", "model")
# What other readers take for the end of a line, and what UTF-8 cannot say: written as escapes.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def plain(value: Any) -> Any:
    """numpy scalars and 0-d arrays as Python numbers; float32 keeps the digits that identify it, not more."""
    if isinstance(value, np.generic | np.ndarray) and np.ndim(value) == 0:
        value = np.asarray(value)[()]
        if isinstance(value, np.integer | np.bool_):
            return value.item()
        return float(str(value)) if value.dtype == np.float32 else float(value)
    return value


def valid_json(row: Mapping[str, Any]) -> Row:
    """NaN and infinity become null, and the row gets `nonfinite`: the names of the fields that were."""
    row = {name: plain(value) for name, value in row.items()}
    bad = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    return row | {name: None for name in bad} | ({"nonfinite": bad} if bad else {})


class JsonLines:
    """An append-only file of JSON rows with a `step`; each row is in the kernel's hands when `write` returns.

    Opening cuts off rows with `step` > `after` and torn lines, which are no JSON; `dropped` counts the latter.
    """

    def __init__(self, path: str | Path, after: int) -> None:
        self.path = Path(path)
        try:
            lines = _parsed(self.path)
            rows = [(line, row) for line, row in lines if _step(row) is not None]
            self.dropped = len(lines) - len(rows)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            counts = lambda row: (step := _step(row)) is not None and step <= after  # noqa: E731
            kept = b"".join(line + b"\n" for line, row in _last(rows) if counts(row))
            files.write_bytes(self.path, kept, durable=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --workdir") from error

    def write(self, row: Mapping[str, Any]) -> None:
        content = encoded(valid_json(row))
        try:
            written = self._file.write(content)
            if written != len(content):
                raise OSError(28, files.FULL)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space and run again to continue"
            ) from error

    def sync(self) -> None:
        """Waits until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: str | Path) -> tuple[list[Row], int]:
    """(rows of a file in the order of writing, how many lines are none); a missing file is empty."""
    found = [row for _, row in _parsed(path)]
    rows = [row for row in found if row is not None]
    return rows, len(found) - len(rows)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a metrics or evals file that count: those with a step, of several with the same KEY the last.

    Raises:
      UserError: the file is there and cannot be read.
    """
    try:
        return [row for _, row in _last(_parsed(path)) if _step(row) is not None]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def put_rows(path: Path, rows: Iterable[Mapping[str, Any]], key: Sequence[str] = KEY) -> None:
    """Adds rows to a file, in place of those with the same `key`; all of it or nothing. The caller owns the file.

    Other lines stay byte for byte as they are.

    Raises:
      OSError: the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = [valid_json(row) for row in rows]
    new = {_key(row, key) for row in added}
    kept = [old + b"\n" for old, row in _parsed(path) if row is None or _key(row, key) not in new]
    files.write_bytes(path, b"".join([*kept, *map(encoded, added)]), durable=True)


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]], way_out: str, key: Sequence[str] = KEY) -> None:
    """`put_rows` as the owner of the file's folder; waits while another process, a trainer or an evaluation, is that.

    Args:
      way_out: what a user can do about a folder that cannot be written, such as "choose another --out".

    Raises:
      UserError: a disk that is full or not writable; the file then is as it was.
    """
    with ownership.own(path.parent, way_out, inside=True, wait=True):
        try:
            put_rows(path, rows, key)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free some space, or {way_out}") from error


def _parsed(path: str | Path) -> list[tuple[bytes, Row | None]]:
    """The lines of a file, each with its row, None where it is none."""
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in content.split(b"\n") if content else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if line.strip():
            found.append((line, row if isinstance(row, dict) else None))
    return found


def _last(lines: Iterable[tuple[bytes, Row | None]]) -> list[tuple[bytes, Row]]:
    """Of several rows with the same KEY the last."""
    found: dict[tuple[str, ...], tuple[bytes, Row]] = {}
    for line, row in lines:
        if row is not None:
            found.pop(_key(row), None)
            found[_key(row)] = line, row
    return list(found.values())


def encoded(row: Mapping[str, Any]) -> bytes:
    """A row as it stands in a file: text stays readable, and nothing inside it ends a line, whoever reads it."""
    text = json.dumps(row, allow_nan=False, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row at a file's end, on a line of its own also after one that a crash has cut. The caller owns the file."""
    append_all(path, [row])


def append_all(path: Path, added: Iterable[Mapping[str, Any]]) -> None:
    """`append` for several rows, in one write."""
    with open(path, "ab+") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * torn + b"".join(map(encoded, added)))


def _key(row: Row, key: Sequence[str] = KEY) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in key)


def _step(row: Row | None) -> int | None:
    if row is None:
        return None
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
