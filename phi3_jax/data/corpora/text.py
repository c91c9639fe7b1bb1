"""Documents of real text: files and folders of text (phi3_jax.data.corpora.files), and the documentation of this Python.

Reading streams and is deterministic: files in sorted order, documents in file order. Which documents are held
out for evaluation is decided by a hash of their text, so equal documents land on the same side in any file,
run or order.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import itertools
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from phi3_jax.data.corpora import files
from phi3_jax.data.corpora.files import Account
from phi3_jax.errors import UserError

HELD_OUT = 0.02
MALFORMED_LIMIT = 0.01
POSITIONS_KEPT = 10
# Characters of plain text after which a blank line, or any line, ends a document.
PIECE, LARGEST_PIECE = 4096, 65_536
_MALFORMED = "malformed JSON"
_BLOCK, _CUT = 1 << 20, 16  # bytes of a .json file read at once; how near its end a cut value may show as an error
_ROWS_AT_ONCE = 1024  # of a .parquet file
_BETWEEN = re.compile(r"[ \t\r\n,]*")
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
      malformed: rows without a text: lines that are not a JSON object in UTF-8, and texts that are null or no text at all;
        `reasons` counts them by kind, `positions` keeps the first ten as file:line.
      account: of the files, None for pydocs; files without a row are noted there as empty while reading.
    """

    files: int = 0
    lines: int = 0
    documents: int = 0
    bytes: int = 0
    empty: int = 0
    malformed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    positions: list[str] = field(default_factory=list)
    account: Account | None = None

    def leave(self, reason: str, place: str) -> None:
        """Counts a row that is left out.

        Raises:
          UserError: more than `MALFORMED_LIMIT` of all rows are.
        """
        self.malformed += 1
        self.reasons[reason] += 1
        if len(self.positions) < POSITIONS_KEPT:
            self.positions.append(place)
        self.check(max(self.lines, _EARLY_LINES))

    def check(self, lines: int) -> None:
        """Raises UserError where too many of so many lines are left out."""
        if self.malformed > MALFORMED_LIMIT * lines:
            raise UserError(f"{self.warning()}; the limit is {MALFORMED_LIMIT:.0%}: mend or remove them")

    def warning(self) -> str | None:
        """One line on the malformed lines that were left out, or None."""
        if not self.malformed:
            return None
        what = _MALFORMED
        if [*self.reasons] != [what]:
            what = "left out: " + ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        return f"{self.malformed} of {self.lines} lines are {what}, first at {', '.join(self.positions)}"


def documents(
    source: str | Path, *, text_field: str = "text", report: ReadReport | None = None, whole: bool = False
) -> Iterator[Document]:
    """Documents of a file or folder (recursive; files.py says which files).

    A JSON line is a document, with its text under `text_field`; so is each object of a .json file (one array, or objects
    one after another) and each row of a .parquet file. A .txt file is cut into documents at blank lines, each of at
    least 4,096 characters, or is one document where `whole`. Texts of white space only are left out.

    Raises:
      UserError: at once for what `files.account` refuses; while reading for a damaged file, a field that is not there
        or holds no text, more than 1 % malformed lines, or no documents at all.
    """
    report = ReadReport() if report is None else report
    report.account = files.account(source)
    return _counted(_read(report.account, text_field, report, whole), report, str(source))


def pydocs(report: ReadReport | None = None) -> Iterator[Document]:
    """Documents of this Python installation's documentation; UserError where it holds none."""
    return _counted(_pydocs(), ReadReport() if report is None else report, "pydocs")


