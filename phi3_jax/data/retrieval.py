"""..."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phi3_jax.errors import UserError

Source = str | Path | Iterable[tuple[str, str]]


KINDS = (".txt", ".md", ".rst", ".jsonl")


PASSAGE_WORDS = 120


_MARK = 0x70337301  # application id in the file's header; the last byte counts layouts


_TOKENIZE = "tokenize = 'unicode61 remove_diacritics 2'"


_TABLES = f"""PRAGMA application_id = {_MARK};
    CREATE TABLE files (name TEXT, bytes INTEGER, sha256 TEXT);
    CREATE VIRTUAL TABLE passages USING fts5(text, source UNINDEXED, {_TOKENIZE});"""


_QUERY = f"""PRAGMA temp_store = MEMORY;
    CREATE VIRTUAL TABLE temp.query USING fts5(text, {_TOKENIZE});
    CREATE VIRTUAL TABLE temp.terms USING fts5vocab(temp, query, instance);"""


_RANK = "SELECT rowid, -bm25(passages) s FROM passages WHERE passages MATCH ? ORDER BY s DESC, rowid LIMIT ?"


_WORD = re.compile(r"\S{1,200}")  # a longer run is no word: cut, so that every passage has a bound


_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s|\n\s*\n")  # of a sentence or a paragraph


@dataclass(frozen=True)
class Passage:
    """A piece of a document; source is the document's name, score its BM25 (positive, higher is better)."""

    text: str
    source: str
    score: float


class Index:
    """Passages and their BM25, for one thread. files: (name, bytes, sha256) of all that was read; fingerprint of them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db, self.close = db, db.close
        self.files = db.execute("SELECT name, bytes, sha256 FROM files ORDER BY rowid").fetchall()
        self.fingerprint = hashlib.sha256(json.dumps(self.files).encode()).hexdigest()
        db.executescript(_QUERY)

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM passages").fetchone()[0]

    @classmethod
    def build(cls, source: Source, path: str | Path, passage_words: int = PASSAGE_WORDS) -> Index:
        """Index a folder's *.txt, *.md, *.rst and *.jsonl (key "text", a document per line), or (name, text) pairs.

        Folders are read recursively, in order of name; undecodable bytes become U+FFFD. Passages are cut by `cut`. The
        index takes its path (":memory:" for none) only when whole, and never replaces anything but another index.
        UserError: a source without text, a line of JSON without text, a path that cannot be read or written.
        """
        if passage_words < 1:
            raise UserError(f"passage_words={passage_words} must be 1 or more; {PASSAGE_WORDS} is usual")
        try:
            if str(path) == ":memory:":
                return cls(_fill(sqlite3.connect(path), source, passage_words))
            path = Path(path)
            if path.exists():
                cls.open(path).close()
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                _fill(sqlite3.connect(f"{folder}/index"), source, passage_words).close()
                os.replace(f"{folder}/index", path)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"index {str(path)!r} is not built: {error}; see to that file, folder or disk") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open an index for reading; UserError where there is none, or something else."""
        if not Path(path).exists():
            raise UserError(f"no search index {str(path)!r}; make it with Index.build(folder, path)")
        try:
            db = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)
            if db.execute("PRAGMA application_id").fetchone()[0] == _MARK:
                return cls(db)
            reason = "another program's or version's"
        except sqlite3.Error as error:
            reason = str(error)
        raise UserError(f"{str(path)!r} is no search index ({reason}); remove it or name another file")

    def tokens(self, text: str) -> list[str]:
        """Tokens of a text in order, by FTS5's own tokenizer."""
        self._db.execute("INSERT INTO temp.query VALUES (?)", [_clean(text)])
        terms = self._db.execute("SELECT term FROM temp.terms ORDER BY offset").fetchall()
        self._db.rollback()
        return [term for (term,) in terms]

    def search(self, query: str, k: int = 3) -> list[Passage]:
        """The k best passages with any token of the query, which is any text: no operators; ties in order of building."""
        if k < 1:
            raise UserError(f"k={k} passages must be 1 or more; 3 is usual")
        terms = " OR ".join(f'"{term}"' for term in dict.fromkeys(self.tokens(query)))
        best = self._db.execute(_RANK, [terms, k]).fetchall() if terms else []
        found = "SELECT text, source FROM passages WHERE rowid = ?"
        passages = [(*self._db.execute(found, [row]).fetchone(), score) for row, score in best]
        return [Passage(text, source, score) for text, source, score in passages]


def cut(text: str, words: int = PASSAGE_WORDS) -> Iterator[str]:
    """Passages of at most `words` words, without loss; one ends with a sentence or paragraph if its second half can."""
    spans, start = [match.span() for match in _WORD.finditer(text)], 0
    while start < len(spans):
        if (stop := start + words) < len(spans):
            ends = range(stop, start + words // 2, -1)  # a passage that ends at e has e - 1 as its last word
            stop = next((e for e in ends if _END.search(text, spans[e - 1][0], spans[e][0])), stop)
        yield text[spans[start][0] : spans[min(stop, len(spans)) - 1][1]]
        start = stop


def _fill(db: sqlite3.Connection, source: Source, words: int) -> sqlite3.Connection:
    db.executescript(_TABLES)
    folder, pairs = (source, ()) if isinstance(source, (str, Path)) else (None, source)
    listed = ((_clean(name), text.encode("utf-8", "replace"), [(_clean(name), text)]) for name, text in pairs)
    for name, data, documents in listed if folder is None else _folder(Path(folder)):
        db.execute("INSERT INTO files VALUES (?, ?, ?)", [name, len(data), hashlib.sha256(data).hexdigest()])
        rows = ((passage, where) for where, text in documents for passage in cut(_clean(text), words))
        db.executemany("INSERT INTO passages VALUES (?, ?)", rows)
    if not db.execute("SELECT 1 FROM passages LIMIT 1").fetchone():
        raise UserError(f"the source holds 0 passages; give text, in files *{', *'.join(KINDS)} of a folder")
    db.execute("INSERT INTO passages (passages) VALUES ('optimize')")
    db.commit()
    return db


def _folder(folder: Path) -> Iterator[tuple[str, bytes, Iterable[tuple[str, str]]]]:
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r} to index; name a folder of text files")
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS and path.is_file()):
        name, data = os.fsencode(file.relative_to(folder)).decode("utf-8", "replace"), file.read_bytes()
        text = data.decode("utf-8-sig", "replace")
        yield name, data, _json_lines(name, text) if file.suffix.lower() == ".jsonl" else [(name, text)]


def _json_lines(name: str, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            yield f"{name}:{number}", _clean(json.loads(line)["text"] if line.strip() else "")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f'{name}:{number} is no JSON object with a string "text"; mend or remove it') from None


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8
