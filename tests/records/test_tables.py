"""Tables of runs as spreadsheets, loggers and people write them: read for what they are, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.records import tables
from phi3_jax.scaling import causal, laws

LAW = laws.Law(1.7, 400.0, 1500.0, 0.33, 0.37)
GRID = [(n, d) for n in np.geomspace(1e7, 1e9, 4) for d in np.geomspace(1e9, 1e11, 4)]
LINES = ["params,tokens,loss", *(f"{n!r},{d!r},{float(LAW(n, d))!r}" for n, d in GRID)]
PLAIN = "\n".join(LINES).replace("np.float64(", "").replace(")", "") + "\n"
WORDS = ["--n", "params", "--d", "tokens", "--loss", "loss", "--bootstrap", "0"]


def run(path: Path, content: str | bytes, *words: str) -> int:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return main(["fit", str(path), *WORDS, *words])


def quoted(text: str) -> str:
    return "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: b"\xef\xbb\xbf" + t.encode(),
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: t.rstrip("\n"),
        quoted,
        lambda t: b"\xef\xbb\xbf" + quoted(t).replace("\n", "\r\n").encode(),
        lambda t: t.replace(",", " , "),
        lambda t: quoted(t).replace(",", ", "),
        lambda t: t.replace("\n", ",\n"),
        lambda t: t.replace("\n", ",,,\n"),
        lambda t: t.replace("\n", ",\n").replace("loss,\n", "loss\n"),
        lambda t: t.replace("\n", "\n\n"),
        lambda t: "\n\n" + t + ",,\n ,\n",
        lambda t: "".join(f",{line}\n" if not i else f"{i},{line}\n" for i, line in enumerate(t.splitlines())),
    ],
)
def test_what_harms_nothing_gives_the_same_law(change: object, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "plain.csv", PLAIN) == 0
    expected = capsys.readouterr().out
    assert "alpha  0.33" in expected
    assert run(tmp_path / "changed.csv", change(PLAIN)) == 0  # type: ignore[operator]
    assert capsys.readouterr().out == expected


def cell(line: int, column: int, value: str) -> str:
    """The table with one cell exchanged, on a line of the file (the header is line 1)."""
    rows = [row.split(",") for row in PLAIN.splitlines()]
    rows[line - 1][column] = value
    return "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (PLAIN.replace(",", ";"), "by semicolons"),
        (PLAIN.replace(",", ";").replace(".", ","), "by semicolons"),
        (quoted(PLAIN).replace(",", ";"), "by semicolons"),
        (PLAIN.replace(",", "\t"), "by tabs"),
        (PLAIN.replace(",", "|"), "by bars"),
        ("", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        ("\n\n", "is empty"),
        (PLAIN.splitlines()[0], "has no rows"),
        (PLAIN.replace("params,tokens,loss", "params,loss,loss"), "the column 'loss' twice"),
        (PLAIN.replace("params,tokens,loss", 'params,"loss ", loss'), "the column 'loss' twice"),
        (PLAIN.encode("utf-16"), "no UTF-8 text"),
        (b"params,tokens,loss\n\xff\xfe,1,2\n", "no UTF-8 text"),
        (PLAIN.replace("params", "\0params"), "no column 'params'"),
        (cell(3, 1, '"1'), "as a table"),
        ("\n" + cell(5, 2, "1,5"), "line 6 has 4 cells and the header 3"),
        (PLAIN + "1e9", f"line {len(GRID) + 2} has 1 cells"),
        *((cell(7, column, value), f"line 7: {name} is {value!r}")
          for column, name in enumerate(("params", "tokens", "loss"))
          for value in ("nan", "-inf", "Infinity", "0", "-3", "", "7B", "1_000", "1e999", "--")),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_one_line(
    content: str | bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"
    assert run(tmp_path / "runs.csv", content, "--card", str(card)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not card.exists()
    assert said in error and "runs.csv" in error


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b\n\n1,2\n"3\n3",4\n\n5,6\n')
    rows = tables.read(tmp_path / "t.csv")
    assert [row.line for row in rows] == [3, 4, 7] and rows[1]["a"] == "3\n3"
    with pytest.raises(UserError, match="line 4: a is"):
        rows[1].number("a")
    assert rows[2].number("b") == 6


def test_a_folder_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        assert main(["fit", str(path), *WORDS]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot read {path}") and error.count("\n") == 1


def test_tables_of_arms_go_through_the_same_reader(tmp_path: Path) -> None:
    text = "arm,member,non_embedding,seed,status,knowledge/universe/recall\na,mini,1e5,0,finished,{}\n"
    (tmp_path / "runs.csv").write_text("\ufeff" + text.format("0.5"))
    assert causal.read(tmp_path / "runs.csv")[0].scores == {"knowledge/universe/recall": 0.5}
    (tmp_path / "runs.csv").write_text(text.format("high"))
    with pytest.raises(UserError, match="line 2: knowledge/universe/recall is 'high'"):
        causal.read(tmp_path / "runs.csv")
