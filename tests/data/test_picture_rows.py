"""Rows with pictures: their forms, what is wrong with them in one line, and their way into a data set and out of it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python import array_record_module

from phi3_jax.configs import Vision
from phi3_jax.data import chat, export, images, loader, picture_rows, pictured, tokenizers, windows
from phi3_jax.errors import UserError

Image = pytest.importorskip("PIL.Image")
EYES = Vision(tile=28, patch=14, crops=4)  # a token a tile


def llava(picture: Any, asked: str = "<image>\nwhat is it?", said: str = "a dog") -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    return {"conversations": turns} | ({"image": picture} if picture else {})


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]


FORMS = [
    (llava("a.png"), ["<|image_1|>\nwhat is it?"], ["a.png"]),
    (llava(["a.png", "b.png"], "<image> or <image>"), ["<|image_1|> or <|image_2|>"], ["a.png", "b.png"]),
    ({"messages": user("see <image>"), "images": ["a.png"]}, ["see <|image_1|>"], ["a.png"]),
    ({"messages": user("<|image_2|> <|image_1|> <|image_2|>"), "images": ["a.png", "b.png"]},
     ["<|image_2|> <|image_1|> <|image_2|>"], ["a.png", "b.png"]),
    ({"messages": user([{"type": "image"}, {"type": "text", "text": "who?"}]), "images": ["a.png"]},
     ["<|image_1|>\nwho?"], ["a.png"]),
    ({"messages": user([{"type": "text", "text": "who? "}, {"type": "image_url", "image_url": {"url": "b.png"}}])},
     ["who? <|image_1|>\n"], ["b.png"]),
    ({"conversations": [{"images": ["a.png"], "user": "one", "assistant": "1"},
                        {"images": ["b.png"], "user": "two", "assistant": "2"}]},
     ["<|image_1|>\none", "<|image_2|>\ntwo"], ["a.png", "b.png"]),
    ({"texts": [{"user": "q", "assistant": "a"}], "images": [{"path": "a.png", "bytes": None}]},
     ["<|image_1|>\nq"], [{"path": "a.png", "bytes": None}]),
    ({"prompt": user("<image> b?")[:1], "chosen": user("")[1:], "rejected": user("")[1:], "images": ["a.png"]},
     ["<|image_1|> b?"], ["a.png"]),
]  # fmt: skip


@pytest.mark.parametrize("row,asked,pictures", FORMS)
def test_every_form_has_numbered_tags_in_its_questions(row: Any, asked: list[str], pictures: list[Any]) -> None:
    before = json.dumps(row)
    made, found = picture_rows.numbered(row)
    talk = made.get("messages") or made.get("conversations") or made["prompt"]
    texts = [turn.get("content", turn.get("value")) for turn in talk]
    assert texts[::2] == asked and found == pictures
    assert json.dumps(row) == before, "a row that is read twice is the same twice"


def test_documents_are_texts_with_pictures_and_rows_without_are_as_they_were() -> None:
    made, found = picture_rows.numbered({"text": "a <image> b", "images": ["a.png"]})
    assert made["document"] == "a <|image_1|> b" and found == ["a.png"]
    assert picture_rows.numbered({"text": "b", "images": []})[0]["document"] == "b"
    plain = {"messages": user("an <image> of HTML")}
    assert picture_rows.numbered(plain) == (plain, [])
    assert picture_rows.numbered(None) == (None, [])


@pytest.mark.parametrize(
    "row,message",
    [
        (llava("a.png", "no tag"), "0 <image> for 1 picture; give each picture one"),
        (llava(["a.png", "b.png"]), "1 <image> for 2 pictures"),
        (llava("a.png", said="<image>"), "an answer has the tag of a picture"),
        (llava("a.png", "<image> <|image_1|>"), "number all tags or none"),
        (llava("a.png", "<|image_2|>"), "<|image_2|> is in the prompt, and there is 1 picture"),
        (llava(["a.png", "b.png"], "<|image_1|>"), "and no <|image_2|> in the prompt"),
        (llava(None, "<|image_1|>"), "<|image_1|> is in the prompt, and there are 0 pictures"),
        (llava(3), "a picture is 3; it is the name of a file"),
        (llava("gone.png"), "gone.png' cannot be opened: No such file or directory"),
        (llava("text.png"), "text.png' cannot be opened: no picture that Pillow reads"),
        (llava("thin.png"), "thin.png' has sides of 300 and 1 pixels"),
        ({"messages": user([{"type": "video"}])}, "a part of a message is {'type': 'video'}"),
        (
            {"messages": user([{"type": "image", "image": ["a.png", "b.png"]}])},
            "a part of a message has 2 pictures where one is allowed",
        ),
        ({"prompt": "a <image>", "completion": "<image>", "images": ["a.png"]}, "completion has the tag of a picture"),
    ],
)
def test_a_wrong_row_is_one_line_with_file_and_row(shop: Path, row: Any, message: str) -> None:
    write(shop / "rows.jsonl", [llava("a.png"), row, row])
    with pytest.raises(UserError) as error:
        made(shop, "rows.jsonl")
    text = str(error.value)
    assert message in text and "rows.jsonl:2: " in text and "(2 of 3 rows are wrong)" in text and "\n" not in text
    assert not (shop / "out").exists()


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(width: int, height: int, seed: int) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with tok/ (a vision tokenizer) and pics/."""
    import sys

    sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
    from hf_folders import vision_folder

    vision_folder(tmp_path / "tok")
    (tmp_path / "pics").mkdir()
    for name, size in {"a": (30, 20), "b": (20, 50), "c": (90, 20), "thin": (1, 300)}.items():
        draw(*size, ord(name[0])).save(tmp_path / "pics" / f"{name}.png")
    (tmp_path / "pics/text.png").write_text("<html>")
    whole = (tmp_path / "pics/c.png").read_bytes()
    (tmp_path / "pics/cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def made(shop: Path, rows: str, **more: Any) -> dict[str, Any]:
    how = {
        "tokenizer": str(shop / "tok"),
        "template": "vision",
        "window": 64,
        "held_out": 0.0,
        "eyes": "28/14",
        "crops": 4,
    }
    return export.export(shop / "out", f"chats:{shop / rows}", **{**how, "images": str(shop / "pics"), **more})


def test_windows_and_pictures_come_back_as_they_went_in(shop: Path) -> None:
    rows = [llava(["b.png", "c.png"], "<image> then <image>"), llava("a.png"), llava(None, "hello"), llava("b.png")]
    write(shop / "rows.jsonl", rows)
    manifest = made(shop, "rows.jsonl")
    assert manifest["pictures"]["count"] == 3 and manifest["generator"]["eyes"] == "28/14"
    ds = loader.open_dataset(shop / "out", verify="sha256")
    shown = loader.pictures(ds, EYES)
    (entry,) = ds.manifest["sources"]
    tokenizer, names = tokenizers.load(shop / "tok"), {"a.png": 0, "b.png": 0, "c.png": 0}
    ((batch, count),) = loader.source_batches(ds, 0, 8)
    assert sum(map(len, (shown.of(entry, i) for i in range(8)))) == 4 and shown.of(entry, count) == []
    sight = shown.sight([shown.of(entry, i) for i in range(8)], 64, 1, [0])
    # Every row alone, by the functions that generation uses.
    found = 0
    album_tiles = {n: images.tiles_of(images.Picture(shop / "pics" / n), 4, EYES) for n in names}
    for row in rows:
        messages = [
            {"role": r, "content": t["value"]} for r, t in zip(("user", "assistant"), row["conversations"], strict=True)
        ]
        pictures = row.get("image") or []
        pictures = [pictures] if isinstance(pictures, str) else pictures
        text, _ = picture_rows.numbered({"messages": messages, "images": pictures})
        counts = [images.grid_of(*images.Picture(shop / "pics" / n).size, 4, 28).tokens(1) for n in pictures]
        ids = chat.masked_ids(tokenizer, text["messages"], "vision", [1], counts)[0]
        for r in range(count):
            for segment in range(1, batch["segments"][r].max() + 1):
                here = batch["segments"][r] == segment
                if not np.array_equal(batch["tokens"][r][here], pictured.tokens_of(ids[:-1])):
                    continue
                index = sight.index[r][here]
                if not np.array_equal(index >= 0, ids[:-1] < 0):
                    continue
                tiles = np.concatenate([album_tiles[n] for n in pictures]) if pictures else np.zeros((0, 3, 28, 28))
                seen = index[(index >= 0) & (index < len(sight.tiles))]
                if np.array_equal(np.sort(sight.tiles[seen].ravel()), np.sort(tiles.ravel().astype(np.float32))):
                    found += 1
    assert found >= 4
    assert not (batch["domains"][sight.index >= 0] * (np.roll(sight.index, -1, 1)[sight.index >= 0] >= 0)).any()
    again = made(shop, "rows.jsonl")
    assert again["fingerprint"] == manifest["fingerprint"]


def test_a_picture_of_as_many_bytes_and_pixels_is_another(shop: Path) -> None:
    for name, level in (("a", 10), ("b", 20)):
        Image.new("RGB", (30, 20), (level, level, level)).save(shop / f"pics/{name}.bmp")
    write(shop / "rows.jsonl", [llava("a.bmp")])
    made(shop, "rows.jsonl")
    old = (shop / "pics/a.bmp").stat()
    (shop / "pics/a.bmp").write_bytes((shop / "pics/b.bmp").read_bytes())
    os.utime(shop / "pics/a.bmp", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (shop / "pics/a.bmp").stat().st_size == old.st_size
    with pytest.raises(UserError, match="input files have changed: 1 pictures, "):
        made(shop, "rows.jsonl")


def test_a_picture_counts_in_the_fingerprint_and_another_model_is_refused(shop: Path) -> None:
    write(shop / "rows.jsonl", [llava("a.png")])
    first = made(shop, "rows.jsonl")["fingerprint"]
    ds = loader.open_dataset(shop / "out")
    for eyes in (None, Vision(tile=56, patch=14)):
        with pytest.raises(UserError, match="has pictures for tiles of 28"):
            loader.pictures(ds, eyes)
    Image.new("RGB", (30, 20), "red").save(shop / "pics/a.png")
    with pytest.raises(UserError, match="input files have changed: 1 pictures, "):
        made(shop, "rows.jsonl")
    made(shop, "rows.jsonl", overwrite=True)
    assert loader.open_dataset(shop / "out").manifest["fingerprint"] != first
    (shard,) = (shop / "out").glob("pictures-*")
    shown = loader.pictures(loader.open_dataset(shop / "out"), EYES)
    writer = array_record_module.ArrayRecordWriter(str(shard), export.WRITER_OPTIONS)
    writer.write((shop / "pics/a.png").read_bytes() + b"none")
    writer.close()
    with pytest.raises(UserError, match="damaged data: picture 0 of shard"):
        shown.tiles({0})


def test_pictures_that_do_not_decode_end_the_export_or_are_counted(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(shop / "rows.jsonl", [llava("a.png"), llava("cut.png"), llava("gone.png"), llava("b.png")])
    with pytest.raises(UserError, match=r"rows.jsonl:3: picture '.*gone.png' cannot be opened"):
        made(shop, "rows.jsonl")
    write(shop / "cut.jsonl", [llava("a.png"), llava("cut.png")])
    with pytest.raises(UserError, match=r"cut.jsonl:2: picture '.*cut.png' is damaged: .*on_error=skip"):
        made(shop, "cut.jsonl")
    assert not (shop / "out").exists()
    manifest = made(shop, "rows.jsonl", on_error="skip")
    assert manifest["pictures"]["count"] == 2
    assert "2 of 4 rows were left out: 1 picture .. cannot be opened" in capsys.readouterr().err


def test_pictures_for_a_text_model_and_without_a_folder_are_one_line(shop: Path) -> None:
    write(shop / "rows.jsonl", [llava("a.png")])
    with pytest.raises(UserError, match="which a text model does not read: start from a phi-3-vision"):
        made(shop, "rows.jsonl", template="mini", tokenizer="tiny", images=None)
    with pytest.raises(UserError, match="say with images=FOLDER where they lie"):
        made(shop, "rows.jsonl", images=None)
    with pytest.raises(UserError, match="nowhere is no folder"):
        made(shop, "rows.jsonl", images=str(shop / "nowhere"))
    with pytest.raises(UserError, match="--eyes 336 must be TILE/PATCH"):
        made(shop, "rows.jsonl", eyes="336")


def test_documents_bear_loss_on_all_text_and_a_cut_row_has_whole_pictures(shop: Path) -> None:
    write(shop / "rows.jsonl", [{"text": "before <image> after <image>", "images": ["a.png", "c.png"]}])
    made(shop, "rows.jsonl")
    ds = loader.open_dataset(shop / "out")
    ((batch, _),) = loader.source_batches(ds, 0, 1)
    begin = pictured.begin_of(tokenizers.load(shop / "tok"))
    shown = loader.pictures(ds, EYES).of(ds.manifest["sources"][0], 0)
    bears, used = batch["domains"][0] > 0, batch["segments"][0] > 0
    assert (batch["targets"][0][bears] != begin).all()
    places = sum(loader.pictures(ds, EYES).grids[p].tokens(1) for _, p in shown)
    assert bears.sum() == used.sum() - places - 2  # the `<s>` after each; the first is nobody's target
    # Cut wherever: tokens of a picture are there all or not at all.
    write(shop / "long.jsonl", [llava("c.png"), llava(["a.png", "c.png"], "<image>" + "x" * 9 + "<image>", "yes " * 9)])
    for window in range(24, 60, 3):
        export.export(shop / f"w{window}", f"chats:{shop / 'long.jsonl'}", window=window, tokenizer=str(shop / "tok"),
                      template="vision", held_out=0.0, eyes="28/14", crops=4, images=str(shop / "pics"))  # fmt: skip
        one = loader.open_dataset(shop / f"w{window}")
        all_shown = loader.pictures(one, EYES)
        for batch, count in loader.source_batches(one, 0, 4):
            for row in range(count):
                for column, picture in all_shown.of(one.manifest["sources"][0], row):
                    span = batch["segments"][row, column : column + all_shown.grids[picture].tokens(1)]
                    assert len(span) == all_shown.grids[picture].tokens(1) and len(set(span)) == 1 and span[0]


def test_a_picture_is_held_out_with_all_its_rows(shop: Path) -> None:
    for i in range(40):
        draw(30, 20, i).save(shop / f"pics/p{i}.png")
    write(shop / "rows.jsonl", [llava(f"p{i}.png", said=f"{k}") for i in range(40) for k in range(2)])
    made(shop, "rows.jsonl", held_out=0.3)
    ds = loader.open_dataset(shop / "out")
    shown = loader.pictures(ds, EYES)
    sides = [
        {picture for i in range(entry["windows"]) for _, picture in shown.of(entry, i)}
        for entry in (ds.manifest["sources"][0], ds.manifest["evals"][0])
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40


def test_bytes_in_parquet_and_names_of_files_give_the_same_pictures(shop: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    draw(30, 20, 7).save(buffer, "PNG")
    (shop / "pics/d.png").write_bytes(buffer.getvalue())
    texts = [{"user": "what is it?", "assistant": "a dog"}]
    table = {"images": [[{"bytes": buffer.getvalue(), "path": None}]] * 2, "texts": [texts, texts]}
    parquet.write_table(pyarrow.table(table), shop / "rows.parquet")
    write(shop / "rows.jsonl", [llava("d.png")] * 2)
    contents = []
    for rows in ("rows.parquet", "rows.jsonl"):
        manifest = made(shop, rows, overwrite=True)
        assert manifest["pictures"]["count"] == 1
        contents.append(manifest["sources"][0]["content"])
    assert contents[0] == contents[1]


def test_windows_keep_their_pictures_when_taken_and_joined() -> None:
    blank = np.zeros((2, 4), np.int32)
    one = windows.Windows(blank, blank, blank, blank, seen=(windows.Seen(0, 1, "a"), windows.Seen(1, 2, "b")))
    assert windows.concatenate([one, one]).seen[2:] == (windows.Seen(2, 1, "a"), windows.Seen(3, 2, "b"))
    assert one[1:].seen == (windows.Seen(0, 2, "b"),)
    assert one[np.array([1, 0])].seen == (windows.Seen(0, 2, "b"), windows.Seen(1, 1, "a"))


def test_pairs_of_responses_share_the_tiles_of_their_picture(shop: Path) -> None:
    asked = [{"role": "user", "content": "<image> what?"}]
    answer = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    pair = {"prompt": asked, "chosen": answer("a dog"), "rejected": answer("no dog at all"), "images": ["a.png"]}
    whole = {"chosen": asked + answer("a dog"), "rejected": asked + answer("no"), "images": ["a.png"]}
    write(shop / "pairs.jsonl", [pair])
    write(shop / "whole.jsonl", [whole])
    for rows in ("pairs.jsonl", "whole.jsonl"):
        manifest = made(shop, rows, overwrite=True)
        ds = loader.open_dataset(shop / "out")
        shown, (entry,) = loader.pictures(ds, EYES), ds.manifest["sources"]
        ((batch, _),) = loader.source_batches(ds, 0, 1)
        assert manifest["domains"] == ["chosen", "rejected"] and batch["segments"].max() == 2
        places = shown.of(entry, 0)
        assert [picture for _, picture in places] == [0, 0]
        assert [batch["segments"][0, column] for column, _ in places] == [1, 2]
        sight = shown.sight([places], 64, 1, [0])
        assert sight.count.tolist() == [shown.grids[0].tiles]
        halves = [sight.index[0][batch["segments"][0] == number] for number in (1, 2)]
        assert np.array_equal(*(half[half >= 0] for half in halves)) and (halves[0] >= 0).any()


def test_units_of_a_batch_have_their_own_tiles_and_share_a_picture(shop: Path) -> None:
    write(shop / "rows.jsonl", [llava(n) for n in ("a.png", "b.png", "c.png")])
    made(shop, "rows.jsonl")
    ds = loader.open_dataset(shop / "out")
    shown = loader.pictures(ds, EYES)
    tiles = [grid.tiles for grid in shown.grids]
    rows = [[(0, 0)], [(1, 1)], [(2, 0)], [(0, 2)], [], [(3, 2)], [(0, 2), (20, 1)], []]
    whole = shown.sight(rows, 64, 2, [0, 1], 2)
    units = [[0, 2], [1, 3], [4, 6], [5, 7]]  # of two shards, each of two microbatches
    totals = [tiles[0], tiles[1] + tiles[2], tiles[2] + tiles[1], tiles[2]]
    assert whole.count.tolist() == totals
    room = pictured.bucket(max(totals))
    assert len(whole.tiles) == 4 * room
    per_shard = whole.tiles.reshape(2, room, 2, 3, 28, 28)
    for number, unit in enumerate(units):
        own = per_shard[number // 2, :, number % 2]
        alone = shown.sight([rows[i] for i in unit], 64, 1, [0])
        n = len(alone.tiles)
        np.testing.assert_array_equal(own[:n][: totals[number]], alone.tiles[: totals[number]])
        for place, i in enumerate(unit):
            ends = alone.index[place] >= n
            np.testing.assert_array_equal(
                whole.index[i], np.where(ends, alone.index[place] - n + room, alone.index[place])
            )
    half = shown.sight(rows, 64, 2, [1], 2)
    np.testing.assert_array_equal(half.tiles, whole.tiles[2 * room :])
    np.testing.assert_array_equal(half.index, whole.index[4:])
