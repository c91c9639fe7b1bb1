"""WARC and WET files: pages with their addresses, damage named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from phi3_jax.curation import reading, warc
from phi3_jax.errors import UserError

TEXT = "A rope is stiff when it is new and soft when it is old."
HTML = f"<html><body><nav>Home</nav><main><p>{TEXT}</p></main></body></html>".encode()


def record(kind: str, content: bytes, more: str = "") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://example.org/a\r\n{more}"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def answer(status: str = "200 OK", kind: str = "text/html; charset=utf-8", body: bytes = HTML) -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n\r\n".encode() + body
    return record("response", http, "Content-Type: application/http; msgtype=response\r\n")


def test_text_of_wet_records(tmp_path: Path) -> None:
    wet = record("warcinfo", b"software: x") + record("conversion", "Grüße\n".encode()) + record("conversion", b"two")
    for name, content in (("a.wet", wet), ("a.warc.wet.gz", gzip.compress(wet[:40]) + gzip.compress(wet[40:]))):
        (tmp_path / name).write_bytes(content)
        found = list(warc.pages(tmp_path / name))
        assert [page["text"] for _, page in found] == ["Grüße\n", "two"]
        assert found[0][0].endswith(":record 2") and found[0][1]["url"] == "https://example.org/a"


def test_pages_of_answers(tmp_path: Path) -> None:
    content = (
        answer("404 Not Found")
        + answer(kind="image/png")
        + answer(kind="text/plain; charset=latin-1", body="é".encode("latin-1"))
    )
    (tmp_path / "a.warc").write_bytes(content + record("request", b"GET /"))
    assert [page["text"] for _, page in warc.pages(tmp_path / "a.warc")] == ["é"]


def test_html_becomes_text(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    (tmp_path / "a.warc").write_bytes(answer())
    [(_, page)] = warc.pages(tmp_path / "a.warc")
    assert "soft when it is old." in page["text"] and "<" not in page["text"]


def test_without_the_extra_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    (tmp_path / "a.warc").write_bytes(answer())
    with pytest.raises(UserError, match=r"pip install -e '.\[web\]', or give WET files"):
        list(warc.pages(tmp_path / "a.warc"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (record("conversion", b"whole")[:-10], "the last record is cut short"),
        (b"<html>", "no WARC record begins with"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nx", "without Content-Length"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "a.wet").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.wet'.*{line}"):
        list(warc.pages(tmp_path / "a.wet"))
    (tmp_path / "a.wet.gz").write_bytes(gzip.compress(content)[:-6])
    with pytest.raises(UserError, match=r"a.wet.gz'"):
        list(warc.pages(tmp_path / "a.wet.gz"))


def test_a_folder_may_mix_them_with_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.wet").write_bytes(record("conversion", b"one"))
    assert [file.name for file in reading.accounts([str(tmp_path)])[0].files] == ["a.wet"]
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    [account] = reading.accounts([str(tmp_path)])
    assert [file.name for file in account.files] == ["a.wet", "b.jsonl"] and not account.left_out
