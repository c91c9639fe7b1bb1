"""Windows on disk and packing of documents: round trips, damage, conservation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data.loader import RecordSource
from phi3_jax.data.windows import (
    FIELDS,
    MAX_SEGMENTS,
    Windows,
    concatenate,
    encode,
    pack_documents,
    positions,
    record_dtype,
)
from phi3_jax.errors import UserError

EOS = 0


def decode(records: Sequence[bytes], window: int, vocab: int) -> Windows:
    """The records of one shard, as the loader reads them."""
    entry = {"name": "made", "shards": [{"file": "shard", "records": len(records)}]}
    rows = RecordSource(Path("data"), entry, record_dtype(window, vocab), vocab, False)._decode(records, 0, None)
    return Windows(*(rows[name] for name in FIELDS))


def random_windows(n: int, window: int, vocab: int, seed: int = 0) -> Windows:
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (n, window)), axis=1)
    return Windows(
        rng.integers(0, vocab, (n, window)),
        rng.integers(0, vocab, (n, window)),
        segments,
        rng.integers(0, 3, (n, window)),
    )


def random_documents(n: int, longest: int, vocab: int = 500, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, rng.integers(1, longest + 1)) for _ in range(n)]


@pytest.mark.parametrize("vocab", [320, 65_535, 65_536, 100_352])
def test_records_round_trip_at_every_id_width(vocab):
    windows = random_windows(7, 24, vocab)
    windows.tokens[0, 0] = vocab - 1
    records = encode(windows, vocab)
    assert {len(record) for record in records} == {record_dtype(24, vocab).itemsize}
    decoded = decode(records, 24, vocab)
    for name in ("tokens", "targets", "segments", "domains"):
        np.testing.assert_array_equal(getattr(decoded, name), getattr(windows, name))


def test_ids_take_two_bytes_up_to_65535_and_four_above():
    """Which width a vocabulary has is part of the format: data sets of any earlier time must read the same."""
    for vocab, size in ((2, 2), (65_535, 2), (65_536, 4), (65_537, 4), (2**31 - 1, 4)):
        ids = np.array([[0, vocab - 1, vocab // 2]])
        records = encode(Windows(ids, ids[:, ::-1], np.ones_like(ids), np.full_like(ids, 255)), vocab)
        assert [len(record) for record in records] == [3 * (2 * size + 2) + 4]
        back = decode(records, 3, vocab)
        assert back.tokens.tolist() == ids.tolist() and back.targets.tolist() == ids[:, ::-1].tolist()
        assert int.from_bytes(records[0][size : 2 * size], "little") == vocab - 1  # little-endian, tokens first


def test_every_single_bit_flip_is_found_and_named():
    records = encode(random_windows(3, 4, 320), 320)
    for bit in range(len(records[1]) * 8):
        damaged = bytearray(records[1])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match="record 1 "):
            decode([records[0], bytes(damaged), records[2]], 4, 320)
    decode(records, 4, 320)  # positive control: the undamaged batch reads


def test_truncated_record_is_named():
    records = encode(random_windows(2, 4, 320), 320)
    with pytest.raises(UserError, match="record 1 .*has 27 bytes instead of 28"):
        decode([records[0], records[1][:-1]], 4, 320)


def test_ids_outside_the_vocabulary_and_too_many_segments_are_errors():
    windows = random_windows(5, 6, 320)
    windows.targets[3, 2] = 320
    with pytest.raises(UserError, match=r"target id 320 in window 3 .* 0\.\.319"):
        encode(windows, 320)
    windows.targets[3, 2] = -1
    with pytest.raises(UserError, match="target id -1"):
        encode(windows, 320)
    windows.targets[3, 2] = 319
    encode(windows, 320)
    windows.segments[0, 0] = 256
    with pytest.raises(UserError, match=r"segments reach 0\.\.256"):
        encode(windows, 320)


def test_no_windows_is_no_records():
    empty = random_windows(0, 8, 320)
    assert encode(empty, 320) == []
    assert len(decode([], 8, 320)) == 0


def test_positions_restart_with_each_segment():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    result = positions(segments)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.int32


@pytest.mark.parametrize("longest, window, chunk", [(5, 8, 2), (100, 8, 3), (30, 64, 1), (3, 1000, 4), (1, 1, 5)])
def test_packing_conserves_every_token_in_order(longest, window, chunk):
    documents = random_documents(200, longest)
    parts = list(pack_documents(documents, window, EOS, chunk=chunk))
    assert all(len(part) == chunk for part in parts[:-1]) and 1 <= len(parts[-1]) <= chunk
    packed = concatenate(parts)
    loss = packed.domains > 0
    expected = np.concatenate([np.append(document, EOS) for document in documents])
    np.testing.assert_array_equal(packed.targets[loss], expected)  # every token and one eos a document, once
    inputs = np.concatenate([np.insert(document, 0, EOS) for document in documents])
    np.testing.assert_array_equal(packed.tokens[loss], inputs)
    np.testing.assert_array_equal(loss, packed.segments > 0)
    for name in ("tokens", "targets"):
        assert not getattr(packed, name)[~loss].any()


def test_targets_never_cross_a_document_and_segments_restart():
    documents = random_documents(300, 40)
    packed = concatenate(list(pack_documents(documents, 32, EOS, chunk=7)))
    same = (packed.segments[:, 1:] == packed.segments[:, :-1]) & (packed.segments[:, 1:] > 0)
    np.testing.assert_array_equal(packed.targets[:, :-1][same], packed.tokens[:, 1:][same])
    ends = ~same & (packed.segments[:, :-1] > 0)
    assert ends.any()
    assert (packed.targets[:, :-1][ends] == EOS).all()  # a document ends with its eos, never a neighbour
    assert set(packed.segments[:, 0]) == {1}
    steps = np.diff(packed.segments, axis=1)
    assert set(np.unique(steps[packed.segments[:, 1:] > 0])) <= {0, 1}


def test_only_the_last_window_is_padded():
    packed = concatenate(list(pack_documents(random_documents(50, 20), 16, EOS)))
    assert (packed.segments[:-1] > 0).all()


def test_more_documents_than_a_byte_counts_start_a_new_window():
    packed = concatenate(list(pack_documents([[7]] * 1000, 1024, EOS, chunk=2)))
    assert packed.segments.max() == MAX_SEGMENTS
    assert int((packed.domains > 0).sum()) == 2000
    encode(packed, 320)


def test_a_window_holds_255_segments_and_not_one_less():
    packed = concatenate(list(pack_documents([[7]] * 256, 512, EOS)))
    assert [len(np.unique(row[row > 0])) for row in packed.segments] == [255, 1]


def test_own_bos_domain_and_empty_documents():
    packed = concatenate(list(pack_documents([[], [5, 6], []], 4, 2, bos=1, domain=3)))
    np.testing.assert_array_equal(packed.tokens, [[1, 5, 6, 0]])
    np.testing.assert_array_equal(packed.targets, [[5, 6, 2, 0]])
    np.testing.assert_array_equal(packed.domains, [[3, 3, 3, 0]])
    assert list(pack_documents([], 4, 2)) == []


def test_packing_is_lazy():
    def endless():
        while True:
            yield [3] * 10

    stream = pack_documents(endless(), 8, EOS, chunk=2)
    assert len(next(stream)) == 2
