"""Exports are whole or absent, deterministic, exact in what they count, and free of TensorFlow where they can be."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data import export, loader, manifest, tokenizers
from phi3_jax.data.corpora import text
from phi3_jax.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
SMALL = dict(tokens=24_000, facts=90, universe=180)


@pytest.fixture
def corpus(tmp_path):
    """120 documents of different lengths, a fifth of them not ASCII."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = []
    for i in range(120):
        words = rng.integers(0, 1000, rng.integers(1, 80))
        lines.append(json.dumps({"text": f"{'é' * (i % 5 == 0)}document {i}: " + " ".join(map(str, words))}))
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[:70]))
    (folder / "b.jsonl").write_text("\n".join(lines[70:]))
    return folder


def rows(ds, entry):
    return ds._source(entry, resident=False).take(np.arange(entry["windows"]))


def documents_of(ds, entry, tokenizer) -> list[str]:
    """The documents back from windows read in file order: targets up to each eos."""
    found, ids = [], []
    for row in rows(ds, entry):
        for target, domain in zip(row["targets"], row["domains"], strict=True):
            if domain and target == tokenizer.eos_id:
                found.append(tokenizer.decode(ids))
                ids = []
            elif domain:
                ids.append(int(target))
    assert not ids
    return found


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir())


# ------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("window", [16, 100, 1000])
def test_every_document_comes_back_once_on_its_side(corpus, tmp_path, window):
    made = export.export(tmp_path / "out", str(corpus), window=window, held_out=0.2)
    ds, tokenizer = loader.open_dataset(tmp_path / "out", verify="sha256"), tokenizers.load("bytes")
    all_texts = [document.text for document in text.documents(corpus)]
    train, held = (documents_of(ds, ds.manifest[group][0], tokenizer) for group in ("sources", "evals"))
    assert train == [t for t in all_texts if not text.is_held_out(t, 0.2)]
    assert held == [t for t in all_texts if text.is_held_out(t, 0.2)] and len(held) > 5
    for entry, texts in ((made["sources"][0], train), (made["evals"][0], held)):
        assert entry["bytes"] == sum(len(t.encode()) for t in texts)
        assert entry["targets"] == entry["bytes"] + len(texts)  # bytes and one eos each
        data = rows(ds, entry)
        assert entry["windows"] == len(data) and entry["tokens"] == (data["segments"] > 0).sum()
        assert entry["max_targets_per_window"] == (data["domains"] > 0).sum(1).max()
    assert made["evals"][0]["meter"] == "text"


def test_same_input_same_fingerprint_other_input_another(corpus, tmp_path):
    first = export.export(tmp_path / "a", str(corpus), window=64)
    copy = tmp_path / "elsewhere" / "corpus"
    copy.mkdir(parents=True)
    for file in corpus.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    again = export.export(tmp_path / "b", str(copy), window=64)
    assert again["fingerprint"] == first["fingerprint"]
    assert [s["sha256"] for s in again["sources"][0]["shards"]] == [s["sha256"] for s in first["sources"][0]["shards"]]
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()
    (copy / "b.jsonl").write_text('{"text": "another one"}\n')
    for data, options in ((copy, {}), (corpus, dict(window=32)), (corpus, dict(held_out=0.1))):
        other = export.export(tmp_path / "c", str(data), **dict(window=64) | options, overwrite=True)
        assert other["fingerprint"] != first["fingerprint"]


