"""Rows of JSON: nothing inside one ends its line, for any reader; who adds some owns the folder; torn lines are none."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from phi3_jax.errors import UserError
from phi3_jax.records import goodput, ownership, rows

BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\0"]


@pytest.mark.parametrize("sign", BREAKS)
def test_nothing_in_a_text_ends_a_row_for_any_reader(tmp_path: Path, sign: str) -> None:
    path, row = tmp_path / "x.jsonl", {"id": f"a{sign}b", "value": 1}
    rows.put_rows(path, [row, {"id": "c"}], ("id",))
    rows.append(path, {"id": f"d{sign}"})
    want = [row, {"id": "c"}, {"id": f"d{sign}"}]
    assert rows.read(path) == (want, 0)
    with open(path, encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == want
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == want
    text = f"a{sign}b"
    naive = json.dumps({"id": text}, ensure_ascii=False).splitlines()
    assert sign not in "\x85\u2028\u2029" or len(naive) == 2, "control: unescaped, these break the line"


def test_text_stays_readable_and_what_utf8_cannot_say_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows.put_rows(path, [{"id": "Grüße 世界 🙂"}, {"id": "\ud800 half"}], ("id",))
    assert "Grüße 世界 🙂" in path.read_text("utf-8")
    assert [row["id"] for row in rows.read(path)[0]] == ["Grüße 世界 🙂", "\ud800 half"]


@pytest.mark.parametrize("torn", [b'{"id": "t', b"\0\0\0", b'{"id": "t"}', b"[1]", b"3"])
def test_an_appended_row_stands_on_a_line_of_its_own(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + torn)
    rows.append(path, {"id": "b"})
    assert path.read_bytes() == b'{"id": "a"}\n' + torn + b'\n{"id": "b"}\n'
    assert [row["id"] for row in rows.read(path)[0]] == ["a", *["t"] * torn.endswith(b"}"), "b"]


def test_who_adds_rows_owns_the_folder_and_waits_for_its_owner(tmp_path: Path, monkeypatch) -> None:
    path, owned = tmp_path / "out" / "x.jsonl", []
    put = rows.put_rows
    monkeypatch.setattr(rows, "put_rows", lambda *a: owned.append((path.parent / ownership.INSIDE).exists()) or put(*a))
    rows.add_rows(path, [{"id": 1}], "choose another --out", ("id",))
    assert owned == [True] and not (path.parent / ownership.INSIDE).exists()
    with ownership.own(path.parent, "-", inside=True):
        waiting = threading.Thread(target=rows.add_rows, args=(path, [{"id": 2}], "choose another --out", ("id",)))
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive() and owned == [True], "not while somebody else writes there"
    waiting.join()
    assert [row["id"] for row in rows.read(path)[0]] == [1, 2]


def test_a_row_that_cannot_be_added_is_one_line_and_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.jsonl"
    rows.add_rows(path, [{"id": 1}], "choose another --out", ("id",))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows, "put_rows", full)
    with pytest.raises(UserError, match=r"x.jsonl: No space left on device; free some space, or choose another --out$"):
        rows.add_rows(path, [{"id": 2}], "choose another --out", ("id",))
    assert rows.read(path) == ([{"id": 1}], 0) and [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("bad", [b"\0" * 9, b"[1]", b"3", b'"x"', b"\xff", b"[" * 100_000, b'{"attempt": 1e999}',
                                 b'{"attempt": 1, "step": NaN, "seconds": {}}', b"{}"])  # fmt: skip
def test_goodput_is_read_as_all_rows_are(tmp_path: Path, bad: bytes) -> None:
    good = {"attempt": 1, "event": "open", "from": None, "step": 3, "seconds": dict.fromkeys(goodput.PHASES, 1.0)}
    path = tmp_path / goodput.FILE
    endless = good | {"seconds": good["seconds"] | {"step": float("inf")}}
    path.write_bytes(json.dumps(endless).encode() + b"\n" + json.dumps(good).encode() + b"\n" + bad)
    assert goodput.read(tmp_path) == [good] and goodput.account(tmp_path)["attempts"] == 1
    with goodput.Clock(tmp_path):
        pass
    assert [row["attempt"] for row in goodput.read(tmp_path)] == [1, 2, 2]


def test_an_account_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / goodput.FILE).mkdir()
    assert goodput.read(tmp_path) == [] and goodput.account(tmp_path) is None
    with goodput.Clock(tmp_path):
        pass
    assert os.listdir(tmp_path) == [goodput.FILE]
