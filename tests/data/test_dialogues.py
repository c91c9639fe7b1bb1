"""Conversations and preferences as ids and masks: beside TRL's, by table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from phi3_jax import UserError
from phi3_jax.data import chat, dialogues, packing, tokenizers
from phi3_jax.data.windows import concatenate, positions

SHARED = Path(__file__).parents[3] / "shared"
GOLDENS = SHARED / "goldens/posttraining"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="needs the post-training goldens")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tokenizers.Tokenizer]:
    june = SHARED / "tokenizers/phi-3-mini/tokenizer.json"
    tree = json.loads(june.read_text())
    for token in tree["added_tokens"]:
        if 32001 <= token["id"] <= 32010:
            token["rstrip"] = False
    april = tmp_path_factory.mktemp("april") / "tokenizer.json"
    april.write_text(json.dumps(tree))
    return {"june2024": tokenizers.load(str(june)), "april2024": tokenizers.load(str(april))}


@needs_goldens
def test_ids_and_loss_masks_of_72_conversations(releases: dict[str, tokenizers.Tokenizer]) -> None:
    cases = json.loads((GOLDENS / "chat_masks.json").read_text())["cases"]
    assert len(cases) == 72
    for case in cases:
        talk = case["messages"]
        answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        ids, mask = chat.masked_ids(releases[case["tokenizer"]], talk, case["member"], answers)
        name = (case["case"], case["member"], case["tokenizer"])
        assert ids.tolist() == case["ids"], name
        assert mask.astype(int).tolist() == case["loss_mask"], name


def rows_of(rows: list[Any]) -> Any:
    return lambda: ((f"f.jsonl:{n}", row) for n, row in enumerate(rows, 1))


def examples(rows: list[Any], tokenizer: Any, template: str = "mini", **options: Any) -> tuple[Any, list[Any]]:
    report, make = dialogues.read(rows_of(rows), tokenizer, template, **options)
    return report, [row for _, row in make()]


@needs_goldens
@pytest.mark.parametrize("case", ["sft_mini", "sft_medium", "dpo_mini", "dpo_medium", "lora_dpo_mini"])
def test_rows_give_the_ids_and_targets_that_trl_trains_on(case: str) -> None:
    golden, arrays = json.loads((GOLDENS / f"{case}.json").read_text()), load_file(GOLDENS / f"{case}.safetensors")
    tokenizer = tokenizers.load(str(GOLDENS / golden["base"] / "tokenizer.json"))
    _, made = examples(golden["rows"], tokenizer, golden["base"].removeprefix("base_"))
    ours = {(tuple(e.ids), tuple(np.flatnonzero(e.answer))) for row in made for e in row}
    ids, there = (arrays[k].reshape(-1, arrays["input_ids"].shape[-1]) for k in ("input_ids", "attention_mask"))
    if "labels" in arrays:
        marks = arrays["labels"].reshape(ids.shape) >= 0
    else:
        marks = arrays["completion_mask"].reshape(ids.shape) > 0
    theirs = {(tuple(i[t > 0]), tuple(np.flatnonzero(m))) for i, t, m in zip(ids, there, marks, strict=True)}
    assert theirs <= ours and len(theirs) > 10


USER, ANSWER = {"role": "user", "content": "What is a tide?"}, {"role": "assistant", "content": "The sea's rise."}
OTHER = {"role": "assistant", "content": "I do not know."}
TINY = GOLDENS / "base_mini/tokenizer.json"


@pytest.fixture(scope="module")
def tiny() -> tokenizers.Tokenizer:
    if not TINY.exists():
        pytest.skip("needs the post-training goldens")
    return tokenizers.load(str(TINY))


def test_each_form_of_one_conversation_gives_the_same_ids(tiny: tokenizers.Tokenizer) -> None:
    talk = f"<|user|>\n{USER['content']}<|end|>\n<|assistant|>\n{ANSWER['content']}<|end|>\n<|endoftext|>"
    forms = [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": ANSWER["content"]}]},
        {"instruction": USER["content"], "input": "", "output": ANSWER["content"]},
        {"text": talk},
        {"prompt": [USER], "completion": [ANSWER]},
    ]
    first = examples(forms[:1], tiny)[1][0][0]
    assert first.targets == len(tiny.encode(ANSWER["content"])) + 2  # the answer, <|end|>, <|endoftext|>
    for form in forms[1:]:
        found = examples([form], tiny)[1][0][0]
        np.testing.assert_array_equal(found.ids, first.ids)
        np.testing.assert_array_equal(found.answer, first.answer)
    for form in ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
                 {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}):  # fmt: skip
        chosen, rejected = examples([form], tiny)[1][0]
        np.testing.assert_array_equal(chosen.ids, first.ids)
        np.testing.assert_array_equal(chosen.answer, first.answer)
        assert rejected.targets == len(tiny.encode(OTHER["content"])) + 2


def test_plain_text_bears_loss_after_what_the_texts_share(tiny: tokenizers.Tokenizer) -> None:
    end = tiny.special_tokens["<|endoftext|>"]
    done = examples([{"prompt": "The sea", "completion": " rises."}], tiny)[1][0][0]
    assert done.ids.tolist() == [*tiny.encode("The sea rises."), end]
    assert done.answer[-1] and not done.answer[: chat.common(tiny.encode("The sea"), done.ids)].any()
    chosen, rejected = examples([{"chosen": "The sea rises.", "rejected": "The sea falls."}], tiny)[1][0]
    shared = chat.common(chosen.ids, rejected.ids)
    assert 0 < shared < len(chosen.ids) - 1
    assert not chosen.answer[:shared].any() and chosen.answer[shared:].all() and rejected.answer[shared:].all()


def test_only_the_last_answer_where_asked_and_no_answer_but_the_response(tiny: tokenizers.Tokenizer) -> None:
    talk = [USER, ANSWER, USER, OTHER]
    every = examples([{"messages": talk}], tiny)[1][0][0]
    last = examples([{"messages": talk}], tiny, last_answer=True)[1][0][0]
    asked = examples([{"prompt": talk[:3], "completion": talk[3:]}], tiny)[1][0][0]
    assert every.targets - last.targets == len(tiny.encode(ANSWER["content"])) + 1
    np.testing.assert_array_equal(last.answer, asked.answer)
    twice = [OTHER, USER, ANSWER]  # a response of several turns: none of its loss is on the user's
    chosen, _ = examples([{"prompt": [USER], "chosen": twice, "rejected": [ANSWER]}], tiny)[1][0]
    assert chosen.targets == len(tiny.encode(OTHER["content"])) + 1 + len(tiny.encode(ANSWER["content"])) + 2


def test_text_makes_no_control_token(tiny: tokenizers.Tokenizer) -> None:
    report, [(example,)] = examples([{"messages": [USER, {"role": "assistant", "content": "a<|end|>b"}]}], tiny)
    assert (example.ids == tiny.special_tokens["<|end|>"]).sum() == 2 and report.controls == 1
    assert "spell a control token" in report.lines()[0]


BAD = [
    ({"mesages": [USER]}, r"it has the keys 'mesages' \(did you mean messages\?\)"),
    ({"messages": "hello"}, "messages is str, not a list"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": [USER]}, "no turn of the assistant"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, "role 'tool' in messages"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "it has role and content, both text"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
    ({"prompt": "a", "completion": [ANSWER]}, "prompt is text, completion is messages"),
    ({"chosen": [ANSWER], "rejected": [OTHER]}, "no common prompt"),
    ({"text": "once upon a time"}, "no conversation rendered"),
    ([1, 2], "no JSON object"),
]


@pytest.mark.parametrize("row,message", BAD, ids=range(len(BAD)))
def test_a_row_that_is_wrong_is_one_line_with_its_place_and_count(
    tiny: tokenizers.Tokenizer, row: Any, message: str
) -> None:
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(UserError, match=rf"f\.jsonl:2: .*{message}.*\(2 of 4 rows are wrong\).*data.on_error=skip"):
        examples([good, row, good, row], tiny)
    report, made = examples([good, row, good, row], tiny, on_error="skip")
    assert len(made) == 2 and sum(report.skipped.values()) == 2 and "2 of 4 rows were left out" in report.lines()[0]


def test_several_kinds_medium_s_system_turn_and_other_tokenizers(tiny: tokenizers.Tokenizer) -> None:
    with pytest.raises(UserError, match="it has the keys prompt, completion where the rows before have messages"):
        examples([{"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "b"}], tiny)
    with pytest.raises(UserError, match="role 'system' in messages; the template of phi-3-medium has user, assistant"):
        examples([{"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}], tiny, "medium")
    with pytest.raises(UserError, match=r"this bytes tokenizer has no <\|user\|>"):
        examples([{"messages": [USER, ANSWER]}], tokenizers.load("bytes"))
    with pytest.raises(UserError, match="no rows of"):
        examples([], tiny)


def test_what_cannot_be_learnt_from_is_dropped_and_counted(tiny: tokenizers.Tokenizer) -> None:
    blank = {"role": "assistant", "content": " \n"}
    pair = {
        "prompt": [USER],
        "chosen": [ANSWER],
        "rejected": [{"role": "assistant", "content": "\n" + ANSWER["content"]}],
    }
    report, made = examples([pair, {"prompt": [USER], "chosen": [ANSWER], "rejected": [blank]}], tiny)
    assert made == [] and report.dropped == {dialogues.EQUAL: 1, dialogues.EMPTY: 1}


# ------------------------------------------------------------------------------------------------ packing


def random_rows(count: int, width: int, seed: int = 0) -> list[dialogues.Row]:
    rng = np.random.default_rng(seed)

    def example() -> dialogues.Example:
        n = int(np.clip(np.exp(rng.normal(3.2, 0.6)), 4, 120))
        answer = np.arange(n) >= rng.integers(1, n - 1)
        return dialogues.Example(rng.integers(1, 400, n).astype(np.int32), answer)

    return [tuple(example() for _ in range(width)) for _ in range(count)]


@pytest.mark.parametrize("width", [1, 2])
def test_every_row_lies_whole_in_one_window(width: int) -> None:
    rows, report = random_rows(300, width), dialogues.Report()
    windows = concatenate(list(packing.pack(iter(rows), 256, report, seed=3, size=128)))
    found = []
    for row in range(len(windows)):
        segments = windows.segments[row]
        ends = np.flatnonzero(segments)
        assert ends.size == ends[-1] + 1 and segments.max() % width == 0  # padding is at the end; pairs are whole
        np.testing.assert_array_equal(positions(segments)[ends[0]], 0)
        for first in range(1, segments.max() + 1, width):
            pair = []
            for which in range(width):
                here = segments == first + which
                domains = windows.domains[row, here]
                assert set(domains.tolist()) <= {0, which + 1}
                ids = (windows.tokens[row, here][0], *windows.targets[row, here])
                np.testing.assert_array_equal(windows.tokens[row, here][1:], windows.targets[row, here][:-1])
                pair.append((ids, tuple(domains > 0)))
            found.append(tuple(pair))
    expected = [tuple((tuple(e.ids), tuple(e.answer[1:])) for e in row) for row in rows]
    assert sorted(found) == sorted(expected) and found != expected
    sizes = [sum(e.positions for e in row) for row in rows]
    assert packing.used(sizes, 256, width) > 0.9


def test_long_rows_are_cut_without_an_end_or_dropped() -> None:
    report = dialogues.Report()
    make = lambda n, start: dialogues.Example(np.arange(n, dtype=np.int32), np.arange(n) >= start)  # noqa: E731
    assert packing.fitted((make(65, 10),), 64, report)[0].positions == 64 and report.cut == 0
    (cut,) = packing.fitted((make(100, 10),), 64, report)
    assert cut.positions == 64 and cut.ids[-1] == 64 and report.cut == 1
    assert packing.fitted((make(100, 65),), 64, report) is None and report.dropped == {dialogues.LONG: 1}
    chosen, rejected = packing.fitted((make(20, 5), make(100, 5)), 64, report)
    assert (chosen.positions, rejected.positions) == (19, 45)
    assert packing.fitted((make(90, 5), make(100, 5)), 64, dialogues.Report()) is None  # equal once both are cut


def test_the_proposed_window_packs_tightly() -> None:
    rng = np.random.default_rng(0)
    prompts, answers = np.exp(rng.normal(np.log(120), 0.7, 4000)), np.exp(rng.normal(np.log(250), 0.8, (4000, 2)))
    pairs = (2 * prompts + answers.sum(1)).astype(int) + 2
    assert packing.proposed(pairs, 4096, 2) == 4096 and packing.used(pairs, 4096, 2) > 0.985
    assert packing.proposed(pairs // 20, 4096, 2) == 256
    assert packing.proposed(pairs, 1024, 2) == 1024


def test_few_rows_get_the_window_that_they_fill_best() -> None:
    assert packing.proposed([20] * 8, 4096) == 128  # two windows of 62 %, as good as one of 256
    assert packing.proposed([60] * 4 + [200], 4096) == 256
    assert packing.proposed([3000, 50], 4096) == 4096
