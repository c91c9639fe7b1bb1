"""The loader: batch i is a pure function of (manifest, seed, i) for any number of hosts; damage is named, not read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from phi3_jax.data import export, loader, manifest
from phi3_jax.data.recipe import Part, Recipe
from phi3_jax.data.windows import Windows, positions
from phi3_jax.errors import UserError

WINDOW, VOCAB = 8, 1000


def numbered(first: int, count: int, *, targets: int = WINDOW, domain: int = 1) -> Windows:
    """Windows that carry their own number in tokens[0], with `targets` loss positions."""
    tokens = np.ones((count, WINDOW), np.int32)
    tokens[:, 0] = np.arange(first, first + count)
    domains = np.zeros_like(tokens)
    domains[:, :targets] = domain
    segments = np.repeat([[1, 1, 1, 2, 2, 2, 2, 2]], count, axis=0)
    return Windows(tokens, tokens % VOCAB, segments, domains)


def write(folder, sources, evals=(), *, shard_windows=10**6, **changes):
    recipe = Recipe(
        kind="test",
        vocab=VOCAB,
        window=WINDOW,
        domains=["a", "b", "c"],
        loss="token_mean",
        tokenizer={"kind": "test", "fingerprint": "abc"},
        generator={"version": 1},
        sources=sources,
        evals=list(evals),
        **changes,
    )
    record = loader.record_dtype(WINDOW, VOCAB).itemsize
    export.write_dataset(folder, recipe, shard_bytes=shard_windows * record)
    return folder


@pytest.fixture
def mixture(tmp_path):
    """Sources of 30 (weight 1), 70 (weight 3, fresh) and 11 windows (weight 2)."""
    return write(
        tmp_path / "data",
        [
            Part("a", [numbered(0, 30)], weight=1),
            Part("b", [numbered(100, 70, targets=3, domain=2)], weight=3, fresh=True),
            Part("c", [numbered(300, 11, targets=5, domain=3)], weight=2),
        ],
        [Part("held", [numbered(500, 13)], meter="text", extra={"x": np.arange(3)})],
        shard_windows=25,
    )


# Record numbers of steps 0 and 7 of `mixture` at seed 3 in batches of 12, and of step 5 at the largest seed in pairs.
GOLDEN = {
    0: [5, 155, 117, 302, 124, 306, 18, 162, 127, 300, 113, 305],
    7: [16, 169, 150, 308, 163, 310, 24, 136, 157, 303, 142, 304],
    "seed": [139, 310],
}


def numbers(batch) -> list[int]:
    return batch["tokens"][:, 0].tolist()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_are_row_slices_of_one_global_batch(mixture, count, resident, monkeypatch):
    monkeypatch.setattr(loader, "RESIDENT_BYTES", (1 << 20) * resident)
    whole = loader.train_batches(loader.open_dataset(mixture), 12, seed=3)
    shards = np.split(np.arange(12), count)
    parts = [loader.train_batches(loader.open_dataset(mixture), 12, seed=3, rows=rows) for rows in shards]
    for step in (0, 1, 7, 10):
        joined = [part[step] for part in parts]
        assert_equal({k: np.concatenate([p[k] for p in joined]) for k in joined[0]}, whole[step])


def test_any_step_can_be_asked_first(mixture):
    """Resuming is starting at a step: no history matters, also across an epoch's end and a plan block's end."""
    ds = loader.open_dataset(mixture)
    unbroken = loader.train_batches(ds, 3, seed=1)
    before = [unbroken[step] for step in range(45)]
    for step in (44, 0, 21, 20):
        assert_equal(loader.train_batches(loader.open_dataset(mixture), 3, seed=1)[step], before[step])
    assert numbers(before[0]) != numbers(loader.train_batches(ds, 3, seed=2)[0])  # positive control: the seed matters


def test_prefetching_iterator_gives_the_same_batches(mixture):
    batches = loader.train_batches(loader.open_dataset(mixture), 6)
    for step, batch in zip(range(10), batches.to_iter_dataset(), strict=False):
        assert_equal(batch, batches[step])


def test_mixture_is_exact_in_every_batch(mixture):
    batches = loader.train_batches(loader.open_dataset(mixture), 12)
    for step in range(11):
        kinds = Counter(np.searchsorted([100, 300], number, side="right") for number in numbers(batches[step]))
        assert kinds == {0: 2, 1: 6, 2: 4}


def test_every_epoch_shows_each_window_once_in_a_new_order(tmp_path):
    folder = write(tmp_path / "d", [Part("a", [numbered(0, 37)])])
    batches = loader.train_batches(loader.open_dataset(folder), 1, seed=5)
    epochs = [[numbers(batches[e * 37 + i])[0] for i in range(37)] for e in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(37)) not in epochs


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection_and_mixes(size):
    index = np.arange(size)
    images = [loader.permute(index, size, np.uint64(key)) for key in (1, 2)]
    for image in images:
        np.testing.assert_array_equal(np.sort(image), index)
    if size >= 4000:
        assert abs(np.corrcoef(index, images[0])[0, 1]) < 0.1
        assert (images[0] == images[1]).mean() < 0.02
        # Every tenth of the inputs covers every tenth of the outputs about equally.
        table = np.histogram2d(index, images[0], bins=10)[0]
        assert table.min() > 0.4 * size / 100 and table.max() < 2 * size / 100


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _permuted(value: int, size: int, key: int) -> int:
    """The permutation in Python's whole numbers: four Feistel rounds, again until the value is inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = value >> half, value % 2**half
        for turn in range(4):
            mixed = _splitmix64((right + _splitmix64((key + turn) % 2**64)) % 2**64)
            left, right = right, left ^ mixed % 2**half
        value = left << half | right
        if value < size:
            return value


