"""Texts, preprocessing and mixing rates declared as seqio Tasks and Mixtures, for sources/tfds.py and sources/mixture.py.

A Task is a source of texts (or a TFDS name), an optional filter, and a tokenizer as seqio vocabulary; a Mixture gives each
Task a rate. This module and nothing else imports TensorFlow; only the two sources import it, and only where a request
needs it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import seqio
import tensorflow as tf

from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError, nearest

Texts = Callable[[], Iterator[str]]

# ---------------------------------------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class Part:
    """A part of a mixture.

    Attributes:
      texts: called for every pass.
      rate: share of the mixture's tokens.
      keep: whether a text stays; None keeps all.
    """

    texts: Texts
    rate: float
    keep: Callable[[str], bool] | None = None


def add_mixture(name: str, parts: Mapping[str, Part], tokenizer: Tokenizer) -> seqio.Mixture:
    """The Mixture of some parts, registered as `name` with Tasks `name.part`."""
    tasks = []
    for part, of in parts.items():
        task = add_task(f"{name}.{part}", function_source(of.texts), tokenizer, keep=of.keep)
        tasks.append((task, of.rate))
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, tasks)


# ----------------------------------------------------------------------------------------------- sources


def function_source(texts: Texts) -> seqio.FunctionDataSource:
    """A seqio source of texts, all in the split "train": the exporter holds documents out by a hash of their text."""

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # the loader shuffles windows

        def rows() -> Iterator[dict[str, bytes]]:
            return ({"text": t.encode("utf-8", "replace")} for t in texts())

        return tf.data.Dataset.from_generator(rows, output_signature={"text": tf.TensorSpec((), tf.string)})

    return seqio.FunctionDataSource(dataset_fn, splits=["train"])


def tfds_source(name: str) -> seqio.TfdsDataSource:
    """`NAME[/CONFIG][:VERSION][:SPLIT]` as a seqio source whose split "train" is SPLIT; the newest version by default."""
    parts = re.fullmatch(r"([^:]+)(?::([\d*]+(?:\.[\d*]+){2}))?(?::([^:\[]+(?:\[.*\])?))?", name)
    if parts is None:
        raise UserError(f"TFDS name {name!r} is not NAME[/CONFIG][:VERSION][:SPLIT]")
    name, version, split = parts.groups()
    return seqio.TfdsDataSource(f"{name}:{version or '*.*.*'}", splits={"train": split or "train"})


def tfds_task(name: str, tokenizer: Tokenizer, text_field: str = "text") -> seqio.Task:
    """The Task of `tfds_source(name)`."""
    return add_task(f"tfds.{re.sub('[^A-Za-z0-9]+', '_', name)}", tfds_source(name), tokenizer, text_field)


def rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of `tfds:NAME`, whose features have the keys of rows, or of `seqio:MODULE:TASK`.

    Of a seqio Task, MODULE registers it; a row has the texts among its features, and where these are `inputs` and `targets`
    they are prompt and completion.

    Raises:
      UserError: no such data set, module or Task; whatever is wrong with the source, in one line.
    """
    kind, _, name = spec.partition(":")
    try:
        dataset = tfds_source(name).get_dataset("train", shuffle=False) if kind == "tfds" else _of_task(name)
        for number, row in enumerate(dataset.as_numpy_iterator(), 1):
            yield f"{spec}:{number}", _plain_row(row)
    except UserError:
        raise
    except Exception as error:  # TFDS, tf.data and the network raise all kinds
        raise UserError(
            f"cannot read {spec}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def _of_task(name: str) -> tf.data.Dataset:
    module, colon, task = name.rpartition(":")
    if not colon or not module:
        raise UserError(f"seqio:{name} must be seqio:MODULE:TASK, the module that registers the Task first")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"seqio:{name}: {module} cannot be imported ({error}); name a module on Python's path"
        ) from error
    if task not in seqio.TaskRegistry.names():
        raise UserError(f"seqio:{name}: {module} registers no Task {task!r}{nearest(task, seqio.TaskRegistry.names())}")
    return seqio.TaskRegistry.get(task).get_dataset(sequence_length=None, split="train", shuffle=False)


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Texts and lists of a row; a sequence of records, which TFDS turns around, is a list of objects again."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, dict):
            columns = {name: plain(one) for name, one in value.items()}
            if all(isinstance(column, list) for column in columns.values()):
                return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]
            return columns
        return [plain(one) for one in value] if isinstance(value, np.ndarray) and value.dtype == object else value

    found = {name: plain(value) for name, value in row.items()}
    for name, key in (("inputs", "prompt"), ("targets", "completion")):
        if isinstance(said := found.get(f"{name}_pretokenized", found.get(name)), str):
            found.setdefault(key, said)
    return {name: value for name, value in found.items() if isinstance(value, str | list)}


