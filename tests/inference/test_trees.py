"""Reads that begin alike share what they begin with, and every number is that of the read alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_scoring import SHAPES, engine_of, tiny

from phi3_jax.configs import BlockSparse
from phi3_jax.inference import trees
from phi3_jax.inference.trees import Read
from phi3_jax.models.attention import Mask, Problem, attend, choose, reference
from phi3_jax.models.kernels import flash

HAS_FLASH = flash._obstacle_of_machine() is None


def questions(seed: int = 0, vocab: int = 97) -> dict[Read, int]:
    """Reads of many questions with several options each, and some of one; how many numbers are asked of each."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, vocab, n).tolist()  # noqa: E731
    found = {}
    for options in (4, 1, 3, 1, 6, 2):
        context = draw(int(rng.integers(20, 60)))
        for _ in range(options):
            found[tuple(context + draw(int(rng.integers(0, 9))))] = int(rng.integers(1, 6))
    return found


def test_a_tree_is_a_question() -> None:
    reads = questions()
    found = trees.grow(reads)
    assert sorted(len(tree.reads) for tree in found) == [1, 1, 2, 3, 4, 6]
    assert sorted(read for tree in found for read in tree.reads) == sorted(reads)
    for tree in found:
        assert len({read[: tree.trunk] for read in tree.reads}) == 1
        tokens = tree.trunk + sum(len(read) - tree.trunk for read in tree.reads)
        assert tree.size == max(tokens, sum(reads[read] for read in tree.reads))
    begun = {tuple(range(40)) + read: n for read, n in reads.items()}  # one instruction before all questions
    assert sorted(len(tree.reads) for tree in trees.grow(begun)) == [1, 1, 2, 3, 4, 6]
    halves = {(1,) * 30 + (2,) * n + (3,): 1 for n in range(5, 9)}  # a sentence whose options differ in the middle
    (tree,) = trees.grow(halves)
    assert tree.trunk == 35 and tree.size == 35 + 1 + 2 + 3 + 4
    assert all(len(tree.reads) < 4 for tree in trees.grow(halves, 40))
    assert [tree.size for tree in trees.grow({(1, 2): 300}, 100)] == [300], "many letters after one read"


@pytest.mark.parametrize(("batch", "most", "full"), [(2, 90, 512), (4, 90, 64), (3, 0, 0)])
def test_packing_keeps_every_read_at_its_positions(batch: int, most: int, full: int) -> None:
    reads = questions(1)
    made = trees.grow(reads, most)
    seen: list[Read] = []
    for packed in trees.pack(made, batch, full):
        rows, time = packed.tokens.shape
        assert rows <= batch and trees.length_of(time) == time
        taken = np.zeros((rows, time), int)
        for read, (row, places) in packed.places.items():
            np.testing.assert_array_equal(packed.tokens[row, places], read)
            np.testing.assert_array_equal(packed.positions[row, places], np.arange(len(read)))
            assert len(set(packed.documents[row, places])) == 1 and packed.documents[row, places[0]] > 0
            own = packed.branches[row, places]
            taken[row, places[own > 0]] += 1
            assert (np.diff(own) >= 0).all() and set(own) <= {0, own[-1]}
            asked = packed.ask(read, len(read) - 1, [7] * reads[read])
            assert packed.counts[row] == asked[1].stop <= time
        assert taken.max() <= 1, "nothing lies on anything"
        assert packed.documents.max() == 1 or time <= full, "a longer row holds one tree"
        assert packed.parted is bool(packed.branches.any() or packed.documents.max() > 1) and (
            most or not packed.parted
        )
        seen += packed.places
    assert sorted(seen) == sorted(reads)


def test_lengths_are_half_an_octave_apart() -> None:
    sizes = {1: 32, 32: 32, 33: 64, 150: 256, 257: 384, 384: 384, 385: 512, 700: 768, 769: 1024, 3000: 3072, 4000: 4096}
    assert {n: trees.length_of(n) for n in sizes} == sizes
    assert [trees.length_of(n, 512) for n in (3, 384, 513)] == [512, 512, 768]


@pytest.mark.parametrize("name", ["reference", "chunked", *(["flash"] if HAS_FLASH else [])])
@pytest.mark.parametrize("narrow", ["plain", "window", "blocks"])
def test_a_branch_sees_what_its_read_alone_does(name: str, narrow: str) -> None:
    (packed,) = trees.pack(trees.grow(questions(2)), 4)
    apart = dict(segments=packed.documents, branches=packed.branches, positions=packed.positions)
    more = {"window": dict(window=11), "blocks": dict(blocksparse=BlockSparse(4, 2, 3))}.get(narrow, {})
    mask = Mask(**{key: jnp.asarray(value) for key, value in apart.items()}, **more)
    rng = np.random.default_rng(0)
    shape = (*packed.tokens.shape, 2, 3, 8)
    if name == "flash" and narrow != "plain":
        problem = Problem("cpu", shape[1], 8, jnp.float32, mask, 1, False)
        assert flash.obstacle(problem) and choose("auto", problem) == "chunked"
        return
    q, k, v = (rng.normal(size=s) for s in (shape, (*shape[:3], 8), (*shape[:3], 8)))
    got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask, 0.3, name)
    with jax.enable_x64(True):
        for row, places in packed.places.values():
            one = [jnp.asarray(x[row : row + 1, places]) for x in (q, k, v)]
            want = reference(*one, Mask(**more), 0.3)
            np.testing.assert_allclose(got[row, places], want[0], atol=1e-5)


