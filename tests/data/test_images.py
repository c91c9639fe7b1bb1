"""Files, grids, pixels and places of pictures, against Microsoft's processor; prompts with pictures in them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.configs import Vision
from phi3_jax.data import chat, images, pictured, tokenizers
from phi3_jax.errors import UserError
from phi3_jax.family import published

PIL = pytest.importorskip("PIL")
SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDENS, EYES = SHARED / "goldens", Vision()
DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8}


def read(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            found[name] = np.frombuffer(raw[start + a : start + b], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    ("width", "height", "crops", "rows", "columns", "tokens"),
    [(1344, 1344, 16, 4, 4, 2509), (1, 1, 16, 4, 4, 2509), (640, 480, 16, 3, 4, 1921), (10, 10, 1, 1, 1, 313),
     (320, 20, 4, 1, 4, 745), (20, 320, 4, 4, 1, 781)],
)  # fmt: skip
def test_a_size_says_what_a_picture_takes(width, height, crops, rows, columns, tokens) -> None:
    grid = images.grid_of(width, height, crops)
    assert (grid.rows, grid.columns, grid.tokens()) == (rows, columns, tokens)
    assert len(images.layout(rows, columns)) == tokens


def test_grids_never_hold_more_tiles_than_crops_and_keep_the_aspect() -> None:
    random = np.random.default_rng(0)
    for crops in (1, 4, 9, 16):
        for width, height in random.integers(1, 4000, (200, 2)):
            if max(width, height) > 300 * crops * min(width, height):
                continue
            grid = images.grid_of(int(width), int(height), crops)
            assert 1 <= grid.rows * grid.columns <= crops
            wide, high = grid.resized
            long, short = max(width, height), min(width, height)
            assert high == int(wide / (long / short)) and math.isclose(wide / 336, max(grid.rows, grid.columns))


def test_a_strip_too_thin_is_refused_by_its_numbers() -> None:
    with pytest.raises(UserError, match="sides of 6000 and 1 pixels; beyond 1344 to 1"):
        images.grid_of(1, 6000, 4)
    assert images.grid_of(1344, 1, 4).resized == (1344, 1)


@pytest.mark.shared("goldens")
def test_the_published_geometry() -> None:
    rows = json.loads((GOLDENS / "vision_hd_table.json").read_text())["rows"]
    assert len(rows) > 40
    for row in rows:
        size = row["width"], row["height"], row["num_crops"]
        if "error" in row:
            with pytest.raises(UserError):
                images.grid_of(*size)
            continue
        grid = images.grid_of(*size)
        assert [grid.rows, grid.columns] == row["crop_rows_cols"] and grid.tokens() == row["num_img_tokens"]
        assert list(grid.resized) == row["resized_width_height"] and grid.above == row["pad_top_bottom"][0]


# ------------------------------------------------------------------------------------------------ pixels


def bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pillow's 8-bit BILINEAR along axis 0: a triangle as wide as the step, 22-bit weights, rounded to uint8."""
    step = pixels.shape[0] / size
    reach, out = max(step, 1.0), np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        centre = (i + 0.5) * step
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), pixels.shape[0])
        weights = np.maximum(0, 1 - np.abs((np.arange(first, last) + 0.5 - centre) / reach))
        whole = np.floor(weights / weights.sum() * 2**22 + 0.5).astype(np.int64)
        out[i] = np.clip((np.tensordot(whole, pixels[first:last].astype(np.int64), 1) + 2**21) >> 22, 0, 255)
    return out


@pytest.mark.parametrize(("width", "height", "crops"), [(61, 43, 2), (700, 500, 4), (43, 150, 4), (1, 1, 1)])
def test_resizing_is_integer_arithmetic(width: int, height: int, crops: int) -> None:
    picture = images.Picture(photo(width, height))
    grid = picture.grid(crops, EYES)
    pixels = photo(width, height)
    pixels = pixels.transpose(1, 0, 2) if grid.transposed else pixels
    wide, high = grid.resized
    across = bilinear(pixels.transpose(1, 0, 2), wide).transpose(1, 0, 2)
    whole = np.full((336 * (grid.columns if grid.transposed else grid.rows), wide, 3), 255, np.uint8)
    whole[grid.above : grid.above + high] = bilinear(across, high)
    found = images.padded(picture, grid)
    np.testing.assert_array_equal(found, whole.transpose(1, 0, 2) if grid.transposed else whole)


