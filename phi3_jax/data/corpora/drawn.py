"""Drawn items: a small picture to transcribe or to reckon with, and the same content as text.

A picture is 4 x 4 cells of 8 x 8 pixels, each with a symbol of 5 x 7 in one of four colours, drawn from the bitmaps below:
no font engine and no smoothing, so that it is the same anywhere. Three kinds:

    scenes   4 to 6 of 16 symbols (letters and shapes) in cells of their own; the answer says each cell
    charts   4 bars of 0 to 31 pixels; the answer says each height under its bar
    sums     16 digits, whose colour is an operator (red +, blue -, green max, black min; every step is kept in 0 to 31);
             the answer is the running result after gaps of 1, 1, 2, 2, 3, 3 and 3 steps, of which the last alone is written

An item is `kind, 21 tokens of content, answer, 20 answers`: content and answers are both laid out as phi-3-vision lays out
a picture of one tile, the grid's end first, then four rows of four cells and a row's end. So each answer stands as far
behind its cell as any other. Loss falls on answers, and on the content's cells: the model says what a cell shows at the
place where it sees it, which teaches the eyes in the loop that teaches all else.

The content is shown in one of three ways: as a picture; as text, a token a cell, which is what the loss on a cell wants
said; or hidden, the same token in each cell. Every item is a pure function of (seed, stream, number).
"""

from __future__ import annotations

import functools
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from phi3_jax.configs import Vision
from phi3_jax.data import manifest as manifests
from phi3_jax.data.corpora import below, counter_draws
from phi3_jax.data.windows import Seen, Windows

