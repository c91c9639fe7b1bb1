"""Batches made in a thread of their own, so that a source which hangs can be given up and a signal is still heard."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from phi3_jax.errors import UserError

LISTEN_SECONDS = 0.1  # how soon a stop is noticed while a batch is awaited


class Fetcher:
    """Calls `batch_fn(step)` in a daemon thread, one call at a time, which a process can end without.

    `limit`: seconds that a batch may take. `stop`: an event that ends the waiting.
    """

    def __init__(self, batch_fn: Callable[[int], Any], limit: float, stop: threading.Event) -> None:
        self._batch_fn, self._limit, self._stop = batch_fn, limit, stop
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="batches").start()

    def get(self, step: int) -> Any:
        """The batch of `step`, or None where `stop` was set first.

        Raises:
          UserError: no batch within the limit. And whatever `batch_fn` raises.
        """
        self._asked.put(step)
        deadline = time.monotonic() + self._limit
        while not self._stop.is_set():
            try:
                batch, error = self._made.get(timeout=min(LISTEN_SECONDS, self._limit))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"the batch of step {step} did not come within {self._limit:g} s (train.batch_timeout); look at "
                        "the disk or the network that holds the data, or raise the limit, and run again to continue"
                    ) from None
                continue
            if error is not None:
                raise error
            return batch
        return None

    def close(self) -> None:
        """Lets the thread end once its call, if any, returns."""
        self._asked.put(None)

    def _work(self) -> None:
        while (step := self._asked.get()) is not None:
            try:
                self._made.put((self._batch_fn(step), None))
            except Exception as error:
                self._made.put((None, error))
