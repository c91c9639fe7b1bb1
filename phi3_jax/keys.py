"""What can be set, declared once: the keys of an experiment and the flags of commands, with type, range and meaning.

`KEYS` are the keys of every experiment, from which `experiment.base_config` is made. Whatever sets one, a word, an option,
an experiment file or a run's own description, is checked against its declaration. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from phi3_jax.errors import UserError, nearest
from phi3_jax.strategies import STRATEGIES

MOST = 10**15  # of anything that is counted: 200 times the tokens of the largest published runs
BELOW_ONE = 1 - 1e-9
MOST_RANK = 2**16  # of an adapter
_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
_POWERS = {"k": 3, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
_SCHEME = re.compile(r"(hf:|gguf:)?([A-Za-z][A-Za-z0-9+.-]*)://")


def parse_count(text: str, what: str = "a number of tokens") -> int:
    """`4M`, `3.3T`, `250k` or `1000000` as an integer from 1 to `MOST`."""
    import decimal  # takes a millisecond, which the help of a command does without

    power = _POWERS.get(text[-1:])
    try:
        value = decimal.Decimal(text[:-1] if power else text).scaleb(power or 0)
        whole = value.is_finite() and 1 <= value <= MOST and value == int(value)
    except (decimal.DecimalException, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UserError(
            f"{text!r} is not {what}; write a whole number from 1 to {MOST // 10**12}T, such as 500k, 4M, 3.3T or 1000000"
        )
    return int(value)


def place(text: str, shown: str) -> str:
    """A path, or hf:FOLDER and gguf:FILE, on this machine's file systems.

    Raises:
      UserError: a bucket or another address, whose scheme would become the name of a folder.
    """
    if "\0" in text:
        raise UserError(f"{shown!a} holds a character of value 0; leave it out")
    if found := _SCHEME.match(text):
        raise UserError(
            f"{shown}: {found[2]}:// is no place this command can reach; give a local path, for example where it is mounted"
        )
    return text


def plain(text: str, shown: str) -> str:
    """A text of whole characters.

    Raises:
      UserError: bytes of the command line that are no UTF-8, or a character of value 0.
    """
    if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
        raise UserError(f"{shown!a} is no UTF-8 text; type it in UTF-8, or give it in a file")
    return text


class Names(Collection[str]):
    """Words, and the names of tables, which may grow after this was made."""

    def __init__(self, *parts: str | Mapping[str, Any]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from (part,) if isinstance(part, str) else part

    def __contains__(self, name: object) -> bool:
        return any(name == word for word in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclasses.dataclass(frozen=True)
class Key:
    """One thing that can be set.

    Attributes:
      doc: what it means.
      default: None where other things decide.
      kind: bool, int, float, str, or tuple, which has an `item`.
      low, high: least and greatest value of a number.
      choices: the texts that are valid, where not all are.
      item: of a tuple; none is there twice where `unique`.
      check: called with a value and how to show it, raises UserError; None: `place` for nothing, texts are free.
    """

    doc: str
    default: Any = None
    kind: type = str
    low: float | None = None
    high: float | None = None
    choices: Collection[str] = ()
    item: Key | None = None
    unique: bool = False
    check: Callable[[Any, str], Any] | None = None

    @property
    def range(self) -> str:
        """The declared values in words."""
        noun = _NOUNS[self.kind]
        if self.choices:
            return f"one of {', '.join(choice or 'nothing' for choice in self.choices)}"
        if self.low is None:
            return noun
        low, high = (f"{x:,}" if isinstance(x, int) else f"{x:.12g}" for x in (self.low, self.high or 0.0))
        return f"{noun}, {low} or more" if self.high in (None, MOST) else f"{noun}, {low} to {high}"

    def read(self, text: str, shown: str) -> Any:
        """The value of a text.

        Raises:
          UserError: not of this kind, or out of range; the message begins with `shown`.
        """
        try:
            if self.kind is bool:
                value: Any = {"true": True, "false": False, "1": True, "0": False}[text.lower()]
            elif self.kind is int:
                value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,4000}", text) else parse_count(text)
            elif self.item is not None:
                pieces = [piece.strip() for piece in text.strip("()").split(",")]
                value = tuple(self.item.read(piece, f"{shown}: {piece!r}") for piece in pieces if piece)
            else:
                value = self.kind(text)
        except (ValueError, KeyError) as error:
            if self.item is not None:
                raise
            raise UserError(f"{shown} must be {self.range}") from error
        return self.valid(value, shown)

    def valid(self, value: Any, shown: str) -> Any:
        """`value`, if it is one.

        Raises:
          UserError: of another kind, or out of range; the message begins with `shown`.
        """
        if value is None and self.default is None:
            return value
        kinds: Any = {float: (int, float), tuple: (tuple, list)}.get(self.kind, self.kind)
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind is not bool):
            raise UserError(f"{shown} must be {self.range}")
        if self.kind in (int, float):
            least, most = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
            if not least <= value <= most or value in (math.inf, -math.inf):
                large = self.high == MOST and value > MOST
                raise UserError(f"{shown} must be {f'at most {MOST:,}' if large else self.range}")
        if self.item is not None:
            for piece in value:
                self.item.valid(piece, f"{shown}: {piece!r}")
            if self.low is not None and len(value) < self.low:
                raise UserError(f"{shown} is empty; name one or more")
            if self.unique and (twice := [piece for piece in value if list(value).count(piece) > 1]):
                raise UserError(f"{shown} names {twice[0]} twice; name each once")
        if self.kind is str and self.check is not place:  # the name of a file may be any bytes, a text may not
            plain(value, shown)
        if self.choices and value not in self.choices:
            raise UserError(f"{shown} is unknown{nearest(value, self.choices)}")
        if self.check is not None:
            self.check(value, shown)
        return value


class Auto(Key):
    """A count, or `auto`, by which other things decide."""

    @property
    def range(self) -> str:
        return f"auto, or {super().range}"

    def read(self, text: str, shown: str) -> Any:
        return text if text == "auto" else super().read(text, shown)

    def valid(self, value: Any, shown: str) -> Any:
        return value if value == "auto" else super().valid(value, shown)


def whole(doc: str, default: int | None = None, low: int = 0, high: int = MOST) -> Key:
    """A count."""
    return Key(doc, default, int, low, high)


def number(doc: str, default: float | None = None, low: float = 0.0, high: float | None = None) -> Key:
    """A finite number."""
    return Key(doc, default, float, low, high)


def share(doc: str, default: float | None = None, high: float = 1.0) -> Key:
    """A number from 0 to 1."""
    return Key(doc, default, float, 0.0, high)


def word(doc: str, default: str | None = "", *choices: str | Mapping[str, Any]) -> Key:
    """A text, one of the choices where there are any: words, and the names of tables."""
    plain_words = tuple(choice for choice in choices if isinstance(choice, str))
    return Key(doc, default, str, choices=plain_words if len(plain_words) == len(choices) else Names(*choices))


def local(doc: str, default: str | None = None) -> Key:
    """A place on this machine's file systems."""
    return Key(doc, default, str, check=place)


