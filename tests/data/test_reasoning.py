"""Reasoning items: right answers, fresh rows, order independence, what policies without arithmetic reach."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from phi3_jax.data.corpora import reasoning
from phi3_jax.data.corpora.reasoning import Layout, degenerate_policies, generate
from phi3_jax.data.windows import Windows, encode, record_dtype
from phi3_jax.errors import UserError

FIELDS = ("tokens", "targets", "segments", "domains")


def evaluate(tokens: list[int], pool: int, gaps: tuple[int, ...]) -> list[int]:
    """The outputs of one item, from its written tokens, one scalar step at a time."""
    number = {pool + 4 + n: n for n in range(48)}
    operator = {
        pool + 56: lambda a, b: a + b,
        pool + 57: lambda a, b: a - b,
        pool + 58: max,
        pool + 59: min,
    }
    assert tokens[0] == pool + 1
    value, at, outputs = number[tokens[1]], 2, []
    for gap in gaps:
        for _ in range(gap):
            value = operator[tokens[at]](value, number[tokens[at + 1]])
            value = 0 if value < 0 else 47 if value > 47 else value
            at += 2
        outputs.append(value)
        at += 1
    return outputs


def rows(windows: Windows) -> set[bytes]:
    return {row.tobytes() for row in windows.tokens}


@pytest.mark.parametrize("gaps, pool", [((1, 2, 3, 2, 1), 256), ((1,), 256), ((4, 1, 5), 1024)])
def test_answers_agree_with_an_independent_evaluator(gaps, pool):
    windows = generate(3, 10, 400, gaps=gaps, pool=pool)
    layout = Layout(gaps)
    assert windows.window == layout.window
    for tokens, targets in zip(windows.tokens.tolist(), windows.targets.tolist(), strict=True):
        answers = [pool + 4 + value for value in evaluate([*tokens, None], pool, gaps)]
        assert [targets[t] for t in layout.outputs] == answers
        # written outputs are the true ones too: position t + 1 reads what position t had to predict
        assert [tokens[t + 1] for t in layout.outputs[:-1]] == answers[:-1]


def test_default_form_is_the_published_one():
    windows = generate(0, 0, 1000)
    assert windows.window == 24
    assert set(np.unique(windows.tokens)) <= {257, *range(260, 308), *range(312, 316)}
    np.testing.assert_array_equal(np.flatnonzero(windows.domains[0]), [3, 8, 15, 20, 23])
    assert set(np.unique(windows.domains)) == {0, 2}
    assert not windows.targets[windows.domains == 0].any()
    assert (windows.segments == 1).all()
    np.testing.assert_array_equal(Layout().depths, [1, 3, 6, 8, 9])


@pytest.mark.parametrize("cuts", [(0, 100), (0, 1, 99, 100), (0, 37, 50, 100)])
def test_items_depend_on_their_index_alone(cuts):
    whole = generate(5, 1000, 100)
    parts = [generate(5, 1000 + a, b - a) for a, b in itertools.pairwise(cuts)]
    for name in FIELDS:
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_items_do_not_depend_on_the_internal_block():
    whole = generate(5, 0, reasoning._BLOCK + 5)
    tail = generate(5, reasoning._BLOCK - 2, 7)
    np.testing.assert_array_equal(whole.tokens[-7:], tail.tokens)


def test_rows_never_repeat_within_or_across_seeds_and_streams():
    sets = [
        rows(generate(0, 0, 50_000)),
        rows(generate(0, 50_000, 50_000)),
        rows(generate(1, 0, 50_000)),
        rows(generate(0, 0, 50_000, stream="eval")),
    ]
    assert len(set.union(*sets)) == 200_000
    assert sets[0] & rows(generate(0, 49_999, 1))  # positive control: the same index is the same row


def test_far_indices_work():
    assert len(rows(generate(0, 10**15, 10)) | rows(generate(0, 0, 10))) == 20


def test_inputs_are_uniform():
    tokens = generate(2, 0, 40_000).tokens
    starts = np.bincount(tokens[:, 1] - 260, minlength=48)
    operators = np.bincount(tokens[:, 2] - 312, minlength=4)
    steps = np.bincount(tokens[tokens[:, 2] < 314, 3] - 261)  # operands of + and - are 1..24
    numbers = np.bincount(tokens[tokens[:, 2] >= 314, 3] - 260)
    assert (steps.size, numbers.size) == (24, 48)
    for counts in (starts, operators, steps, numbers):
        expected = counts.sum() / counts.size
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < counts.size + 5 * np.sqrt(2 * counts.size)


def test_records_hold_items():
    windows = generate(0, 0, 5)
    decoded = np.frombuffer(b"".join(encode(windows, 320)), record_dtype(24, 320))
    np.testing.assert_array_equal(decoded["targets"], windows.targets)


def test_degenerate_policies_reach_what_the_pilot_measured():
    policies = degenerate_policies(generate(7, 0, 40_000, stream="eval"))
    assert (policies["constant"] > 0.07).all() and (policies["constant"] < 0.12).all()  # pilot: .08-.11
    assert policies["constant_row"] < 0.001  # pilot: .0002
    assert (policies["copy"] > 0.25).all() and (policies["copy"] < 0.33).all()  # pilot: .26-.31
    assert policies["copy_row"] < 0.05


def test_degenerate_policies_find_a_copy_task():
    windows = generate(0, 0, 1000)
    targets = np.where(windows.domains > 0, windows.tokens[:, 1:2], 0)
    policies = degenerate_policies(Windows(windows.tokens, targets, windows.segments, windows.domains))
    assert policies["copy_row"] == 1.0


def test_unwritten_steps_hide_the_answer():
    """The written prefix alone must not fix an output of gap >= 2: its operators and operands matter."""
    windows = generate(0, 0, 4000)
    copy_last_output = windows.tokens[:, 4] == windows.targets[:, 8]
    assert 0.1 < copy_last_output.mean() < 0.5


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="start=-1"):
        generate(0, -1, 5)
    with pytest.raises(UserError, match="stream='test'"):
        generate(0, 0, 5, stream="test")
    with pytest.raises(UserError, match="gaps="):
        generate(0, 0, 5, gaps=(1, 0))


def test_extra_describes_each_output():
    extra = reasoning.extra()
    assert extra["gap"].tolist() == [1, 2, 3, 2, 1]
    assert int(extra["answers"]) == 48


def test_policies_without_depth_are_the_floors_of_a_score():
    """Shares as a review measured them: .41 an output from the last step alone; 8.8 and 63.7 % exact rows."""
    found = reasoning.depthless_policies()
    assert found["last_step"].accuracy == pytest.approx(0.41, abs=0.01)
    assert found["compose_1"].exact == pytest.approx(0.088, abs=0.01)
    assert found["compose_2"].exact == pytest.approx(0.637, abs=0.01)
    assert math.log(48) > found["last_step"].nll > found["compose_1"].nll > found["compose_2"].nll > 0
    assert found["compose_2"].accuracy == pytest.approx(
        (4 + found["compose_2"].exact) / 5
    )  # only the third output is deeper
