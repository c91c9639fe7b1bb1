"""Prompts with pictures: `<|image_k|>` in a text is where picture k stands, and rows of token ids with places for them.

In the ids of a prompt, a token of picture k is -k, as in Microsoft's processor: the text is cut at the tags, each piece is
tokenised alone with `<s>` before it, also an empty one. Unlike there, tag k shows picture k whatever their order, and a tag
that comes again shows its picture again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.data import images
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError

TAG = re.compile(r"<\|image_(\d+)\|>")
BEGIN = "<s>"
MOST = 1024  # pictures of a prompt


def split(text: str) -> tuple[str, list[tuple[int, str]]]:
    """The text before the first tag, and for each tag its number and the text after it."""
    first, *rest = TAG.split(text)
    return first, [(int(number), piece) for number, piece in zip(rest[::2], rest[1::2], strict=True)]


def tags_in(texts: Iterable[str]) -> list[int]:
    """The numbers of all tags, in order."""
    return [int(number) for text in texts for number in TAG.findall(text)]


def check_tags(numbers: Sequence[int], pictures: int) -> None:
    """UserError unless the tags are those of pictures 1 to `pictures`, each once or more."""
    there = f"there {'is 1 picture' if pictures == 1 else f'are {pictures} pictures'}"
    for number in numbers:
        if not 1 <= number <= pictures:
            way = "tags count from 1" if number < 1 else "give one picture a tag"
            raise UserError(f"<|image_{number}|> is in the prompt, and {there}; {way}")
    if missing := [k for k in range(1, pictures + 1) if k not in set(numbers)]:
        raise UserError(f"{there}, and no <|image_{missing[0]}|> in the prompt; say with it where that picture stands")


def begin_of(tokenizer: Tokenizer) -> int:
    """The id of `<s>`.

    Raises:
      UserError: the tokenizer has none.
    """
    found = tokenizer.special_tokens.get(BEGIN, getattr(tokenizer, "bos_id", None))
    if found is None:
        raise UserError(f"this {tokenizer.kind} tokenizer has no {BEGIN}; take phi-3-vision's own")
    return int(found)


def places(number: int, piece: str, tokenizer: Tokenizer, counts: Sequence[int]) -> list[int]:
    """Ids of a tag and of the text after it: counts[number - 1] places, `<s>`, and the text."""
    after = tokenizer.encode(piece) if piece else []
    return [-number] * counts[number - 1] + [begin_of(tokenizer)] + after


def text_ids(tokenizer: Tokenizer, text: str, counts: Sequence[int]) -> list[int]:
    """Ids of a text with tags of pictures that take `counts` tokens each; the text makes no control tokens.

    Raises:
      UserError: see `check_tags`.
    """
    first, rest = split(text)
    check_tags([number for number, _ in rest], len(counts))
    ids = [begin_of(tokenizer), *(tokenizer.encode(first) if first else [])]
    for number, piece in rest:
        ids += places(number, piece, tokenizer, counts)
    return ids


# ------------------------------------------------------------------------------------------------ batches


class Album:
    """Opens pictures, each once however often it is given.

    Args:
      cfg: a model with eyes.
      crops: tiles of a picture's grid at most; None: what the model's files say.
      exif: turn pictures as their EXIF orientation says.
    """

    def __init__(self, cfg: ModelConfig, crops: int | None = None, exif: bool = False) -> None:
        if cfg.vision is None:
            raise UserError(f"{cfg.label} reads no pictures; take a phi-3-vision, or leave them out")
        if crops is not None and not 1 <= crops <= images.MOST_CROPS:
            raise UserError(f"crops={crops} must be 1 to {images.MOST_CROPS}")
        self.eyes, self.crops, self._exif = cfg.vision, crops or cfg.vision.crops, exif
        self._opened: dict[Any, images.Picture] = {}

    def open(self, sources: Any) -> list[images.Picture]:
        """The pictures of a prompt: files, images of Pillow's, or uint8 (height, width, 3)."""
        if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence):
            raise UserError(f"images={sources!r:.60}; give a list of pictures for each prompt")
        return [self._one(source) for source in sources]

    def _one(self, source: Any) -> images.Picture:
        if isinstance(source, images.Picture):
            return source
        key = str(source) if not hasattr(source, "shape") and not hasattr(source, "convert") else id(source)
        if key not in self._opened:
            self._opened[key] = images.Picture(source, exif=self._exif)
        return self._opened[key]

    def counts(self, pictures: Sequence[images.Picture]) -> list[int]:
        """Tokens that each picture takes, from its size."""
        return [p.grid(self.crops, self.eyes).tokens(self.eyes.side) for p in pictures]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Ids with -k for the tokens of picture k, and the pictures."""

    ids: list[int]
    pictures: list[images.Picture]


def check(prompt: Prompt, album: Album) -> None:
    """UserError unless each run of -k is as long as picture k, and every picture has one."""
    found, counts = list(runs(prompt.ids)), album.counts(prompt.pictures)
    check_tags([number for number, _, _ in found], len(counts))
    for number, at, length in found:
        if length != counts[number - 1]:
            raise UserError(
                f"{length} places of {-number} from token {at} on, and {prompt.pictures[number - 1].name} takes "
                f"{counts[number - 1]} at {album.crops} crops; give so many"
            )


def runs(ids: Sequence[int] | np.ndarray) -> Iterable[tuple[int, int, int]]:
    """(picture, first place, number of places) of each run of equal negative ids."""
    at = 0
    while at < len(ids):
        end = at + 1
        while end < len(ids) and ids[end] == ids[at]:
            end += 1
        if ids[at] < 0:
            yield -ids[at], at, end - at
            at = end
        else:
            at += 1


def bucket(tiles: int) -> int:
    """Tiles that a program is compiled for: 1 to 8, 10, 12, 14, 16, 20, 24, ..; a fifth of them padding at most."""
    step = 1 << max((tiles - 1).bit_length() - 3, 0)
    return max(1, -(-tiles // step) * step)


def batch(prompts: Sequence[Prompt], shape: tuple[int, int], album: Album) -> tuple[np.ndarray, np.ndarray]:
    """Tiles, and which row of `models.vision.rows` takes each token's place; a picture that several prompts share is there
    once.

    Args:
      prompts: of `check`; the rows of a batch, of which there may be fewer than `shape` says.
      shape: (rows, time) of the batch.

    Returns:
      float32 (tiles, 3, side, side), padded with zeros to a `bucket`; int32 index (rows, time), -1 for none.
    """
    eyes, first, parts, shown = album.eyes, {}, [], []
    count = 0
    for prompt in prompts:
        for picture in prompt.pictures:
            if id(picture) not in first:
                parts.append(images.tiles_of(picture, album.crops, eyes))
                first[id(picture)], count = count, count + len(parts[-1])
        here = ((prompt.pictures[number - 1], at) for number, at, _ in runs(prompt.ids))
        shown.append([images.Shown(p.grid(album.crops, eyes), first[id(p)], at) for p, at in here])
    tiles = np.zeros((bucket(count), 3, eyes.tile, eyes.tile), np.float32)
    if parts:
        tiles[:count] = np.concatenate(parts)
    return tiles, images.index_of(shown, shape, len(tiles), eyes.side)


def tokens_of(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32 ids that an embedding can look up: 0 in the places of pictures."""
    return np.maximum(np.asarray(ids, np.int32), 0)