def switch(doc: str) -> Key:
    """Off, unless it is asked for."""
    return Key(doc, False, bool)


def _rising(value: Any, shown: str) -> None:
    if len(value) != 2 or not value[0] < value[1]:
        raise UserError(f"{shown} must be two steps, the first and the one before which it ends, such as 100,105")


MOST_SEED = 2**63 - 2**20  # so that a study's further seeds are seeds too
SEED = whole("the first seed", 0, 0, MOST_SEED)
OPTIMIZERS = ("adamw", "muon", "lion")  # each is a file of training/optimizers/
SCHEDULES = ("wsd", "cosine", "linear")  # of the learning rate
PREFERENCES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "orpo", "simpo")  # losses of training/preference.py
PARTS = ("lm", "projector", "tower")  # of a phi-3-vision


def rates_of(parts: Collection[str], shown: str = "train.parts") -> dict[str, float]:
    """{part: factor of its learning rate} of `lm`, `tower@0.1`.

    Raises:
      UserError: no part, one that is there twice, a factor that is none.
    """
    found: dict[str, float] = {}
    for one in parts:
        name, at, rate = one.partition("@")
        if name not in PARTS:
            raise UserError(f"{shown}: {name!r} is no part of a model{nearest(name, PARTS)}")
        if name in found:
            raise UserError(f"{shown} names {name} twice; name each once")
        found[name] = number("factor", 1.0, 1e-6, 1e3).read(rate, f"{shown}: the factor {rate!r}") if at else 1.0
    return found


