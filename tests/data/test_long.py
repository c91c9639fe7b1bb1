"""Mixed windows: short documents in packed rows with positions of their own, long ones from a row's start; wide records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.configs import LongRope
from phi3_jax.data import export, loader, sources, tokenizers
from phi3_jax.data.corpora import text
from phi3_jax.data.windows import WIDE, Windows, encode, most_segments, pack_documents, positions, record_dtype
from phi3_jax.errors import UserError

BYTES = tokenizers.load("bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{i} " + " ".join(map(str, rng.integers(0, 99, rng.integers(3, 300)))) for i in range(160)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def rows(ds: loader.Dataset, entry: dict) -> np.ndarray:
    return ds._source(entry, False).take(np.arange(entry["windows"]))


def test_short_rows_hold_whole_pieces_and_long_rows_one_document(corpus: Path, tmp_path: Path) -> None:
    made = export.export(tmp_path / "out", f"long:{corpus}", window=256, original=32, held_out=0.2, mix=0.25)
    ds = loader.open_dataset(tmp_path / "out")
    documents = [d.text for d in text.documents(corpus)]
    kept = [d for d in documents if not text.is_held_out(d, 0.2)]
    assert made["domains"] == ["short", "long", "needles"] and made["loss"] == "token_mean"
    assert [(s["name"], s["weight"]) for s in made["sources"]] == [("short", 0.25), ("long", 0.75)]
    short, long = (rows(ds, entry) for entry in made["sources"])
    assert positions(short["segments"])[short["segments"] > 0].max() == 31 and (short["segments"].max(1) > 1).all()
    pieces = []
    for row in short:
        assert ((row["domains"] == 1) == (row["segments"] > 0)).all()
        for segment in range(1, row["segments"].max() + 1):
            mine = row["segments"] == segment
            assert (row["tokens"][mine][1:] == row["targets"][mine][:-1]).all()
            pieces.append((row["tokens"][mine][0], *row["targets"][mine]))
    ends = [np.r_[BYTES.eos_id, BYTES.encode(d), BYTES.eos_id] for d in kept]
    whole = [tuple(d[i : i + 33]) for d in ends for i in range(0, len(d) - 1, 32)]
    assert sorted(pieces) == sorted(whole)  # each id to say once, none cut by a row's end, no end but a document's own
    assert (long["segments"] == 1).all() and (long["domains"] == 2).all()
    starts = [BYTES.decode([row["tokens"][0], *row["targets"]]) for row in long]
    assert all(any(d.find(s) % 257 == 0 for d in kept if s in d) for s in starts)
    assert len(starts) == sum(len(d) // 257 for d in kept)
    # the list of each document follows from its own last position, as in training
    rope = LongRope(32)
    batch = loader.train_batches(ds, 8, 0, steps=4, rows=slice(None))[0]
    ends = np.where(batch["segments"] > 0, batch["positions"], 0).max(1) + 1 > rope.original_context
    assert (ends == (batch["domains"] == 2).any(1)).all() and ends.sum() == 6


def test_a_row_of_many_tiny_documents_ends_where_its_segments_do(tmp_path: Path) -> None:
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps({"text": chr(65 + i % 26)}) + "\n" for i in range(3000)))
    made = export.export(tmp_path / "out", f"long:{tmp_path / 'tiny.jsonl'}", window=1024, mix=1.0)
    (entry,) = made["sources"]
    found = rows(loader.open_dataset(tmp_path / "out"), entry)["segments"]
    assert found.max() == 255 and (np.diff(found[:, :510]) >= 0).all() and (found[0] > 0).sum() == 510


def test_all_rows_of_one_kind_and_what_is_refused(corpus: Path, tmp_path: Path) -> None:
    for mix, names in ((0.0, ["long"]), (1.0, ["short"])):
        made = export.export(tmp_path / f"{mix}", f"long:{corpus}", window=128, mix=mix)
        assert [s["name"] for s in made["sources"]] == names
    with pytest.raises(UserError, match="the longest document has .* tokens, too few for rows of 5,000"):
        export.export(tmp_path / "none", f"long:{corpus}", window=5000)
    with pytest.raises(UserError, match=r"data.original=300 exceeds the window of 128"):
        export.export(tmp_path / "none", f"long:{corpus}", window=128, original=300)
    with pytest.raises(UserError, match="--mix 1.5"):
        sources.recipe(f"long:{corpus}", mix=1.5)


def test_needles_are_a_domain_of_their_own(corpus: Path, tmp_path: Path) -> None:
    made = export.export(tmp_path / "out", f"long:{corpus}", window=512, original=128, needles=1.0)
    ds = loader.open_dataset(tmp_path / "out")
    assert made["loss"] == "domain_mean"
    for entry, number in zip(made["sources"], (1, 2), strict=True):
        found = rows(ds, entry)
        assert set(np.unique(found["domains"])) == {0, number, 3}
        if entry["name"] == "short":  # needles stand between the ids that begin and end a document
            first = np.diff(found["segments"], prepend=0, axis=1) != 0
            assert (found["tokens"] == BYTES.eos_id)[~first].sum() == 0 and (found["targets"] == BYTES.eos_id).any()
    for entry in made["evals"]:
        assert 3 not in np.unique(rows(ds, entry)["domains"])


def test_a_file_of_plain_text_is_one_document_of_long_windows(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line of a chapter.\n\n" * 1000)
    assert len(list(text.documents(tmp_path / "book.txt"))) > 4
    assert len(list(sources.texts(str(tmp_path / "book.txt")).documents)) > 4
    (whole,) = sources.texts(str(tmp_path / "book.txt"), whole=True).documents
    assert len(whole) == 22_000


def test_wide_windows_hold_more_than_255_documents_and_old_records_are_read(tmp_path: Path) -> None:
    documents = [np.full(3, 65, np.int32)] * 9000
    narrow, wide = (list(pack_documents(documents, size, 257)) for size in (WIDE // 2, WIDE))
    assert max(w.segments.max() for w in narrow) == 255 and most_segments(WIDE) == 65_535
    assert wide[0].segments[0].max() == WIDE // 4 and (wide[0].segments[0] > 0).all()
    assert (
        record_dtype(WIDE, 259)["segments"].base == np.uint16
        and record_dtype(WIDE // 2, 259)["segments"].base == np.uint8
    )
    (record, *_) = encode(wide[0][:1], 259)
    back = np.frombuffer(record, record_dtype(WIDE, 259))
    assert (back["segments"] == wide[0].segments[:1]).all()
    with pytest.raises(UserError, match="segments reach 0..300, a record holds 0..255"):
        encode(_with(300), 259)
    # a data set of before: a long window in records of the first version, which its manifest does not name
    (tmp_path / "a.txt").write_text("some words. " * 9000)
    made = export.export(tmp_path / "new", str(tmp_path / "a.txt"), window=WIDE)
    assert made["records"] == 2
    ds = loader.open_dataset(tmp_path / "new")
    old = loader.Dataset(ds.folder, {k: v for k, v in made.items() if k != "records"}, ds.weights)
    assert old.record == record_dtype(WIDE, 259, 1) and ds.record == record_dtype(WIDE, 259, 2)
    assert "records" not in export.export(tmp_path / "short", str(tmp_path / "a.txt"), window=256)


def _with(segment: int) -> Windows:
    zeros = np.zeros((1, 8), int)
    segments = zeros.copy()
    segments[0, 3] = segment
    return Windows(zeros, zeros, segments, zeros)
