"""Which requests begin alike (the exemplars of a task), so that what they share is read once and not in every row.

Sharing takes two or three programs more, so that it pays where it saves more than they take to compile. The bounds were
measured, see docs/evaluation.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from phi3_jax.configs import ModelConfig
from phi3_jax.models.flops import idle_params

Pair = tuple[Sequence[int], Sequence[int]]
STEP = 8  # tokens by which beginnings are told apart
LEAST = 64  # tokens of a beginning that is shared, at least
ROWS = 16  # that share it, at least
SAVED = 1e12  # FLOPs that a beginning saves, at least: a CPU core does them in about the time it compiles the programs


def shared(pairs: Sequence[Pair], cfg: ModelConfig) -> list[tuple[int, list[int]]]:
    """Pairs (context, continuation) by what they share: (tokens, numbers of the pairs), whole rows (0 tokens) last.

    Where some rows of a set share more than all do (exemplars by subject behind one instruction), the set is split if that
    saves more tokens. A beginning is a part of every context and leaves its last token out.
    """
    rows: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        rows.setdefault(((*context, *continuation[:-1]), len(context)), []).append(number)
    keys = sorted(rows, key=lambda key: np.asarray(key[0], ">u4").tobytes())
    alike = np.array([_alike(a, b) for a, b in itertools.pairwise(keys)], int)
    token = 2 * (cfg.matrix_params - idle_params(cfg))
    found: list[tuple[int, list[int]]] = []
    whole: list[int] = []
    todo = [(0, len(keys))] if keys else []
    while todo:
        start, stop = todo.pop()
        length = int(alike[start : stop - 1].min(initial=np.iinfo(np.int32).max))
        parts = list(_parts(alike, start, stop, length))
        apart = sum((b - a - 1) * int(alike[a : b - 1].min()) for a, b in parts if b - a >= ROWS)
        if stop - start < ROWS:
            whole += [number for key in keys[start:stop] for number in rows[key]]
        elif length >= LEAST and (saved := (stop - start - 1) * length) >= apart and saved * token >= SAVED:
            found.append((length, [number for key in keys[start:stop] for number in rows[key]]))
        else:
            todo += parts
    found.sort(key=lambda one: (-one[0], one[1]))
    return [*found, (0, whole)] if whole else found


def _alike(a: tuple[tuple[int, ...], int], b: tuple[tuple[int, ...], int]) -> int:
    """Tokens that two rows' contexts share, but for the last of either, in whole steps."""
    most = min(a[1], b[1]) - 1
    differ = np.flatnonzero(np.asarray(a[0][:most]) != np.asarray(b[0][:most]))
    return (int(differ[0]) if differ.size else most) // STEP * STEP


def _parts(alike: np.ndarray, start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """The rows start to stop, cut wherever neighbours share no more than all do."""
    edges = [start, *(start + 1 + np.flatnonzero(alike[start : stop - 1] <= length)).tolist(), stop]
    yield from itertools.pairwise(edges)
