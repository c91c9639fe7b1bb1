"""The pictures of a data set: how they lie beside the windows that show them, and the tiles and index of a batch.

`pictures-*.arrayrecord` hold every picture once, the bytes of its file and a crc32, so that what a model sees is decided
when they are read; `pictures.npz` their sizes; of each source and eval, `NAME-seen.npz` has which picture begins at which
column of which window.

A batch is cut into units, the rows that one device has of one microbatch. Each unit has its own tiles, a picture that
several of its rows show once, and as many as the fullest unit of the batch, rounded up (`pictured.bucket`): every process
knows that number, since tiles follow from sizes alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.configs import Vision
from phi3_jax.data import images
from phi3_jax.data.picture_rows import Pictures
from phi3_jax.data.pictured import bucket
from phi3_jax.data.windows import Seen
from phi3_jax.errors import UserError

NAME = "pictures"
SHARD = 4096  # pictures of a file
CACHE = 256 << 20  # bytes of tiles that stay in memory
LARGE = 1 << 16  # pixels of a picture from which on threads decode; of smaller ones Python's own work is the most

# ------------------------------------------------------------------------------------------------ writing


class Writer:
    """Writes pictures as windows come to show them; `shards` takes records and is named at the end (`export`)."""

    def __init__(self, shelf: Pictures, shards: Any) -> None:
        self._shelf, self._shards = shelf, shards
        self._numbers: dict[str, int] = {}
        self._digests: list[str] = []

    def put(self, seen: Sequence[Seen], first: int) -> tuple[list[tuple[int, int, int]], bytes]:
        """(window, column, picture) of the pictures in windows, before which `first` came; and what identifies all that."""
        places = [(first + one.row, one.column, self._number(one.picture)) for one in seen]
        said = [(window, column, self._digests[picture]) for window, column, picture in places]
        return places, repr(said).encode()

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            content = self._shelf.bytes_of(name)
            self._shards.write(content + zlib.crc32(content).to_bytes(4, "little"))
            self._numbers[name] = len(self._numbers)
            self._digests.append(hashlib.sha256(content).hexdigest())
        return self._numbers[name]

    def tiles(self, seen: Sequence[tuple[int, int, int]]) -> int:
        """Tiles of the pictures in the places of a source, each as often as it is shown."""
        eyes, names = self._shelf.eyes, list(self._numbers)
        grids = {n: images.grid_of(*self._shelf.size(names[n]), eyes.crops, eyes.tile) for _, _, n in seen}
        return sum(grids[picture].tiles for _, _, picture in seen)

    def finish(self, folder: Path) -> dict[str, Any]:
        """Closes the shards and writes the sizes; the manifest's `pictures`."""
        self._shards.close()
        sizes = np.array([self._shelf.size(name) for name in self._numbers], np.int32).reshape(-1, 2)
        np.savez(folder / f"{NAME}.npz", width=sizes[:, 0], height=sizes[:, 1])
        eyes = self._shelf.eyes
        found = {"count": len(sizes), "tile": eyes.tile, "patch": eyes.patch, "crops": eyes.crops}
        return found | {"sizes": f"{NAME}.npz", "shards": self._shards.rename()}


def write_seen(folder: Path, stem: str, seen: Sequence[tuple[int, int, int]], tiles: int) -> dict[str, Any]:
    """The places of the pictures of a source or eval, which have so many tiles; the manifest's `seen`."""
    path = folder / f"{stem}-seen.npz"
    columns = np.array(seen, np.int64).reshape(-1, 3)
    np.savez(path, window=columns[:, 0], column=columns[:, 1].astype(np.int32), picture=columns[:, 2].astype(np.int32))
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tiles": tiles}


def tiles_per_token(manifest: Mapping[str, Any]) -> float:
    """Tiles of pictures that come with a token of training, on average; 0 of a data set without any."""
    sources = [source for source in manifest["sources"] if "seen" in source]
    shares = sum(source["weight"] * source["seen"]["tiles"] / source["windows"] for source in sources)
    return float(shares / sum(source["weight"] for source in manifest["sources"]) / manifest["window"])


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Sight:
    """What a batch sees.

    Attributes:
      tiles: (units x tiles, 3, side, side): of each shard its microbatches' tiles in turn, as `step` cuts them.
      index: (rows, time) int32, into the rows of `models.vision.rows` of a row's own unit, -1 for none.
      count: (units,) int32, tiles that are no padding.
    """

    tiles: np.ndarray
    index: np.ndarray
    count: np.ndarray


Row = list[tuple[int, int]]  # (column, picture) of the pictures in a window