def test_the_order_of_records_is_pinned(mixture):
    """Order 1: another one would change every later run under the same fingerprint. A new order is a new ORDER."""
    assert loader.ORDER == 1
    assert _splitmix64(1234567) == 6457827717110365317  # the published test vector
    for size, key in ((30, 5), (1000, 2**64 - 2), (2, 0)):
        wanted = [_permuted(i, size, key) for i in range(size)]
        assert loader.permute(np.arange(size), size, np.uint64(key)).tolist() == wanted
    ds = loader.open_dataset(mixture)
    batches = loader.train_batches(ds, 12, seed=3)
    assert numbers(batches[0]) == GOLDEN[0] and numbers(batches[7]) == GOLDEN[7]
    big = loader.train_batches(ds, 2, seed=2**63 - 1)
    assert numbers(big[5]) == GOLDEN["seed"]


def test_sources_of_one_size_have_orders_of_their_own(tmp_path):
    parts = [Part(name, [numbered(first, 37)]) for name, first in (("a", 0), ("b", 100))]
    batches = loader.train_batches(loader.open_dataset(write(tmp_path / "d", parts)), 2, seed=5)
    order = np.array([numbers(batches[step]) for step in range(74)])
    one, other = (np.sort(order, axis=1)[:, i] - 100 * i for i in (0, 1))
    assert sorted(one[:37]) == sorted(other[:37]) == list(range(37))
    for shift in (0, 37):  # neither the same order nor that of another epoch
        assert (one[shift : shift + 37] == other[:37]).mean() < 0.3


def test_interleave_keeps_every_prefix_in_proportion():
    weights = (1, 3, 2, 5)
    source, number = loader.interleave(np.arange(2000), weights)
    for i, weight in enumerate(weights):
        seen = np.cumsum(source == i)
        assert np.abs(seen - np.arange(1, 2001) * weight / 11).max() < 2
        np.testing.assert_array_equal(number[source == i], np.arange(seen[-1]))


def test_weights_become_smallest_whole_numbers():
    assert loader.whole_weights([0.25, 0.75]) == (1, 3)
    assert loader.whole_weights([0.85, 0.1, 0.05]) == (17, 2, 1)
    assert loader.whole_weights([4, 2]) == (2, 1)
    with pytest.raises(UserError, match="positive"):
        loader.whole_weights([1, 0])
    with pytest.raises(UserError, match="too fine"):
        loader.whole_weights([0.123457, 1])


