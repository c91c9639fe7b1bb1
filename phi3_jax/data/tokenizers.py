"""Tokenizers behind one small interface: bytes, Hugging Face `tokenizer.json`, tiktoken, sentencepiece.

`load("bytes")` needs no file; `load("tiny")` comes along, for proxies that chat; `load(path)` looks at the content of a
file or folder. Strings such as `<s>` or `<|end|>` in ordinary text are ordinary text: no text can produce a control token.
Everything works offline.
"""

from __future__ import annotations

import abc
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from phi3_jax.data.continuation import Continuation
from phi3_jax.errors import UserError
from phi3_jax.foreign import Fields, shown
from phi3_jax.records import files

FOLDER = "tokenizer"  # of a data set: the files of the tokenizer it was made with
# Byte-fallback BPE of 1,013 pieces of the generated corpora, then the control tokens of the family in its order.
TINY = Path(__file__).parent / "corpora/tiny"
_NAMES = {"huggingface": "tokenizer.json", "tiktoken": "tokenizer.tiktoken", "sentencepiece": "tokenizer.model"}
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "special_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Added tokens that steer a model (`<s>`, `<|end|>`, `[SEP]`), unlike added pieces such as runs of blanks.
_CONTROL = re.compile(r"<.*>|\[[A-Z0-9_]+\]")
_EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")


