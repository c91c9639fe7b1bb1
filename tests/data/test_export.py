"""Exports are whole or absent, deterministic, exact in what they count, and free of TensorFlow where they can be."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.__main__ import main
from phi3_jax.data import export, loader, manifest, sources, tokenizers
from phi3_jax.data.corpora import text
from phi3_jax.errors import UserError
from phi3_jax.records import files as records
from phi3_jax.records.folder import KEPT
from phi3_jax.training.folder import keep_tokenizer

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
        return sources.recipe(str(corpus), tokenizer="bytes", window=64)

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
def test_of_two_exports_at_a_time_the_second_waits_for_the_first(corpus, tmp_path, monkeypatch, window):
    """Jobs of a study that start together ask for the same data: one writes them, the others find them there."""
    out, write, started = tmp_path / "out", export._write_part, []
    command = [sys.executable, "-m", "phi3_jax.data.export", f"--out={out}", f"--data={corpus}", f"--window={window}"]

    def meanwhile(*arguments):
        if not started:
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            assert started[0].stderr.readline().startswith(f"note: {out} is being written by process {os.getpid()} on")
        return write(*arguments)

    monkeypatch.setattr(export, "_write_part", meanwhile)
    made = export.export(out, str(corpus), window=32)
    place = out.stat().st_ino
    output, errors = started[0].communicate()
    assert started[0].returncode == (0 if window == 32 else 2)
    assert made["fingerprint"] in output if window == 32 else "holds another data set (window: 32 -> 64)" in errors
    assert out.stat().st_ino == place and loader.open_dataset(out).manifest["fingerprint"] == made["fingerprint"]
    assert files(out) == ["corpus", "out"]


def test_what_a_killed_export_left_is_removed_and_nothing_else(corpus, tmp_path):
    left = records.temporary(tmp_path / "out")
    dead, living = (left.with_name(left.name.replace(f".{os.getpid()}.", f".{pid}.")) for pid in (999999999, 1))
    mine = [tmp_path / name for name in ("out.partial", ".out.partial", ".out.elsewhere.999999999.0.partial")]
    for folder in (dead, living, *mine):
        folder.mkdir()
    export.export(tmp_path / "out", str(corpus))
    assert not dead.exists() and all(folder.is_dir() for folder in (living, *mine))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "does not exist"),
        (["--data", "{corpus}", "--window", "1"], "--window 1 must be an integer, 2 or more"),
        (["--data", "{corpus}", "--tokenizer", "nowhere"], "no tokenizer at"),
        (["--data", "{corpus}", "--source", "web=x"], "--source belongs to --data mixture:PHASE, not to "),
        (["--data", "{corpus}", "--source", "web"], "ROLE=PATH"),
        (["--data", "{corpus}", "--facts", "3"], "--facts belongs to --data facts, not to "),
        (["--data", "facts", "--facts", "10000"], "facts=10000"),
        (["--data", "facts", "--share", "1.5"], "--share 1.5 must be a number, 0 to 1"),
        (["--data", "{corpus}/../bad"], "malformed"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(corpus, tmp_path, capsys, arguments, message):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jsonl").write_text('{"text": "ok"}\n' * 20 + "{oops\n" * 3)
    arguments = [a.replace("{corpus}", str(corpus)) for a in arguments]
    assert main(["data", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert files(tmp_path / "out") == ["bad", "corpus"]


def test_the_command_prints_what_it_wrote(corpus, tmp_path, capsys):
    assert main(["data", "--out", str(tmp_path / "out"), "--data", str(corpus), "--held-out", "0"]) == 0
    made = json.loads((tmp_path / "out" / manifest.NAME).read_text())
    assert made["fingerprint"] in capsys.readouterr().out and made["evals"] == []


# ------------------------------------------------------------------------------------------------ facts


def test_facts_reference_numbers():
    """4,500 of 9,000 facts: a quarter of the tokens, 11 + 33 windows and 363 targets in every batch of 44."""
    recipe = sources.recipe("facts")
    assert (recipe.vocab, recipe.window, recipe.domains) == (320, 24, ["knowledge", "reasoning"])
    assert [(p.name, p.weight, p.fresh) for p in recipe.sources] == [("knowledge", 1, False), ("reasoning", 3, True)]
    assert len(recipe.sources[0].windows[0]) == 1500
    assert [len(e.windows[0]) for e in recipe.evals] == [3000, 4096]
    loose = sources.recipe("facts", facts=9000)
    assert [p.weight for p in loose.sources] == [1, 1]
    assert [p.name for p in sources.recipe("facts", facts=0).sources] == ["reasoning"]
    assert [p.name for p in sources.recipe("facts", share=1).sources] == ["knowledge"]


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
        sources.recipe("facts", pool=128, value_bits=7, universe=100, facts=50, text_share=0.1)


def test_exporting_facts_and_text_never_imports_tensorflow(corpus, tmp_path):
    code = (
        "import sys; from phi3_jax.data import export\n"
        f"export.export({str(tmp_path / 'f')!r}, 'facts', **{SMALL!r})\n"
        f"export.export({str(tmp_path / 't')!r}, {str(corpus)!r})\n"
        "print([m for m in ('tensorflow', 'seqio', 'jax') if m in sys.modules], 'array_record' in str(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


@pytest.mark.shared("corpus")
@pytest.mark.shared("tokenizers")
@pytest.mark.parametrize("tokenizer", ["bytes", "phi-3-mini", "phi-3-small"])
def test_shared_corpus_with_published_tokenizers(tmp_path, tokenizer):
    with gzip.open(SHARED / "corpus" / "dialogue_qa.jsonl.gz", "rt") as file:
        lines = [next(file) for _ in range(150)]
    (tmp_path / "part.jsonl").write_text("".join(lines))
    spec = tokenizer if tokenizer == "bytes" else str(SHARED / "tokenizers" / tokenizer)
    made = export.export(tmp_path / "out", str(tmp_path / "part.jsonl"), tokenizer=spec, window=256, held_out=0.1)
    ds = loader.open_dataset(tmp_path / "out")
    assert ds.manifest["tokenizer"]["fingerprint"] == tokenizers.load(spec).fingerprint
    held = documents_of(ds, ds.manifest["evals"][0], tokenizers.load(spec))
    texts = [json.loads(line)["text"] for line in lines]
    assert held == [t for t in texts if text.is_held_out(t, 0.1)]
    assert made["dtype"] == ("uint32" if tokenizer == "phi-3-small" else "uint16")


# ---------------------------------------------------------------------------------------- few documents


def few(folder: Path, texts: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(folder)


@pytest.mark.parametrize(
    "texts",
    [
        ["Sentence number one ends here. " * 3000],
        [f"Document {i} of ten says {i}. " * 20 for i in range(10)],
        ["ab"],
        ["x"] * 9 + ["the last one is longer"],
        ["equal documents are all on one side"] * 40,
        ["é" * 501],
    ],
)
@pytest.mark.parametrize("side", ["none held out", "all held out"])
def test_few_documents_are_cut_for_evaluation_without_loss(tmp_path, capsys, texts, side):
    share = 1e-9 if side == "none held out" else 1 - 1e-9
    made = export.export(tmp_path / "out", few(tmp_path / "few", texts), window=16, held_out=share)
    ds, tokenizer = loader.open_dataset(tmp_path / "out", verify="sha256"), tokenizers.load("bytes")
    train, held = (documents_of(ds, made[group][0], tokenizer) for group in ("sources", "evals"))
    assert len(held) == 1 and [*train[:-1], train[-1] + held[0]] == texts
    assert len(held[0]) <= max(1, len(texts[-1]) / 2 + 1)
    for entry, found in ((made["sources"][0], train), (made["evals"][0], held)):
        assert entry["bytes"] == sum(len(t.encode()) for t in found)
    assert f"the last {len(held[0]):,} characters of the last document are held out" in capsys.readouterr().err


def test_one_character_trains_and_says_that_nothing_is_evaluated(tmp_path, capsys):
    made = export.export(tmp_path / "out", few(tmp_path / "few", ["x"]), window=16)
    assert made["evals"] == [] and made["sources"][0]["targets"] == 2
    assert "too short to cut: there is no evaluation of this text" in capsys.readouterr().err
    loader.open_dataset(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no documents \(1 files, 2 empty texts\)"):
        export.export(tmp_path / "none", few(tmp_path / "few", ["", " \n"]))


# --------------------------------------------------------------------------------------- the same input


def aged(folder: Path) -> None:
    import os

    for path in folder.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))


def test_equal_bytes_are_equal_data_whatever_their_times_and_place(corpus, tmp_path, monkeypatch):
    from phi3_jax.data.corpora import files as corpus_files

    out, hashed = tmp_path / "out", []
    original = corpus_files.File.sha256
    monkeypatch.setattr(corpus_files.File, "sha256", lambda self: hashed.append(self.name) or original(self))
    first = export.export(out, str(corpus), window=64)
    shard = (out / first["sources"][0]["shards"][0]["file"]).stat().st_mtime_ns
    hashed.clear()
    assert export.export(out, str(corpus), window=64) == first and not hashed  # nothing differs: nothing is hashed
    aged(corpus)
    again = export.export(out, str(corpus), window=64)
    assert again["fingerprint"] == first["fingerprint"] and sorted(hashed) == ["a.jsonl.gz", "b.jsonl"]
    assert json.loads((out / manifest.NAME).read_text()) == again  # and the times are noted,
    hashed.clear()
    assert export.export(out, str(corpus), window=64) == again and not hashed  # so that they are not hashed once more
    moved = corpus.rename(tmp_path / "moved")
    assert export.export(out, str(moved), window=64) == again and len(hashed) == 2
    assert (out / first["sources"][0]["shards"][0]["file"]).stat().st_mtime_ns == shard  # nothing was written anew
    content = (moved / "b.jsonl").read_text()
    (moved / "b.jsonl").write_text(content.replace("document 71", "document 17"))  # the same size
    with pytest.raises(UserError, match=r"data: corpus -> moved, its input files have changed: b.jsonl"):
        export.export(out, str(moved), window=64)
    (moved / "b.jsonl").write_text(content)
    (moved / "c.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"its input files have changed: c.jsonl"):
        export.export(out, str(moved.rename(corpus)), window=64)


def older(out: Path, corpus: Path) -> None:
    """Turns a data set into one whose inputs were recorded without sha256."""
    made = json.loads((out / manifest.NAME).read_text())
    made["inputs"] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(corpus.rglob("*.jsonl*"))]
    made.pop("left_out", None)
    (out / manifest.NAME).write_text(json.dumps(made, indent=1) + "\n")


def test_data_sets_of_older_versions_are_known_again(corpus, tmp_path):
    first = export.export(tmp_path / "out", str(corpus), window=64)
    older(tmp_path / "out", corpus)
    assert export.export(tmp_path / "out", str(corpus), window=64)["fingerprint"] == first["fingerprint"]
    older(tmp_path / "out", corpus)
    aged(corpus)
    again = export.export(tmp_path / "out", str(corpus.rename(tmp_path / "moved")), window=64)
    assert again["fingerprint"] == first["fingerprint"] and len(again["inputs"][0]) == 4
    assert files(tmp_path / "out") == ["moved", "out"]
    older(tmp_path / "out", tmp_path / "moved")
    (tmp_path / "moved" / "b.jsonl").write_text('{"text": "another one"}\n')
    with pytest.raises(UserError, match="its input files have changed: their text"):
        export.export(tmp_path / "out", str(tmp_path / "moved"), window=64)
    assert files(tmp_path / "out") == ["moved", "out"]


def test_what_is_left_out_is_said_and_kept(corpus, tmp_path, capsys):
    (corpus / "a.pdf").write_text("x")
    plain = export.export(tmp_path / "plain", str(corpus), window=64)
    (corpus / "README.txt").write_text("not data\n" * 999)
    made = export.export(tmp_path / "out", str(corpus), window=64)
    assert made["fingerprint"] == plain["fingerprint"]
    assert made["left_out"] == {
        ".pdf": {"count": 1, "files": ["a.pdf"]},
        "notes about data": {"count": 1, "files": ["README.txt"]},
    }
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("data: 2 files read (1 x .jsonl.gz, 1 x .jsonl; ")
    assert said.endswith("; left out: 1 x .pdf (a.pdf), 1 notes about data (README.txt)")


# ----------------------------------------------------------------------------------- the tokenizer travels


@pytest.fixture
def vocabulary(tmp_path):
    """A small tokenizer.json under another name, with its companion."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "vocabulary"
    folder.mkdir()
    entries = {chr(i): i - 32 for i in range(32, 127)} | {"</s>": 95, "[UNK]": 96}
    made = Tokenizer(models.WordLevel(entries, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "letters.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder / "letters.json"


def test_a_data_set_and_its_runs_keep_the_tokenizer(corpus, tmp_path, vocabulary):
    from phi3_jax.interop import loading

    out, run = tmp_path / "out", tmp_path / "study" / "run"
    made = export.export(out, str(corpus), tokenizer=str(vocabulary), window=64)
    kept = sorted(p.name for p in (out / "tokenizer").iterdir())
    assert kept == ["tokenizer.json", "tokenizer_config.json"]
    ds = loader.open_dataset(out)
    vocabulary.unlink()
    keep_tokenizer(ds, run)
    found = loading.tokenizer_of(run / KEPT, run)
    assert found.fingerprint == made["tokenizer"]["fingerprint"]
    assert found.decode(found.encode("kept")).replace(" ", "") == "kept"
    (run / KEPT / "tokenizer_config.json").write_text("{}")
    keep_tokenizer(ds, run)  # what is there stays
    assert (run / KEPT / "tokenizer_config.json").read_text() == "{}"
    other = (out / "tokenizer" / "tokenizer.json").read_text().replace('"a"', '"é"')
    (out / "tokenizer" / "tokenizer.json").write_text(other)
    with pytest.raises(UserError, match="is not the tokenizer that .* was made with"):
        keep_tokenizer(ds, tmp_path / "study" / "second")
    assert not (tmp_path / "study" / "second").exists()


def test_another_tokenizer_is_another_data_set_and_an_older_one_gets_its_copy(corpus, tmp_path, vocabulary):
    import shutil

    out = tmp_path / "out"
    export.export(out, str(corpus), tokenizer=str(vocabulary), window=64)
    shutil.rmtree(out / "tokenizer")  # as older versions wrote it
    export.export(out, str(corpus), tokenizer=str(vocabulary.parent / "letters.json"), window=64)
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == vocabulary.read_bytes()
    vocabulary.write_text(vocabulary.read_text().replace('"a"', '"é"'))
    with pytest.raises(UserError, match="holds another data set .tokenizer: "):
        export.export(out, str(corpus), tokenizer=str(vocabulary), window=64)


@pytest.mark.parametrize("place", ["data", "data/arm-s0"])
def test_a_run_finds_its_data_set_wherever_its_study_lies(corpus, tmp_path, monkeypatch, place):
    from phi3_jax.interop import loading

    study = tmp_path / "study"
    made = export.export(study / place, str(corpus), window=64)
    (study / "run").mkdir()
    data = {"folder": str(study / place), "fingerprint": made["fingerprint"]}
    (study / "run" / "config.json").write_text(json.dumps({"config": {"data": data}}))
    study.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    for run in (tmp_path / "moved" / "run", Path("run"), Path("../moved/run")):
        assert manifest.beside(run, data).resolve() == tmp_path / "moved" / place
        assert loading.tokenizer_of(run / "huggingface", run).kind == "bytes"
    assert manifest.beside("run", data | {"fingerprint": "another"}) == study / place  # not some other data set
    other = {"folder": "elsewhere/data", "fingerprint": made["fingerprint"], "source": "x"}
    assert manifest.beside("run", other | {"fingerprint": None}) == Path("elsewhere/data")


@pytest.mark.parametrize("seed", ["-1", "3", str(2**70)])
def test_a_seed_that_nothing_reads_is_refused(tmp_path: Path, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert main(["data", "--out", str(tmp_path / "o"), "--data", str(tmp_path / "a.txt"), "--seed", seed]) == 2
    assert "--seed" in capsys.readouterr().err and not (tmp_path / "o").exists()
