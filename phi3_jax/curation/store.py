"""Parts on disk: parquet files that are whole or absent, the same bytes for the same rows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.records import files


def write(path: Path, columns: dict[str, Any]) -> None:
    """Writes a table under a temporary name and renames it.

    Args:
      columns: {name: values}; lists, NumPy arrays or pyarrow arrays of one length.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: _array(values) for name, values in columns.items()})
    partial = files.temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, partial, compression="zstd", row_group_size=1 << 14, write_statistics=False)
        os.replace(partial, path)
        files.sweep(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _array(values: Any) -> Any:
    import pyarrow

    if isinstance(values, list) and (not values or isinstance(values[0], str)):
        return pyarrow.array(values, pyarrow.large_string() if sum(map(len, values)) > 1 << 30 else pyarrow.string())
    return values


def cannot_write(path: Path, error: OSError) -> UserError:
    """A full disk, or no right to write, in a line."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    reason = error.strerror or str(error)
    return UserError(f"cannot write {path}: {reason}; {free:,} bytes are free there, make room and type the same again")


def read(path: Path, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """The columns of a part as pyarrow arrays.

    Raises:
      UserError: the part is missing or damaged; the line names it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=None if columns is None else list(columns), use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"part {path} is damaged ({reason}); remove it and type the same command again") from error
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def part(folder: Path, number: int) -> Path:
    """The name of a part."""
    return folder / f"part-{number:05}.parquet"


def count(path: Path) -> int:
    """Rows of a part."""
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def typed(values: Sequence[Any], kind: type | None) -> Any:
    """A column of one kind, with nulls; of mixed kinds (None), each value as JSON."""
    import pyarrow

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    if kind is not None:
        with contextlib.suppress(OverflowError, pyarrow.ArrowInvalid):
            return pyarrow.array(values, types[kind])
    texts = [None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values]
    return pyarrow.array(texts, pyarrow.string())