class Gallery:
    """The pictures of an opened data set; thread-safe.

    Args:
      folder: of the data set.
      manifest: its manifest, with `pictures`.
      open_shard: opens an ArrayRecord file.
      eyes: of the model that is trained.

    Raises:
      UserError: the data were made for other eyes, or a file of them is missing or changed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], open_shard: Any, eyes: Vision | None) -> None:
        self._folder, about = folder, manifest[NAME]
        self._reader = functools.cache(open_shard)  # a reader serves many threads
        if eyes is None or (eyes.tile, eyes.patch) != (about["tile"], about["patch"]):
            has = f"tiles of {eyes.tile} and patches of {eyes.patch} pixels" if eyes else "no eyes"
            raise UserError(
                f"{folder} has pictures for tiles of {about['tile']} and patches of {about['patch']} pixels, and the model "
                f"{has}; export the data again for it"
            )
        self._eyes, self._crops = eyes, about["crops"]
        self._shards, self._starts = about["shards"], np.cumsum([0] + [shard["records"] for shard in about["shards"]])
        with np.load(self._folder / about["sizes"]) as sizes:
            pairs = list(zip(sizes["width"].tolist(), sizes["height"].tolist(), strict=True))
        self.grids = [images.grid_of(*size, self._crops, eyes.tile) for size in pairs]
        self._large = [width * height >= LARGE for width, height in pairs]
        if len(self.grids) != about["count"]:
            raise self._damage(f"{about['sizes']} has {len(self.grids)} sizes, the manifest says {about['count']}")
        parts = [*manifest["sources"], *manifest["evals"]]
        self._seen = {part["seen"]["file"]: self._read_seen(part) for part in parts if "seen" in part}
        most = (self._crops + 1) * 3 * eyes.tile**2 * 4
        self._room, self._kept, self._lock = max(1, CACHE // most), dict[int, np.ndarray](), threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")

    def _damage(self, problem: str) -> UserError:
        return UserError(f"damaged data: {problem}; remove {self._folder} to export it again")

    def _read_seen(self, part: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        path = self._folder / part["seen"]["file"]
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != part["seen"]["sha256"]:
                raise self._damage(f"{path} is not what was exported")
            with np.load(path) as arrays:
                window, column, picture = (arrays[name] for name in ("window", "column", "picture"))
        except OSError as error:
            raise self._damage(f"{path} cannot be read: {error.strerror or error}") from error
        return np.searchsorted(window, np.arange(part["windows"] + 1)), column, picture

    def of(self, part: dict[str, Any], window: int) -> Row:
        """The pictures of one window of a source or eval, by its entry in the manifest; none past its end."""
        starts, column, picture = self._seen[part["seen"]["file"]]
        if window + 1 >= len(starts):
            return []
        span = slice(starts[window], starts[window + 1])
        return list(zip(column[span].tolist(), picture[span].tolist(), strict=True))

    def tiles(self, pictures: set[int]) -> dict[int, np.ndarray]:
        """float32 (tiles, 3, side, side) of each picture; the last ones made stay in memory."""
        with self._lock:
            found = {picture: self._kept[picture] for picture in pictures if picture in self._kept}
        new = sorted(pictures - found.keys())
        each = self._pool.map if any(self._large[picture] for picture in new) else map
        made = dict(zip(new, each(self._decoded, new, self._read(new)), strict=True))
        with self._lock:
            self._kept |= made
            for picture in list(self._kept)[: max(0, len(self._kept) - self._room)]:
                del self._kept[picture]
        return found | made

    def _place(self, picture: int) -> tuple[int, int]:
        """(shard, record) of a picture."""
        shard = int(np.searchsorted(self._starts, picture, side="right")) - 1
        return shard, picture - int(self._starts[shard])

    def _called(self, picture: int) -> str:
        shard, record = self._place(picture)
        return f"picture {record} of shard {self._folder / self._shards[shard]['file']}"

    def _read(self, pictures: list[int]) -> list[bytes]:
        """The records of ascending pictures."""
        records: list[bytes] = []
        for shard, several in itertools.groupby(pictures, lambda picture: self._place(picture)[0]):
            some = list(several)
            try:
                reader = self._reader(self._folder / self._shards[shard]["file"])
                records += reader.read([self._place(picture)[1] for picture in some])
            except Exception as error:  # array_record raises plain exceptions for damaged chunks
                if len(some) == 1:
                    raise self._damage(f"{self._called(some[0])} cannot be read") from error
                records += [record for picture in some for record in self._read([picture])]
        return records

    def _decoded(self, picture: int, record: bytes) -> np.ndarray:
        content, what = bytes(record[:-4]), self._called(picture)
        if zlib.crc32(content) != int.from_bytes(record[-4:], "little"):
            raise self._damage(f"{what} fails its checksum")
        return images.tiles_of(images.Picture(content, name=what), self._crops, self._eyes)

    def sight(
        self, rows: Sequence[Row], time: int, shards: int, mine: Sequence[int], parts: int = 1, dtype: Any = np.float32
    ) -> Sight:
        """What some shards of a batch see.

        Args:
          rows: of the whole global batch, in order.
          time: tokens of a window.
          shards: devices that the rows are split over.
          mine: those shards of which the result is.
          parts: microbatches; row i of a shard is in microbatch i modulo `parts`.
          dtype: of the tiles.
        """
        eyes, each = self._eyes, len(rows) // shards
        units = [
            [rows[shard * each + i] for i in range(part, each, parts)]
            for shard in range(shards)
            for part in range(parts)
        ]
        first: list[dict[int, int]] = []  # of each unit, the first tile of each picture
        totals = []
        for unit in units:
            places: dict[int, int] = {}
            total = 0
            for _, picture in (one for row in unit for one in row):
                if picture not in places:
                    places[picture], total = total, total + self.grids[picture].tiles
            first.append(places)
            totals.append(total)
        room = bucket(max(totals))
        tiles = np.zeros((len(mine), room, parts, 3, eyes.tile, eyes.tile), dtype)
        index = np.full((len(mine) * each, time), -1, np.int32)
        wanted = {picture for shard in mine for part in range(parts) for picture in first[shard * parts + part]}
        seen = self.tiles(wanted)
        for i, shard in enumerate(mine):
            for part in range(parts):
                places = first[shard * parts + part]
                for picture, at in places.items():
                    tiles[i, at : at + len(seen[picture]), part] = seen[picture]
                shown = [
                    [images.Shown(self.grids[picture], places[picture], column) for column, picture in row]
                    for row in units[shard * parts + part]
                ]
                own = slice(i * each + part, (i + 1) * each, parts)
                index[own] = images.index_of(shown, (len(shown), time), room, eyes.side)
        count = np.array(totals, np.int32).reshape(shards, parts)[list(mine)].reshape(-1)
        return Sight(tiles.reshape(-1, 3, eyes.tile, eyes.tile), index, count)
