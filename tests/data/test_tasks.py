"""seqio declarations: tasks give the exporter every text once, phases mix as declared, TFDS names work offline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data import export, loader, quality, sources, tokenizers
from phi3_jax.data.sources import mixture
from phi3_jax.errors import UserError

tasks = pytest.importorskip("phi3_jax.data.tasks")
GOOD = (
    "Consider a ball that is thrown upwards. It slows down because gravity pulls it back, and therefore it stops for a "
    "moment at the top.\nThe time to reach the top is defined by the first speed: for example, a ball that leaves the "
    "hand with a speed of ten metres a second rises for about one second.\nIn general, the height is the result of "
    "the speed and of the time, and this rule explains why heavy and light balls fall alike."
)
BAD = "\n".join(["- click here http://x.y #1 ... 404 ###"] * 8)


@pytest.fixture
def tokenizer():
    return tokenizers.load("bytes")


@pytest.fixture
def web(tmp_path):
    path = tmp_path / "web.jsonl"
    rows = [GOOD.replace("ball", f"ball{i}") for i in range(40)] + [BAD.replace("404", str(i)) for i in range(20)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return str(path), rows


def test_vocabulary_is_the_tokenizer(tokenizer):
    import tensorflow as tf

    vocabulary = tasks.TokenizerVocabulary(tokenizer)
    text = "Grüße <s> ok"
    assert vocabulary.encode(text) == tokenizer.encode(text)
    assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == tokenizer.encode(text)
    assert vocabulary.decode(tokenizer.encode(text)) == text
    assert vocabulary.decode_tf(tf.constant(tokenizer.encode(text))).numpy().decode() == text
    assert (vocabulary.vocab_size, vocabulary.eos_id) == (259, 257)
    assert vocabulary == tasks.TokenizerVocabulary(tokenizers.load("bytes"))


def test_a_task_gives_every_text_once_with_its_ids(tokenizer, web):
    path, rows = web
    task = tasks.add_task("test.all", tasks.function_source(lambda: sources.texts(path).documents), tokenizer)
    found = list(tasks.documents(task))
    assert [text for text, _ in found] == rows
    assert all(ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text) for text, ids in found)


def test_quality_prefers_explanations_and_thresholds_are_nested():
    assert quality.quality(GOOD) > 0.8 > 0.5 > quality.quality(BAD) and quality.quality("") == 0
    words, lines = GOOD.split(), BAD.splitlines()
    mixed = [" ".join(words[:i]) + "\n" + "\n".join(lines[: i % 9]) for i in range(2, len(words))]
    low, high = ({t for t in mixed if quality.passes(t, least)} for least in (0.5, 0.7))
    assert high < low < set(mixed)
    assert {t for t in mixed if quality.passes(t, 0.6, seed=1)} != {t for t in mixed if quality.passes(t, 0.6, seed=2)}


def test_phase_two_reads_a_subset_of_phase_ones_web(tokenizer, web):
    path, rows = web
    kept = []
    for name in mixture.PHASES:
        found, inputs = mixture.roles(name, tokenizer, {"web": path}, sources.texts)
        assert [file.name for account in inputs.accounts for file in account.files] == [Path(path).name]
        (role,) = (one for one in found if one.name == "web")
        kept.append({text for text, _ in role.documents})
    assert set(rows) > kept[0] >= kept[1] and len(kept[1]) >= 40


def test_phases_are_whole_mixtures(tokenizer):
    for name, roles in mixture.PHASES.items():
        assert sum(role.rate for role in roles.values()) == pytest.approx(1)
        found, _ = mixture.roles(name, tokenizer, {}, sources.texts)
        assert {one.name: one.rate for one in found} == {role: part.rate for role, part in roles.items()}


def test_reasoning_texts_are_right_and_never_the_same():
    texts = list(mixture.reasoning_texts(0, count=30))
    lines = [line for text in texts for line in text.splitlines()[1:]]
    assert len(set(lines)) == len(lines) == 300
    for line in lines:
        for step in line.rstrip(".").split("; "):
            left, right = step.split(" = ")
            value, *rest = left.split()
            value = int(value)
            for operator, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
                result = {
                    "+": value + number,
                    "-": value - number,
                    "max": max(value, number),
                    "min": min(value, number),
                }
                value = min(47, max(0, result[operator]))
            assert value == int(right)
    assert texts[0] != next(mixture.reasoning_texts(1))


def test_a_mixture_reaches_the_loader_in_its_rates(tmp_path, web):
    path, _ = web
    fill = tuple(f"{role}={path}" for role in ("web", "textbook", "reasoning"))
    options = dict(source=fill, window=64, held_out=0.1)
    made = export.export(tmp_path / "m", "mixture:phi3_phase2", **options)
    assert [s["name"] for s in made["sources"]] == made["domains"] and made["kind"] == "mixture"
    assert [e["meter"] for e in made["evals"]] == ["text"] * 3
    ds = loader.open_dataset(tmp_path / "m")
    batch = loader.train_batches(ds, 20)[3]
    counts = np.bincount(batch["domains"].max(1), minlength=4)[1:]
    assert dict(zip(made["domains"], counts.tolist(), strict=True)) == {"web": 10, "textbook": 4, "reasoning": 6}
    assert export.export(tmp_path / "m", "mixture:phi3_phase2", **options) == made  # skipped: nothing has changed
    again = export.export(tmp_path / "n", "mixture:phi3_phase2", **options)
    assert again["fingerprint"] == made["fingerprint"]


def test_a_tfds_name_works_offline(tmp_path, monkeypatch, web):
    import tensorflow_datasets as tfds

    pytest.importorskip("importlib_resources", reason="tensorflow_datasets writes data sets through it")
    _, rows = web
    if not hasattr(tfds.dataset_builders, "store_as_tfds_dataset"):
        pytest.skip("needs a tensorflow_datasets with dataset_builders.store_as_tfds_dataset")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64})
    data = {"train": [(i, {"text": row, "id": i}) for i, row in enumerate(rows)]}
    tfds.dataset_builders.store_as_tfds_dataset("tiny", "1.0.0", features, data, data_dir=str(tmp_path))
    monkeypatch.setattr(tasks.seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(tmp_path))
    made = export.export(tmp_path / "t", "tfds:tiny:train", window=64, held_out=0.1)
    total = made["sources"][0]["bytes"] + made["evals"][0]["bytes"]
    assert total == sum(len(row.encode()) for row in rows)
    part = export.export(tmp_path / "p", "tfds:tiny:1.0.0:train[:50%]", window=64, held_out=0)
    assert 0 < part["sources"][0]["bytes"] < total
    with pytest.raises(UserError, match="nothing_like_it"):
        export.export(tmp_path / "u", "tfds:nothing_like_it", window=64)


@pytest.mark.parametrize(
    ("data", "fill", "message"),
    [
        ("mixture:phi3_phase3", "", "unknown mixture 'phi3_phase3'.*phi3_phase2"),
        ("mixture:phi3_phase1", "wbe=pydocs", "no role 'wbe'.*'web'"),
        ("mixture:phi3_phase1", "web=nowhere", "nowhere.* does not exist"),
        ("tfds:x", "web=pydocs", "--source belongs to --data mixture:PHASE, not to tfds:x"),
        ("tfds:a:b:c", "", "is not NAME"),
    ],
)
def test_bad_requests(tmp_path, data, fill, message):
    with pytest.raises(UserError, match=message):
        export.export(tmp_path / "x", data, **({"source": (fill,)} if fill else {}))


def test_an_error_inside_a_source_keeps_its_one_line(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ok"}\n' * 20 + "{oops\n" * 3)
    task = tasks.add_task("test.bad", tasks.function_source(lambda: sources.texts(str(path)).documents), tokenizer)
    with pytest.raises(UserError, match="malformed") as error:
        list(tasks.documents(task))
    assert "\n" not in str(error.value)


def test_only_tasks_needs_tensorflow():
    folder = Path(tasks.__file__).parents[1]
    users = {
        p.name for p in folder.rglob("*.py") if any(w in p.read_text() for w in ("import tensorflow", "import seqio"))
    }
    assert users == {"tasks.py"}
