"""`--batch_size auto`: how many rows fit, and that each task takes as many as its own longest request allows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from phi3_jax.evaluation import batches
from phi3_jax.family import published

MINI = published("mini")


def test_rows_are_the_largest_power_of_two_that_fits() -> None:
    one = batches.row_bytes(MINI, 512, 4, 2) / batches.SHARE
    for rows in (1, 2, 8, 64):
        assert batches.rows_that_fit(MINI, 512, 4, 2, 1.01 * rows * one, 64) == rows
        assert batches.rows_that_fit(MINI, 512, 4, 2, 0.99 * rows * one, 64) == max(1, rows // 2)
    assert batches.rows_that_fit(MINI, 512, 4, 2, 1e15, 16) == 16 and batches.rows_that_fit(MINI, 512, 4, 2, 0, 16) == 1


def test_a_row_takes_more_the_longer_it_is_and_the_wider_its_values() -> None:
    short, long = (batches.row_bytes(MINI, length, 1, 2) for length in (512, 1024))
    assert 2 * short < long < 4 * short, "attention grows faster than the row"
    assert batches.row_bytes(MINI, 512, 1, 4) > short < batches.row_bytes(MINI, 512, 512, 2)
    cache = 2 * 32 * 3072 * 512 * 2  # phi-3-mini: 32 layers, 32 heads of 96, in bfloat16
    assert cache < short < 4 * cache
    assert batches.free_bytes() > 0


def test_a_suite_without_known_lengths_takes_what_fits_at_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "free_bytes", lambda: 8 * batches.row_bytes(MINI, 4096, 256, 4) / batches.SHARE * 1.01)
    assert batches.at_once(MINI, 4096) == batches.at_once(MINI, 10**6) == 8 < batches.at_once(MINI, 1024)
    half = batches.fit(MINI, "bfloat16", 16)
    assert half(4096, 256) == 8 and half(512, 4) == 16, "logits are float32 whatever the rest is"


def test_each_kind_of_request_takes_its_own_batch() -> None:
    pytest.importorskip("lm_eval")
    from phi3_jax.evaluation import harness

    asked, used = [], []

    class Fake:
        config, tokenizer, batch = MINI, SimpleNamespace(eos_id=0), 1

        def score(self, pairs: list) -> list:
            used.append((self.batch, len(pairs)))
            return [SimpleNamespace(logprob=-1.0, greedy=False) for _ in pairs]

    def fit(length: int, count: int) -> int:
        asked.append((length, count))
        return 2

    pairs = [([1] * n, [2, 3]) for n in range(1, 50)]
    lm = harness.HarnessLM(Fake(), fit=fit)
    assert len(lm._score(pairs, "options")) == 49
    assert asked == [(1536, 2)] and used == [(2, 32), (2, 17)]
    fixed = harness.HarnessLM(Fake(), 4)
    fixed._score(pairs, "options")
    assert used[2:] == [(1, 49)], "control: without it the engine keeps the batch that it was told"
