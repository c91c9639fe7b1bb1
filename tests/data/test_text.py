"""Text documents: every kind of file, every kind of damage, a stable split, and the library's own documentation."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_jax.data.corpora.text import Document, ReadReport, documents, is_held_out, pydocs
from phi3_jax.errors import UserError

zstandard = pytest.importorskip("zstandard")
TEXTS = [f"Document {i}: " + "words and ünïcödé " * (i % 7 + 1) for i in range(300)]


def rows(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(path: Path | str, **options) -> list[str]:
    return [document.text for document in documents(path, **options)]


WRITERS = {
    "a.jsonl": rows,
    "a.jsonl.gz": lambda texts: gzip.compress(rows(texts)),
    "a.jsonl.zst": lambda texts: zstandard.compress(rows(texts)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_json_kind_reads_the_same(tmp_path, name):
    (tmp_path / name).write_bytes(WRITERS[name](TEXTS))
    report = ReadReport()
    read = list(documents(tmp_path / name, report=report))
    assert [document.text for document in read] == TEXTS
    assert all(document.bytes == len(document.text.encode()) for document in read)
    assert read[7].source == f"{tmp_path / name}:8"
    assert (report.files, report.lines, report.documents, report.malformed) == (1, 300, 300, 0)
    assert report.bytes == sum(len(text.encode()) for text in TEXTS) and report.warning() is None


def test_several_zstd_frames_read_as_one(tmp_path):
    frames = zstandard.compress(rows(TEXTS[:100])) + zstandard.compress(rows(TEXTS[100:]))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert texts_of(tmp_path) == TEXTS


def test_folders_are_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "1.txt").write_text("third")
    (tmp_path / "a.jsonl").write_bytes(rows(["first"]))
    (tmp_path / "b" / "0.jsonl.gz").write_bytes(gzip.compress(rows(["second"])))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden" / "x.txt").write_text("not data")
    assert texts_of(tmp_path) == ["first", "second", "third"]


def test_plain_text_is_cut_at_blank_lines_without_loss(tmp_path):
    text = "\ufeff" + "".join(f"Paragraph {i} with some words.\nAnd a second line.\n\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    read = texts_of(tmp_path / "a.txt")
    assert "".join(read) == text[1:]
    assert len(read) > 5 and all(piece.endswith("\n\n") and len(piece) >= 4096 for piece in read[:-1])
    (tmp_path / "b.txt").write_text("no blank line\n" * 20_000)
    assert "".join(texts_of(tmp_path / "b.txt")) == "no blank line\n" * 20_000
    assert max(map(len, texts_of(tmp_path / "b.txt"))) < 70_000


def test_malformed_lines_are_counted_and_located(tmp_path):
    good = rows(TEXTS * 10).splitlines(keepends=True)
    bad = [b"{not json}\n", b"[1, 2]\n", b'{"text": "\xff\xfe"}\n', b'{"text": "\\ud800"}\n', b"{" * 5000 + b"\n"]
    lines = [*good[:10], bad[0], b"\n", *good[10:500], *bad[1:], *good[500:]]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    report = ReadReport()
    assert len(list(documents(tmp_path, report=report))) == 3000
    assert (report.lines, report.malformed) == (3005, 5)
    assert report.positions == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (11, 503, 504, 505, 506)]
    assert report.warning().startswith("5 of 3005 lines are malformed JSON, first at ")


@pytest.mark.parametrize("bad, aborts", [(10, False), (11, True), (40, True)])
def test_more_than_one_percent_malformed_aborts(tmp_path, bad, aborts):
    (tmp_path / "a.jsonl").write_bytes(b"oops\n" * bad + rows(["x"] * (1000 - bad)))
    if not aborts:
        assert len(texts_of(tmp_path)) == 1000 - bad
        return
    with pytest.raises(UserError, match=f"^{bad} of 1000 lines are malformed.*the limit is 1%") as caught:
        texts_of(tmp_path)
    assert str(caught.value).count("a.jsonl:") == 10 and "\n" not in str(caught.value)


def test_hopeless_files_are_given_up_early(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(["x"]) + b"oops\n" * 5000)
    report = ReadReport()
    with pytest.raises(UserError, match="malformed"):
        list(documents(tmp_path, report=report))
    assert report.lines < 1100


def test_missing_text_field_names_the_fields_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(TEXTS, field="content"))
    with pytest.raises(UserError, match=r"a.jsonl:1 has no text in field 'text'; its fields are 'content', 'n'"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, text_field="content") == TEXTS
    with pytest.raises(UserError, match="no text in field 'n'"):  # a number is no text
        texts_of(tmp_path, text_field="n")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_archives_are_named(tmp_path, name, damage):
    whole = WRITERS[name]([str(i) * 50 for i in range(20_000)])
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"this is no archive at all")
    with pytest.raises(UserError, match=f"cannot read data file .*{name}"):
        texts_of(tmp_path)
    (tmp_path / name).write_bytes(whole)
    assert len(texts_of(tmp_path)) == 20_000  # positive control


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt:2 is not UTF-8"):
        texts_of(tmp_path)


def test_missing_empty_and_foreign_paths_are_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist; give pydocs, or a file or folder"):
        documents(tmp_path / "nowhere")  # at once, before anything is read
    with pytest.raises(UserError, match="holds no file of"):
        documents(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a\.csv' is none of \.txt"):
        documents(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_bytes(rows(["", " \n "]))
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"holds no documents \(2 files, 3 empty texts\)"):
        texts_of(tmp_path)


def test_the_split_is_about_two_percent_and_depends_on_the_text_alone():
    texts = [f"text number {i}" for i in range(50_000)]
    held = [text for text in texts if is_held_out(text)]
    assert 0.018 < len(held) / len(texts) < 0.022
    assert held == [text for text in texts if is_held_out(str(text))]
    wider = {text for text in texts if is_held_out(text, 0.1)}
    assert set(held) < wider  # a larger share keeps what was held out
    assert not any(is_held_out(text, 0.0) for text in texts[:100])
    # fixed for all time: a changed hash would move training text into the evaluation of older runs
    assert [i for i in range(300) if is_held_out(texts[i])] == [24, 42, 45, 81, 212, 219, 228, 298]


def test_pydocs_is_real_text_in_a_fixed_order_and_imports_nothing():
    program = (
        "import sys, hashlib, itertools\n"
        "from phi3_jax.data.corpora.text import pydocs\n"
        "before = set(sys.modules)\n"
        "for d in itertools.islice(pydocs(), 1500):\n"
        "    print(d.source, hashlib.sha256(d.text.encode()).hexdigest())\n"
        "assert 'antigravity' not in sys.modules and 'pydoc_data.topics' not in sys.modules\n"
        "assert len(set(sys.modules) - before) < 20"
    )
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    report = ReadReport()
    read = list(pydocs(report))
    lines = [f"{document.source} {hashlib.sha256(document.text.encode()).hexdigest()}" for document in read]
    assert elsewhere.splitlines() == lines[:1500]
    assert report.bytes > 1_000_000 and sum(is_held_out(document.text) for document in read) >= 10
    by_source = {document.source: document for document in read}
    assert isinstance(read[0], Document) and "pydocs:topic assert" in by_source
    assert "Serialize ``obj`` to a JSON formatted" in by_source["pydocs:json.dumps"].text


@pytest.mark.shared("corpus")
def test_shared_corpus_reads_whole():
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "corpus"
    report = ReadReport()
    assert sum(1 for _ in documents(folder, report=report)) == 8389
    assert report.malformed == 0 and report.bytes > 40e6
