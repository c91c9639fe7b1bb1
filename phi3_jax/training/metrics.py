"""The numbers of a run: metrics.jsonl, evals.jsonl, TensorBoard, and the bars in the terminal.

`step` counts finished steps everywhere: the row of step 1 describes the first update. Files are append-only; on
resume, rows beyond the restored step are cut off, so a resumed run's files equal those of an unbroken run but for
the fields in `TIMING_FIELDS`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from phi3_jax.errors import UserError

TIMING_FIELDS = ("tokens_per_s", "mfu", "compile_s", "first_step_s")
Row = dict[str, Any]


class OneStepLate:
    """Holds a step's device metrics until the next step has been dispatched: the host never idles the device."""

    def __init__(self) -> None:
        self._waiting: tuple[int, Mapping[str, Any]] | None = None

    def push(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, Row] | None:
        """Takes the device scalars of `step` and returns (step, numbers) of the one before."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        ready = self.flush()
        self._waiting = (step, dict(metrics))
        return ready

    def flush(self) -> tuple[int, Row] | None:
        """Waits for what is pending and returns it as Python numbers."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        step, metrics = waiting
        return step, {name: plain(value) for name, value in jax.device_get(metrics).items()}


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
        kept, self.dropped = [], 0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            step = _step_of(line)
            self.dropped += step is None
            if step is not None and step <= after:
                kept.append(line + b"\n")
        try:
            _replace(self.path, b"".join(kept))
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose another --workdir") from error

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(valid_json(row), allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(28, "no space left on device")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space and run again to continue"
            ) from error

    def sync(self) -> None:
        """Waits until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_rows(path: str | Path) -> list[Row]:
    """All whole rows of a metrics or evals file; a torn last line is left out, a missing file is empty."""
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


class RunLog:
    """Writes metrics.jsonl and evals.jsonl of a run folder, and TensorBoard events where asked (process 0 only).

    Rows with `step` > `after` are cut off; evaluations > `evals_after`, where the two differ.
    """

    def __init__(
        self, folder: str | Path, after: int, tensorboard: bool = False, *, evals_after: int | None = None
    ) -> None:
        folder = Path(folder)
        self._files: list[JsonLines] = []
        self._board = None
        if jax.process_index() != 0:
            return
        cuts = {"metrics.jsonl": after, "evals.jsonl": after if evals_after is None else evals_after}
        self._files = [JsonLines(folder / name, cut) for name, cut in cuts.items()]
        if tensorboard:
            self._board = _board_writer(folder / "tensorboard", after)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One training row: scalars by name."""
        if self._files:
            self._files[0].write(row)
        self._chart(row["step"], {f"train/{name}": value for name, value in row.items()})

    def evals(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Evaluation rows with `suite`, `task`, `metric` and `value`."""
        for row in rows:
            if self._files:
                self._files[1].write(row)
            tag = "/".join(str(row[key]) for key in ("suite", "task", "metric") if row.get(key))
            self._chart(row["step"], {tag or "eval": row.get("value")})

    def sync(self) -> None:
        """Puts all rows on the disk; call before a checkpoint, which must never be ahead of the rows."""
        for file in self._files:
            file.sync()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()

    def _chart(self, step: int, values: Mapping[str, Any]) -> None:
        for tag, value in values.items() if self._board is not None else ():
            value = plain(value)
            if isinstance(value, int | float) and not tag.endswith("/step"):
                self._board.add_scalar(tag, value, step)


def progress_line(name: str, row: Mapping[str, Any], width: int = 100) -> str:
    """One run as text: `name [#####.....]  50% loss 2.345  12.3k tokens/s  0:42 left`.

    `row` is what `fit` hands to `progress`: step, steps, loss, tokens_per_s, eta_s (each but the steps may be None).
    """
    done = row["step"] / max(1, row["steps"])
    loss = "   ...  " if row.get("loss") is None else f"{row['loss']:8.4f}"
    speed = "..." if not row.get("tokens_per_s") else _short(row["tokens_per_s"])
    left = "..." if row.get("eta_s") is None else f"{_clock(row['eta_s'])} left"
    text = f"{done:4.0%} loss {loss} {speed:>6} tokens/s {left:>12}"
    room = max(5, min(30, width - len(name) - len(text) - 5))
    return f"{name} [{('#' * int(done * room)).ljust(room, '.')}] {text}"[:width]


class ProgressBars:
    """Progress of several runs, a line each, redrawn in place; off a terminal, a plain line every `plain_every` s."""

    def __init__(self, stream: TextIO | None = None, plain_every: float = 10.0) -> None:
        self.stream = stream or sys.stdout
        self.plain_every = plain_every
        self._drawn = 0
        self._last: dict[str, tuple[float, int]] = {}

    def show(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """`rows`: {run name: progress row}, always in the same order."""
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            names = self._padded(rows)
            lines = [progress_line(name, row, width) for name, row in zip(names, rows.values(), strict=True)]
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            self.stream.write(up + "".join(f"\r\x1b[2K{line}\n" for line in lines))
            self._drawn = len(lines)
        else:
            for name, row in rows.items():
                self._plain(name, row)
        self.stream.flush()

    def _plain(self, name: str, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        then, step = self._last.get(name, (-math.inf, -1))
        finished = row["step"] >= row["steps"] and step < row["step"]
        if finished or (now - then >= self.plain_every and row["step"] != step):
            self._last[name] = (now, row["step"])
            self.stream.write(progress_line(name, row) + "\n")

    @staticmethod
    def _padded(names: Iterable[str]) -> list[str]:
        names = list(names)
        return [name.ljust(max(map(len, names))) for name in names]


def _step_of(line: bytes) -> int | None:
    try:
        row = json.loads(line)
        return int(row["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _replace(path: Path, content: bytes) -> None:
    """Leaves an unchanged file alone; otherwise writes a new one beside it and renames."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def _board_writer(folder: Path, after: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=True needs tensorboardX; pip install tensorboardX") from error
    return SummaryWriter(str(folder), purge_step=after + 1)


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