def test_kernels_that_know_no_branches_say_so() -> None:
    mask = Mask(segments=jnp.ones((1, 512), int), branches=jnp.ones((1, 512), int))
    for platform, dtype in (("tpu", jnp.bfloat16), ("gpu", jnp.bfloat16)):
        assert choose("auto", Problem(platform, 512, 64, dtype, mask, 1, False)) == "chunked"


@pytest.mark.parametrize("shape", [*SHAPES, "blocks from the row's start"])
@pytest.mark.parametrize("shared", [0, 19])
def test_scores_are_those_of_every_read_alone(shape: str, shared: int) -> None:
    cfg = SHAPES.get(shape) or dataclasses.replace(
        SHAPES["blocks"], blocksparse=dataclasses.replace(SHAPES["blocks"].blocksparse, per_document=False)
    )
    engine, rng = engine_of(cfg), np.random.default_rng(3)
    first = rng.integers(0, cfg.vocab, 19).tolist()
    pairs = []
    for read, asked in questions(4).items():
        ids = [*first, *read, *rng.integers(0, cfg.vocab, 2).tolist(), *(read * 2 if len(read) > 55 else ())]
        pairs += [(ids[:-asked], ids[-asked:]), (ids[:-asked], [*ids[-asked:-1], 5])]
    found = engine.score(pairs, shared)
    alone = [engine.score([pair])[0] for pair in pairs]
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in alone], rtol=0, atol=2e-5)
    assert [(s.greedy, s.tokens) for s in found] == [(s.greedy, s.tokens) for s in alone]
    assert len({round(s.logprob, 3) for s in found}) > 0.9 * len(found), "control: they differ"


def test_the_likeliest_is_the_first_of_equals_and_programs_are_few() -> None:
    engine = engine_of(tiny("mini", sliding_window=None))
    engine._params = jax.tree.map(jnp.zeros_like, engine._params)
    scores = engine.score([([1, 2], [0]), ([1, 2], [1])])
    assert [s.greedy for s in scores] == [True, False] and scores[0].logprob == pytest.approx(-np.log(97))
    before = engine.compilations
    for seed in range(5):
        engine.score([(list(read), [1, 2]) for read in questions(seed)])
    assert engine.compilations - before <= 2, "other questions are no other programs"


def test_one_tree_of_many_letters() -> None:
    letters = [([4] * 20, [n]) for n in range(97)]
    engine = engine_of(tiny("mini", sliding_window=None))
    total = np.exp([s.logprob for s in engine.score(letters)]).sum()
    assert total == pytest.approx(1, abs=1e-5)


def test_long_reads_keep_rows_of_their_own_and_what_is_asked_twice_is_read_once() -> None:
    engine, shapes = engine_of(tiny("mini", sliding_window=None, context=2048), 2), []
    scores = engine._scores
    engine.__dict__["_scores"] = lambda p, rows, *more: (
        shapes.append((*rows.tokens.shape, rows.documents is None, rows.branches is None)) or scores(p, rows, *more)
    )
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 97, 600).tolist(), [rng.integers(0, 97, 30).tolist() for _ in range(6)]
    engine.score([(long, [1, 2]), *((one, [1, 2]) for one in short)])
    assert shapes == [(1, 768, True, True), (1, 256, False, True)], "the fast kernels know no documents"
    shapes.clear()
    many = engine.score([(short[0], [3] * 30)] * 200 + [(short[1], [4])])
    assert shapes == [(1, 128, False, True)] and len({score.logprob for score in many[:200]}) == 1
    shapes.clear()
    engine.score([(long, [n, 5]) for n in range(9)])
    assert shapes == [(1, 768, False, False)], "a long context, too, is read once"


def test_any_number_of_rows_makes_logits_in_large_pieces() -> None:
    for batch in (1, 3, 5, 6, 7, 8, 64):
        pairs = [(list(read), [1, 2, 3]) for seed in range(4) for read in questions(seed)]
        found = engine_of(tiny("mini", sliding_window=None), batch).score(pairs)
        assert len(found) == len(pairs) and all(score.tokens == 3 for score in found)
    from phi3_jax.inference import scoring

    assert [1 << max(32, scoring.LOGITS // rows).bit_length() - 1 for rows in (1, 3, 6, 8, 64)] == [
        512,
        128,
        64,
        64,
        32,
    ]


def test_packing_is_not_quadratic() -> None:
    rng = np.random.default_rng(0)
    reads = {tuple(rng.integers(0, 32000, 104).tolist()): 4 for _ in range(4000)}
    passes = 0
    for packed in trees.pack(trees.grow(reads), 8):
        passes += 1
        assert len(packed.places) <= 8 * 4
    assert passes == 125
