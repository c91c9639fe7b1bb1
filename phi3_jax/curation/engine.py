"""The engine: Daft, on this machine or on Ray. No other file of this package imports it.

A task is one of our parts: plain values in, plain values out, its work left on disk as a part that is whole or absent. So
the number of workers and the engine change nothing in the bytes that are written, and what is done is not done again.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError

ENGINES = ("native", "ray")
_QUIET = {"DO_NOT_TRACK": "1", "DAFT_ANALYTICS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}


class Engine:
    """Runs tasks on `workers` processes, and groups what they wrote.

    Raises:
      UserError: Daft, or Ray where it is asked for, is not installed.
    """

    def __init__(self, name: str = "native", workers: int = 1) -> None:
        os.environ.update(_QUIET)
        os.environ.setdefault("DAFT_RUNNER", name)
        try:
            import daft

            if name == "ray":
                importlib.import_module("ray").init(
                    ignore_reinit_error=True, include_dashboard=False, log_to_driver=False
                )
                daft.set_runner_ray()
            if daft.get_or_infer_runner_type() != name:
                raise UserError(
                    f"this process runs on {daft.get_or_infer_runner_type()} already; start another for {name}"
                )
        except ImportError as error:
            extra = "daft[ray]" if name == "ray" else "-e '.[curate]'"
            raise UserError(f"the engine {name} is not installed: pip install {extra}") from error
        self._daft, self.name, self.workers = daft, name, workers

    def map(self, function: str, tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """What a function makes of each task, in their order.

        Args:
          function: "module:name", called with a task in a worker process; its values are JSON's.

        Raises:
          UserError: what a task raised.
        """
        if not tasks:
            return
        daft, name, workers = self._daft, function, min(self.workers, len(tasks))
        with tempfile.TemporaryDirectory() as folder:
            stop = str(Path(folder) / "stop")  # once it is there, what has not begun is left out

            # One worker is this process: a process of its own takes a second to start.
            @daft.cls(**{"max_concurrency": workers, "use_process": True} if workers > 1 else {"use_process": False})
            class Work:
                @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)
                def __call__(self, column: Any) -> list[str]:
                    return [perform(name, task, stop) for task in column.to_pylist()]

            frame = daft.from_pydict({"at": list(range(len(tasks))), "task": [json.dumps(task) for task in tasks]})
            done: dict[int, dict[str, Any]] = {}
            errors: dict[int, str] = {}
            for row in frame.with_column("done", Work()(frame["task"])).select("at", "done").iter_rows():
                result = done[row["at"]] = json.loads(row["done"])
                if "error" in result:
                    errors[row["at"]] = result["error"]
                    Path(stop).touch()
        if errors:
            raise UserError(errors[min(errors)])
        yield from (done[at] for at in sorted(done))

    def groups(self, files: Sequence[Path], key: str, where: tuple[int, int] | None = None) -> Iterator[list[int]]:
        """The values of column `doc`, sorted, of rows that share a value of another column with a second row.

        Args:
          key: that column, uint64.
          where: least and greatest value that count, in order to do it in several passes.
        """
        col: Any = self._daft.col

        frame = self._daft.read_parquet([str(file) for file in files]).select("doc", key)
        if where is not None:
            frame = frame.where((col(key) >= where[0]) & (col(key) <= where[1]))
        frame = frame.groupby(key).agg(col("doc").list_agg().alias("docs"), col("doc").count().alias("count"))
        for row in frame.where(col("count") > 1).select("docs").iter_rows():
            if len(docs := sorted(set(row["docs"]))) > 1:
                yield docs


def perform(function: str, task: str, stop: str) -> str:
    """Runs one task in a worker, unless another one has failed."""
    if os.path.exists(stop):
        return "{}"
    module, _, name = function.partition(":")
    try:
        return json.dumps(getattr(importlib.import_module(module), name)(json.loads(task)))
    except UserError as error:
        return json.dumps({"error": str(error)})
    except OSError as error:
        return json.dumps({"error": f"{error.filename or 'a file'}: {error.strerror or error}"})
