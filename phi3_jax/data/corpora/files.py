"""Which files of a folder hold text, which are left out and why, and their bytes whatever they are packed in.

Read are .txt, .jsonl, .json (each also .gz, .zst, .bz2; capitals too) and, where pyarrow is installed, .parquet. Links to
files and folders are followed, every real file once. Everything else is left out and named with its reason: other kinds,
empty files, dead links, hidden names, notes about data such as README.txt. A folder or file that cannot be read is an
error, for text that is there must not go missing in silence.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib.util
import io
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from phi3_jax.errors import UserError
from phi3_jax.records.files import read_json

KINDS = (".txt", ".jsonl", ".json", ".parquet")
PACKED = (".gz", ".zst", ".bz2")
WHAT = ".txt, .jsonl or .json (each also .gz, .zst, .bz2), or .parquet"
EMPTY, TWICE = "empty", "read already under another name"
# Of a curated folder: that it is one; which parts it holds, once it is whole.
CURATION, MANIFEST = "curation.json", "manifest.json"
SHOWN, KEPT = 3, 100  # names of a reason in the line, and in the manifest
_NOTES = re.compile(
    r"(readme|licen[cs]e|copying)([-_. ].*)?|(manifest|changelog|checksums?|sha\d+sums?|md5sums?|requirements)\.txt",
    re.I,
)
_MAGIC = re.compile(rb"(?P<gz>\x1f\x8b)|(?P<zst>\x28\xb5\x2f\xfd)|(?P<bz2>BZh[1-9]1AY&SY)")


@dataclass(frozen=True)
class File:
    """A file that is read: its name within the folder (its own name where it is the data itself), bytes, time of change."""

    path: Path
    name: str
    size: int
    time: int

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return form(self.name)[0]

    @property
    def packing(self) -> str:
        """One of `PACKED`, or ""."""
        return form(self.name)[1]

    def sha256(self) -> str:
        """Of the bytes as stored; UserError where they are not those that were listed, or cannot be read."""
        try:
            with self.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            now = self.path.stat()
        except OSError as error:
            raise UserError(f"cannot read data file {str(self.path)!r}: {error.strerror or error}") from error
        if (now.st_size, now.st_mtime_ns) != (self.size, self.time):
            raise UserError(f"data file {str(self.path)!r} changed while it was read; start again when it is whole")
        return digest


@dataclass
class Account:
    """What a path holds.

    Attributes:
      files: those that are read, sorted by name.
      left_out: reason -> names of those that are not; a reason that is a suffix means another kind of file. A reading
        adds what only it can see.
    """

    files: list[File]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, name: str) -> None:
        """Notes a file that is not read."""
        self.left_out.setdefault(reason, []).append(name)

    def line(self) -> str:
        """`3 files read (2 x .jsonl, 1 x .json.gz; 3,200 bytes); left out: 2 x .pdf (a.pdf, b.pdf), 1 empty (c.jsonl)`."""
        kinds = Counter(file.kind + file.packing for file in self.files)
        read = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        left = f"; left out: {self.left()}" if self.left_out else ""
        size = sum(file.size for file in self.files)
        return f"{len(self.files)} file{'s' * (len(self.files) != 1)} read ({read}; {size:,} bytes){left}"

    def left(self) -> str:
        """The part of the line on what is left out."""
        return ", ".join(
            f"{len(names)} {'x ' * reason.startswith('.')}{reason} "
            f"({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
            for reason, names in sorted(self.left_out.items())
        )

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: {reason: {count, files}}, at most `KEPT` names each."""
        return {why: {"count": len(names), "files": names[:KEPT]} for why, names in sorted(self.left_out.items())}


def form(name: str) -> tuple[str, str]:
    """(kind, packing) by the name of a file; kind "" where it is nothing that is read."""
    stem, packing = os.path.splitext(name.lower())
    if packing not in PACKED:
        stem, packing = name.lower(), ""
    kind = os.path.splitext(stem)[1]
    return (kind, packing) if kind in KINDS and not (packing and kind == ".parquet") else ("", "")


