"""The one reader of comma-separated tables, and the one writer: every cell as text, and the line that each row came from.

Spreadsheets, loggers and people write them, so what harms nothing is read over (a byte order mark, blanks, CRLF, empty
lines, commas at the end, a column without a name) and what could be read in two ways is refused in one line.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError, nearest
from phi3_jax.records import files

_OTHERS = ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"))


class Row(dict[str, str]):
    """The cells of one row by column, blanks around them taken off; `line` is where it begins in `path`."""

    path: Path
    line: int

    def number(self, column: str, *, positive: bool = True) -> float:
        """The finite number of a cell.

        Raises:
          UserError: anything else, and 0 or less where the number must be positive; names file, line and column.
        """
        text = self[column]
        try:
            value = math.nan if "_" in text else float(text)  # Python alone would read 1_000
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (positive and value <= 0):
            kind = "positive number" if positive else "finite number"
            raise UserError(f"{self.path} line {self.line}: {column} is {text!r}, not a {kind}; leave the run out")
        return value


def read(path: Path) -> list[Row]:
    """The rows of a table in UTF-8 with a header line.

    Raises:
      UserError: no such file, not text, no header or no row, cells parted by something else than commas, a column given
        twice, a row that is shorter or longer than the header, or a quote that is never closed.
    """
    path, rows, names, last = Path(path), [], None, 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            _commas(path, next((line for line in file if line.strip()), ""))
            file.seek(0)
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            for cells in reader:
                line, last = last + 1, reader.line_num
                cells = [cell.strip() for cell in cells]
                if not any(cells):
                    continue
                if names is None:
                    names = _header(path, cells)
                else:
                    rows.append(_row(path, names, cells, line))
    except (OSError, UnicodeError, csv.Error) as error:
        reason = "it is no UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", None) or error
        where = f", line {last + 1}" if isinstance(error, csv.Error) else ""
        raise UserError(f"cannot read {path} as a table{where}: {reason}; save it as CSV in UTF-8") from error
    if names is None:
        raise UserError(f"{path} is empty; it needs a header and a line a run")
    if not rows:
        raise UserError(f"{path} has no rows; it needs a header and a line a run")
    return rows


def write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table atomically: a header and a line per row; empty where a row has no value, other keys are left out.

    Raises:
      OSError: the file is as it was.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(Path(path), text.getvalue())


def need(rows: list[Row], column: str) -> None:
    """Refuses a column that the table lacks, naming the nearest."""
    if column not in rows[0]:
        raise UserError(f"{rows[0].path} has no column {column!r}{nearest(column, list(rows[0]))}")


def _commas(path: Path, header: str) -> None:
    """Refuses a header line that is parted by another sign than commas, whatever stands in quotes."""
    bare = re.sub(r'"[^"]*"', "", header)
    for sign, word in _OTHERS:
        if bare.count(sign) > bare.count(","):
            raise UserError(f"{path} parts its columns by {word}; save it with commas, and numbers with decimal points")


def _header(path: Path, cells: list[str]) -> list[str]:
    """Names of the columns; "" for one without a name, such as the index that pandas writes."""
    if twice := sorted({name for name in cells if name and cells.count(name) > 1}):
        raise UserError(f"{path} has the column {twice[0]!r} twice; rename or remove one")
    return cells


def _row(path: Path, names: list[str], cells: list[str], line: int) -> Row:
    if len(cells) < len(names) or any(cells[len(names) :]):
        raise UserError(
            f"{path} line {line} has {len(cells)} cells and the header {len(names)}; a cell that holds a comma needs quotes"
        )
    row = Row((name, cell) for name, cell in zip(names, cells, strict=False) if name)
    row.path, row.line = path, line
    return row
