"""What a model has answered, kept by request: a command that was stopped goes on, and a cache serves the next one.

A file of JSON lines, appended to after each part of the work. A line that a crash has cut is no answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.records import rows

RESUME = ".answers.jsonl"  # beside the results, while they are not whole


class Kept:
    """Answers by request, on disk where there is a path.

    Attributes:
      taken: how many answers came from the file.
    """

    def __init__(self, path: Path | None = None, model: str = "") -> None:
        """
        Args:
          path: the file; it may hold answers of other models.
          model: what tells the answers of these weights from those of others.

        Raises:
          UserError: the file is there and cannot be read.
        """
        self._path, self._model, self.taken = path, model, 0
        try:
            found = rows.read(path)[0] if path is not None else []
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name another --use_cache") from error
        self._answers = {row["request"]: row["answer"] for row in found if "request" in row and "answer" in row}

    def name(self, *request: Any) -> str:
        """The key of a request: everything that its answer depends on, as JSON has it."""
        return hashlib.sha256(json.dumps([self._model, *request]).encode()).hexdigest()[:32]

    def get(self, name: str) -> Any:
        """The answer to a request, None where there is none."""
        found = self._answers.get(name)
        self.taken += found is not None
        return found

    def add(self, new: Mapping[str, Any]) -> None:
        """Keeps answers, all that one part of the work gave.

        Raises:
          UserError: a disk that is full or not writable.
        """
        self._answers |= new
        if self._path is None or not new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows.append_all(self._path, [{"request": name, "answer": answer} for name, answer in new.items()])
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space and run again to go on"
            ) from error

    def finish(self) -> None:
        """Removes the file: the results are whole."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
