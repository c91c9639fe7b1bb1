"""Bars in the terminal, drawn by rich; off a terminal, a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TextIO

from rich import progress
from rich.console import Console

from phi3_jax.units import human_count


class Bar(NamedTuple):
    """How far something is: `done` of `total`, and what else there is to say."""

    done: int
    total: int
    text: str


def of_run(row: Mapping[str, Any]) -> Bar:
    """A training run: `50% loss 2.345  12.3k tokens/s  0:42 left`.

    `row` is what `fit` hands to `progress`: step, steps, loss, tokens_per_s, eta_s (each but the steps may be None).
    """
    loss = "   ...  " if row.get("loss") is None else f"{row['loss']:8.4f}"
    speed = "..." if not row.get("tokens_per_s") else human_count(row["tokens_per_s"])
    left = "..." if row.get("eta_s") is None else f"{_clock(row['eta_s'])} left"
    done = row["step"] / max(1, row["steps"])
    return Bar(row["step"], row["steps"], f"{done:4.0%} loss {loss} {speed:>6} tokens/s {left:>12}")


class Bars:
    """Bars by name, redrawn in place while the context lasts; off a terminal, a line for each every `plain_every` s."""

    def __init__(self, stream: TextIO | None = None, plain_every: float = 10.0) -> None:
        self.stream = stream or sys.stdout
        self.plain_every = plain_every
        self._last: dict[str, tuple[float, int]] = {}
        self._tasks: dict[str, progress.TaskID] = {}
        self._drawn: progress.Progress | None = None
        if self.stream.isatty():
            # Drawn when there is news: a thread of its own would draw into what a signal's handler says.
            self._drawn = progress.Progress(
                progress.TextColumn("{task.description}", markup=False), progress.BarColumn(30),
                progress.TextColumn("{task.fields[text]}", markup=False),
                console=Console(file=self.stream, force_terminal=True), auto_refresh=False,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if self._drawn is not None:
            self._drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    def show(self, bars: Mapping[str, Bar]) -> None:
        """Draws them, in the order in which their names come first."""
        for name, bar in bars.items():
            if self._drawn is None:
                self._plain(name, bar)
            elif name in self._tasks:
                self._drawn.update(self._tasks[name], completed=bar.done, total=bar.total, text=bar.text)
            else:
                self._tasks[name] = self._drawn.add_task(name, total=bar.total, completed=bar.done, text=bar.text)
        if self._drawn is not None:
            self._drawn.refresh()
        self.stream.flush()

    def _plain(self, name: str, bar: Bar) -> None:
        now = time.monotonic()
        then, done = self._last.get(name, (-math.inf, -1))
        finished = bar.done >= bar.total and done < bar.done
        if finished or (now - then >= self.plain_every and bar.done != done):
            self._last[name] = (now, bar.done)
            self.stream.write(f"{name} {bar.text}\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
