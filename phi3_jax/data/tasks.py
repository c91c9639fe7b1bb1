"""Text sources, preprocessing and mixing rates declared as seqio Tasks and Mixtures, for the exporter.

A Task is a source (text files, pydocs, a TFDS name, or generated text), an optional quality filter, and a tokenizer as
seqio vocabulary; a Mixture gives each Task a rate. `PHASES` holds the two phases of the Phi-3 report (arXiv:2404.14219,
section 2): phase 1 mostly web text for knowledge and language, phase 2 a more heavily filtered part of that web text
with synthetic text for reasoning. The report publishes no ratios and no filter: every number here is ours.

Rates are shares of tokens: the exporter writes each Task as a source of its own and the loader mixes windows. This
module and nothing else imports TensorFlow; only the exporter imports it, and only where a request needs it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import seqio
import tensorflow as tf

from phi3_jax.data.corpora import facts, reasoning, text
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError, nearest

Texts = Callable[[], Iterator[str]]

# ------------------------------------------------------------------------------------------------ phases


@dataclass(frozen=True)
class Role:
    """One part of a phase.

    Attributes:
      rate: share of the phase's tokens.
      default: where the text comes from when the user names nothing: "pydocs", "prose" (facts), or "reasoning".
      quality: least `quality` of a document that is kept, 0 keeps all.
    """

    rate: float
    default: str
    quality: float = 0.0


# Rates and thresholds are ours: the report says "mostly" web in phase 1, and in phase 2 "even more heavily filtered
# webdata (a subset used in Phase-1) with some synthetic data". pydocs stands in for the web, so that all works offline.
PHASES: dict[str, dict[str, Role]] = {
    "phi3_phase1": {
        "web": Role(0.9, "pydocs", quality=0.4),
        "textbook": Role(0.1, "prose"),
    },
    "phi3_phase2": {
        "web": Role(0.5, "pydocs", quality=0.6),
        "textbook": Role(0.2, "prose"),
        "reasoning": Role(0.3, "reasoning"),
    },
}


@dataclass(frozen=True)
class Source:
    """A Task with its share, as the exporter takes it."""

    name: str
    rate: float
    task: seqio.Task


def sources(
    spec: str, tokenizer: Tokenizer, filled: Mapping[str, str], *, text_field: str = "text", seed: int = 0
) -> tuple[list[Source], list[str]]:
    """The sources of "tfds:..." or "mixture:PHASE", and the paths that they read.

    Args:
      filled: role -> path (or pydocs) that the user gives for a mixture.
      seed: of generated text and of the filter's noise.

    Raises:
      UserError: an unknown phase or role, a path without text, a TFDS name without text.
    """
    kind, _, name = spec.partition(":")
    if kind == "tfds":
        if filled:
            raise UserError(f"--source {'/'.join(filled)} belongs to a mixture, not to --data {spec}")
        task = add_task(f"tfds.{re.sub('[^A-Za-z0-9]+', '_', name)}", tfds_source(name), tokenizer, text_field)
        return [Source("text", 1, task)], []
    if name not in PHASES:
        raise UserError(f"unknown mixture {name!r}{nearest(name, PHASES)}")
    mixture = phase(name, tokenizer, filled, text_field=text_field, seed=seed)
    named = [Source(t.name.split(".")[-1], mixture.get_rate(t), t) for t in mixture.tasks]
    return named, [filled.get(role, part.default) for role, part in PHASES[name].items()]


def phase(
    name: str, tokenizer: Tokenizer, filled: Mapping[str, str], *, text_field: str = "text", seed: int = 0
) -> seqio.Mixture:
    """The Mixture of a phase, registered as `name` with Tasks `name.role`."""
    roles = PHASES[name]
    for role in filled:
        if role not in roles:
            raise UserError(f"{name} has no role {role!r}{nearest(role, roles)}")
    tasks = []
    for role, part in roles.items():
        where = filled.get(role, part.default)
        texts = _generated(where, seed) or text_texts(where, text_field)
        keep = functools.partial(kept, least=part.quality, seed=seed) if part.quality else None
        tasks.append((add_task(f"{name}.{role}", function_source(texts), tokenizer, keep=keep), part.rate))
    seqio.MixtureRegistry.remove(name)
    return seqio.MixtureRegistry.add(name, tasks)


# ----------------------------------------------------------------------------------------------- sources


def text_texts(where: str, text_field: str = "text") -> Texts:
    """Texts of "pydocs" or of files (phi3_jax.data.corpora.text); a missing path is an error at once."""
    text.documents(where, text_field=text_field)
    return lambda: (document.text for document in text.documents(where, text_field=text_field))


def _generated(where: str, seed: int) -> Texts | None:
    return {"prose": lambda: prose_texts(seed), "reasoning": lambda: reasoning_texts(seed)}.get(where)


def prose_texts(seed: int, universe: facts.Universe | None = None, visits: int = 2) -> Iterator[str]:
    """The knowledge corpus in prose, one person a text, everyone `visits` times in newly worded sentences."""
    universe = facts.Universe(seed=seed) if universe is None else universe
    for document in facts.prose(universe, universe.order(seed, 0, visits * universe.facts), seed):
        yield document.text


def reasoning_texts(seed: int, count: int = 4000, items: int = 10) -> Iterator[str]:
    """Reasoning items written out, `items` a text: steps from left to right, each result kept between 0 and 47."""
    head = f"Work from left to right and keep every result between 0 and {reasoning.NUMBERS - 1}."
    for start in range(0, count * items, items):
        windows = reasoning.generate(seed, start, items)
        yield "\n".join([head, *(_item_text(windows, row) for row in range(items))])


def _item_text(windows: Windows, row: int, pool: int = 256) -> str:
    item = [*windows.tokens[row].tolist(), int(windows.targets[row, -1])]
    value, column, lines = item[1] - pool - reasoning.FIRST_NUMBER, 2, []
    for gap in reasoning.GAPS:
        line = str(value)
        for at in range(column, column + 2 * gap, 2):
            operator = reasoning.OPERATORS[item[at] - pool - reasoning.FIRST_OPERATOR]
            line += f" {operator} {item[at + 1] - pool - reasoning.FIRST_NUMBER}"
        column += 2 * gap + 1
        value = item[column - 1] - pool - reasoning.FIRST_NUMBER
        lines.append(f"{line} = {value}")
    return "; ".join(lines) + "."


def function_source(texts: Texts) -> seqio.FunctionDataSource:
    """A seqio source of texts, all in the split "train": the exporter holds documents out by a hash of their text."""

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # the loader shuffles windows

        def rows() -> Iterator[dict[str, bytes]]:
            return ({"text": t.encode("utf-8", "replace")} for t in texts())

        return tf.data.Dataset.from_generator(rows, output_signature={"text": tf.TensorSpec((), tf.string)})

    return seqio.FunctionDataSource(dataset_fn, splits=["train"])


def tfds_source(name: str) -> seqio.TfdsDataSource:
    """NAME[/CONFIG][:VERSION][:SPLIT] as a seqio source whose split "train" is SPLIT; the newest version by default."""
    parts = re.fullmatch(r"([^:]+)(?::([\d*]+(?:\.[\d*]+){2}))?(?::([^:\[]+(?:\[.*\])?))?", name)
    if parts is None:
        raise UserError(f"TFDS name {name!r} is not NAME[/CONFIG][:VERSION][:SPLIT]")
    name, version, split = parts.groups()
    return seqio.TfdsDataSource(f"{name}:{version or '*.*.*'}", splits={"train": split or "train"})


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
        same = isinstance(other, TokenizerVocabulary)
        return same and other.tokenizer.fingerprint == self.tokenizer.fingerprint

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
                f"{name} has no text field {text_field!r}; name one with --text-field: {', '.join(strings)}"
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


# ---------------------------------------------------------------------------------------- quality filter

_STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
_TEACHING = re.compile(
    r"\b(because|therefore|thus|hence|example|for instance|defined?|definition|means?|called|note that|in general"
    r"|if|then|returns?|how|why|consider|suppose|explain(?:s|ed)?|first|second|finally|compute[ds]?|rule|theory|result)\b",
    re.IGNORECASE,
)


def quality(document: str) -> float:
    """How much a text reads like something to learn from, 0..1: a documented heuristic, not the report's model.

    0.6 for the share of seven rules met (Gopher: Rae et al. 2021, table A1: words of 3-10 letters on average, 80 % of
    them with a letter, at most 0.1 symbols a word, two stop words, at most 90 % list lines, under 30 % repeated lines;
    and 50 or more words), 0.2 for the share of lines that end a sentence (C4: Raffel et al. 2020), 0.2 for words of
    explanation (ours, full at 2 in 100 words).
    """
    words, lines = document.split(), [line.strip() for line in document.splitlines() if line.strip()]
    if not words:
        return 0.0
    n = len(words)
    rules = (
        n >= 50,
        3 <= sum(map(len, words)) / n <= 10,
        sum(any(c.isalpha() for c in word) for word in words) >= 0.8 * n,
        document.count("#") + document.count("...") + document.count("…") <= 0.1 * n,
        len(_STOP_WORDS & {word.lower() for word in words}) >= 2,
        sum(line[0] in "-*•" for line in lines) <= 0.9 * len(lines),
        len(set(lines)) > 0.7 * len(lines),
    )
    ends = sum(line.endswith((".", "!", "?", '"', ":", ";")) for line in lines) / len(lines)
    teaching = min(1.0, 50 * len(_TEACHING.findall(document)) / n)
    return 0.6 * sum(rules) / len(rules) + 0.2 * ends + 0.2 * teaching


def kept(document: str, least: float, seed: int = 0, noise: float = 0.05) -> bool:
    """Whether the filter keeps a text: quality plus seeded noise in +-`noise` reaches `least`.

    The noise (as in GPT-3's filter, Brown et al. 2020, appendix A) lets some doubtful texts through; it depends on seed
    and text alone, so that what a higher threshold keeps is a subset of what a lower one keeps.
    """
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8, key=str(seed).encode()).digest()
    return quality(document) + noise * (2 * int.from_bytes(digest, "big") / 2**64 - 1) >= least
