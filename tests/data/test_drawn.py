"""Drawn items: answers are right, each stands behind its cell, and pictures show what the text says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data import export, images, loader, meters
from phi3_jax.data.corpora import drawn
from phi3_jax.data.meters.meter import Evaluation
from phi3_jax.errors import UserError
from phi3_jax.models import vision

COUNT = 300
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "max": max, "min": min}


def test_answers_are_what_the_cells_say() -> None:
    kinds, cells, answers = drawn.items(5, "train", 0, COUNT)
    symbols = []
    for kind, shown, said in zip(kinds, cells.tolist(), answers.tolist(), strict=True):
        if kind == 0:
            symbols.append(sum(cell != 4 for cell in shown))
            assert said == shown
        elif kind == 1:
            heights = [sum(shown[4 * row + column] - 152 for row in range(4)) for column in range(4)]
            assert said == [0] * 12 + [16 + height for height in heights]
            for column in range(4):  # bars stand on the ground, and have no holes
                filled = [shown[4 * row + column] - 152 for row in range(4)]
                assert filled == sorted(filled) and sum(0 < f < 8 for f in filled) <= 1
        else:
            value, expected, steps = (shown[0] - 112) % 10, [0], 0
            gaps = list(drawn.GAPS)
            for cell in shown[1:]:
                operator, digit = divmod(cell - 112, 10)
                value = min(31, max(0, SIGNS[drawn.OPERATORS[operator]](value, digit)))
                steps += 1
                expected.append(16 + value if steps == gaps[0] else 0)
                if steps == gaps[0]:
                    steps, gaps = 0, gaps[1:]
            assert said == expected and not gaps
    assert set(symbols) == {4, 5, 6}


def test_items_depend_on_their_number_alone() -> None:
    whole, part = drawn.items(5, "train", 0, 40), drawn.items(5, "train", 17, 9)
    assert all((a[17:26] == b).all() for a, b in zip(whole, part, strict=True))
    assert (drawn.items(6, "train", 0, 40)[1] != whole[1]).any() and (
        drawn.items(5, "eval", 0, 40)[1] != whole[1]
    ).any()


def test_each_way_to_show_the_content_asks_the_same() -> None:
    text, picture, hidden = (drawn.windows(5, "train", 0, COUNT, shown) for shown in ("text", "picture", "hidden"))
    for other in (picture, hidden):
        assert (other.targets == text.targets).all() and (other.domains == text.domains).all()
        assert (other.tokens[:, 22:] == text.tokens[:, 22:]).all()
    for row in range(COUNT):  # a cell's name and its answer stand 21 places apart; row ends bear no loss
        content = text.tokens[row, 1:22]
        assert content[0] == 1 and (content[5::5] == 2).all()
        where = np.flatnonzero(text.domains[row] == 1)
        assert len(where) == 16 and (text.targets[row, where] == text.tokens[row, where]).all()
        answered = np.flatnonzero(text.domains[row] > 1)
        assert set((answered - 20).tolist()) <= set(where.tolist())  # an input before its answer, as any target
    assert len({tuple(row) for row in hidden.tokens[:, :22].tolist()}) == 3  # the kind shows, and nothing else
    assert [one.column for one in picture.seen] == [1] * COUNT and not text.seen and not hidden.seen


def test_a_picture_is_a_png_that_shows_its_cells() -> None:
    from PIL import Image

    cells = drawn.items(5, "train", 0, 60)[1]
    for number, ids in enumerate(cells):
        decoded = np.asarray(Image.open(io.BytesIO(drawn.Drawings().bytes_of(f"5/train/{number}"))))
        assert (decoded == drawn.pixels(ids)).all()
    looks = {tuple(drawn._drawn()[i].ravel().tolist()) for i in [4, *range(48, 161)] if i != 152}
    assert len(looks) == 1 + 64 + 40 + 8  # no two ids look alike, but for the empty cell and the empty part of a bar


def test_an_exported_picture_stands_where_the_text_does(tmp_path: Path) -> None:
    export.export(tmp_path / "data", "drawn:picture", tokens=4200, seed=7)
    ds = loader.open_dataset(tmp_path / "data")
    pictures = loader.pictures(ds, drawn.EYES)
    part = ds.manifest["sources"][0]
    sight = pictures.sight([pictures.of(part, window) for window in range(6)], drawn.WINDOW, 1, [0])
    assert sight.count.tolist() == [6] and sight.tiles.shape[1:] == (3, 32, 32)
    cells = drawn.items(7, "train", 0, 6)[1]
    for row in range(6):
        pixels = images.normalised(drawn.pixels(cells[row]))
        assert np.abs(sight.tiles[row] - pixels).max() < 1e-5
        at = sight.index[row]
        content = np.flatnonzero(at >= 0)
        assert content.tolist() == list(range(1, 22))
        ends = len(sight.tiles) * 16
        assert (at[1], at[6], at[21]) == (ends + 1, ends, ends) and vision.ENDS == 2
        assert at[drawn._CELLS + 1].tolist() == list(range(16 * row, 16 * row + 16))
    text = export.export(tmp_path / "text", "drawn:text", tokens=4200, seed=7)
    assert "pictures" not in text and text["sources"][0]["targets"] == ds.manifest["sources"][0]["targets"]


def test_the_meter_counts_items_whose_answers_are_all_right() -> None:
    windows = drawn.windows(0, "eval", 0, 12, "text", 2)
    hit = np.ones(windows.domains.shape, bool)
    wrong = np.flatnonzero(windows.domains[0] == 3)[4]  # the first of gap 3
    hit[0, wrong] = False
    hit[1, np.flatnonzero(windows.domains[1] == 1)] = False
    found = Evaluation(
        "sums", hit * 0.0, hit, None, None, windows.targets, windows.domains, drawn.extra(2), None, 176, 1
    )
    rows = {f"{row['task']} {row['metric']}": row["value"] for row in meters.find("seeing").measure(found)}
    assert rows["sums exact"] == 7 / 8 and rows["sums gap1 accuracy"] == rows["sums gap2 accuracy"] == 1
    assert rows["sums accuracy"] == pytest.approx(1 - 1 / 56) and rows["sums gap3 accuracy"] == pytest.approx(
        1 - 1 / 24
    )
    assert rows["sums cells accuracy"] == 7 / 8


def test_evals_have_as_many_items_as_they_say() -> None:
    for kind, wanted in enumerate((256, 256, 1024)):
        assert len(drawn.windows(0, "eval", 0, drawn.among(kind, wanted), "text", kind)) == wanted


def test_who_does_not_look_gets_a_fifth_of_the_sums_right() -> None:
    found = drawn.blind_policies()
    assert round(found["constant"], 3) == 0.203 and round(found["after"], 3) == 0.225


def test_another_way_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'pictures'"):
        export.export(tmp_path / "x", "drawn:pictures")
