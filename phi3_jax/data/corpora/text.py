"""Documents of real text: .txt and .jsonl[.gz|.zst] files or folders, and the documentation of this Python.

Reading streams and is deterministic: files in sorted order, documents in file order. Which documents are held
out for evaluation is decided by a hash of their text, so equal documents land on the same side in any file,
run or order.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from phi3_jax.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
HELD_OUT = 0.02
MALFORMED_LIMIT = 0.01
POSITIONS_KEPT = 10
# Characters of plain text after which a blank line, or any line, ends a document.
PIECE, LARGEST_PIECE = 4096, 65_536
_EARLY_LINES = 100_000  # a long file is given up once 1 % of this many lines are malformed
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){3,}", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A text, where it came from (file:line), and its length in UTF-8 bytes."""

    text: str
    source: str
    bytes: int


@dataclass
class ReadReport:
    """What a reading met; filled while the documents are consumed.

    Attributes:
      files, lines, documents, bytes: read so far (bytes of text in UTF-8; lines of JSON).
      empty: documents left out because they hold only white space.
      malformed: lines that are not a JSON object in UTF-8; `positions` keeps the first ten as file:line.
    """

    files: int = 0
    lines: int = 0
    documents: int = 0
    bytes: int = 0
    empty: int = 0
    malformed: int = 0
    positions: list[str] = field(default_factory=list)

    def warning(self) -> str | None:
        """One line on the malformed lines that were left out, or None."""
        if not self.malformed:
            return None
        return f"{self.malformed} of {self.lines} lines are malformed JSON, first at {', '.join(self.positions)}"