# What a run carries as it was set; its description in `configs.RunConfig` is held against these.
TRAIN: dict[str, Key] = dict(
    init=local("weights to start from: a run, one of its checkpoints, or hf:FOLDER; default: random", ""),
    epochs=number("passes over the data, instead of a budget in tokens; 0: none", 0.0, 0.0, 1e6),
    batch_tokens=whole("tokens of a batch; default by the scale", None, 1, 10**12),
    accumulation=whole("parts a batch is computed in", 1, 1, 10**6),
    weighting=word(
        "of the loss. token: a target weighs the same in every batch of every run; domain: the mean of the domains' means, "
        "which doubles the weight of a target where its domain's share is halved; default: what the data set says, domain "
        "for facts",
        "",
        "",
        "token",
        "domain",
    ),
    parts=Key(
        "of a phi-3-vision, what is trained: lm, projector, tower; tower@0.1 learns at a tenth of the rate; default: all",
        (),
        tuple,
        item=word("a part", None),
        check=rates_of,
    ),
    dtype=word("of products", None, "float32", "bfloat16"),
    base_dtype=word(
        "of frozen weights (lora); default: bfloat16 on accelerators, float32 on CPUs", None, "float32", "bfloat16"
    ),
    remat=word("what is computed again in the backward pass", None, "none", "dots", "names", "full"),
    strategy=word("how a run is split over devices", "auto", "auto", STRATEGIES),
    context=whole("devices that share a sequence (fsdp_cp)", 1, 1, 10**6),
    tensor=whole("devices that share a layer's heads and mlp (fsdp_tp)", 1, 1, 10**6),
    attention=word("kernel", "auto", "auto", "reference", "chunked", "blocksparse", "splash", "cudnn", "flash"),
    slices=whole("groups of devices joined by a slow network; 0: what the topology says", 0, 0, 10**6),
    log_every=whole("steps between rows of metrics.jsonl", 20, 1, 10**9),
    eval_points=whole("evaluations of a run; 0 and 1: at the end", 4, 0, 10**4),
    checkpoint_every=whole("steps between checkpoints; default a tenth of the run", None, 1, 10**9),
    keep_latest=whole("newest checkpoints that stay", 2, 1, 10**6),
    batch_timeout=number("seconds until a batch that does not come ends the run", 600.0, 1e-3, 1e9),
    tensorboard=switch("write TensorBoard's files too"),
    profile=Key(
        "FIRST,STOP: the steps that a profile traces", None, tuple, item=whole("a step", None, 0, 10**12), check=_rising
    ),
)
_OF_RUN = {  # fields of RunConfig with other names than their keys
    "context_parallel": "context", "tensor_parallel": "tensor",
}  # fmt: skip


def check_run(run: Any) -> None:
    """Checks the fields of a `RunConfig` that are keys; 0 stands for a `checkpoint_every` that is not set."""
    for field in dataclasses.fields(run):
        name, value = _OF_RUN.get(field.name, field.name), getattr(run, field.name)
        key = SEED if name == "seed" else TRAIN.get(name)
        if key is not None and not (field.name == "checkpoint_every" and value == 0):
            key.valid(value, f"{'' if name == 'seed' else 'train.'}{name}={text(value)}")


def text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
