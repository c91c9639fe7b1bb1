"""Pictures as phi-3-vision reads them: a file to RGB, resized to a grid of tiles, and which token shows which patch.

The rules are those of Microsoft's image processor. Pillow decodes and resizes (extra `[vision]`), and is imported when the
first picture is. What a picture takes in tokens follows from its size alone, before anything is decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import Vision
from phi3_jax.errors import UserError

# Of CLIP (preprocessor_config.json).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WHITE = 255
MOST_CROPS = 64
# Pixels of a file that is read at all: twice Pillow's limit, from which on it speaks of decompression bombs.
MOST_PIXELS = 178_956_970
_CUBIC = -0.75  # of the global view's bicubic kernel, as torch has it


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a picture of some size is cut.

    Attributes:
      transposed: whether rows and columns are exchanged for the resizing, and back after it: the picture is upright.
      resized: (width, height) after resizing, before the white; of the exchanged picture where it is.
      above: white rows above it; the rest of them are below.
      rows, columns: of tiles.
    """

    transposed: bool
    resized: tuple[int, int]
    above: int
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles of the grid, and the whole picture as one."""
        return self.rows * self.columns + 1

    def tokens(self, side: int = 12) -> int:
        """Tokens of the picture, of which a tile has side x side."""
        return self.tiles * side * side + 1 + (self.rows + 1) * side


def grid_of(width: int, height: int, crops: int, tile: int = 336, name: str = "the picture") -> Grid:
    """The grid of at most `crops` tiles of a picture; of 0, the whole of it as one tile is all there is.

    Raises:
      UserError: sides further apart than tile x (tiles side by side) to 1, of which nothing would be left.
    """
    if not crops:
        return dataclasses.replace(grid_of(width, height, 1, tile, name), rows=0, columns=0)
    transposed = width < height
    if transposed:
        width, height = height, width
    ratio, scale = width / height, 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= crops:
        scale += 1
    wide = scale * tile
    high = int(wide / ratio)
    if high < 1:
        raise UserError(
            f"{name} has sides of {width} and {height} pixels; beyond {wide} to 1, nothing is left at {crops} crops: cut it"
        )
    down = -(-high // tile)
    above = (down * tile - high) // 2
    rows, columns = (scale, down) if transposed else (down, scale)
    return Grid(transposed, (wide, high), above, rows, columns)


# ------------------------------------------------------------------------------------------------ files


class Picture:
    """A picture that is not decoded yet: its size is known.

    Args:
      source: a file or its bytes, an image of Pillow's, or uint8 (height, width, 3).
      exif: turn it as its EXIF orientation says, which the released code does not.
      name: what errors call it; default: the file.

    Attributes:
      size: (width, height).

    Raises:
      UserError: a file that is missing, no picture or too large; another array; no Pillow.
    """

    def __init__(self, source: Any, *, exif: bool = False, name: str = "") -> None:
        self._exif = exif
        self._image: Any = None
        self._file: Path | bytes | None = None
        if isinstance(source, np.ndarray):
            self.name = name or f"an array of shape {source.shape}"
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise UserError(f"{self.name}, {source.dtype}: give uint8 (height, width, 3)")
            self._image = pillow().fromarray(source)
            self.size: tuple[int, int] = self._image.size
            return
        if isinstance(source, (str, Path, bytes)):
            self._file = source if isinstance(source, bytes) else Path(source)
            self.name = name or ("the picture" if isinstance(source, bytes) else str(source))
            image = self._opened()
            self.size = self._turned_size(image)
            _remark(self.name, image)
            if isinstance(source, bytes):
                self._image = image  # of these, `rgb` need not read the header again
            else:
                image.close()
            return
        self.name = name or "the picture"
        if not hasattr(source, "convert") or not hasattr(source, "size"):
            raise UserError(f"{self.name} is a {type(source).__name__}; give a file, an image of Pillow's, or an array")
        self._image, self.size = source, self._turned_size(source)

    def _opened(self) -> Any:
        image_module = pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
                image = image_module.open(io.BytesIO(self._file) if isinstance(self._file, bytes) else self._file)
        except image_module.DecompressionBombError as error:
            raise UserError(f"{self.name}: more than {MOST_PIXELS:,} pixels; make it smaller first") from error
        except (OSError, ValueError, SyntaxError) as error:
            reason = _said(error) if getattr(error, "strerror", None) else "no picture that Pillow reads"
            raise UserError(f"{self.name} cannot be opened: {reason}") from error
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UserError(
                f"{self.name}: {width} x {height} are more than {MOST_PIXELS:,} pixels; make it smaller first"
            )
        return image

    def _turned_size(self, image: Any) -> tuple[int, int]:
        width, height = image.size
        turned = self._exif and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)

    def rgb(self) -> Any:
        """An RGB image of Pillow's: alpha and palette transparency dropped, the first frame, 16 bits cut off at 255.

        Raises:
          UserError: the file is cut off or damaged.
        """
        image = self._opened() if self._image is None else self._image
        if self._file is not None:
            self._image = None  # what is decoded is not kept
        try:
            if self._exif:
                from PIL import ImageOps

                image = ImageOps.exif_transpose(image)
            with warnings.catch_warnings():  # of palettes with transparency, of which `_remark` speaks
                warnings.simplefilter("ignore", UserWarning)
                return image.convert("RGB")
        except Exception as error:  # decoders of damaged files raise whatever they stumble over
            raise UserError(f"{self.name} is damaged: {_said(error)}") from error
        finally:
            if self._file is not None:
                image.close()

    def grid(self, crops: int, eyes: Vision) -> Grid:
        """How it is cut into at most `crops` tiles."""
        return grid_of(*self.size, crops, eyes.tile, self.name)


def pillow() -> Any:
    """Pillow's module Image."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures need Pillow: pip install pillow, or the extra [vision]") from None
    return Image


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _remark(name: str, image: Any) -> None:
    """A line, once of a kind, where the released code reads a file otherwise than a person sees it."""
    what = ""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        what = "has more than 8 bits a value: what is above 255 becomes white"
    elif getattr(image, "n_frames", 1) > 1:
        what = "has several frames: the first is taken"
    elif "A" in image.mode or "transparency" in image.info:
        what = "has transparent parts: the colours below them show"
    if what and what not in _SAID:
        _SAID.add(what)
        print(f"note: {name} {what}, as in the released code", file=sys.stderr)