def local(where: str | Path) -> Path:
    """A path as typed, `~` resolved; UserError for an address such as s3://bucket/data."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(where)):
        raise UserError(f"data {str(where)!r} is an address, not a local path; download it and name the folder or file")
    try:
        return Path(where).expanduser()
    except RuntimeError as error:
        raise UserError(f"data {str(where)!r}: {error}; write the path in full") from error


def account(where: str | Path) -> Account:
    """Which files of a file or folder are read and which are left out.

    Raises:
      UserError: nothing there, nothing that is read (names what is there), or a folder that cannot be listed.
    """
    path = local(where)
    if not os.path.lexists(path):
        raise UserError(f"data {str(path)!r} does not exist; give pydocs, or a file or folder of {WHAT}")
    if not path.is_dir():
        reason = _reason(path, alone=True)
        if reason is None:
            return Account([_file(path, path.name)])
        if reason.startswith(("a ", "dead", EMPTY, "needs")):
            raise UserError(f"data file {str(path)!r} is not read: {reason}; give a file or folder of {WHAT}")
        raise UserError(f"data file {str(path)!r} is none of {WHAT}")
    if (path / CURATION).is_file():
        return _curated(path)
    found = Account([])
    candidates = sorted(_walk(path, found), key=lambda entry: (entry[0], entry[1]))
    seen: set[str] = set()
    for _, name, file in candidates:  # those that are no links first
        reason, real = _reason(file), os.path.realpath(file)
        if reason is None and real in seen:
            reason = TWICE
        if reason is not None:
            found.leave(reason, name)
            continue
        seen.add(real)
        found.files.append(_file(file, name))
    found.files.sort(key=lambda file: file.name)
    if not found.files:
        there = f"it holds {found.left()}" if found.left_out else "it is empty"
        raise UserError(f"data folder {str(path)!r} holds no file of {WHAT}: {there}")
    return found


def _curated(path: Path) -> Account:
    """The parts that the manifest of a curated folder names, and nothing else that lies there."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"the curation in {str(path)!r} is not finished; type its command again first")
    found = Account([])
    for entry in read_json(path / MANIFEST).get("parts", []):
        name, size = str(entry["file"]), entry["size"]
        reason = _reason(path / name)
        if reason is not None or (path / name).stat().st_size != size:
            raise UserError(f"part {str(path / name)!r} is {reason or 'damaged'}; remove the manifest and curate again")
        found.files.append(_file(path / name, name))
    return found


def _walk(root: Path, found: Account) -> Iterator[tuple[bool, str, Path]]:
    """(behind a link, name, path) of all files below; what is linked comes last, and no real folder twice."""
    todo, seen = [(False, "", root)], set()
    while todo:
        todo.sort(reverse=True)
        linked, within, folder = todo.pop()
        real = os.path.realpath(folder)
        if real in seen:
            found.leave(TWICE, within.rstrip("/"))
            continue
        seen.add(real)
        entries = _entries(folder)
        if within and any(entry.name == "study.json" for entry in entries):
            found.leave("a study's folder", within.rstrip("/"))
            continue
        if within and any(entry.name == CURATION for entry in entries):
            found.leave("a curated folder", within.rstrip("/"))
            continue
        for entry in entries:
            name, link = within + entry.name, linked or entry.is_symlink()
            if entry.name.startswith("."):
                found.leave("hidden", name)
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                todo.append((link, name + "/", Path(entry.path)))
            else:
                yield link, name, Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"cannot list data folder {str(folder)!r}: {error.strerror or error}; make it readable or move it away"
        ) from error


def _reason(path: Path, alone: bool = False) -> str | None:
    """Why a file is not read, or None; notes about data are left out unless named `alone`."""
    try:
        found = path.stat()
    except OSError:
        return "dead link" if path.is_symlink() else "a file that cannot be seen"
    if not stat.S_ISREG(found.st_mode):
        return "a device, pipe or socket"
    if not alone and _NOTES.fullmatch(path.name):
        return "notes about data"
    if not form(path.name)[0]:
        stem, last = os.path.splitext(path.name)
        return (os.path.splitext(stem)[1] * (last.lower() in PACKED) + last) or "without a suffix"
    if found.st_size == 0:
        return EMPTY
    needs = {".parquet": "pyarrow", ".zst": "zstandard"}.get(os.path.splitext(path.name.lower())[1])
    return f"needs {needs}" if needs and importlib.util.find_spec(needs) is None else None


def _file(path: Path, name: str) -> File:
    found = path.stat()
    return File(path, name, found.st_size, found.st_mtime_ns)


# ----------------------------------------------------------------------------------------------- content


@contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; whatever goes wrong while it is open is an error that names it."""
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        with file.path.open("rb") as raw:
            inside = _MAGIC.match(raw.read(16))
            raw.seek(0)
            if inside and not file.packing:
                raise OSError(f"it is packed, which its name does not say; name it {file.path.name}.{inside.lastgroup}")
            if file.packing == ".zst":
                import zstandard

                damaged += (zstandard.ZstdError,)
                yield io.BufferedReader(_ZstdReader(raw, zstandard.ZstdDecompressor()))
            elif file.packing:
                with {".gz": gzip, ".bz2": bz2}[file.packing].open(raw, "rb") as stream:
                    yield stream
            else:
                yield raw
    except damaged as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read data file {str(file.path)!r}: {reason}") from error


class _ZstdReader(io.RawIOBase):
    """Bytes of all frames of a zstd file; unlike the package's own reader it notices a file cut short."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._compressed, self._ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end mark")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = self._frame.decompress(self._compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
