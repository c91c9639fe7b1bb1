"""Replies of a chat about persons (`corpora.instructions`), which the model writes on its own, greedily.

known : recall, refused       persons of the pre-training that no question of SFT was about
strangers : refused           persons of whom nothing was ever said
replies : ended               replies that reach `<|end|>` within their room
prose : recall, refused       the same persons, their sentences gone on with outside of any chat
sorting : right               three numbers put in order, outside of any chat; a copy in any order is right once in six
"""

from __future__ import annotations

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.corpora.instructions import KNOWN, PROSE, ROOM, SORT, STRANGER
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row


def rows_of(e: Evaluation) -> list[Row]:
    """Rows of a finished run; none where replies were not asked for."""
    if e.reply is None:
        return []
    kind = e.extra["kind"]
    plain = (kind == PROSE) | (kind == SORT)
    said, exact, ended = read(e, e.reply, plain)
    refused = begins(said, e.extra["refusal"])
    found = [
        ("known", "recall", exact[kind == KNOWN]),
        ("known", "refused", refused[kind == KNOWN]),
        ("strangers", "refused", refused[kind == STRANGER]),
        ("replies", "ended", ended[~plain]),
        ("prose", "recall", exact[kind == PROSE]),
        ("prose", "refused", refused[kind == PROSE]),
        ("sorting", "right", exact[kind == SORT]),
    ]
    return [
        row("chat", task, metric, statistics.proportion(share), chance=1 / 6 if task == "sorting" else 0.0)
        for task, metric, share in found
    ]


def read(e: Evaluation, reply: np.ndarray, plain: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(replies (N, ROOM), whether each is the right one, whether it reached `<|end|>`) of N questions, one a window.

    Args:
      reply: (N, T) of the evaluation.
      plain: (N,), what is outside of a chat, where nothing ends.
    """
    where = e.domains > 0
    said, right = reply[where].reshape(-1, ROOM), e.targets[where].reshape(-1, ROOM)
    end = right[~plain][0, -1]
    length = np.where((right == end).any(1), (right == end).argmax(1) + 1, ROOM)
    length = np.where(plain, length - 1, length)
    exact = np.array([np.array_equal(a[:n], b[:n]) for a, b, n in zip(said, right, length, strict=True)])
    return said, exact, (said == end).any(1)


def begins(said: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Whether each reply (N, ROOM) begins with ids (N, ROOM), which are -1 after their end; not where there are none."""
    return np.array(
        [np.array_equal(a[b >= 0], b[b >= 0]) and bool((b >= 0).any()) for a, b in zip(said, ids, strict=True)]
    )


METER = Meter(rows_of, free=True)