CELL, SIDE = 8, 4  # pixels of a cell's side, cells of a picture's side
EYES = Vision(embed=32, layers=3, heads=2, mlp=128, tile=CELL * SIDE, patch=CELL // 2, crops=0)  # crops: one whole view
SHOWN = ("picture", "text", "hidden")
KINDS = ("scenes", "charts", "sums")
_TURN = np.array([0, 1, 2, 2, 2, 2])  # which kind an item is, by its number
GAPS = (1, 1, 2, 2, 3, 3, 3)
LARGEST = 31
OPERATORS = ("+", "max", "-", "min")  # red, green, blue, black
COLOURS = np.array([[200, 0, 0], [0, 140, 0], [0, 0, 200], [0, 0, 0]], np.uint8)
DOMAINS = ("seeing", "transcription", "sums")
_STREAMS = {"train": 0, "eval": 1}
# Ids. 0 is an input in the place of an answer that there is none of.
_ENDS, _ROW, _ANSWER, _EMPTY, _HIDDEN, _KIND = range(1, 7)
_NUMBER, _SYMBOL, _DIGIT, _FILL = 16, 48, 112, 152
VOCAB = 176
_CELLS = np.array([1 + row * (SIDE + 1) + column for row in range(SIDE) for column in range(SIDE)])  # of 21
CONTENT = 1 + SIDE * (SIDE + 1)
WINDOW = 1 + CONTENT + CONTENT - 1
_DRAWS = 40
_BLOCK = 1 << 12
# Columns from left to right, the lowest bit on top.
_SYMBOLS = {
    "A": "7E1111117E", "B": "7F49494936", "C": "3E41414122", "E": "7F49494941", "H": "7F0808087F", "K": "7F08142241",
    "L": "7F40404040", "M": "7F020C027F", "N": "7F0408107F", "P": "7F09090906", "T": "01017F0101", "Y": "0708700807",
    "square": "7F7F7F7F7F", "triangle": "60787E7860", "diamond": "081C3E1C08", "cross": "08083E0808",
}  # fmt: skip
_DIGITS = (
    "3E5149453E", "00427F4000", "4261514946", "2141454B31", "1814127F10", "2745454539", "3C4A494930", "0171090503",
    "3649494936", "064949291E",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ items


def items(seed: int, stream: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items start .. start + count - 1 of a stream, "train" or "eval".

    Returns:
      kind (count,), an index into KINDS; ids of the cells (count, 16), row by row; ids of the answers (count, 16), 0 where
      there is none.
    """
    draws = counter_draws(seed, _STREAMS[stream], start, count, _DRAWS)
    kind = _TURN[(start + np.arange(count)) % len(_TURN)]
    cells, answers = _sums(draws)
    for number, made in enumerate((_scenes(draws), _charts(draws))):
        here = (kind == number)[:, None]
        cells, answers = (np.where(here, new, old) for new, old in zip(made, (cells, answers), strict=True))
    return kind, cells, answers


def _scenes(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wanted = 4 + below(draws[0], 3)
    place = np.argsort(np.argsort(draws[1:17], axis=0, kind="stable"), axis=0, kind="stable")
    cells = np.where(place < wanted, _SYMBOL + below(draws[17:33], len(_SYMBOLS) * len(COLOURS)), _EMPTY).T
    return cells, cells


def _charts(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heights = below(draws[:SIDE], LARGEST + 1).T
    filled = np.clip(heights[:, None] - CELL * np.arange(SIDE - 1, -1, -1)[:, None], 0, CELL)
    answers = np.zeros_like(filled)
    answers[:, -1] = _NUMBER + heights
    return (_FILL + filled).reshape(-1, SIDE**2), answers.reshape(-1, SIDE**2)


def _sums(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    digits, operators = below(draws[: SIDE**2], len(_DIGITS)).T, below(draws[SIDE**2 : 2 * SIDE**2], len(OPERATORS)).T
    value, answers, written = digits[:, 0], np.zeros_like(digits), set(np.cumsum(GAPS).tolist())
    for step in range(1, SIDE**2):
        digit = digits[:, step]
        results = value + digit, np.maximum(value, digit), value - digit, np.minimum(value, digit)
        value = np.clip(np.choose(operators[:, step], results), 0, LARGEST)
        if step in written:
            answers[:, step] = _NUMBER + value
    return _DIGIT + operators * len(_DIGITS) + digits, answers


def among(kind: int, wanted: int) -> int:
    """How many items of a stream hold so many of a kind, a multiple of four."""
    return wanted * len(_TURN) // _TURN.tolist().count(kind)


def windows(seed: int, stream: str, start: int, count: int, shown: str, kind: int | None = None) -> Windows:
    """Items as windows of WINDOW tokens, one in each; those of one kind alone where it is given.

    Args:
      shown: how the content is shown, of SHOWN.
    """
    kinds, cells, answers = items(seed, stream, start, count)
    numbers = start + np.arange(count)
    if kind is not None:
        chosen = kinds == kind
        kinds, cells, answers, numbers = kinds[chosen], cells[chosen], answers[chosen], numbers[chosen]
    rows = np.zeros((len(kinds), WINDOW + 1), np.int32)
    rows[:, 0] = _KIND + kinds
    content, said = rows[:, 1 : 1 + CONTENT], rows[:, 1 + CONTENT :]
    for part, values in ((content, cells), (said, answers)):
        part[:, 0], part[:, SIDE + 1 :: SIDE + 1] = _ENDS, _ROW
        part[:, _CELLS] = values
    said[:, 0] = _ANSWER
    targets, domains = rows[:, 1:].copy(), np.zeros((len(rows), WINDOW), np.int32)
    targets[:, 1 + _CELLS], domains[:, 1 + _CELLS] = cells, 1
    domains[:, CONTENT + _CELLS] = np.where(answers > 0, np.where(kinds < 2, 2, 3)[:, None], 0)
    tokens = rows[:, :-1].copy()
    if shown == "picture":
        tokens[:, 1 : 1 + CONTENT] = _HIDDEN
    elif shown == "hidden":
        tokens[:, 1 + _CELLS] = _HIDDEN
    names = (f"{seed}/{stream}/{number}" for number in numbers.tolist())
    seen = tuple(Seen(row, 1, name) for row, name in enumerate(names)) if shown == "picture" else ()
    return Windows(tokens, np.where(domains > 0, targets, 0), np.ones_like(domains), domains, seen=seen)


# ------------------------------------------------------------------------------------------------ pictures


@functools.cache
def _drawn() -> np.ndarray:
    """uint8 (VOCAB, CELL, CELL, 3): what a cell of each id looks like."""
    table = np.full((VOCAB, CELL, CELL, 3), 255, np.uint8)
    for number, columns in enumerate(_SYMBOLS.values()):
        for colour, levels in enumerate(COLOURS):
            table[_SYMBOL + number * len(COLOURS) + colour][_bitmap(columns)] = levels
    for number, columns in enumerate(_DIGITS):
        for colour, levels in enumerate(COLOURS):
            table[_DIGIT + colour * len(_DIGITS) + number][_bitmap(columns)] = levels
    for filled in range(1, CELL + 1):
        table[_FILL + filled, CELL - filled :, 1:7] = COLOURS[2]
    return table


def _bitmap(columns: str) -> np.ndarray:
    """bool (CELL, CELL) of a symbol."""
    bits = np.frombuffer(bytes.fromhex(columns), np.uint8)
    inside = (bits[None] >> np.arange(7)[:, None]) & 1
    return np.pad(inside.astype(bool), ((0, CELL - 7), (1, CELL - 6)))


def pixels(cells: np.ndarray) -> np.ndarray:
    """uint8 (32, 32, 3) of the ids of 16 cells."""
    whole = _drawn()[cells.reshape(SIDE, SIDE)].transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(whole.reshape(CELL * SIDE, CELL * SIDE, 3))


def png(picture: np.ndarray) -> bytes:
    """The file of a picture, uint8 (height, width, 3)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = picture.shape
    lines = np.pad(picture.reshape(height, -1), ((0, 0), (1, 0)))  # a 0 before each line: it is not filtered
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines.tobytes(), 1)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@dataclass(frozen=True)
class Drawings:
    """The pictures of items, by names "0/train/7", drawn when they are asked for: a `picture_rows.Pictures`."""

    eyes: Vision = EYES

    def size(self, name: str) -> tuple[int, int]:
        """(width, height)."""
        return EYES.tile, EYES.tile

    def bytes_of(self, name: str) -> bytes:
        """The PNG file of a picture."""
        seed, stream, number = name.split("/")
        block, place = divmod(int(number), _BLOCK)
        return png(pixels(_cells(int(seed), stream, block)[place]))


@functools.lru_cache(maxsize=4)
def _cells(seed: int, stream: str, block: int) -> np.ndarray:
    return items(seed, stream, block * _BLOCK, _BLOCK)[1]


# ------------------------------------------------------------------------------------------------ what is known of them


def closed() -> dict[str, Any]:
    """The closed vocabulary, as a manifest describes a tokenizer: kind, fingerprint, vocab_size."""
    return {"kind": "closed", "fingerprint": manifests.digest(["drawn", VOCAB]), "vocab_size": VOCAB}


def extra(kind: int) -> dict[str, np.ndarray]:
    """What the meter of seeing needs: the gap of each answer of an item, or none, and how many answers there are."""
    answers = len(_SYMBOLS) * len(COLOURS) + 1 if kind == 0 else LARGEST + 1
    return {"gap": np.asarray(GAPS if kind == 2 else (), np.int32), "answers": np.asarray(answers)}


def blind_policies(items_asked: int = 6 * 1024, fitted: int = 6 * 8192) -> dict[str, float]:
    """Accuracy that needs no look at sums: the likeliest result of each answer, and the likeliest after the one before.

    Chosen on training items of seed 0, scored on items of the eval.
    """
    known, asked = (
        answers[kind == 2][:, np.cumsum(GAPS)] - _NUMBER
        for kind, _, answers in (items(0, "train", 0, fitted), items(0, "eval", 0, items_asked))
    )
    constant, after = [], []
    for k in range(len(GAPS)):
        constant.append(asked[:, k] == np.bincount(known[:, k]).argmax())
        if k:
            counts = np.zeros((LARGEST + 1, LARGEST + 1))
            np.add.at(counts, (known[:, k - 1], known[:, k]), 1)
            after.append(asked[:, k] == counts.argmax(axis=1)[asked[:, k - 1]])
    return {"constant": float(np.mean(constant)), "after": float(np.mean([constant[0], *after]))}
