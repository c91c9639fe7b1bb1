"""Replies of a chat about persons (`corpora.instructions`), which the model writes on its own, greedily.

known : recall, refused       persons of the pre-training that no question of SFT was about
strangers : refused           persons of whom nothing was ever said
replies : ended               replies that reach `<|end|>` within their room
prose : recall                the same persons, their sentences gone on with outside of any chat
sums : right                  small sums, outside of any chat
"""

from __future__ import annotations

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.corpora.instructions import KNOWN, PROSE, ROOM, STRANGER, SUM
from phi3_jax.data.meters.meter import Evaluation, Meter, Row, row


def rows_of(e: Evaluation) -> list[Row]:
    """Rows of a finished run; none where replies were not asked for."""
    if e.reply is None:
        return []
    kind, refusal = e.extra["kind"], e.extra["refusal"]
    where = e.domains > 0
    said, right = e.reply[where].reshape(-1, ROOM), e.targets[where].reshape(-1, ROOM)
    plain = (kind == PROSE) | (kind == SUM)  # outside of a chat, where nothing ends
    end = right[~plain][0, -1]
    length = np.where((right == end).any(1), (right == end).argmax(1) + 1, ROOM)
    length = np.where(plain, length - 1, length)
    exact = np.array([np.array_equal(a[:n], b[:n]) for a, b, n in zip(said, right, length, strict=True)])
    refused = np.array(
        [np.array_equal(a[b >= 0], b[b >= 0]) and bool((b >= 0).any()) for a, b in zip(said, refusal, strict=True)]
    )
    ended = (said == end).any(1)
    found = [
        ("known", "recall", exact[kind == KNOWN]),
        ("known", "refused", refused[kind == KNOWN]),
        ("strangers", "refused", refused[kind == STRANGER]),
        ("replies", "ended", ended[~plain]),
        ("prose", "recall", exact[kind == PROSE]),
        ("sums", "right", exact[kind == SUM]),
    ]
    return [row("chat", task, metric, statistics.proportion(share), chance=0.0) for task, metric, share in found]


METER = Meter(rows_of, free=True)