def is_held_out(text: str, share: float = HELD_OUT) -> bool:
    """Whether a document is held out: a hash of its text alone decides, for about `share` of all."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _counted(stream: Iterator[Document], report: ReadReport, name: str) -> Iterator[Document]:
    for document in stream:
        if not document.text.strip():
            report.empty += 1
            continue
        report.documents += 1
        report.bytes += document.bytes
        yield document
    if not report.documents:
        left = f"; left out: {report.account.left()}" if report.account and report.account.left_out else ""
        raise UserError(f"data {name!r} holds no documents ({report.files} files, {report.empty} empty texts){left}")


def rows(account: files.Account) -> Iterator[tuple[str, Any]]:
    """(file:line, row) of all JSON lines, objects of .json files and rows of .parquet files; a row that is no JSON is None.

    Raises:
      UserError: a damaged file, or one of plain text.
    """
    for file in account.files:
        if file.kind == ".txt":
            raise UserError(f"data file {str(file.path)!r} is plain text; give rows as .jsonl, .json or .parquet")
        with files.opened(file) as stream:
            yield from _ROWS[file.kind](file.path, stream, None)


# ------------------------------------------------------------------------------------------------ files


def _read(account: files.Account, text_field: str, report: ReadReport, whole: bool = False) -> Iterator[Document]:
    others = any(file.kind != ".json" for file in account.files)
    for file in account.files:
        report.files += 1
        lines, pieces = report.lines, 0
        with files.opened(file) as stream:
            if file.kind == ".txt":
                found = _plain(file.path, stream, whole)
            else:
                rows = _ROWS[file.kind](file.path, stream, text_field)
                found = _texts(rows, file, text_field, report, account if others and file.kind == ".json" else None)
            for document in found:
                pieces += 1
                yield document
        if not pieces and report.lines == lines:
            account.leave(files.EMPTY, file.name)
    report.check(report.lines)


def _document(text: str, source: str) -> Document:
    return Document(text, source, len(text.encode()))


def _plain(file: Path, stream: BinaryIO, whole: bool = False) -> Iterator[Document]:
    lines: list[str] = []
    first, size = 1, 0
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        lines.append(line)
        size += len(line)
        if not whole and (size >= LARGEST_PIECE or (size >= PIECE and not line.strip())):
            yield _document("".join(lines), f"{file}:{first}")
            lines, first, size = [], number + 1, 0
    if size:
        yield _document("".join(lines), f"{file}:{first}")


def _texts(
    rows: Iterator[tuple[str, Any]], file: files.File, text_field: str, report: ReadReport, beside: files.Account | None
) -> Iterator[Document]:
    """Documents of (place, row) pairs.

    A .json file without the field is no text where files of other kinds are there, whose account is `beside`.
    """
    for number, (place, row) in enumerate(rows):
        report.lines += 1
        if not isinstance(row, dict):
            report.leave(_MALFORMED, place)
            continue
        text = row.get(text_field)
        if isinstance(text, str):
            try:
                document = _document(text, place)
            except UnicodeEncodeError:  # a lone surrogate
                report.leave(_MALFORMED, place)
                continue
            yield document
        elif text is None and text_field in row:
            report.leave(f"null in field {text_field!r}", place)
        elif beside is not None and number == 0:
            return beside.leave(f"without a text in field {text_field!r}", file.name)
        elif report.documents:
            report.leave(f"{_named(text)} in field {text_field!r}", place)
        else:
            fields = ", ".join(map(repr, [*row][:20])) or "none"
            but = f" but {_named(text)}" * (text_field in row)
            raise UserError(
                f"{place} has no text in field {text_field!r}{but}; its fields are {fields}: name the right one with "
                "--text_field, in a study with --config.data.text_field"
            )


def _named(value: Any) -> str:
    kinds = {type(None): "nothing", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"{type(value).__name__}")


def _lines(file: Path, stream: Iterable[bytes], text_field: str | None) -> Iterator[tuple[str, Any]]:
    """The value of each line that is not blank, None for a malformed one."""
    for number, raw in enumerate(stream, 1):
        if raw.strip():
            yield f"{file}:{number}", _parsed(raw)


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _json(file: Path, stream: BinaryIO, text_field: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of a .json file: lines where the first is an object by itself, else the values of an array or one by one."""
    head = []
    for raw in stream:
        head.append(raw)
        if raw.strip(b" \t\r\n\xef\xbb\xbf"):
            break
    if head and isinstance(_parsed(head[-1]), dict):
        yield from _lines(file, itertools.chain(head, stream), text_field)
        return
    try:
        for number, value in enumerate(_values(b"".join(head), stream), 1):
            yield f"{file}:item {number}", value
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read data file {str(file)!r}: not whole JSON ({error}); mend or remove it") from None


def _values(head: bytes, stream: BinaryIO) -> Iterator[Any]:
    """JSON values of an array, or one after another, parsed one at a time: memory holds the largest, not the file.

    Raises:
      ValueError: something that is no JSON.
    """
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, ended, opened = decode(head), False, False
    at = 0
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        if not opened and text.startswith("[", at):
            opened, at = True, at + 1
            continue
        if opened and text.startswith("]", at):
            opened, at = False, at + 1
            continue
        try:
            if at < len(text):
                value, at = parse(text, at)
                yield value
                continue
        except json.JSONDecodeError as error:
            if ended or not (error.msg.startswith("Unterminated") or error.pos >= len(text) - _CUT):
                raise
        if ended:
            if opened:
                raise ValueError("the array does not end")
            return
        raw = stream.read(max(_BLOCK, len(text) - at))
        ended = not raw
        text, at = text[at:] + decode(raw, ended), 0


def _parquet(file: Path, stream: BinaryIO, text_field: str | None) -> Iterator[tuple[str, Any]]:
    """Rows of a .parquet file, of the column `text_field` alone where there is one; None: of all columns."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(stream)
        if text_field is not None and text_field not in table.schema_arrow.names:
            row = dict.fromkeys(table.schema_arrow.names)
            yield from ((f"{file}:row {number}", row) for number in range(1, table.metadata.num_rows + 1))
            return
        number = 0
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=None if text_field is None else [text_field]):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:row {number}", row
    except pyarrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


_ROWS = {".jsonl": _lines, ".json": _json, ".parquet": _parquet}


# ------------------------------------------------------------------------------------------------ pydocs


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


def _entries(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Iterator[str]:
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
