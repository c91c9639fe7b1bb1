"""Reasoning items that nothing can memorise: clamped running expressions, graded in depth.

An item is `<R> a0 (op b)=o (op b)(op b)=o ...`: numbers 0..47, operators + - max min, every step clamped to
0..47. An output is written after `gap` steps, of which gap - 1 are unwritten, so it takes a composition of
`gap` steps without chain of thought. The `=` is notation only and takes no token. Loss falls on the outputs
alone. Operands of + and - are 1..24: with 0..47 the clamp would make 47 and 0 the answer of a sixth of the
outputs each, which a constant gets right.

Every item is a pure function of (seed, stream, item index): a counter-based generator jumps to any index, so
any split of the work gives the same items, and the default form has 48 * (2 * 48 + 2 * 24)^9 = 1.3e21
different rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from phi3_jax.data.corpora import below, counter_draws
from phi3_jax.data.windows import Windows
from phi3_jax.errors import UserError

NUMBERS = 48
LARGEST_STEP = 24  # of + and -; max and min take any number
OPERATORS = ("+", "-", "max", "min")
GAPS = (1, 2, 3, 2, 1)
DOMAIN = 2
_STREAMS = {"train": 0, "eval": 1}
# Ids after the shared pool: <K> <R> '=' '+', the numbers, four spare ids, the operators, four spare ids.
R_TOKEN, FIRST_NUMBER, FIRST_OPERATOR, SPECIALS = 1, 4, 56, 64
_BLOCK = 1 << 14  # items worked on at once, so that they stay in cache


@dataclass(frozen=True)
class Layout:
    """Where things are in an item of the given gaps; `window` is T, the input tokens of one item."""

    gaps: tuple[int, ...] = GAPS

    def __post_init__(self) -> None:
        if not self.gaps or min(self.gaps) < 1:
            raise UserError(f"gaps={self.gaps} must be one or more numbers of steps, each at least 1")

    @property
    def window(self) -> int:
        return 1 + 2 * sum(self.gaps) + len(self.gaps)

    @property
    def outputs(self) -> np.ndarray:
        """Positions t (in the targets) of the outputs, one a gap."""
        return np.cumsum([2 * gap + 1 for gap in self.gaps])

    @property
    def depths(self) -> np.ndarray:
        """Steps from the start of the item to each output."""
        return np.cumsum(self.gaps)


def generate(
    seed: int,
    start: int,
    count: int,
    *,
    stream: str = "train",
    gaps: tuple[int, ...] = GAPS,
    pool: int = 256,
) -> Windows:
    """Items start .. start + count - 1 of an endless sequence, one a window of `Layout(gaps).window` tokens.

    Args:
      seed: any integer >= 0; other seeds give other items.
      stream: "train" or "eval": the same seed gives different items in the two.
      gaps: steps before each output.
      pool: size of the shared pool that comes before the special ids (vocabulary = pool + 64).

    Raises:
      UserError: negative numbers or an unknown stream.
    """
    if stream not in _STREAMS:
        raise UserError(f"stream={stream!r} is none of {', '.join(_STREAMS)}")
    if min(seed, start, count) < 0:
        raise UserError(f"seed={seed}, start={start} and count={count} must not be negative")
    layout = Layout(tuple(gaps))
    items = np.empty((count, layout.window + 1), np.int32)
    for at in range(0, count, _BLOCK):
        block = items[at : at + _BLOCK]
        _fill(
            block,
            counter_draws(seed, _STREAMS[stream], start + at, len(block), 1 + 2 * sum(layout.gaps)),
            layout.gaps,
            pool,
        )
    domains = np.zeros((count, layout.window), np.int32)
    domains[:, layout.outputs] = DOMAIN
    targets = np.where(domains > 0, items[:, 1:], 0)
    return Windows(items[:, :-1], targets, np.ones_like(domains), domains)


def extra(gaps: tuple[int, ...] = GAPS) -> dict[str, np.ndarray]:
    """What the reasoning meter needs: gap and depth of each output, and how many answers there are."""
    layout = Layout(tuple(gaps))
    return {"gap": np.asarray(layout.gaps), "depth": layout.depths, "answers": np.asarray(NUMBERS)}


def degenerate_policies(windows: Windows) -> dict[str, np.ndarray]:
    """What policies without arithmetic reach on items (N, T): chosen on the first half, scored on the second.

    Returns accuracies per output (k,) and of whole rows (scalar): `constant` and `constant_row` always say one
    number per output; `copy` and `copy_row` repeat the input token a fixed distance back. An endpoint must
    beat them.
    """
    half = len(windows) // 2
    outputs = np.flatnonzero(windows.domains[0] > 0)
    answers = windows.targets[:, outputs]
    constant, copied = np.empty(answers[half:].shape, bool), np.empty(answers[half:].shape, bool)
    for k, position in enumerate(outputs):
        best = np.bincount(answers[:half, k]).argmax()
        constant[:, k] = answers[half:, k] == best
        equal = windows.tokens[:, : position + 1] == answers[:, k : k + 1]
        copied[:, k] = equal[half:, equal[:half].sum(axis=0).argmax()]
    return {
        "constant": constant.mean(axis=0),
        "constant_row": constant.all(axis=1).mean(),
        "copy": copied.mean(axis=0),
        "copy_row": copied.all(axis=1).mean(),
    }


@dataclass(frozen=True)
class Depthless:
    """What a policy that composes no more than a few unwritten steps reaches: a floor of the depth that a score shows.

    Attributes:
      accuracy: share of outputs right; exact: share of items with all outputs right.
      nll: nats an output; that of outputs which are too deep for a policy is `last_step`'s.
    """

    accuracy: float
    exact: float
    nll: float


@functools.cache
def depthless_policies(items: int = 4096, seed: int = 0, fitted: int = 1 << 16) -> dict[str, Depthless]:
    """Policies without depth, scored on the items of the eval.

    `last_step` sees the last operator and its number alone, not the state: it says the likeliest answer after them, counted
    on `fitted` training items an output. `compose_1` and `compose_2` take the last written number through at most one
    or two of the steps since, the last ones, and leave out those before.
    """
    known, asked = (_unpack(generate(seed, 0, n, stream=s)) for n, s in ((fitted, "train"), (items, "eval")))
    hits, nats = [], []
    for (_, operators, numbers, answers), (_, op, number, answer) in zip(known, asked, strict=True):
        counts = np.full((len(OPERATORS), NUMBERS, NUMBERS), 1e-2)
        np.add.at(counts, (operators[:, -1], numbers[:, -1], answers), 1)
        p = (counts / counts.sum(-1, keepdims=True))[op[:, -1], number[:, -1]]
        hits.append(p.argmax(1) == answer)
        nats.append(-np.log(p[np.arange(len(p)), answer]))
    found = {"last_step": Depthless(float(np.mean(hits)), float(np.all(hits, axis=0).mean()), float(np.mean(nats)))}
    shallow = np.mean(nats, axis=1)
    for depth in (1, 2):
        hits = []
        for value, op, number, answer in asked:
            for step in range(max(0, op.shape[1] - depth), op.shape[1]):
                value = _apply(value, op[:, step], number[:, step])
            hits.append(value == answer)
        nll = float(np.mean(shallow * (np.array(GAPS) > depth)))
        found[f"compose_{depth}"] = Depthless(float(np.mean(hits)), float(np.all(hits, axis=0).mean()), nll)
    return found


def _unpack(windows: Windows, pool: int = 256) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """An entry an output of items (n,): the number written before, operators and numbers since (n, gap), the answer."""
    ids = np.concatenate([windows.tokens, windows.targets[:, -1:]], axis=1) - pool
    found, at, value = [], 2, ids[:, 1] - FIRST_NUMBER
    for gap in GAPS:
        steps = slice(at, at + 2 * gap)
        answer = ids[:, at + 2 * gap] - FIRST_NUMBER
        found.append((value, ids[:, steps][:, ::2] - FIRST_OPERATOR, ids[:, steps][:, 1::2] - FIRST_NUMBER, answer))
        at, value = at + 2 * gap + 1, answer
    return found


def _apply(value: np.ndarray, operator: np.ndarray, number: np.ndarray) -> np.ndarray:
    """One clamped step."""
    results = value + number, value - number, np.maximum(value, number), np.minimum(value, number)
    return np.clip(np.choose(operator, results), 0, NUMBERS - 1)


def _fill(items: np.ndarray, draws: np.ndarray, gaps: tuple[int, ...], pool: int) -> None:
    """Write items (n, T + 1) from draws (1 + 2 steps, n)."""
    items[:, 0] = pool + R_TOKEN
    value = below(draws[0], NUMBERS)
    items[:, 1] = pool + FIRST_NUMBER + value
    column, draw = 2, 1
    for gap in gaps:
        for _ in range(gap):
            operator = below(draws[draw], len(OPERATORS))
            step, number = 1 + below(draws[draw + 1], LARGEST_STEP), below(draws[draw + 1], NUMBERS)
            number = np.where(operator < 2, step, number)
            value = _apply(value, operator, number)
            items[:, column] = pool + FIRST_OPERATOR + operator
            items[:, column + 1] = pool + FIRST_NUMBER + number
            column, draw = column + 2, draw + 2
        items[:, column] = pool + FIRST_NUMBER + value
        column += 1