_SAID: set[str] = set()


# ------------------------------------------------------------------------------------------------ pixels


def padded(picture: Picture, grid: Grid, tile: int = 336) -> np.ndarray:
    """uint8 (rows x tile, columns x tile, 3): resized by Pillow's bilinear filter, white around."""
    image_module = pillow()
    image = picture.rgb()
    if grid.transposed:
        image = image.transpose(image_module.Transpose.TRANSPOSE)
    pixels = np.asarray(image.resize(grid.resized, image_module.Resampling.BILINEAR))
    wide, high = grid.resized
    whole = np.full((-(-high // tile) * tile, wide, 3), WHITE, np.uint8)
    whole[grid.above : grid.above + high] = pixels
    return whole.transpose(1, 0, 2) if grid.transposed else whole


def normalised(pixels: np.ndarray) -> np.ndarray:
    """float32 (3, h, w) of uint8 (h, w, 3): of mean 0 and standard deviation 1 over CLIP's pictures."""
    values = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel, mean, std, plane in zip(range(3), MEAN, STD, values, strict=True):
        np.divide(pixels[:, :, channel], np.float32(WHITE), out=plane)
        plane -= mean
        plane /= std
    return values


@functools.lru_cache(maxsize=64)
def _taps(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """(wanted, 4) places and float32 weights of the bicubic kernel (a = -0.75, half-pixel centres, no antialiasing)."""
    at = (np.arange(wanted) + 0.5) * (size / wanted) - 0.5
    first, a = np.floor(at), _CUBIC
    x = np.abs((at - first)[:, None] - np.array([-1, 0, 1, 2]))
    weights = np.where(x <= 1, ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a)
    places = np.clip(first[:, None].astype(int) + np.array([-1, 0, 1, 2]), 0, size - 1)
    return places, weights.astype(np.float32)


def overview(values: np.ndarray, tile: int = 336) -> np.ndarray:
    """float32 (3, tile, tile): the whole picture (3, h, w), normalised already, as one tile; torch's bicubic."""
    for axis in (1, 2):
        if values.shape[axis] == tile:
            continue  # each place's own weight is 1, the others' 0
        places, weights = _taps(values.shape[axis], tile)
        shape = (-1, 1) if axis == 1 else (-1,)
        sums = np.take(values, places[:, 0], axis=axis) * weights[:, 0].reshape(shape)
        for k in (1, 2, 3):
            taken = np.take(values, places[:, k], axis=axis)
            taken *= weights[:, k].reshape(shape)
            sums += taken
        values = sums
    return values


def tiles_of(picture: Picture, crops: int, eyes: Vision) -> np.ndarray:
    """float32 (tiles, 3, tile, tile) of a picture: the whole of it, then its grid row by row.

    Raises:
      UserError: see `grid_of` and `Picture.rgb`.
    """
    grid, tile = picture.grid(crops, eyes), eyes.tile
    values = normalised(padded(picture, grid, tile))
    tiles = np.empty((grid.tiles, 3, tile, tile), np.float32)
    tiles[0] = overview(values, tile)
    if grid.tiles > 1:
        places = tiles[1:].reshape(grid.rows, grid.columns, 3, tile, tile)
        places[...] = values.reshape(3, grid.rows, tile, grid.columns, tile).transpose(1, 3, 0, 2, 4)
    return tiles


# ------------------------------------------------------------------------------------------------ places


@functools.lru_cache(maxsize=256)
def layout(rows: int, columns: int, side: int = 12) -> np.ndarray:
    """int32 (tokens,): which token of its tiles each token of a picture is; -1: a row ends, -2: the grid ends.

    Tile 0 is the whole picture, and comes last; the tokens of a grid are read line by line across its tiles.
    """

    def lines(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([numbers, np.full((len(numbers), 1), -1)], axis=1).reshape(-1)

    tile = np.arange(side * side).reshape(side, side)
    grid = 1 + np.arange(rows * columns).reshape(rows, 1, columns, 1)
    spread = grid * side * side + tile[None, :, None, :]
    return np.concatenate([lines(spread.reshape(rows * side, columns * side)), [-2], lines(tile)]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture in a row of tokens: `first` is its first tile among those of the batch, `at` its first token."""

    grid: Grid
    first: int
    at: int


def index_of(shown: Sequence[Sequence[Shown]], shape: tuple[int, int], tiles: int, side: int = 12) -> np.ndarray:
    """int32 (rows, time): the row of `models.vision.rows` that takes each token's place, -1 for none.

    Args:
      shown: of each row.
      shape: (rows, time).
      tiles: of the batch, padding included; the two ends lie after them.
    """
    index = np.full(shape, -1, np.int32)
    ends = tiles * side * side
    for row, pictures in enumerate(shown):
        for one in pictures:
            places = layout(one.grid.rows, one.grid.columns, side)
            found = np.where(places >= 0, places + one.first * side * side, ends - 1 - places)
            index[row, one.at : one.at + len(found)] = found
    return index
