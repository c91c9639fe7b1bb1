"""A folder is accounted for: every kind and packing reads the same, and what is not read is named with its reason."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from phi3_jax.data.corpora import files, text
from phi3_jax.errors import UserError

zstandard = pytest.importorskip("zstandard")
TEXTS = [f"Document {i}: " + "words and ünïcödé " * (i % 7 + 1) for i in range(50)]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}


def lines(texts=TEXTS, field="text") -> bytes:
    return "".join(json.dumps({field: t}) + "\n" for t in texts).encode()


def read(path: Path, **options) -> list[str]:
    return [document.text for document in text.documents(path, **options)]


def line(path: Path) -> str:
    return files.account(path).line()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "b.Json"])
def test_every_kind_reads_the_same(tmp_path, name, packing):
    name += packing.upper() if name.isupper() else packing
    (tmp_path / name).write_bytes(PACK[packing](lines()))
    assert read(tmp_path) == read(tmp_path / name) == TEXTS
    assert line(tmp_path).startswith(f"1 file read (1 x {name[name.index('.') :].lower()}; ")


ROWS = [{"text": t, "n": i} for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff" + json.dumps(ROWS, ensure_ascii=False),
        "\r\n\r\n[\r\n" + ",\r\n".join(map(json.dumps, ROWS)) + "\r\n]\r\n",
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\ufeff" + "\r\n".join(map(json.dumps, ROWS)),
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_json_file_is_an_array_or_objects_one_after_another(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr(text, "_BLOCK", block)
    (tmp_path / "a.json").write_text(content, "utf-8")
    assert read(tmp_path) == TEXTS


def test_one_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"title": "x", "text": "a\n" * 9000}, indent=1))
    assert read(tmp_path) == ["a\n" * 9000]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text": "b"', '[{"text": "a"}', '[{"text": "a"}, oops]', '[{"text": "a"} ' + "x" * 99]
)
def test_json_that_is_cut_or_no_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read data file '.*a.json': not whole JSON") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_is_read_and_its_columns_named(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": [*TEXTS[:5000], None], "n": range(len(TEXTS) + 1)})
    parquet.write_table(pyarrow.concat_tables([table] + [table.slice(0, 50)] * 2), tmp_path / "a.parquet")
    report = text.ReadReport()
    assert read(tmp_path, report=report) == TEXTS * 3
    assert "1 null in field 'text', first at" in report.warning() and "a.parquet:row 51" in report.warning()
    with pytest.raises(UserError, match=r"has no text in field 'body'; its fields are 'text', 'n'"):
        read(tmp_path, text_field="body")
    with pytest.raises(UserError, match=r"no text in field 'n' but a number"):
        read(tmp_path, text_field="n")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cannot read data file .*a\.parquet"):
        read(tmp_path)


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else name)
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert line(tmp_path).endswith("; left out: 1 needs pyarrow (b.parquet)")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"holds no file of .*: it holds 1 needs pyarrow \(b.parquet\)"):
        line(tmp_path)


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    for name in ("a.pdf", "sub/b.pdf", "c.csv.gz", "noun", "README.txt", "sub/LICENSE-MIT.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text("x")
    for name in ("part-1.jsonl", "part-2.txt", "sub/part-3.json.gz"):
        (tmp_path / name).touch()
    (tmp_path / "dead.jsonl").symlink_to("nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "void.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "meta.json").write_text('{"made": "today"}')
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "study.json").write_text("{}")
    report = text.ReadReport()
    assert read(tmp_path, report=report) == TEXTS
    assert report.account.left_out == {
        ".pdf": ["a.pdf", "sub/b.pdf"],
        ".csv.gz": ["c.csv.gz"],
        "without a suffix": ["noun"],
        "notes about data": ["README.txt", "sub/LICENSE-MIT.txt"],
        "hidden": [".hidden.jsonl", "sub/.cache"],
        "empty": ["part-1.jsonl", "part-2.txt", "sub/part-3.json.gz", "void.jsonl.gz"],
        "dead link": ["dead.jsonl", "loop.jsonl"],
        "a device, pipe or socket": ["pipe.jsonl"],
        "without a text in field 'text'": ["meta.json"],
        "a study's folder": ["runs/x"],
    }
    said = report.account.line()
    assert (
        "2 x .pdf (a.pdf, sub/b.pdf)" in said and "4 empty (part-1.jsonl, part-2.txt, sub/part-3.json.gz, ...)" in said
    )
    assert "\n" not in said and report.account.record()["empty"]["count"] == 4


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    data, real = tmp_path / "data", tmp_path / "real"
    for folder, word in ((data / "own", "own"), (real / "deep", "linked")):
        folder.mkdir(parents=True)
        (folder / "a.jsonl").write_bytes(lines([word]))
    (tmp_path / "one.jsonl").write_bytes(lines(["one"]))
    (data / "0-again").symlink_to(data / "own")
    (data / "more").symlink_to(real)
    (data / "more2").symlink_to(real / "deep")
    (real / "up").symlink_to(data)
    (data / "single.jsonl").symlink_to(tmp_path / "one.jsonl")
    (data / "twice.jsonl").symlink_to("own/a.jsonl")
    report = text.ReadReport()
    assert read(data, report=report) == ["linked", "own", "one"]
    assert [file.name for file in report.account.files] == ["more/deep/a.jsonl", "own/a.jsonl", "single.jsonl"]
    assert sorted(report.account.left_out[files.TWICE]) == ["0-again", "more/up", "more2", "twice.jsonl"]
    assert read(data / "more" / "deep") == ["linked"]  # a link as the path itself


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", gzip.compress(lines()), r"packed, .* name it a.jsonl.gz"),
        ("a.txt", bz2.compress(lines()), r"packed, .* name it a.txt.bz2"),
        ("a.json", zstandard.compress(lines()), r"packed, .* name it a.json.zst"),
        ("a.json.gz", lines(), "Not a gzipped file"),
        ("a.jsonl.bz2", lines(), "Invalid data stream"),
        ("a.txt.zst", lines(), "cannot read data file"),
        ("a.txt.gz", gzip.compress(lines())[:-9], "ended before the end"),
        ("a.json.bz2", bz2.compress(lines())[:-9], "ended before the end"),
        ("a.json.zst", zstandard.compress(lines())[:-9], "ends before its end mark"),
        ("a.json", "[{}]".encode("utf-16"), "not UTF-8"),
    ],
)
def test_damage_and_names_that_lie_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, word", [(None, "null"), (7, "a number"), (["x"], "a list"), (True, "true or false"), ({}, "an object")]
)
def test_a_text_that_is_none_is_said_for_what_it_is(tmp_path, value, word):
    rows = [json.dumps({"text": t}) for t in TEXTS * 4]
    odd = json.dumps({"text": value})
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, odd]))
    report = text.ReadReport()
    assert len(read(tmp_path, report=report)) == 200
    assert report.warning().startswith(
        f"1 of 201 lines are left out: 1 {word} in field 'text', first at {tmp_path}/a.jsonl:201"
    )
    (tmp_path / "a.jsonl").write_text("\n".join([odd] * 9))
    with pytest.raises(UserError, match=word):
        read(tmp_path)


def test_a_row_without_the_field_is_counted_once_texts_were_met(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 4) + b'{"body": "x"}\n')
    report = text.ReadReport()
    assert len(read(tmp_path, report=report)) == 200
    assert "1 nothing in field 'text'" in report.warning()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_marks_line_ends_nul_and_long_lines_are_text(tmp_path, mark, end):
    texts = ["with \0 in it", "long " * 1_000_000, "a\u2028b\x0cc\x85d"]
    (tmp_path / "a.jsonl").write_text(
        mark + end.join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), "utf-8", newline=""
    )
    assert read(tmp_path) == texts
    (tmp_path / "b.txt").write_text(mark + "one" + end + end + "two\0", "utf-8", newline="")
    assert read(tmp_path / "b.txt") == [f"one{end}{end}two\0"]


@pytest.mark.parametrize("where", ["s3://bucket/data", "gs://b/x.jsonl", "hf://datasets/x", "https://host/a.jsonl"])
def test_an_address_is_no_path(where):
    with pytest.raises(UserError, match="is an address, not a local path; download it") as caught:
        files.account(where)
    assert where in str(caught.value)


def test_paths_as_typed(tmp_path, monkeypatch):
    folder = tmp_path / "a folder, with a comma"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for where in (f"{folder}/", "~/a folder, with a comma", "./a folder, with a comma/../a folder, with a comma"):
        assert read(where) == TEXTS
    with pytest.raises(UserError, match="does not exist"):
        files.account("~/b")
    for path, message in (
        (tmp_path / "void.jsonl", "is not read: empty"),
        (tmp_path / "l.txt", "is not read: dead link"),
    ):
        path.touch() if "void" in path.name else path.symlink_to("nowhere")
        with pytest.raises(UserError, match=message):
            files.account(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["sub", "sub/a.jsonl"])
def test_what_may_not_be_read_is_refused(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(lines())
    (tmp_path / "b.jsonl").write_bytes(lines())
    (tmp_path / name).chmod(0)
    try:
        with pytest.raises(UserError, match=rf"cannot (list|read) data .*{re.escape(name)}.*ermission"):
            read(tmp_path)
    finally:
        (tmp_path / name).chmod(0o700)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    (file,) = files.account(tmp_path).files
    assert len(file.sha256()) == 64
    (tmp_path / "a.jsonl").write_bytes(lines() * 2)
    with pytest.raises(UserError, match=r"a\.jsonl' changed while it was read"):
        file.sha256()