def test_tiles_are_the_whole_and_the_grid_row_by_row() -> None:
    picture = images.Picture(photo(672, 336))
    tiles = images.tiles_of(picture, 2, EYES)
    assert tiles.shape == (3, 3, 336, 336) and tiles.dtype == np.float32
    values = images.normalised(photo(672, 336))
    np.testing.assert_array_equal(tiles[1], values[:, :, :336])
    np.testing.assert_array_equal(tiles[2], values[:, :, 336:])
    flat = images.Picture(np.full((50, 50, 3), 100, np.uint8))
    np.testing.assert_allclose(images.tiles_of(flat, 1, EYES)[0], images.tiles_of(flat, 1, EYES)[1], atol=1e-6)


@pytest.mark.shared("goldens")
@pytest.mark.parametrize("name", ["vision_pixels_a", "vision_pixels_b"])
def test_pixels_are_the_originals(name: str) -> None:
    meta, t = json.loads((GOLDENS / f"{name}.json").read_text()), read(GOLDENS / f"{name}.safetensors")
    for one in meta["images"]:
        i, crops = one["index"], one["num_crops"]
        picture = images.Picture(t[f"image_{i}"])
        whole = images.padded(picture, picture.grid(crops, EYES))
        np.testing.assert_array_equal(whole[::2, ::2], t[f"hd_image_every_2nd_{i}"])
        values = np.zeros(one["pixel_values_shape"], np.float32)  # the original fills up with tiles of zeros
        tiles = images.tiles_of(picture, crops, EYES)
        values[: len(tiles)] = tiles
        np.testing.assert_allclose(values[tuple(t[f"points_{i}"].T)], t[f"values_at_points_{i}"], rtol=0, atol=3e-6)
        np.testing.assert_allclose(values[0, :, ::3, ::3], t[f"global_every_3rd_{i}"], rtol=0, atol=3e-6)


@pytest.mark.shared("goldens/vision2")
def test_files_are_opened_as_the_original_opens_them(capsys) -> None:
    folder = GOLDENS / "vision2"
    meta, t = json.loads((folder / "preprocess.json").read_text()), read(folder / "preprocess.safetensors")
    sha = lambda a: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]  # noqa: E731
    assert len(meta["files"]) == 39
    for one in meta["files"]:
        path = folder / "preprocess" / one["file"]
        if "original" in one:
            with pytest.raises(UserError) as error:
                images.tiles_of(images.Picture(path), 4, EYES)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
            continue
        picture = images.Picture(path)
        grid, key = picture.grid(4, EYES), one["file"].replace(".", "_")
        assert list(picture.size) == one["width_height"] and grid.tokens() == one["num_img_tokens"]
        assert sha(np.asarray(picture.rgb())) == one["rgb_sha256"], one["file"]
        assert sha(images.padded(picture, grid)) == one["padded_sha256"], one["file"]
        values, tiles = np.zeros((5, 3, 336, 336), np.float32), images.tiles_of(picture, 4, EYES)
        values[: len(tiles)] = tiles
        np.testing.assert_allclose(
            values[tuple(t[f"points_{key}"].T)], t[f"at_points_{key}"], rtol=0, atol=3e-6, err_msg=one["file"]
        )


@pytest.mark.shared("goldens/vision2")
def test_every_token_shows_the_patches_of_the_original() -> None:
    folder = GOLDENS / "vision2"
    meta, t = json.loads((folder / "layout.json").read_text()), read(folder / "layout.safetensors")
    for case in meta["cases"]:
        found = []
        for image, grid in enumerate(case["grids_rows_cols"]):
            one = images.layout(*grid)
            tile, (y, x) = one // 144, np.divmod(one % 144, 12)
            first = (image * case["tiles_per_image"] + tile) * 576
            quarters = [first + (2 * y + dy) * 24 + 2 * x + dx for dy in (0, 1) for dx in (0, 1)]
            found.append(np.where(one[:, None] >= 0, np.stack(quarters, 1), one[:, None]))
        np.testing.assert_array_equal(np.concatenate(found), t[case["tensor"]])


