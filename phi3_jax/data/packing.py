"""Rows of conversations and of preference pairs packed into windows, whole, by best fit.

Rows are shuffled through a bounded buffer first, so that a file which is sorted by length or origin gives mixed windows,
then each bufferful is packed by best fit, longest first (Coffman et al. 1996). A pair lies in one window as two segments,
chosen 2 p + 1 and rejected 2 p + 2 (p from 0), which the preference objective reads.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from phi3_jax.data.dialogues import EQUAL, LONG, Report, Row
from phi3_jax.data.pictured import runs, tokens_of
from phi3_jax.data.windows import Seen, Windows, most_segments

BUFFER = 8192  # rows
ENOUGH = 0.97  # share of positions in use that a proposed window must reach
WHOLE = 0.995  # share of rows that must fit a proposed window whole


def shuffled(rows: Iterable[Row], seed: int, size: int = BUFFER) -> Iterator[Row]:
    """The rows in a seeded order that needs no more than `size` of them at a time."""
    rng = np.random.default_rng([seed, 0x9AC4])
    pool: list[Row] = []
    for row in rows:
        if len(pool) < size:
            pool.append(row)
            continue
        place = int(rng.integers(size))
        yield pool[place]
        pool[place] = row
    for place in rng.permutation(len(pool)):
        yield pool[place]


def fitted(row: Row, window: int, report: Report) -> Row | None:
    """A row that fits a window; None where its answers, or the difference between them, lie beyond. Both are counted.

    Of a pair that is too long each sequence gets half of the window, or what the other leaves.
    """
    sizes = [example.positions for example in row]
    if sum(sizes) <= window:
        return row
    room = [max(window // len(row), window - sum(sizes) + size) for size in sizes]
    if len(row) == 2 and min(sizes) > window // 2:
        room = [window // 2] * 2
    cut = tuple(example.cut(most) for example, most in zip(row, room, strict=True))
    if any(example.targets == 0 for example in cut):
        report.dropped[LONG] += 1
        return None
    if len(cut) == 2 and np.array_equal(cut[0].ids, cut[1].ids):
        report.dropped[EQUAL] += 1
        return None
    report.cut += sum(len(a.ids) > len(b.ids) for a, b in zip(row, cut, strict=True))
    return cut


def best_fit(sizes: Sequence[int], window: int, most: int) -> list[list[int]]:
    """Indices of `sizes` by bin: longest first, each into the fullest bin that takes it; at most `most` in a bin."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), ascending
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(free, (sizes[index], -1))
        if at == len(free):
            bins.append([])
            room, number = window, len(bins) - 1
        else:
            room, number = free.pop(at)
        bins[number].append(index)
        if len(bins[number]) < most and room > sizes[index]:
            bisect.insort(free, (room - sizes[index], number))
    return bins


def pack(rows: Iterable[Row], window: int, report: Report, seed: int = 0, size: int = BUFFER) -> Iterator[Windows]:
    """Windows of whole rows, a bufferful at a time; rows that are too long are cut or left out, and counted.

    Domain 1 marks what bears loss in conversations and chosen answers, domain 2 rejected ones.
    """
    chunk: list[Row] = []
    for row in shuffled(rows, seed, size):
        if (fit := fitted(row, window, report)) is not None:
            chunk.append(fit)
        if len(chunk) == size:
            yield _windows(chunk, window)
            chunk = []
    if chunk:
        yield _windows(chunk, window)


def _windows(rows: Sequence[Row], window: int) -> Windows:
    width = len(rows[0])
    bins = best_fit([sum(e.positions for e in row) for row in rows], window, most_segments(window) // width)
    tokens, targets, segments, domains = np.zeros((4, len(bins), window), np.int32)
    seen = []
    for number, members in enumerate(bins):
        column = 0
        for segment, example in enumerate((e for index in members for e in rows[index]), 1):
            span = slice(column, column + example.positions)
            tokens[number, span], targets[number, span] = tokens_of(example.ids[:-1]), tokens_of(example.ids[1:])
            if example.pictures:
                seen += [Seen(number, column + at, example.pictures[k - 1]) for k, at, _ in runs(example.ids)]
            segments[number, span] = segment
            domains[number, span] = example.answer[1:] * ((segment - 1) % width + 1)
            column = span.stop
    return Windows(tokens, targets, segments, domains, seen=tuple(seen))


def used(sizes: Sequence[int], window: int, width: int = 1) -> float:
    """Share of positions that hold tokens once rows of these sizes are packed; longer ones fill a window."""
    sizes = np.minimum(sizes, window).tolist()
    return sum(sizes) / (window * len(best_fit(sizes, window, most_segments(window) // width)))


def proposed(sizes: Sequence[int], most: int, width: int = 1) -> int:
    """The smallest power of two, from 128 to `most`, that holds nearly all rows whole and packs them tightly.

    Where none does, for rows are few or long, the one of those that hold them which packs them best.

    Args:
      sizes: positions of each row (of both sequences of a pair together).
      most: the longest window that the model is trained at.
    """
    windows = [min(128, most)]
    while windows[-1] < most:
        windows.append(min(2 * windows[-1], most))
    holding = [w for w in windows if np.mean(np.asarray(sizes) <= w) >= WHOLE] or [most]
    share = {window: used(sizes, window, width) for window in holding}
    return next((window for window in holding if share[window] >= ENOUGH), max(holding, key=share.__getitem__))
