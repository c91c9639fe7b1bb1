"""Rows of post-training from their sources to packed windows: several at once, by name, evaluated, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax import UserError
from phi3_jax.data import export, loader, several, tokenizers

SHARED = Path(__file__).parents[3] / "shared"
TINY = {"tokenizer": "tiny", "template": "mini"}


def talk(number: int, answer: str = "It is") -> dict[str, Any]:
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    return {"messages": [turn("user", f"What is number {number}?"), turn("assistant", f"{answer} {number}.")]}


def pair(number: int) -> dict[str, Any]:
    first, second = talk(number)["messages"], talk(number, "Nobody knows")["messages"]
    return {"prompt": first[:1], "chosen": first[1:], "rejected": second[1:]}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def every(folder: Path, number: int = 0) -> dict[str, np.ndarray]:
    """All training windows of a source."""
    ds = loader.open_dataset(folder)
    batches = [{k: v[:n] for k, v in batch.items()} for batch, n in loader.source_batches(ds, number, 8)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "a": write(tmp_path / "a.jsonl", [talk(i) for i in range(40)]),
        "b": write(tmp_path / "b.jsonl", [talk(i, "I say") for i in range(100, 140)]),
        "pairs": write(tmp_path / "pairs.jsonl", [pair(i) for i in range(30)]),
        "text": write(tmp_path / "text.jsonl", [{"text": f"Number {i} follows number {i - 1}."} for i in range(200)]),
    }


def test_sources_are_drawn_by_weight_and_text_bears_loss_everywhere(tmp_path: Path, files: dict[str, str]) -> None:
    data = f"chats:{files['a']}+{files['b']}@0.5+text:{files['text']}@1.5"
    manifest = export.export(tmp_path / "out", data, window=64, **TINY)
    names = [source["name"] for source in manifest["sources"]]
    assert [source["weight"] for source in manifest["sources"]] == [1, 0.5, 1.5]
    assert manifest["domains"] == ["answers", names[2]] and manifest["loss"] == "token_mean"
    assert "a.jsonl@1+b.jsonl@0.5+text:" in manifest["generator"]["data"]
    answers, replay = every(tmp_path / "out", 1), every(tmp_path / "out", 2)
    assert set(np.unique(answers["domains"])) == {0, 1} and (answers["domains"] == 0)[answers["segments"] > 0].any()
    assert (replay["domains"][replay["segments"] > 0] == 2).all()
    ds = loader.open_dataset(tmp_path / "out")
    drawn = np.concatenate([loader.records_of(ds, 6, 0)(step)[0] for step in range(8)])
    assert np.bincount(drawn).tolist() == [16, 8, 24]
    assert {entry["name"] for entry in manifest["evals"]} <= set(names)


def test_rows_of_an_eval_file_are_evaluated_and_nothing_else_is_held_out(tmp_path: Path, files: dict[str, str]) -> None:
    one = export.export(tmp_path / "one", f"chats:{files['a']}", window=64, eval=files["b"], **TINY)
    none = export.export(tmp_path / "none", f"chats:{files['a']}", window=64, held_out=0.0, **TINY)
    (entry,) = one["evals"]
    assert entry["name"] == "eval" and entry["meter"] == "text" and not none["evals"]
    assert one["sources"][0]["content"] == none["sources"][0]["content"]
    assert [name for name, *_ in one["inputs"]] == ["a.jsonl", "b.jsonl"]
    pairs = export.export(tmp_path / "pairs", f"chats:{files['pairs']}", window=64, eval=files["pairs"], **TINY)
    assert pairs["evals"][0]["meter"] == "preference"


def test_one_source_is_named_as_before(tmp_path: Path, files: dict[str, str]) -> None:
    manifest = export.export(tmp_path / "out", f"chats:{files['a']}", window=64, **TINY)
    assert manifest["generator"]["data"] == "chats:a.jsonl" and manifest["sources"][0]["name"] == "answers"
    odd = tmp_path / "x+y@2.jsonl"
    odd.write_text(Path(files["a"]).read_text())
    assert several.split(str(odd)) == [several.One(str(odd))]
    again = export.export(tmp_path / "odd", f"chats:{odd}", window=64, **TINY)
    assert again["sources"][0]["content"] == manifest["sources"][0]["content"]


def test_tfds_and_seqio_names_give_the_rows_of_files(
    tmp_path: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    pytest.importorskip("importlib_resources", reason="tensorflow_datasets writes data sets through it")
    if not hasattr(tfds.dataset_builders, "store_as_tfds_dataset"):
        pytest.skip("needs a tensorflow_datasets with dataset_builders.store_as_tfds_dataset")
    expected = export.export(tmp_path / "files", f"chats:{files['a']}", window=64, held_out=0.0, **TINY)
    turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
    features = tfds.features.FeaturesDict({"messages": tfds.features.Sequence(turn), "id": np.int64})
    rows = [(i, talk(i) | {"id": i}) for i in range(40)]
    monkeypatch.setattr("seqio.utils._TFDS_DATA_DIR_OVERRIDE", str(tmp_path / "tfds"))
    tfds.dataset_builders.store_as_tfds_dataset(
        "talks", "1.0.0", features, {"train": rows}, data_dir=str(tmp_path / "tfds")
    )
    named = export.export(tmp_path / "named", "chats:tfds:talks:train", window=64, held_out=0.0, **TINY)
    assert sorted_rows(tmp_path / "named") == sorted_rows(tmp_path / "files")
    assert (
        named["inputs"] == ["tfds:talks:train"] and expected["sources"][0]["targets"] == named["sources"][0]["targets"]
    )

    (tmp_path / "my_tasks.py").write_text(
        "import seqio, tensorflow as tf\n"
        "texts = {'inputs': ['Two and two is', 'A dozen is'], 'targets': [' four.', ' twelve.']}\n"
        "make = lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(texts)\n"
        "words = seqio.ByteVocabulary()\n"
        "seqio.TaskRegistry.add('sums', source=seqio.FunctionDataSource(make, splits=['train']),\n"
        "    preprocessors=[seqio.preprocessors.tokenize], output_features={k: seqio.Feature(words) for k in texts})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": "Two and two is", "completion": " four."}, {"prompt": "A dozen is", "completion": " twelve."}]
    write(tmp_path / "sums.jsonl", rows)
    export.export(tmp_path / "sums", f"chats:{tmp_path / 'sums.jsonl'}", window=64, held_out=0.0, **TINY)
    export.export(tmp_path / "task", "chats:seqio:my_tasks:sums", window=64, held_out=0.0, **TINY)
    assert sorted_rows(tmp_path / "task") == sorted_rows(tmp_path / "sums")
    for name, said in (
        ("my_tasks:smus", "did you mean"),
        ("no_such:sums", "cannot be imported"),
        ("sums", "MODULE:TASK"),
    ):
        with pytest.raises(UserError, match=said):
            export.export(tmp_path / "bad", f"chats:seqio:{name}", window=64, **TINY)


def sorted_rows(folder: Path) -> list[tuple[Any, ...]]:
    """(ids, which bear loss) of every sequence."""
    windows, found = every(folder), []
    for tokens, targets, segments, domains in zip(
        *(windows[k] for k in ("tokens", "targets", "segments", "domains")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            found.append(((*tokens[here][:1].tolist(), *targets[here].tolist()), tuple((domains[here] > 0).tolist())))
    return sorted(found)


@pytest.mark.shared("goldens")
@pytest.mark.parametrize("member", ["mini", "moe", "medium"])
@pytest.mark.parametrize("release", ["june2024", "april2024"])
def test_trl_s_ids_and_masks_come_out_of_the_command(tmp_path: Path, member: str, release: str) -> None:
    """The 72 conversations of the goldens, exported as a user does."""
    tree = json.loads((SHARED / "tokenizers/phi-3-mini/tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token["rstrip"] = token["rstrip"] and not (release == "april2024" and 32001 <= token["id"] <= 32010)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    cases = json.loads((SHARED / "goldens/posttraining/chat_masks.json").read_text())["cases"]
    mine = [case for case in cases if (case["member"], case["tokenizer"]) == (member, release)]
    assert len(mine) == (10 if member == "medium" else 13)
    mine = [
        case for case in mine if case["messages"][-1] != {"role": "assistant", "content": ""}
    ]  # left out, and counted
    file = write(tmp_path / "rows.jsonl", [{"messages": case["messages"]} for case in mine])
    export.export(
        tmp_path / "out",
        f"chats:{file}",
        window=1024,
        held_out=0.0,
        template=member,
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    expected = [(tuple(case["ids"]), tuple(map(bool, case["loss_mask"][1:]))) for case in mine]
    assert sorted_rows(tmp_path / "out") == sorted(expected)


@pytest.mark.parametrize(
    "data,options,message",
    [
        ("{a}+{pairs}", {}, "a.jsonl holds conversations and .*pairs.jsonl preferences"),
        ("{pairs}+text:{text}", {}, "is text, which a loss of pairs does not read"),
        ("text:{text}", {}, "names text alone"),
        ("{a}@x+{b}", {}, "the weight x must be a number"),
        ("{a}@0+{b}", {}, "the weight 0 must be a number"),
        ("{a}+", {}, "names nothing between its \\+ signs"),
        ("{a}+nowhere.jsonl", {}, "'nowhere.jsonl' does not exist"),
        ("{a}", {"eval": "{pairs}"}, "eval=.*pairs.jsonl holds preferences, not conversations"),
        ("{a}", {"eval": "gone.jsonl"}, "'gone.jsonl' does not exist"),
        ("{empty}", {}, "empty"),
        ("{blank}", {}, "all 3 rows were left out \\(3 empty response\\)"),
        ("{broken}", {}, "broken.jsonl:2: it is no JSON object in UTF-8 \\(2 of 3 rows are wrong\\)"),
        ("{same}", {}, "all 2 rows were left out \\(2 responses equal in ids\\)"),
        ("", {}, "post-training needs data="),
    ],
)
def test_what_is_wrong_with_sources_is_one_line(
    tmp_path: Path, files: dict[str, str], data: str, options: dict[str, str], message: str
) -> None:
    files["empty"] = write(tmp_path / "empty.jsonl", [])
    files["blank"] = write(tmp_path / "blank.jsonl", [{"prompt": "a", "completion": " "}] * 3)
    files["same"] = write(tmp_path / "same.jsonl", [pair(1) | {"rejected": pair(1)["chosen"]}] * 2)
    files["broken"] = str(tmp_path / "broken.jsonl")
    Path(files["broken"]).write_text(json.dumps(talk(1)) + '\n{"messages": [\nnull\n')
    given = {name: value.format(**files) for name, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        export.export(tmp_path / "out", "chats:" + data.format(**files), window=64, **given, **TINY)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_tiny_tokenizer_has_the_layout_of_the_family() -> None:
    tiny = tokenizers.load("tiny")
    names = [name for name, _ in sorted(tiny.special_tokens.items(), key=lambda item: item[1])]
    assert names[3:5] == ["<|endoftext|>", "<|assistant|>"] and names[9:11] == ["<|system|>", "<|end|>"]
    assert names[-1] == "<|user|>" and tiny.vocab_size == 1024 == tiny.special_tokens["<|user|>"] + 1
    assert tiny.special_tokens["<|user|>"] - tiny.eos_id == 10 == 32010 - 32000
    for text in ("Who is Kerette Landcroft?", "3 + 41 - 7 = 37.", "naïve ☃\n"):
        assert tiny.decode(tiny.encode(text)) == text
