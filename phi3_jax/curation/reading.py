"""From files to our parts: documents are scattered by the hash of their text, so that a part is a range of ids.

An id is a function of the text alone. So names, order and number of the input's files change neither an id nor a part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_jax.curation import store
from phi3_jax.data.corpora import files as listing
from phi3_jax.data.corpora import text as texts
from phi3_jax.data.corpora.files import Account, File
from phi3_jax.errors import UserError
from phi3_jax.records import files

PART_BYTES = 8 << 20  # of text in a part, about
_PACKED = 4  # bytes of text in a byte of a packed file, about
_HELD = 8 << 20  # characters of text that a scattering worker holds
MALFORMED_LIMIT = texts.MALFORMED_LIMIT
OWN = ("source", "genre", "licence", "id")  # fields of a row that mean something here
COLUMNS = ("id", "place", "source", "genre", "licence", "given", "meta", "text")


def parts_for(inputs: list[File]) -> int:
    """How many parts: a function of the input's size."""
    size = sum(file.size * (_PACKED if file.packing or file.kind == ".parquet" else 1) for file in inputs)
    return max(1, -(-size // PART_BYTES))


def identity(text: str) -> str:
    """The first 32 hex digits of the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def bucket(identifier: str, parts: int) -> int:
    """The part of an id: ids are spread evenly, and parts are ranges of them."""
    return int(identifier[:8], 16) * parts >> 32


def scatter(task: dict[str, Any]) -> dict[str, Any]:
    """Reads one file and writes its documents into a folder, one table a part; counts what was malformed.

    Args:
      task: path, name, size, time of the file; text_field; parts; folder; sample, the share of ids that is taken.
    """
    file = File(Path(task["path"]), task["name"], task["size"], task["time"])
    out = Path(task["folder"])
    counts = out / "counts.json"
    if counts.is_file():
        return files.read_json(counts)
    partial = files.temporary(out)
    report = texts.ReadReport(account=Account([file]))
    held: dict[int, dict[str, list[str]]] = {}
    size = pieces = 0
    kinds: dict[str, set[str]] = {}
    try:
        partial.mkdir(parents=True)
        for place, row in _rows(file, task["text_field"], report):
            document = _document(place, row, task["text_field"], file, kinds)
            if int(document["id"][8:16], 16) >= task["sample"] * (1 << 32):
                continue
            columns = held.setdefault(bucket(document["id"], task["parts"]), {name: [] for name in COLUMNS})
            for name in COLUMNS:
                columns[name].append(document[name])
            size += len(document["text"]) + len(document["meta"])
            if size > _HELD:
                _flush(partial, held, pieces)
                held, size, pieces = {}, 0, pieces + 1
        _flush(partial, held, pieces)
        found = {
            "documents": report.documents, "empty": report.empty, "lines": report.lines, "malformed": report.malformed,
            "positions": report.positions, "reasons": dict(report.reasons), "bytes": report.bytes,
            "kinds": {key: sorted(value) for key, value in sorted(kinds.items())}, "sha256": file.sha256(),
        }  # fmt: skip
        files.write_json(partial / "counts.json", found)
        files.remove(out)
        partial.rename(out)
        return found
    except OSError as error:
        raise store.cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rows(file: File, text_field: str, report: texts.ReadReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row with a text); what has none is counted."""
    if file.kind == ".txt":
        for document in texts.documents(file.path, report=report):
            yield document.source, {text_field: document.text}
        return
    for place, row in texts.rows(Account([file])):
        report.lines += 1
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(row, dict):
            report.leave("malformed JSON", place)
        elif isinstance(text, str) and _whole(text):
            if not text.strip():
                report.empty += 1
                continue
            report.documents += 1
            report.bytes += len(text.encode())
            yield place, row
        elif text_field not in row and not report.documents:
            fields = ", ".join(map(repr, [*row][:20])) or "none"
            raise UserError(f"{place} has no field {text_field!r}; its fields are {fields}: name one with --text_field")
        else:
            report.leave(f"no text in field {text_field!r}", place)


def _whole(text: str) -> bool:
    """Whether UTF-8 holds a text: no half of a surrogate pair stands alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _document(
    place: str, row: dict[str, Any], text_field: str, file: File, kinds: dict[str, set[str]]
) -> dict[str, str]:
    text = row[text_field]
    rest = {key: value for key, value in row.items() if key != text_field and key not in OWN and value is not None}
    for key, value in rest.items():
        kinds.setdefault(key, set()).add(type(value).__name__ if type(value) in (str, int, float, bool) else "json")
    own = {name: _text(row.get(name)) for name in OWN}
    return {
        "id": identity(text),
        "place": place.removeprefix(str(file.path.parent) + "/"),
        "source": own["source"] or file.name.partition(".")[0],
        "genre": own["genre"],
        "licence": own["licence"] or _text(row.get("license")),
        "given": own["id"],
        "meta": json.dumps(rest, sort_keys=True, ensure_ascii=False, default=str),
        "text": text,
    }


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _flush(folder: Path, held: dict[int, dict[str, list[str]]], piece: int) -> None:
    for number, columns in held.items():
        store.write(folder / f"{number:05}-{piece:05}.parquet", columns)


def gather(task: dict[str, Any]) -> dict[str, Any]:
    """Writes one part: all documents of its range, sorted by id; a text that is there again gets an id of its own.

    Args:
      task: number; folders of what `scatter` wrote; out, the part.
    """
    out, number = Path(task["out"]), task["number"]
    if not out.is_file():
        columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
        for folder in task["folders"]:
            for path in sorted(Path(folder).glob(f"{number:05}-*.parquet")):
                for name, values in store.read(path).items():
                    columns[name] += values.to_pylist()
        order = sorted(
            range(len(columns["id"])),
            key=lambda i: tuple(columns[name][i] for name in ("id", "source", "given", "place")),
        )
        columns = {name: [values[i] for i in order] for name, values in columns.items()}
        seen: dict[str, int] = {}
        for at, identifier in enumerate(columns["id"]):
            before = seen.get(identifier, 0)
            seen[identifier] = before + 1
            if before:
                columns["id"][at] = f"{identifier}-{before}"
        store.write(out, columns)
    return {"number": number}


def accounts(inputs: list[str]) -> list[Account]:
    """The files of each input; UserError for what cannot be read, or is named twice."""
    if len({str(Path(each).resolve()) for each in inputs}) < len(inputs):
        raise UserError("an input is named twice; name each once")
    return [listing.account(each) for each in inputs]
