"""Rows with pictures, in the forms that people keep them in -> rows of text with numbered tags, and their pictures.

| keys | where the pictures stand |
| --- | --- |
| conversations (from, value) with image or images: LLaVA | `<image>` in a human's turn |
| messages with images; prompt, completion or prompt, chosen, rejected with images | `<image>` |
| messages whose content is parts: {type: text, text}, {type: image} or {type: image_url} | the part; its own, or the next |
| conversations (images, user, assistant): Microsoft's cookbook | before the question of their turn |
| texts (user, assistant) with images: The Cauldron | before the first question |
| text with images: a document | `<image>` |

`<image>` is the next picture; `<|image_k|>` in its place is picture k. A picture is the name of a file, or an object with
`bytes` or `path`. Pictures never stand in answers.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.configs import Vision
from phi3_jax.data import images
from phi3_jax.data.pictured import TAG, check_tags
from phi3_jax.errors import UserError

MARK = "<image>"
_TALKS = ("messages", "conversations", "prompt", "chosen", "rejected", "completion", "document")
_ANSWERS = ("gpt", "assistant")


class BadRow(ValueError):
    """A row that is not of its kind; the message says why."""


# ------------------------------------------------------------------------------------------------ forms


def numbered(row: Any) -> tuple[Any, list[Any]]:
    """The row with the tags of its pictures numbered, and the pictures in their order; a row without any as it is.

    Raises:
      BadRow: pictures that are none, or more or fewer tags than pictures.
    """
    if not isinstance(row, Mapping):
        return row, []
    pictures = _given(row.get("images") if row.get("images") is not None else row.get("image"))
    row = _talk(dict(row), pictures)
    for key in _TALKS:
        if isinstance(row.get(key), Sequence) and not isinstance(row[key], str):
            row[key] = [_joined(message, pictures) for message in row[key]]
    if not pictures:
        return row, []
    if row.get("prompt") is not None and row.get("chosen") is not None:
        _refuse_tags(row, ("chosen", "rejected"))
    if row.get("prompt") is not None and row.get("completion") is not None:
        _refuse_tags(row, ("completion",))
    for key in _TALKS:
        if key in row and not (row.get("prompt") is not None and key in ("chosen", "rejected", "completion")):
            row[key] = _with_numbers(row[key], len(pictures))
    return row, pictures


def _given(value: Any) -> list[Any]:
    found = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    for one in found:
        usable = isinstance(one, str) or (isinstance(one, Mapping) and (one.get("bytes") or one.get("path")))
        if not usable:
            raise BadRow(f"a picture is {one!r:.60}; it is the name of a file, or an object with bytes or path")
    return found


def _talk(row: dict[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """The forms whose turns are pairs as messages, and a text with pictures as a document; adds pictures of turns."""
    turns = row.get("conversations") or row.get("texts")
    if isinstance(turns, Sequence) and not isinstance(turns, str) and turns and _is_pair(turns[0]):
        cookbook = row.get("conversations") is not None
        messages = []
        for number, turn in enumerate(turns):
            if not _is_pair(turn):
                raise BadRow(f"a turn is {turn!r:.60}; it has user and assistant, both text, as the turns before")
            shown = _given(turn.get("images")) if cookbook else pictures if number == 0 else []
            pictures += shown if cookbook else []
            marks = "" if MARK in turn["user"] else f"{MARK}\n" * len(shown)
            messages += [{"role": "user", "content": marks + turn["user"]}]
            messages += [{"role": "assistant", "content": turn["assistant"]}]
        kept = {key: value for key, value in row.items() if key not in ("conversations", "texts")}
        return kept | {"messages": messages}
    pictured = "images" in row or "image" in row  # a document among such may have none
    if isinstance(row.get("text"), str) and pictured and not any(row.get(key) is not None for key in _TALKS):
        return {key: value for key, value in row.items() if key != "text"} | {"document": row["text"]}
    return row


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("user", "assistant"))


def _joined(message: Any, pictures: list[Any]) -> Any:
    """A message whose content is text, of one whose content is parts; adds the pictures that parts bring."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None or isinstance(content, str) or not isinstance(content, Sequence):
        return message
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            own = part.get("image") or part.get("path") or part.get("image_url") or part.get("url")
            own = own.get("url") if isinstance(own, Mapping) and "url" in own else own
            shown = _given(own)
            if len(shown) > 1:
                raise BadRow(
                    f"a part of a message has {len(shown)} pictures where one is allowed; give each its own part"
                )
            pictures += shown
            text += f"{MARK}\n"
        else:
            raise BadRow(f"a part of a message is {part!r:.60}; it is text or image")
    return {**message, "content": text}