# ------------------------------------------------------------------------------------------------ files of one's own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    image = Image.fromarray(photo(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "lying.png", exif=exif)
    image.save(tmp_path / "plain.png")
    alpha = image.convert("RGBA")
    alpha.putalpha(0)
    alpha.save(tmp_path / "clear.png")
    whole = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def test_alpha_is_dropped_and_orientation_is_ignored_unless_asked_for(folder: Path, capsys) -> None:
    plain = np.asarray(images.Picture(folder / "plain.png").rgb())
    np.testing.assert_array_equal(images.Picture(folder / "clear.png").rgb(), plain)
    np.testing.assert_array_equal(images.Picture(folder / "lying.png").rgb(), plain)
    upright = images.Picture(folder / "lying.png", exif=True)
    assert upright.size == (30, 40)
    np.testing.assert_array_equal(np.asarray(upright.rgb()), np.rot90(plain, -1))


@pytest.mark.parametrize(
    ("name", "said"),
    [("cut.png", "is damaged"), ("page.jpg", "no picture"), ("empty.png", "no picture"), ("none.png", "No such file")],
)
def test_what_is_no_picture_is_one_line_with_the_file(name: str, said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        images.Picture(folder / name).rgb()
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_bombs_and_arrays_of_other_kinds_are_refused(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 100)
    with pytest.raises(UserError, match="40 x 30 are more than 100 pixels"):
        images.Picture(folder / "plain.png")
    for odd in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), 3):
        with pytest.raises(UserError, match="give"):
            images.Picture(odd)


# ------------------------------------------------------------------------------------------------ prompts


def letters() -> tokenizers.Tokenizer:
    return tokenizers.load("bytes")


def test_text_is_cut_at_tags_and_each_piece_begins_anew() -> None:
    begin = 256
    assert pictured.text_ids(letters(), "a<|image_1|>", [2]) == [begin, 97, -1, -1, begin]
    ids = pictured.text_ids(letters(), "<|image_2|><|image_01|>b<|image_2|>", [1, 2])
    assert ids == [begin, -2, -2, begin, -1, begin, 98, -2, -2, begin]
    assert pictured.text_ids(letters(), "<|image|>", []) == [begin, *b"<|image|>"]


