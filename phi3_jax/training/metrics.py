"""The numbers of a run: metrics.jsonl, evals.jsonl, TensorBoard, and the bars in the terminal.

`step` counts finished steps everywhere: the row of step 1 describes the first update. Files are append-only; on
resume, rows beyond the restored step are cut off, so a resumed run's files equal those of an unbroken run but for
the fields in `TIMING_FIELDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from phi3_jax.errors import UserError
from phi3_jax.records.rows import JsonLines, Row, plain

TIMING_FIELDS = ("tokens_per_s", "mfu", "compile_s", "first_step_s")


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
        if self._board is None:
            return
        for tag, value in values.items():
            value = plain(value)
            if isinstance(value, int | float) and not tag.endswith("/step"):
                self._board.add_scalar(tag, value, step)


def _board_writer(folder: Path, after: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard=True needs tensorboardX; pip install tensorboardX") from error
    return SummaryWriter(str(folder), purge_step=after + 1)