def _texts(talk: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it is an answer) of a text or of messages; what is neither has none."""
    if isinstance(talk, str):
        yield talk, False
    elif isinstance(talk, Sequence):
        for message in talk:
            if isinstance(message, Mapping):
                text = message.get("content", message.get("value"))
                if isinstance(text, str):
                    yield text, message.get("role", message.get("from")) in _ANSWERS


def _refuse_tags(row: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if any(MARK in text or TAG.search(text) for text, _ in _texts(row.get(key))):
            raise BadRow(f"{key} has the tag of a picture; pictures stand in questions alone")


def _with_numbers(talk: Any, count: int) -> Any:
    """A text or messages, `<image>` replaced by `<|image_k|>`."""
    texts = list(_texts(talk))
    if any(answer and (MARK in text or TAG.search(text)) for text, answer in texts):
        raise BadRow("an answer has the tag of a picture; pictures stand in questions alone")
    marks = sum(text.count(MARK) for text, _ in texts)
    if not any(TAG.search(text) for text, _ in texts):
        if marks != count:
            raise BadRow(f"{marks} {MARK} for {count} picture{'s' * (count != 1)}; give each picture one")
    elif marks:
        raise BadRow(f"it has both {MARK} and <|image_1|>; number all tags or none")
    numbers = iter(range(1, marks + 1))

    def put(text: str) -> str:
        return re.sub(re.escape(MARK), lambda _: f"<|image_{next(numbers)}|>", text)

    if isinstance(talk, str):
        return put(talk)
    keys = ("content", "value")
    return [
        {k: put(v) if k in keys and isinstance(v, str) else v for k, v in message.items()}
        if isinstance(message, Mapping)
        else message
        for message in talk
    ]


def require_tags(prompts: Iterable[Sequence[str]], count: int) -> None:
    """Checks that the tags in each of some texts are those of pictures 1 to `count`.

    Raises:
      BadRow: they are others.
    """
    for texts in prompts:
        try:
            check_tags([int(number) for text in texts for number in TAG.findall(text)], count)
        except UserError as error:
            raise BadRow(str(error)) from None


# ------------------------------------------------------------------------------------------------ pictures


class Pictures(Protocol):
    """Pictures by name, as `gallery.Writer` takes them."""

    @property
    def eyes(self) -> Vision: ...

    def size(self, name: str) -> tuple[int, int]:
        """(width, height)."""

    def bytes_of(self, name: str) -> bytes:
        """The file of a picture."""


class Shelf:
    """The pictures of a data set's rows, by name: where they lie, and what they take in tokens.

    Args:
      folder: that names of files are relative to.
      eyes: tile, patch and crops of the model.

    Attributes:
      damaged: {name: why} of pictures that do not decode, as `check` finds them.
    """

    def __init__(self, folder: Path, eyes: Vision) -> None:
        if not folder.is_dir():
            raise UserError(f"images={folder} is no folder; name the one that the rows' pictures lie in")
        self.folder, self.eyes, self.damaged = folder, eyes, dict[str, str]()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._places: dict[str, str] = {}
        self._spool: Any = None  # bytes that rows bring along, and where in it each lies
        self._spans: dict[str, tuple[int, int]] = {}
        self._whole: set[str] = set()
        self._digests: dict[str, str] = {}

    def add(self, source: Any, place: str) -> str:
        """The name of a picture, whose file is read and hashed, and its header decoded, the first time.

        Raises:
          BadRow: it is missing, no picture, too large or too thin.
        """
        content = source.get("bytes") if isinstance(source, Mapping) else None
        if content is not None and not isinstance(content, bytes):
            raise BadRow(f"bytes of a picture are {type(content).__name__}, which only a .parquet file can hold")
        path = source.get("path") if isinstance(source, Mapping) else source
        name = f"sha256:{hashlib.sha256(content).hexdigest()}" if content else str(path)
        if name not in self._sizes:
            if content:
                self._spool = self._spool or tempfile.TemporaryFile()  # noqa: SIM115  it goes with the shelf
                self._spans[name] = (self._spool.seek(0, os.SEEK_END), len(content))
                self._spool.write(content)
            try:
                picture = self._picture(name)
                images.grid_of(*picture.size, self.eyes.crops, self.eyes.tile, picture.name)
                self._digests[name] = hashlib.sha256(content or self.bytes_of(name)).hexdigest()
            except UserError as error:
                raise BadRow(f"picture {error}") from None
            self._sizes[name], self._places[name] = picture.size, place
        return name

    def _picture(self, name: str) -> images.Picture:
        if name in self._spans:
            return images.Picture(self.bytes_of(name), name=name[:19])
        return images.Picture(self.folder / name, name=repr(str(self.folder / name)))

    def bytes_of(self, name: str) -> bytes:
        """The file of a picture.

        Raises:
          UserError: it cannot be read any more.
        """
        if name in self._spans:
            start, size = self._spans[name]
            self._spool.flush()
            return os.pread(self._spool.fileno(), size, start)
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"picture {self.folder / name} cannot be read: {error.strerror or error}") from error

    def size(self, name: str) -> tuple[int, int]:
        """(width, height)."""
        return self._sizes[name]

    def counts(self, names: Sequence[str]) -> list[int]:
        """Tokens that each takes."""
        eyes = self.eyes
        grids = [images.grid_of(*self._sizes[name], eyes.crops, eyes.tile, name) for name in names]
        return [grid.tokens(eyes.side) for grid in grids]

    def check(self, skip: bool = False) -> None:
        """Decodes every picture once, on all cores. Those that do not are `damaged`.

        Raises:
          UserError: there are such, and they are not to be skipped; names the first, its row, and how many there are.
        """
        names = [name for name in self._sizes if name not in self._whole]

        def why(name: str) -> str:
            try:
                self._picture(name).rgb()
            except UserError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.damaged |= {name: said for name, said in zip(names, pool.map(why, names), strict=True) if said}
        self._whole.update(names)
        if self.damaged and not skip:
            name = next(iter(self.damaged))
            more = f" ({len(self.damaged)} of {len(self._sizes)} pictures are)" if len(self.damaged) > 1 else ""
            raise UserError(
                f"{self._places[name]}: picture {self.damaged[name]}{more}; mend it, or leave out rows of such with "
                "--config.data.on_error=skip"
            )

    @property
    def names(self) -> list[str]:
        """Of all pictures, as they came."""
        return list(self._sizes)

    @property
    def account(self) -> str:
        """What a manifest keeps to know its input by: the number of pictures, and a digest of their names and contents."""
        digest = hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()
        return f"{len(self._digests)} pictures, {digest[:16]}"