def test_shard_size_changes_files_but_not_the_data_set(corpus, tmp_path):
    def recipe():
        return export.text_recipe(str(corpus), tokenizer=tokenizers.load("bytes"), window=64)

    one = export.write_dataset(tmp_path / "one", recipe())
    many = export.write_dataset(tmp_path / "many", recipe(), shard_bytes=10_000)
    assert len(many["sources"][0]["shards"]) > 3 == 2 + len(one["sources"][0]["shards"])
    assert many["fingerprint"] == one["fingerprint"]
    a, b = (loader.train_batches(loader.open_dataset(tmp_path / name), 7, seed=1)[5] for name in ("one", "many"))
    np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_an_unchanged_request_is_skipped_and_another_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    first = export.export(out, str(corpus), window=64)
    stamp = (out / manifest.NAME).stat().st_mtime_ns
    assert export.export(out, str(corpus), window=64) == first
    assert (out / manifest.NAME).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"holds another data set \(window: 64 -> 32\)"):
        export.export(out, str(corpus), window=32)
    shard = out / first["sources"][0]["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"shard .* is truncated: .* remove .* to export"):
        export.export(out, str(corpus), window=64)
    assert export.export(out, str(corpus), window=64, overwrite=True)["fingerprint"] == first["fingerprint"]
    loader.open_dataset(out, verify="sha256")
    (corpus / "b.jsonl").write_text('{"text": "another one"}\n')
    with pytest.raises(UserError, match="its input files have changed"):
        export.export(out, str(corpus), window=64)


def test_a_folder_of_other_things_is_never_replaced(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a data set"):
        export.export(tmp_path / "mine", str(corpus), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("reason", ["full", "interrupt", "bad ids"])
def test_nothing_half_written_is_left(corpus, tmp_path, monkeypatch, reason):
    before = export.export(tmp_path / "out", str(corpus), window=64)
    names, real = files(tmp_path / "out"), export.encode
    calls = []

    class Full:
        def __init__(self, *_):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 9")

        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 9")

    def encode(windows, vocab):
        calls.append(1)
        if len(calls) == 2:
            raise _Interrupted if reason == "interrupt" else UserError("bad id")
        return real(windows, vocab)

    if reason == "full":
        monkeypatch.setattr(export.array_record_module, "ArrayRecordWriter", Full)
    else:
        monkeypatch.setattr(export, "encode", encode)
    expected = _Interrupted if reason == "interrupt" else UserError
    for target, overwrite in (("new", False), ("out", True)):
        calls.clear()
        with pytest.raises(expected, match=r"No space left.*bytes are free" if reason == "full" else None) as error:
            export.export(tmp_path / target, str(corpus), window=32, overwrite=overwrite)
        assert "\n" not in str(error.value)
        assert files(tmp_path / "out") == names
    assert json.loads((tmp_path / "out" / manifest.NAME).read_text()) == before


@pytest.mark.parametrize("window", [32, 64])
def test_of_two_exports_at_a_time_the_first_stays_if_they_are_the_same(corpus, tmp_path, monkeypatch, window):
    """Jobs of a study that start together write the same data; none may take away what another reads."""
    out, write = tmp_path / "out", export._write_part

    def meanwhile(*arguments):
        monkeypatch.setattr(export, "_write_part", write)
        command = [sys.executable, "-m", "phi3_jax.data.export", f"--out={out}", f"--data={corpus}", "--window=32"]
        subprocess.run(command, check=True, capture_output=True)
        first.append(out.stat().st_ino)
        return write(*arguments)

    first: list[int] = []
    monkeypatch.setattr(export, "_write_part", meanwhile)
    made = export.export(out, str(corpus), window=window)
    assert (out.stat().st_ino == first[0]) == (window == 32)
    assert loader.open_dataset(out).manifest["fingerprint"] == made["fingerprint"]
    assert files(out) == ["corpus", "out"]


def test_what_a_killed_export_left_is_removed(corpus, tmp_path):
    import socket

    dead = tmp_path / f".out.{socket.gethostname()}-999999999.partial"
    dead.mkdir()
    export.export(tmp_path / "out", str(corpus))
    assert files(tmp_path / "out") == ["corpus", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "does not exist"),
        (["--data", "{corpus}", "--held-out", "0.000001"], "raise --held-out"),
        (["--data", "{corpus}", "--window", "1"], "window >= 2"),
        (["--data", "{corpus}", "--tokenizer", "nowhere"], "no tokenizer at"),
        (["--data", "{corpus}", "--source", "web=x"], "belongs to a mixture"),
        (["--data", "{corpus}", "--source", "web"], "ROLE=PATH"),
        (["--data", "{corpus}", "--facts", "3"], "belong to --data facts"),
        (["--data", "facts", "--facts", "10000"], "facts=10000"),
        (["--data", "facts", "--share", "1.5"], "0 <= share <= 1"),
        (["--data", "{corpus}/../bad"], "malformed"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(corpus, tmp_path, capsys, arguments, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jsonl").write_text('{"text": "ok"}\n' * 20 + "{oops\n" * 3)
    arguments = [a.replace("{corpus}", str(corpus)) for a in arguments]
    assert export.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert files(tmp_path / "out") == ["bad", "corpus"]


def test_the_command_prints_what_it_wrote(corpus, tmp_path, capsys):
    assert export.main(["--out", str(tmp_path / "out"), "--data", str(corpus), "--held-out", "0"]) == 0
    made = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    assert made["fingerprint"] in capsys.readouterr().out and made["evals"] == []


# ------------------------------------------------------------------------------------------------ facts


def test_facts_reference_numbers():
    """4,500 of 9,000 facts: a quarter of the tokens, 11 + 33 windows and 363 targets in every batch of 44."""
    recipe = export.facts_recipe()
    assert (recipe.vocab, recipe.window, recipe.domains) == (320, 24, ["knowledge", "reasoning"])
    assert [(p.name, p.weight, p.fresh) for p in recipe.sources] == [("knowledge", 1, False), ("reasoning", 3, True)]
    assert len(recipe.sources[0].windows[0]) == 1500
    assert [len(e.windows[0]) for e in recipe.evals] == [3000, 4096]
    loose = export.facts_recipe(facts=9000)
    assert [p.weight for p in loose.sources] == [1, 1]
    assert [p.name for p in export.facts_recipe(facts=0).sources] == ["reasoning"]
    assert [p.name for p in export.facts_recipe(share=1).sources] == ["knowledge"]


def test_facts_export_serves_its_budget(tmp_path):
    export.export(tmp_path / "f", "facts", **SMALL)
    ds = loader.open_dataset(tmp_path / "f")
    steps = -(-SMALL["tokens"] // (44 * 24))
    batches = loader.train_batches(ds, 44, steps=steps)
    for step in (0, steps - 1):
        domains = batches[step]["domains"]
        assert ((domains == 1).sum(), (domains == 2).sum()) == (11 * 18, 33 * 5)
    assert loader.max_targets(ds, 44) == 363
    with pytest.raises(UserError, match="must not repeat"):
        loader.train_batches(ds, 44, steps=3 * steps + 40)


def test_facts_train_and_eval_do_not_share_reasoning_items(tmp_path):
    export.export(tmp_path / "f", "facts", **SMALL)
    ds = loader.open_dataset(tmp_path / "f")
    train, held = (
        {r.tobytes() for r in rows(ds, part[1])["tokens"]} for part in (ds.manifest["sources"], ds.manifest["evals"])
    )
    assert len(train) == ds.manifest["sources"][1]["windows"] and not train & held
    knowledge = rows(ds, ds.manifest["sources"][0])
    subjects = [tuple(s) for row in knowledge["tokens"].reshape(-1, 3, 8)[..., :3] for s in row]
    assert len(set(subjects)) == len(subjects) == SMALL["facts"]
    assert ds.extra("knowledge")["in_corpus"].sum() == SMALL["facts"]


@pytest.mark.parametrize("change", [dict(seed=1), dict(facts=60), dict(pool=300), dict(frequency="power_law")])
def test_facts_are_deterministic_and_follow_their_parameters(tmp_path, change):
    first = export.export(tmp_path / "a", "facts", **SMALL)
    assert export.export(tmp_path / "b", "facts", **SMALL)["fingerprint"] == first["fingerprint"]
    assert export.export(tmp_path / "c", "facts", **SMALL | change)["fingerprint"] != first["fingerprint"]


def test_power_law_facts_come_as_often_as_declared(tmp_path):
    export.export(tmp_path / "p", "facts", **SMALL | dict(tokens=240_000, frequency="power_law"))
    ds = loader.open_dataset(tmp_path / "p")
    subjects = rows(ds, ds.manifest["sources"][0])["tokens"].reshape(-1, 8)[:, 1:3]
    _, counts = np.unique(subjects[subjects.any(1)], axis=0, return_counts=True)
    frequency = ds.extra("knowledge")["frequency"]
    np.testing.assert_allclose(sorted(counts / counts.sum()), sorted(frequency[frequency > 0]), atol=2e-3)


def test_text_takes_its_share_of_facts_and_reasoning_and_no_id_of_theirs(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "HELD_OUT", 0.3)
    mixed = SMALL | dict(share=0.25, text_share=0.25, text_source=str(corpus))
    made = export.export(tmp_path / "m", "facts", **mixed)
    assert [s["name"] for s in made["sources"]] == ["knowledge", "reasoning", "text"]
    assert made["domains"] == ["knowledge", "reasoning", "text"]
    ds = loader.open_dataset(tmp_path / "m")
    assert list(ds.weights) == [1, 2, 1]
    batch = loader.train_batches(ds, 44)[0]
    shares = {domain: int((batch["domains"] == domain).any(axis=1).sum()) for domain in (1, 2, 3)}
    assert shares == {1: 11, 2: 22, 3: 11}
    ids = batch["tokens"][(batch["domains"] == 3).any(axis=1)]
    assert set(np.unique(ids[ids > 255])) == {319}  # bytes, and an end that nothing else is
    plain = export.export(tmp_path / "p", "facts", **SMALL)
    assert "text_share" not in plain["generator"] and made["fingerprint"] != plain["fingerprint"]
    with pytest.raises(UserError, match="pool=256 or more"):
        export.facts_recipe(pool=128, value_bits=7, universe=100, facts=50, text_share=0.1)


def test_exporting_facts_and_text_never_imports_tensorflow(corpus, tmp_path):
    code = (
        "import sys; from phi3_jax.data import export\n"
        f"export.export({str(tmp_path / 'f')!r}, 'facts', **{SMALL!r})\n"
        f"export.export({str(tmp_path / 't')!r}, {str(corpus)!r})\n"
        "print([m for m in ('tensorflow', 'seqio', 'jax') if m in sys.modules], 'array_record' in str(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


@pytest.mark.skipif(not (SHARED / "corpus").is_dir(), reason="the shared corpus is not beside the repository")
@pytest.mark.parametrize("tokenizer", ["bytes", "phi-3-mini", "phi-3-small"])
def test_shared_corpus_with_published_tokenizers(tmp_path, tokenizer):
    with gzip.open(SHARED / "corpus" / "dialogue_qa.jsonl.gz", "rt") as file:
        lines = [next(file) for _ in range(150)]
    (tmp_path / "part.jsonl").write_text("".join(lines))
    spec = tokenizer if tokenizer == "bytes" else str(SHARED / "tokenizers" / tokenizer)
    made = export.export(tmp_path / "out", str(tmp_path / "part.jsonl"), tokenizer=spec, window=256, held_out=0.1)
    ds = loader.open_dataset(tmp_path / "out", tokenizer=tokenizers.load(spec).fingerprint)
    held = documents_of(ds, ds.manifest["evals"][0], tokenizers.load(spec))
    texts = [json.loads(line)["text"] for line in lines]
    assert held == [t for t in texts if text.is_held_out(t, 0.1)]
    assert made["dtype"] == ("uint32" if tokenizer == "phi-3-small" else "uint16")
