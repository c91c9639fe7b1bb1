"""What each step did to documents and tokens of each source: the numbers of the manifest and of the report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from phi3_jax.curation import store
from phi3_jax.curation.table import reasons_of
from phi3_jax.curation.work import ROWS, Work
from phi3_jax.data.tokenizers import ByteTokenizer, Tokenizer


class Ledger:
    """Counts documents, bytes and tokens, in and dropped, by step and by source; by parts, so that memory stays bounded."""

    def __init__(self, work: Work, tokenizer: Tokenizer) -> None:
        self._work, self._tokenizer = work, tokenizer
        files = [work.folder / f"dropped-{number:02}.parquet" for number in range(len(work.steps))]
        tables = [store.read(path) for path in files if path.is_file()]
        self._all = {
            name: np.concatenate([t[name].to_numpy(zero_copy_only=False) for t in tables]) if tables else np.zeros(0)
            for name in ("doc", "step", "check", "other", "value")
        }
        order = np.argsort(self._all["doc"], kind="stable")
        self._all = {name: values[order] for name, values in self._all.items()}
        self._ids: dict[int, str] = {}
        self.read: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self._bytes: dict[str, Counter[str]] = {"read": Counter(), "kept": Counter()}
        self._tokens: dict[str, Counter[str]] = {"read": Counter(), "kept": Counter()}
        self._lost: dict[str, Counter[str]] = defaultdict(Counter)
        self._lost_tokens: dict[str, Counter[str]] = defaultdict(Counter)
        self._reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.licences: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, number: int, columns: Mapping[str, Any]) -> None:
        """Counts a part as it was read, and what was dropped of it."""
        sources, licences = columns["source"].to_pylist(), columns["licence"].to_pylist()
        texts = columns["text"].to_pylist()
        tokens = self._count(texts)
        for source, licence, text, count in zip(sources, licences, texts, tokens, strict=True):
            self.read[source] += 1
            self._bytes["read"][source] += len(text.encode())
            self._tokens["read"][source] += count
            self.licences[source][licence or "not stated"] += 1
        for row, step, reason, _, _ in self.dropped(number):
            self._lost[step][sources[row]] += 1
            self._lost_tokens[step][sources[row]] += tokens[row]
            self._reasons[step][reason] += 1

    def keep(self, source: str, text: str) -> int:
        """Counts a document that stays, as it is written; its tokens."""
        self.kept[source] += 1
        self._bytes["kept"][source] += len(text.encode())
        count = self._count([text])[0]
        self._tokens["kept"][source] += count
        return count

    def dropped(self, number: int) -> Iterator[tuple[int, str, str, str, float]]:
        """(row, step, reason, id of the document that stays, similarity) of what was dropped of a part."""
        low, high = np.searchsorted(self._all["doc"], (number * ROWS, (number + 1) * ROWS))
        for at in range(int(low), int(high)):
            step = self._work.steps[int(self._all["step"][at])]
            reason = reasons_of(step.rule)[int(self._all["check"][at])]
            other = int(self._all["other"][at])
            row = int(self._all["doc"][at]) - number * ROWS
            yield row, step.name, reason, self._id(other) if other >= 0 else "", float(self._all["value"][at])

    def _id(self, doc: int) -> str:
        if doc not in self._ids:
            part = store.read(self._work.read_part(doc // ROWS), ["id"])["id"]
            wanted = np.unique(self._all["other"])
            for other in wanted[(wanted // ROWS) == doc // ROWS].tolist():
                self._ids[other] = part[other % ROWS].as_py()
        return self._ids[doc]

    def _count(self, texts: list[str]) -> list[int]:
        if isinstance(self._tokenizer, ByteTokenizer):
            return [len(text.encode()) for text in texts]
        return [len(ids) for ids in self._tokenizer.encode_batch(texts)]

    def entries(self) -> dict[str, Any]:
        """The manifest's part."""
        steps = [
            {
                "step": step.name, "rule": step.rule, "documents": sum(self._lost[step.name].values()),
                "tokens": sum(self._lost_tokens[step.name].values()),
                "reasons": dict(sorted(self._reasons[step.name].items())),
                "by_source": dict(sorted(self._lost[step.name].items())),
                "tokens_by_source": dict(sorted(self._lost_tokens[step.name].items())),
            }
            for step in self._work.steps
        ]  # fmt: skip
        sources = {
            source: {
                "read": self.read[source], "kept": self.kept[source],
                **{f"{what}_{when}": counts[source] for what, of in (("bytes", self._bytes), ("tokens", self._tokens))
                   for when, counts in of.items()},
                "licences": dict(sorted(self.licences[source].items())),
            }
            for source in sorted(self.read)
        }  # fmt: skip
        total = {
            "read": sum(self.read.values()), "kept": sum(self.kept.values()),
            **{f"{what}_{when}": sum(counts.values()) for what, of in (("bytes", self._bytes), ("tokens", self._tokens))
               for when, counts in of.items()},
        }  # fmt: skip
        return {"counts": total, "sources": sources, "steps": steps}
