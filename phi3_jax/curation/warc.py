"""Pages of WARC and WET files: their text and where it comes from (ISO 28500; Common Crawl's forms of it).

Of a WET file the records of type `conversion` are text already. Of a WARC file the answers of status 200 that are HTML
become text by resiliparse (extra [web]), main content alone.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from phi3_jax.errors import UserError

ENDINGS = (".warc", ".warc.gz", ".wet", ".wet.gz")


def is_one(path: Path) -> bool:
    """Whether a name is that of a WARC or WET file."""
    return path.name.lower().endswith(ENDINGS)


def pages(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:record, {text, url, date}) of every page of a file.

    Raises:
      UserError: the file is damaged, cut short or no WARC; or HTML is there and resiliparse is not.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for number, (headers, content) in enumerate(_records(stream, path), 1):
                kind = headers.get("warc-type")
                text = None
                if kind == "conversion":
                    text = content.decode("utf-8", "replace")
                elif kind == "response" and headers.get("content-type", "").startswith("application/http"):
                    text = _answer(content)
                if text is not None:
                    where = {
                        "url": headers.get("warc-target-uri", "").strip("<>"),
                        "date": headers.get("warc-date", ""),
                    }
                    yield f"{path}:record {number}", {"text": text, **where}
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read data file {str(path)!r}: {reason}") from error


def _records(stream: gzip.GzipFile | BinaryIO, path: Path) -> Iterator[tuple[dict[str, str], bytes]]:
    while line := stream.readline():
        if not line.strip():
            continue
        if not line.startswith(b"WARC/"):
            raise UserError(
                f"cannot read data file {str(path)!r}: no WARC record begins with {line[:20]!r}; mend or remove it"
            )
        headers = _headers(iter(stream.readline, b""))
        size = headers.get("content-length", "")
        if not size.isdigit():
            raise UserError(f"cannot read data file {str(path)!r}: a record without Content-Length; mend or remove it")
        content = stream.read(int(size))
        if len(content) < int(size):
            raise UserError(f"cannot read data file {str(path)!r}: the last record is cut short; fetch the file again")
        yield headers, content


def _headers(lines: Iterator[bytes]) -> dict[str, str]:
    found = {}
    for line in lines:
        if not line.strip():
            break
        name, _, value = line.decode("utf-8", "replace").partition(":")
        found[name.strip().lower()] = value.strip()
    return found


def _answer(content: bytes) -> str | None:
    """The text of an HTTP answer, None where it is no page."""
    head, _, body = content.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = _headers(iter(lines))
    kind = headers.get("content-type", "")
    if b" 200" not in status or not ("html" in kind or kind.startswith("text/plain")):
        return None
    if "gzip" in headers.get("content-encoding", "") and body[:2] == b"\x1f\x8b":
        body = gzip.decompress(body)
    charset = kind.rpartition("charset=")[2].strip("\"' ") if "charset=" in kind else "utf-8"
    try:
        text = body.decode(charset, "replace")
    except LookupError:
        text = body.decode("utf-8", "replace")
    return text if kind.startswith("text/plain") else plain(text)


def plain(html: str) -> str:
    """The main text of an HTML page.

    Raises:
      UserError: resiliparse is not installed.
    """
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise UserError("pages of HTML need resiliparse: pip install -e '.[web]', or give WET files") from error
    return str(extract_plain_text(html, main_content=True))