@pytest.mark.parametrize(("batch", "shards"), [(12, 1), (12, 2), (12, 4), (5, 1), (7, 1)])
def test_max_targets_bounds_what_is_seen_and_is_met(mixture, batch, shards):
    ds = loader.open_dataset(mixture)
    bound = loader.max_targets(ds, batch, shards)
    steps = range(130 // batch)
    seen = [
        (loader.train_batches(ds, batch, rows=rows)[step]["domains"] > 0).sum()
        for step in steps
        for rows in np.split(np.arange(batch), shards)
    ]
    assert max(seen) == bound


def test_a_fresh_source_never_repeats(mixture):
    ds = loader.open_dataset(mixture)
    assert loader.windows_needed(ds, 12, 11) == {"a": 22, "b": 66, "c": 44}
    loader.train_batches(ds, 12, steps=11)
    with pytest.raises(UserError, match=r"'b' .* has 70 windows .* 12 steps of 12 windows need 72.*--tokens 1152"):
        loader.train_batches(ds, 12, steps=12)
    batches = loader.train_batches(ds, 12, rows=np.arange(3))
    seen = [n for step in range(11) for n in numbers(loader.train_batches(ds, 12)[step]) if 100 <= n < 300]
    assert len(seen) == len(set(seen)) == 66
    with pytest.raises(UserError, match="must not repeat"):  # on every host, also one without such a row
        batches[12]


def test_batches_are_int32_with_restarting_positions(mixture):
    batch = loader.train_batches(loader.open_dataset(mixture), 6)[0]
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)} and batch["tokens"].shape == (6, WINDOW)
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(batch["positions"], positions(batch["segments"]))


def test_eval_keeps_order_and_pads_without_loss(mixture):
    ds = loader.open_dataset(mixture)
    batches = list(loader.eval_batches(ds, "held", 5))
    assert [valid for _, valid in batches] == [5, 5, 3]
    assert [n for b, valid in batches for n in numbers(b)[:valid]] == list(range(500, 513))
    last = batches[-1][0]
    assert last["tokens"].shape == (5, WINDOW) and not last["domains"][3:].any() and not last["segments"][3:].any()
    assert ds.extra("held")["x"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"no eval 'other'.*held"):
        next(loader.eval_batches(ds, "other", 5))


# ------------------------------------------------------------------------------------------------ damage


def _read_everything(folder, verify="records"):
    ds = loader.open_dataset(folder, verify=verify)
    for source in ds.manifest["sources"]:
        ds._source(source, resident=False).take(np.arange(source["windows"]))
    for _ in loader.eval_batches(ds, "held", 8):
        pass


