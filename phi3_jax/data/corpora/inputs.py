"""What a data set was made from, and whether it is still that.

The manifest keeps a record of every file that was read: [name within its folder, bytes, time of change, sha256]. Names,
sizes and times are compared first; a file is hashed where its time alone differs, and all are where the folder has another
name. So data that were copied without their times, or moved, are the same data. A change that keeps both size and time is
not seen. Records before this one held no sha256: where such a record differs, only a new export can say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phi3_jax.data.corpora import files


@dataclass
class Inputs:
    """What is read: files by path, and things that are known by name and version."""

    accounts: list[files.Account] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    def __add__(self, other: Inputs) -> Inputs:
        """What both read."""
        return Inputs(self.accounts + other.accounts, self.versions + other.versions)

    @property
    def _files(self) -> list[files.File]:
        return [file for account in self.accounts for file in account.files]

    def record(self) -> list[Any]:
        """The manifest's `inputs`; reads every file once more, to hash it."""
        return [*self.versions, *([f.name, f.size, f.time, f.sha256()] for f in self._files)]

    def left_out(self) -> dict[str, Any]:
        """The manifest's `left_out`: {reason: {count, files}}."""
        found = files.Account([])
        for account in self.accounts:
            for reason, names in account.left_out.items():
                found.left_out.setdefault(reason, []).extend(names)
        return found.record()

    def lines(self) -> list[str]:
        """One line per path on what is read and what is left out."""
        return [f"data: {account.line()}" for account in self.accounts]

    def compare(self, old: list[Any], renamed: bool) -> tuple[list[str], list[Any]] | None:
        """(what differs from a manifest's `inputs`, the record with today's times), or None where `old` is too old to say.

        Args:
          renamed: names, sizes and times do not suffice: hash every file.
        """
        before, here = [entry for entry in old if isinstance(entry, list)], self._files
        if any(len(entry) < 4 for entry in before):
            same = sorted(before) == sorted([f.path.name, f.size, f.time] for f in here)
            return ([], old) if same and not renamed else None
        if (versions := [entry for entry in old if not isinstance(entry, list)]) != self.versions:
            return [f"{' '.join(versions)} -> {' '.join(self.versions)}"], old
        if (was := [entry[0] for entry in before]) != (now := [file.name for file in here]):
            return sorted({*was} ^ {*now}) or ["the order of files"], old
        changed: list[str] = []
        record: list[Any] = [*self.versions]
        for file, (_, size, time, sha256) in zip(here, before, strict=True):
            same = file.size == size and ((file.time == time and not renamed) or file.sha256() == sha256)
            changed += [] if same else [file.name]
            record.append([file.name, file.size, file.time, sha256])
        return changed, record