class Tokenizer(abc.ABC):
    """Text <-> token ids.

    Attributes:
      kind: "bytes", "huggingface", "tiktoken" or "sentencepiece".
      vocab_size: ids are 0..vocab_size-1 (a model may pad its embedding table beyond).
      eos_id: the id that ends a document.
      fingerprint: sha256 over kind, content and eos_id; manifests carry it.
      special_tokens: ids of the control tokens by name (`<|end|>`), which no text produces.
      stripping: those that swallow the blanks after them (`rstrip`).
      files: what it was read from, by the name under which `load` finds it in a folder of its own.
    """

    kind: str
    vocab_size: int
    eos_id: int
    special_tokens: Mapping[str, int] = MappingProxyType({})
    stripping: frozenset[str] = frozenset()
    files: Mapping[str, Path] = MappingProxyType({})

    def _finish(self, vocab_size: int, eos_id: int, content: bytes) -> None:
        self.vocab_size, self.eos_id = vocab_size, eos_id
        digest = hashlib.sha256(f"{self.kind}\n{eos_id}\n".encode())
        digest.update(content)
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end tokens."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; lone surrogates are replaced by '?'."""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.special_tokens.values())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, as a text of its own; an id that stands for nothing (a padded row of a model's table) is none.

        A reply is not a text of its own: see `continuation`.
        """
        return self._decode([i for i in map(int, ids) if self._stands(i)])

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of a reply `ids` to `prompt`: what they add to the prompt's text."""
        text = Continuation(self, prompt)
        return "".join([*map(text.add, ids), text.end()])

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that all stand for something."""

    def _stands(self, token: int) -> bool:
        return 0 <= token < self.vocab_size

    def describe(self) -> dict[str, object]:
        """The manifest's entry."""
        names = ("kind", "fingerprint", "vocab_size", "eos_id")
        return {name: getattr(self, name) for name in names}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then bos 256, eos 257, pad 258."""

    kind = "bytes"
    bos_id, pad_id = 256, 258

    def __init__(self) -> None:
        self._finish(259, 257, b"utf-8")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; `tokenizer_config.json` beside it may name the end token."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers

        spec = files.read_json(path)
        for token, fields in zip(
            spec.get("added_tokens") or (), Fields(spec, path).objects("added_tokens"), strict=True
        ):
            control = _CONTROL.fullmatch(fields.text("content"))
            token["special"] = bool(fields.flag("special", False) or control)
            fields.whole("id"), fields.flag("rstrip", False)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the Rust parser raises plain Exception
            raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True  # True means: special tokens in text are split as ordinary text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        names: tuple[str, ...] = _EOS_NAMES
        config = path.with_name("tokenizer_config.json")
        if config.exists() and (eos := _end_token(config)):
            names = (eos,)
        ids = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
        if not ids:
            raise UserError(f"{path} has no end token among {', '.join(names)}; name it as eos_token in {config.name}")
        special = [token for token in spec.get("added_tokens") or () if token["special"]]
        self.special_tokens = MappingProxyType({token["content"]: token["id"] for token in special})
        self.stripping = frozenset(token["content"] for token in special if token.get("rstrip"))
        content = json.dumps(spec, sort_keys=True, ensure_ascii=True).encode()
        entries = self._tokenizer.get_vocab(with_added_tokens=True)
        self._finish(max(len(entries), *(id + 1 for id in entries.values())), ids[0], content)  # ids may leave gaps

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast([_clean(t) for t in texts], add_special_tokens=False)
        return [e.ids for e in encoded]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _stands(self, token: int) -> bool:  # added tokens may lie beyond a gap, and so beyond `vocab_size`
        return 0 <= token < 2**32


def _end_token(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json: a text, or an object with its `content`."""
    fields = Fields(files.read_json(path), path)
    if isinstance(fields.raw("eos_token"), dict):
        token = fields.inside("eos_token")
        return token.text("content") if token else None
    return fields.text("eos_token", None) or None


class TiktokenTokenizer(Tokenizer):
    """A tiktoken file, beside it `special_tokens.json`: {pattern, special_tokens, n_vocab, eos_token}."""

    kind = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        beside = path.with_name("special_tokens.json")
        if not beside.exists():
            raise UserError(f"{path} needs {beside.name} beside it with pattern, special_tokens, n_vocab and eos_token")
        content, special = path.read_bytes(), files.read_json(beside)
        fields = Fields(special, beside)
        fields.text("pattern"), fields.whole("n_vocab", None, low=1)
        named, end = fields.inside("special_tokens"), fields.text("eos_token")
        if named is None or end not in named.names():
            raise UserError(
                f"{beside}: special_tokens must be an object {{name: id}} that holds eos_token={shown(end)}"
            )
        for name in named.names():
            named.whole(name)
        try:
            lines = (line.split() for line in content.splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            self._encoding = tiktoken.Encoding(
                path.stem,
                pat_str=special["pattern"],
                mergeable_ranks=ranks,
                special_tokens=special["special_tokens"],
                explicit_n_vocab=special.get("n_vocab"),
            )
            self._known = {*ranks.values(), *special["special_tokens"].values()}
            eos = special["special_tokens"][end]
            self.special_tokens = MappingProxyType(special["special_tokens"])
        except (ValueError, KeyError, AssertionError) as error:
            raise UserError(f"{path} with {beside.name} is not a whole tiktoken vocabulary: {error!r}") from error
        content += json.dumps(special, sort_keys=True).encode()
        self._finish(self._encoding.n_vocab, eos, content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(_clean(text)) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def _stands(self, token: int) -> bool:
        return token in self._known


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        content = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            size, eos = self._processor.vocab_size(), self._processor.eos_id()
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{path} is not a readable sentencepiece model: {error}") from error
        if eos < 0:
            raise UserError(f"{path} has no end token; train the model with eos_id >= 0")
        self._finish(size, eos, content)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(filter(self._processor.is_control, range(self.vocab_size)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([_clean(t) for t in texts], out_type=int)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


def place(spec: str | Path) -> Path:
    """The file or folder that a tokenizer is read from."""
    return TINY if spec == "tiny" else Path(spec).expanduser()


def load(spec: str | Path) -> Tokenizer:
    """The tokenizer called "bytes" or "tiny", or the one in a file or folder, told by its content.

    Raises:
      UserError: nothing there, or nothing that is a tokenizer.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = place(spec)
    if path.is_dir():
        path = _find(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; give 'bytes', a tokenizer.json, a .tiktoken or a .model file")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror or error}") from error
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        found: Tokenizer = HuggingFaceTokenizer(path)
    elif re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        found = TiktokenTokenizer(path)
    elif head[:1] == b"\n":  # field 1 of the ModelProto: the pieces
        found = SentencePieceTokenizer(path)
    else:
        raise UserError(
            f"{path} is neither a tokenizer.json nor a tiktoken nor a sentencepiece file; 'bytes' needs no file"
        )
    beside = {name: other for name in _BESIDE if (other := path.with_name(name)).is_file() and other != path}
    found.files = MappingProxyType({_NAMES[found.kind]: path} | beside)
    return found


def keep(kept: Mapping[str, Path], folder: Path) -> None:
    """Copies a tokenizer's files `kept` to a folder, whole or not at all; leaves a folder that is there.

    Raises:
      OSError: it cannot be written.
    """
    if not kept or folder.exists():
        return
    partial = files.temporary(folder)
    try:
        partial.mkdir(parents=True)
        for name, file in kept.items():
            shutil.copyfile(file, partial / name)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find(folder: Path) -> Path:
    for pattern in ("tokenizer.json", "*.tiktoken", "*.model"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise UserError(
        f"{folder} holds no tokenizer.json, .tiktoken or .model file; name a folder that does, or use 'bytes'"
    )


def _clean(text: str) -> str:
    """`text` with lone surrogates replaced, which UTF-8 cannot carry."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