@pytest.mark.parametrize(
    ("text", "pictures", "said"),
    [
        ("<|image_1|><|image_2|>", 1, "<|image_2|> is in the prompt, and there is 1 picture"),
        ("<|image_1|>", 2, "there are 2 pictures, and no <|image_2|>"),
        ("<|image_1|><|image_3|>", 2, "<|image_3|> is in the prompt"),
        ("<|image_0|>", 1, "tags count from 1"),
        ("what?", 1, "no <|image_1|> in the prompt"),
    ],
)
def test_tags_are_those_of_the_pictures(text: str, pictures: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        pictured.text_ids(letters(), text, [3] * pictures)
    assert said in str(error.value)


def test_a_shared_picture_is_encoded_once_and_buckets_are_few() -> None:
    cfg = published("vision-3.5")
    album = pictured.Album(cfg, crops=1)
    small = photo(20, 20)
    one, again = (album.open([small, photo(30, 30, 1)][:n]) for n in (1, 2))
    prompts = [
        pictured.Prompt(pictured.text_ids(letters(), "<|image_1|>", album.counts(one)), one),
        pictured.Prompt([5, 6], []),
        pictured.Prompt(pictured.text_ids(letters(), "<|image_2|><|image_1|>", album.counts(again)), again),
    ]
    tiles, index = pictured.batch(prompts, (4, 700), album)
    assert len(tiles) == 4 and index.shape == (4, 700) and (index[[1, 3]] == -1).all()
    np.testing.assert_array_equal(index[0, 1:314], index[2, 315:628])
    assert index.max() == 4 * 144 + 1  # the two ends lie after the tiles
    sizes = {pictured.bucket(n) for n in range(1, 200)}
    assert sorted(sizes) == [
        *range(1, 9),
        *range(10, 17, 2),
        *range(20, 33, 4),
        *range(40, 65, 8),
        *range(80, 129, 16),
        160,
        192,
        224,
    ]
    assert all(n <= pictured.bucket(n) <= 1.25 * n for n in range(1, 200))


def test_places_of_another_length_are_refused() -> None:
    album = pictured.Album(published("vision"), crops=1)
    pictures = album.open([photo(20, 20)])
    with pytest.raises(UserError, match="312 places of -1 from token 1 on, and an array .* takes 313"):
        pictured.check(pictured.Prompt([1] + [-1] * 312, pictures), album)
    with pytest.raises(UserError, match="phi-3-mini reads no pictures"):
        pictured.Album(published("mini"))
    with pytest.raises(UserError, match="crops=0 must be 1 to 64"):
        pictured.Album(published("vision"), crops=0)


def spelled(runs: list) -> list[int]:
    return [i for run in runs for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]


@pytest.fixture(scope="module")
def april(tmp_path_factory) -> tokenizers.Tokenizer:
    """phi-3-vision's tokenizer: that of mini, but <|user|>, <|system|> and <|end|> keep the newline after them."""
    spec = json.loads((SHARED / "tokenizers/phi-3-mini/tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        if token["content"] in ("<|user|>", "<|system|>", "<|end|>"):
            token["rstrip"] = False
    path = tmp_path_factory.mktemp("april") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    return tokenizers.load(path)


def messages_of(case: dict) -> list[dict[str, str]]:
    if "messages" in case:
        return case["messages"]
    text = case["prompt"].removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    return [{"role": "user", "content": text}]


@pytest.mark.shared("goldens/vision2")
@pytest.mark.shared("tokenizers")
@pytest.mark.parametrize("name", ["vision_prompt_ids", "vision2/prompts35"])
def test_ids_are_those_of_the_published_processor(name: str, april: tokenizers.Tokenizer) -> None:
    for case in json.loads((GOLDENS / f"{name}.json").read_text())["cases"]:
        counts = [images.grid_of(*size, case["num_crops"]).tokens() for size in case["image_sizes_width_height"]]
        want = spelled(case["input_ids_run_length"])
        if "messages" in case or case["prompt"].startswith("<|user|>"):
            header = case.get("add_generation_prompt", True)
            ids = chat.chat_ids(april, messages_of(case), "vision", header, pictures=counts)
        else:
            ids = pictured.text_ids(april, case["prompt"], counts)
            if case["prompt"].endswith("<|image|>"):  # no text makes a control token here
                ids, want = ids[: len(want) - 2], want[:-2]
        assert ids == want, case["prompt"]


def test_a_chat_with_pictures_bears_loss_on_answers_alone() -> None:
    made = {"<s>": 300, "<|user|>": 301, "<|assistant|>": 302, "<|end|>": 303, "<|endoftext|>": 304}

    class Letters(tokenizers.ByteTokenizer):
        special_tokens = made

    talk = [{"role": "user", "content": "<|image_1|>\nq"}, {"role": "assistant", "content": "yes"}]
    ids, bears = chat.masked_ids(Letters(), talk, "vision", {1}, [2])
    assert ids.tolist() == [300, 301, 10, -1, -1, 300, 10, 113, 303, 10, 302, 10, *b"yes", 303, 10, 304]
    assert ids[bears].tolist() == [*b"yes", 303, 10, 304]
    with pytest.raises(UserError, match="<|image_1|> is in an answer"):
        chat.masked_ids(
            Letters(), [talk[0] | {"content": "q"}, talk[1] | {"content": "<|image_1|>"}], "vision", {1}, [2]
        )
    with pytest.raises(UserError, match="'mini' has no pictures"):
        chat.chat_ids(Letters(), talk, "mini", pictures=[2])