# ------------------------------------------------------------------------------------------------- tasks


class TokenizerVocabulary(seqio.Vocabulary):
    """One of phi3_jax's tokenizers as a seqio vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def bos_id(self) -> int:
        return self.tokenizer.eos_id  # the packer starts documents with the separator that ends them

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def unk_id(self) -> None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i != self.eos_id])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = tf.numpy_function(lambda raw: np.asarray(self.tokenizer.encode(_decoded(raw)), np.int32), [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda row: self._decode(row.tolist()).encode(), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and other.tokenizer.fingerprint == self.tokenizer.fingerprint

    def __hash__(self) -> int:
        return hash(self.tokenizer.fingerprint)


def _decoded(raw: bytes | np.ndarray) -> str:
    """tf.numpy_function passes bytes inside tf.data, and an array of one object when called eagerly."""
    return (raw if isinstance(raw, bytes) else raw.item()).decode("utf-8", "replace")


def add_task(
    name: str,
    source: seqio.DataSource,
    tokenizer: Tokenizer,
    text_field: str = "text",
    keep: Callable[[str], bool] | None = None,
) -> seqio.Task:
    """Register a Task: `targets` (token ids) and `targets_pretokenized` (text) of the documents that `keep` keeps."""

    def choose(dataset: tf.data.Dataset) -> tf.data.Dataset:
        fields = dataset.element_spec
        strings = [
            key for key, spec in fields.items() if getattr(spec, "dtype", None) == tf.string and spec.shape == ()
        ]
        field = text_field if text_field in strings else strings[0] if len(strings) == 1 else None
        if field is None:
            raise UserError(
                f"{name} has no text field {text_field!r}; name one with --text_field: {', '.join(strings)}"
            )
        dataset = dataset.map(lambda row: {"targets": row[field]})
        if keep is not None:
            dataset = dataset.filter(
                lambda row: tf.numpy_function(lambda raw: keep(_decoded(raw)), [row["targets"]], tf.bool)
            )
        return dataset

    seqio.TaskRegistry.remove(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[choose, seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(TokenizerVocabulary(tokenizer), add_eos=False)},
    )


def documents(task: seqio.Task) -> Iterator[tuple[str, np.ndarray]]:
    """(text, token ids) of a Task's documents, in a fixed order.

    Raises:
      UserError: whatever is wrong with the source, in one line.
    """
    try:
        dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False)
        for row in dataset.as_numpy_iterator():
            yield row["targets_pretokenized"].decode("utf-8", "replace"), row["targets"]
    except UserError:
        raise
    except Exception as error:  # TFDS, tf.data and the network raise all kinds; a UserError inside is theirs too
        found = re.search(r"UserError: (.*)", str(error))
        if found is None and isinstance(task.source, seqio.FunctionDataSource):
            raise
        reason = (
            found[1] if found else f"cannot read {task.source.tfds_dataset.name}: {str(error).strip().splitlines()[0]}"
        )
        raise UserError(reason) from error
