"""RULER's items: as long as asked for, answerable from the prompt alone, in RULER's words, scored as RULER scores."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.evaluation import ruler

BYTES = tokenizers.load("bytes")


class Words(tokenizers.Tokenizer):
    """A tokenizer of words, marks and digits by threes, so that short items are as short as a real one's."""

    kind = "words"

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._finish(10**6, 0, b"words")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [re.findall(r" ?[A-Za-z]+| ?\d{1,3}|\s|.", text) for text in texts]
        return [[self._ids.setdefault(p, len(self._ids) + 1) for p in one] for one in pieces]

    def _decode(self, ids: list[int]) -> str:
        back = {i: piece for piece, i in self._ids.items()}
        return "".join(back[i] for i in ids)


def writer(tokenizer: tokenizers.Tokenizer) -> ruler.Writer:
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["plain", "words", "of", "no", "meaning."], 6000))
    return ruler.Writer(tokenizer, np.asarray(tokenizer.encode(text), np.int32))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_items_are_exactly_as_long_as_asked_and_can_be_answered(task: str) -> None:
    words = Words()
    made, lengths = writer(words), []
    for length in (64, 128, 300, 1024, 4096):
        try:
            items = [ruler.TASKS[task](made, length, np.random.default_rng(i), (i + 0.5) / 4) for i in range(4)]
        except UserError as error:
            assert "leave --lengths" in str(error) and length < 1024
            continue
        lengths.append(length)
        for item in items:
            assert len(item.prompt) + item.room == length
            said = words.decode(item.prompt)
            assert all(answer in said for answer in item.answers)
            assert item.score(" ".join(item.answers).upper()) == 1 and item.score("nothing") == 0
        assert len({tuple(item.prompt) for item in items}) == 4
        others = [one.score(" ".join(other.answers)) for one in items for other in items if one is not other]
        assert np.mean(others) < 0.2
        if length == 4096:
            assert items[0].room == {"vt": 30, "cwe": 120, "fwe": 50, "passkey": 16}.get(task, 128)
    shortest = {"niah_single_1": 64, "niah_single_2": 64, "passkey": 64}
    assert {1024, 4096} <= set(lengths) and lengths[0] <= shortest.get(task, 1024)
    exact = [ruler.TASKS[task](writer(BYTES), 2048, np.random.default_rng(0), 0.5)]
    assert all(len(item.prompt) + item.room == 2048 for item in exact)


def test_the_needle_stands_at_its_depth() -> None:
    for depth in (0.05, 0.5, 0.95):
        item = ruler.TASKS["niah_single_2"](writer(BYTES), 4096, np.random.default_rng(1), depth)
        said = BYTES.decode(item.prompt)
        begin, end = said.index(".\n") + 2, said.index("\nWhat is the special")
        at = (said.index("One of the special") - begin) / (end - begin)
        assert abs(at - depth) < 0.08


def constants(name: str) -> dict[str, Any]:
    """What lm-eval's task file says of its words, read without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs lm-eval")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "tasks/ruler" / f"{name}.py").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
        if isinstance(node, ast.FunctionDef) and node.name == "string_match_all":
            scope: dict[str, Any] = {}
            exec(compile(ast.Module([node], []), name, "exec"), scope)
            found["match"] = scope["string_match_all"]
    return found


def test_prompts_have_the_words_of_lm_evals_items() -> None:
    for task, name in (("vt", "vt_utils"), ("cwe", "cwe_utils"), ("fwe", "fwe_utils")):
        config = constants(name)["CONFIG"]
        config = config.get("variable_tracking", config)
        item = ruler.TASKS[task](writer(BYTES), 8192, np.random.default_rng(0), 0.5)
        said = BYTES.decode(item.prompt)
        head, ask = config["template"].split("{context}")
        pattern = re.escape(head) + "(?s:.*)" + re.escape((ask + config["answer_prefix"]).rstrip())
        for hole in ("query", "num_v"):
            pattern = pattern.replace(re.escape("{" + hole + "}"), r"\d+")
        assert re.fullmatch(pattern, said.rstrip()), (task, said[:200], said[-300:])
    template = constants("niah_utils")["TEMPLATE"]
    for task, several in (("niah_multiquery", True), ("niah_single_3", False)):
        item = ruler.TASKS[task](writer(BYTES), 8192, np.random.default_rng(0), 0.5)
        said = template
        if not several:
            for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
                said = said.replace(old, new)
        head, ask = said.replace("{type_needle_v}", "numbers" if several else "uuid").split("{context}")
        mine = BYTES.decode(item.prompt)
        assert mine.startswith(head)
        assert re.search(re.escape(ask).replace(re.escape("{query}"), r"[\w, -]+"), mine)


def test_scores_are_those_of_lm_eval() -> None:
    match = constants("common_utils")["match"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [f"W{i}" for i in rng.integers(0, 12, 3)]
        reply = " ".join(f"w{i}" for i in rng.integers(0, 12, 4))
        assert ruler.Item([], answers, 1).score(reply) == pytest.approx(match([reply], [answers]))


def test_questions_about_documents_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"question": f"Who wrote {i}?", "context": f"Book {i} is by A{i}b. " * 3, "answers": [f"A{i}b", f"a. {i}b"]}
        for i in range(9)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = ruler.qa(ruler.questions(path))
    item = make(writer(BYTES), 2048, np.random.default_rng(0), 0.5)
    said = BYTES.decode(item.prompt)
    assert len(item.prompt) + item.room == 2048 and said.count("Document:") > 5 and said.endswith(" Answer:")
    assert item.answers[0] in said and item.score(f"It was {item.answers[0]}.") == 1 and item.score("who?") == 0
    path.write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="test.jsonl:1 lacks question, context or answers"):
        ruler.questions(path)