@pytest.mark.parametrize("verify", ["records", "sha256"])
def test_no_flipped_byte_reaches_training(mixture, verify):
    """Any byte of a shard changed: the reading fails naming the shard, or (in unused bytes) what is read is right."""
    good = _rows(mixture)
    shard = mixture / loader.open_dataset(mixture).manifest["sources"][1]["shards"][1]["file"]
    whole, caught = shard.read_bytes(), 0
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the file is padded to whole blocks with zeros
    places = np.unique(np.concatenate([used[:: len(used) // 80], np.linspace(0, len(whole) - 1, 10).astype(int)]))
    for place in places:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            _read_everything(mixture, verify)
            assert verify == "records" and _rows(mixture) == good
        except UserError as error:
            caught += 1
            assert shard.name in str(error) and "\n" not in str(error)
            assert verify == "sha256" or "record" in str(error)
    assert caught == len(places) if verify == "sha256" else caught > 40
    shard.write_bytes(whole)
    _read_everything(mixture, verify)


def _rows(folder):
    ds = loader.open_dataset(folder)
    return {
        s["name"]: ds._source(s, resident=False).take(np.arange(s["windows"])).tobytes() for s in ds.manifest["sources"]
    }


@pytest.mark.parametrize("resident", [True, False])
def test_a_damaged_record_is_named(mixture, resident, monkeypatch):
    monkeypatch.setattr(loader, "RESIDENT_BYTES", (1 << 20) * resident)
    shard = mixture / loader.open_dataset(mixture).manifest["sources"][1]["shards"][1]["file"]
    from array_record.python import array_record_module

    records = array_record_module.ArrayRecordReader(str(shard)).read_all()
    broken = bytearray(records[17])
    broken[3] ^= 1
    writer = array_record_module.ArrayRecordWriter(str(shard), export.WRITER_OPTIONS)
    for i, record in enumerate(records):
        writer.write(bytes(broken) if i == 17 else record)
    writer.close()
    data = json.loads((mixture / "manifest.json").read_text())
    data["sources"][1]["shards"][1]["size"] = shard.stat().st_size
    (mixture / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"record 17 of shard .*{shard.name} fails its checksum"):
        batches = loader.train_batches(loader.open_dataset(mixture), 12)
        [batches[step] for step in range(11)]


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_truncated_shard_is_named_with_its_record(mixture, keep):
    shard = mixture / loader.open_dataset(mixture).manifest["sources"][0]["shards"][0]["file"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{shard.name} is truncated.*records from about \d+ of 25"):
        loader.open_dataset(mixture)


def test_a_missing_shard_and_a_longer_one_are_named(mixture):
    shard = mixture / loader.open_dataset(mixture).manifest["evals"][0]["shards"][0]["file"]
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=shard.name):
        loader.open_dataset(mixture)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        loader.open_dataset(mixture)


def test_ids_outside_the_vocabulary(mixture):
    ds = loader.open_dataset(mixture)
    ds.manifest["vocab"] = 120  # a manifest of other shards
    with pytest.raises(UserError, match=r"record \d+ of shard .* holds token id \d+, outside the vocabulary 0\.\.119"):
        loader.train_batches(ds, 12)[0]
    with pytest.raises(UserError, match=r"token id 1000 .* is outside"):
        write(mixture.parent / "other", [Part("a", [numbered(VOCAB - 3, 10)])])
    assert not (mixture.parent / "other").exists()


def test_an_id_of_the_size_of_the_vocabulary_is_damage(mixture):
    ds = loader.open_dataset(mixture)
    ds.manifest["vocab"] = 311  # the largest id is 310
    loader.train_batches(ds, 12)[10]
    ds = loader.open_dataset(mixture)
    ds.manifest["vocab"] = 310
    with pytest.raises(UserError, match=r"holds token id 310, outside the vocabulary 0\.\.309"):
        loader.train_batches(ds, 12)[10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": 9}, "has format 9, this version reads format 1"),
        (lambda m: {k: v for k, v in m.items() if k != "window"}, "lacks window"),
        (lambda m: m | {"sources": []}, "has no training source"),
        (lambda m: m | {"sources": [m["sources"][0] | {"windows": 0}]}, "'a' .* is empty"),
        (lambda m: m | {"sources": [m["sources"][0] | {"weight": 9}, *m["sources"][1:]]}, "changed after export"),
        (lambda m: [], "holds no JSON object"),
    ],
)
def test_bad_manifests(mixture, change, message):
    path = mixture / manifest.NAME
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message) as error:
        loader.open_dataset(mixture)
    assert "\n" not in str(error.value)


def test_missing_data(tmp_path, mixture):
    with pytest.raises(UserError, match="no data set at"):
        loader.open_dataset(tmp_path / "nothing")
    (mixture / manifest.NAME).write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        loader.open_dataset(mixture)
    shutil.rmtree(mixture)
    with pytest.raises(UserError, match="no data set at"):
        loader.open_dataset(mixture)


@pytest.mark.parametrize("arguments", [dict(batch_windows=0), dict(seed=-1)])
def test_bad_arguments(mixture, arguments):
    with pytest.raises(UserError):
        loader.train_batches(loader.open_dataset(mixture), **{"batch_windows": 12} | arguments)


def test_the_loader_never_imports_tensorflow(mixture):
    code = (
        "import sys; from phi3_jax.data import loader\n"
        f"b = loader.train_batches(loader.open_dataset({str(mixture)!r}), 12)[0]\n"
        "print(sorted(m for m in ('tensorflow', 'seqio', 'grain') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['grain']"


def test_chosen_rows_are_those_of_the_global_batch_and_no_others_are_read(mixture, monkeypatch):
    read, decode = [], loader.RecordSource._decode

    def counting(self, records, shard, local):
        read.append(len(records))
        return decode(self, records, shard, local)

    monkeypatch.setattr(loader.RecordSource, "_decode", counting)
    rows = np.array([1, 2, 9, 10, 11])
    whole = loader.train_batches(loader.open_dataset(mixture), 12, 3)
    expected = [whole[step] for step in range(5)]
    assert sum(read) == 30 + 70 + 11, "control: a process that feeds every row keeps the whole data set"
    read.clear()
    mine = loader.train_batches(loader.open_dataset(mixture), 12, 3, rows=rows)
    for step, batch in enumerate(expected):
        found = mine[step]
        assert all(np.array_equal(found[name], batch[name][rows]) for name in batch)
    assert sum(read) == 5 * len(rows)


def test_chosen_rows_of_an_evaluation(mixture):
    ds, rows = loader.open_dataset(mixture), np.array([1, 2, 5])
    whole = list(loader.eval_batches(ds, "held", 6))
    assert [valid for _, valid in whole] == [6, 6, 1]
    for (batch, valid), (mine, as_valid) in zip(whole, loader.eval_batches(ds, "held", 6, rows), strict=True):
        assert valid == as_valid and all(np.array_equal(mine[name], batch[name][rows]) for name in batch)