def documents(source: str | Path, *, text_field: str = "text", report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of "pydocs", or of a .txt or .jsonl[.gz|.zst] file or a folder of them (recursive).

    A JSON line is a document, with its text under `text_field`. A .txt file is cut into documents at blank
    lines, each of at least 4,096 characters. Texts of white space only are left out.

    Raises:
      UserError: at once for a missing path, a folder without such files or another kind of file; while
        reading for a damaged file, a line without `text_field`, more than 1 % malformed JSON lines, or no
        documents at all.
    """
    report = ReadReport() if report is None else report
    if str(source) == "pydocs":
        return _counted(_pydocs(), report, "pydocs")
    files = _files(Path(source))
    return _counted(_read(files, text_field, report), report, str(source))


def is_held_out(text: str, share: float = HELD_OUT) -> bool:
    """Whether a document is held out: a hash of its text alone decides, for about `share` of all."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _files(path: Path) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if not path.exists():
        raise UserError(f"data {str(path)!r} does not exist; give pydocs, or a file or folder of {kinds}")
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data file {str(path)!r} is none of {kinds}")
        return [path]
    files = sorted(
        (file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"data folder {str(path)!r} holds no file of {kinds}")
    return files


def _counted(stream: Iterator[Document], report: ReadReport, name: str) -> Iterator[Document]:
    for document in stream:
        if not document.text.strip():
            report.empty += 1
            continue
        report.documents += 1
        report.bytes += document.bytes
        yield document
    if not report.documents:
        raise UserError(f"data {name!r} holds no documents ({report.files} files, {report.empty} empty texts)")


def _read(files: list[Path], text_field: str, report: ReadReport) -> Iterator[Document]:
    for file in files:
        report.files += 1
        with _readable(file) as stream:
            yield from (_plain(file, stream) if file.suffix == ".txt" else _json(file, stream, text_field, report))
    _check_malformed(report, report.lines)


@contextmanager
def _readable(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; whatever goes wrong while it is open is an error that names it."""
    damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    try:
        if file.suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise UserError(f"reading {str(file)!r} needs zstandard: pip install zstandard") from None
            damaged += (zstandard.ZstdError,)
            with file.open("rb") as raw:
                yield io.BufferedReader(_ZstdReader(raw, zstandard.ZstdDecompressor()))
        elif file.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                yield stream
        else:
            with file.open("rb") as stream:
                yield stream
    except damaged as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read data file {str(file)!r}: {reason}") from error


class _ZstdReader(io.RawIOBase):
    """Bytes of all frames of a zstd file; unlike the package's own reader it notices a file cut short."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame, self._compressed, self._ready = None, b"", b""

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


def _document(text: str, source: str) -> Document:
    return Document(text, source, len(text.encode()))


def _plain(file: Path, stream: BinaryIO) -> Iterator[Document]:
    lines: list[str] = []
    first, size = 1, 0
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        lines.append(line)
        size += len(line)
        if size >= LARGEST_PIECE or (size >= PIECE and not line.strip()):
            yield _document("".join(lines), f"{file}:{first}")
            lines, first, size = [], number + 1, 0
    if size:
        yield _document("".join(lines), f"{file}:{first}")


def _json(file: Path, stream: BinaryIO, text_field: str, report: ReadReport) -> Iterator[Document]:
    for number, raw in enumerate(stream, 1):
        if not raw.strip():
            continue
        report.lines += 1
        place = f"{file}:{number}"
        try:
            row = json.loads(raw.decode("utf-8-sig"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
            text = row.get(text_field)
            size = len(text.encode()) if isinstance(text, str) else 0  # a lone surrogate fails here
        except (ValueError, RecursionError):
            report.malformed += 1
            if len(report.positions) < POSITIONS_KEPT:
                report.positions.append(place)
            _check_malformed(report, max(report.lines, _EARLY_LINES))
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{place} has no text in field {text_field!r}; its fields are {', '.join(map(repr, row))}: "
                "name the right one"
            )
        yield Document(text, place, size)


def _check_malformed(report: ReadReport, lines: int) -> None:
    if report.malformed > MALFORMED_LIMIT * lines:
        raise UserError(f"{report.warning()}; the limit is {MALFORMED_LIMIT:.0%}: mend or remove them")


def _pydocs() -> Iterator[Document]:
    """Help topics, then every module's docstrings and comments, from the sources: nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
    files = sorted(
        (file for file in root.rglob("*.py") if not skip & set(file.relative_to(root).parts)),
        key=lambda file: file.relative_to(root).as_posix(),
    )
    if not files:
        raise UserError(f"this Python has no library sources in {str(root)!r}; use a file or folder of text")
    yield from _topics(root / "pydoc_data" / "topics.py")
    for file in files:
        module = file.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        if module.startswith("pydoc_data"):
            continue
        try:
            source = file.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some old modules hold invalid escapes
                tree = ast.parse(source)
            yield from _module(module, tree, source)
        except (OSError, SyntaxError, ValueError):
            continue  # a library file that is broken on purpose (test data of a tool) is no documentation


def _topics(file: Path) -> Iterator[Document]:
    if not file.exists():
        return
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield _document(text.strip() + "\n", f"pydocs:topic {name}")


def _module(module: str, tree: ast.Module, source: bytes) -> Iterator[Document]:
    """One document for a module's docstring and comments, one for each documented class or function in it."""
    parts = [f"{module}\n\n{ast.get_docstring(tree)}"] if ast.get_docstring(tree) else []
    parts += _comments(source)
    if parts:
        yield _document("\n\n".join(parts) + "\n", f"pydocs:{module}")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            entries = list(_entries(node, module))
            if entries:
                yield _document("\n\n".join(entries) + "\n", f"pydocs:{module}.{node.name}")


def _entries(node: ast.AST, prefix: str) -> Iterator[str]:
    """Signature and docstring of a definition and of those inside it."""
    name = f"{prefix}.{node.name}"
    docstring = ast.get_docstring(node)
    if docstring:
        signature = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
        yield f"{signature}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, name)


def _comments(source: bytes) -> list[str]:
    """Blocks of three or more lines of comment (shorter ones mean little without their code)."""
    blocks = _COMMENT_BLOCK.findall(source.decode("utf-8", "replace").replace("\r\n", "\n"))
    return ["\n".join(re.sub("^#+ ?", "", line.strip()) for line in block.splitlines()).strip() for block in blocks]
