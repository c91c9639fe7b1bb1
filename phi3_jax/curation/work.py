"""A curation under way: its folder, which documents are left, and the stages that are done.

Stages lie in `stages/`: `read/` with all rows, a folder with texts and numbers for each run of document rules, one with
keys for each corpus rule, and `dropped-NN.parquet`, which says what each stage dropped. All are whole or absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.curation import against, documents, store
from phi3_jax.curation.engine import Engine
from phi3_jax.curation.rule import Step

ROWS = 1 << 32


class Work:
    """Attributes: folder, engine; steps, the whole plan; left, a mask for each part; texts_in, where the texts are."""

    def __init__(self, folder: Path, engine: Engine, steps: Sequence[Step], parts: int) -> None:
        self.folder, self.engine, self.steps = folder / "stages", engine, list(steps)
        self.further: list[Path] = []  # parts of other corpora, whose numbers follow ours
        self.first_of: dict[str, int] = {}  # {step: number of the first of its corpus}
        for step in steps:
            if step.rule == "against":
                self.first_of[step.name] = parts + len(self.further)
                self.further += against.parts_of(step.parameters["corpus"])
        self._parts = parts
        self.left = [np.ones(store.count(self.read_part(number)), bool) for number in range(parts)]
        self.texts_in = self.folder / "read"
        self.measured: list[tuple[list[Step], Path]] = []

    def read_part(self, number: int) -> Path:
        if number >= self._parts:
            return self.further[number - self._parts]
        return store.part(self.folder / "read", number)

    def rows(self, number: int) -> np.ndarray:
        """Rows of a part that are left."""
        return np.flatnonzero(self.left[number])

    def texts(self, docs: Sequence[int]) -> Iterator[tuple[int, str]]:
        """(number, text) of some documents, sorted."""
        wanted = np.asarray(docs, np.int64)
        for number in np.unique(wanted // ROWS).tolist():
            mine = wanted[wanted // ROWS == number] - number * ROWS
            path = store.part(self.texts_in, number) if number < self._parts else self.read_part(number)
            found = documents.texts_of(path, mine)
            yield from zip((mine + number * ROWS).tolist(), found, strict=True)

    # -------------------------------------------------------------------------------------------- stages

    def measure(self, steps: list[Step]) -> None:
        """Document rules: measures every document that is left, then drops by the limits."""
        out = self.folder / f"{self.steps.index(steps[0]):02}-{steps[0].name}"
        plain = [[step.name, step.rule, dict(step.parameters)] for step in steps]
        tasks = [
            {
                "steps": plain, "read": str(self.read_part(n)), "text": str(store.part(self.texts_in, n)),
                "rows": self.rows(n).tolist(), "out": str(store.part(out, n)),
            }
            for n in range(len(self.left))
            if not store.part(out, n).is_file()
        ]  # fmt: skip
        for _ in self.engine.map("phi3_jax.curation.documents:measure", tasks):
            pass
        self.texts_in = out
        self.measured.append((steps, out))
        dropped: dict[str, list[np.ndarray]] = {"doc": [], "step": [], "check": []}
        for number in range(len(self.left)):
            numbers = self.numbers(out, number, steps)
            gone = np.zeros(len(numbers["row"]), bool)
            for step in steps:
                first = documents.failing(step, numbers)
                now = (first >= 0) & ~gone
                gone |= now
                dropped["doc"].append(numbers["row"][now] + number * ROWS)
                dropped["step"].append(np.full(now.sum(), self.steps.index(step)))
                dropped["check"].append(first[now])
        columns = {name: np.concatenate(values).astype(np.int64) for name, values in dropped.items()}
        order = np.argsort(columns["doc"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        nothing = np.full(len(order), -1, np.int64)
        self._dropped(steps[0], {**columns, "other": nothing, "value": np.zeros(len(order))})

    def numbers(self, folder: Path, number: int, steps: Sequence[Step]) -> dict[str, np.ndarray]:
        """What some rules measured of a part."""
        names = ["row", *documents.columns_of(steps)]
        return {k: v.to_numpy(zero_copy_only=False) for k, v in store.read(store.part(folder, number), names).items()}

    def stage(self, step: Step) -> Path:
        """The folder of a corpus rule's parts."""
        return self.folder / f"{self.steps.index(step):02}-{step.name}"

    def noted(self, step: Step) -> Path:
        """What a corpus rule notes for the manifest."""
        return self.folder / f"noted-{self.steps.index(step):02}.json"

    def sign(self, step: Step, function: str, prints: bool = False) -> list[Path]:
        """Writes keys of every document that is left; the files, one a part."""
        out = self.stage(step)
        paths = [store.part(out, n) for n in range(len(self.left))]
        tasks = [
            {
                "number": n, "text": str(store.part(self.texts_in, n)), "rows": self.rows(n).tolist(), "out": str(path),
                "prints": str(path.with_name(f"prints-{path.name}")),
                "parameters": dict(step.parameters), "read": str(self.read_part(n)),
            }
            for n, path in enumerate(paths)
            if not path.is_file()
        ]  # fmt: skip
        if not self.dropped_file(step).is_file():
            for _ in self.engine.map(function, tasks):
                pass
        return paths

    def drop(self, step: Step, dropped: list[tuple[int, int, int, float]]) -> None:
        """Notes (document, reason, the one that stays, similarity) of what a corpus rule drops."""
        rows = sorted(dropped)
        index = self.steps.index(step)
        fields = ("doc", "check", "other")
        columns = {name: np.asarray([row[i] for row in rows], np.int64) for i, name in enumerate(fields)}
        columns["step"] = np.full(len(rows), index, np.int64)
        self._dropped(step, {**columns, "value": np.asarray([row[3] for row in rows], np.float64)})

    def dropped_file(self, step: Step) -> Path:
        return self.folder / f"dropped-{self.steps.index(step):02}.parquet"

    def _dropped(self, step: Step, columns: dict[str, Any]) -> None:
        store.write(
            self.dropped_file(step), {name: columns[name] for name in ("doc", "step", "check", "other", "value")}
        )
        self.take_away(columns["doc"])

    def take_away(self, docs: np.ndarray) -> None:
        for number, mask in enumerate(self.left):
            mask[docs[docs // ROWS == number] - number * ROWS] = False

    def again(self, step: Step) -> bool:
        """Whether a corpus rule was done before; then what it dropped is taken away."""
        path = self.dropped_file(step)
        if not path.is_file():
            return False
        changed = self.stage(step).with_name(f"{self.stage(step).name}-cut")
        if changed.is_dir():
            self.texts_in = changed
        self.take_away(store.read(path, ["doc"])["doc"].to_numpy())
        return True


def segments(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Document rules that follow one another together, each corpus rule alone."""
    run: list[Step] = []
    for step in steps:
        if not step.corpus:
            run.append(step)
            continue
        if run:
            yield run
        run = []
        yield [step]
    if run:
        yield run
