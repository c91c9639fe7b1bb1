"""The list of planted mistakes fits the code: every fragment is there once, every test that must see it exists."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_mutants", REPO / "benchmarks" / "mutants.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


mutants = script()
LIST = mutants.read(mutants.LIST)


def test_each_mistake_is_planted_in_one_place_and_leaves_a_program() -> None:
    out_of_date = []
    for mutant in LIST:
        text = mutants.mutated(mutant, (REPO / mutant.file).read_text())
        if text is None:
            out_of_date.append(mutant.label)
        else:
            compile(text, mutant.file, "exec")
    assert not out_of_date, "their `old` is not in the file exactly once: bring benchmarks/mutants.toml up to date"


def test_each_mistake_has_tests_that_exist() -> None:
    for mutant in LIST:
        assert mutant.equivalent or mutant.tests, mutant.label
        for test in mutant.tests:
            path, _, name = test.partition("::")
            text = (REPO / "tests" / path).read_text()
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{mutant.label}: no test {test}"


def entry(**changes: Any) -> Any:
    return mutants.Mutant(1, "a.py", "x < 1", "x <= 1", "a border", ("test_a.py",), **changes)


def test_a_fragment_that_is_missing_or_there_twice_is_not_planted() -> None:
    assert mutants.mutated(entry(), "if x < 1:") == "if x <= 1:"
    assert mutants.mutated(entry(), "if x > 1:") is None
    assert mutants.mutated(entry(), "x < 1 or x < 1") is None


def test_mutants_are_chosen_by_number_range_and_word() -> None:
    numbers = lambda *words: [m.number for m in mutants.chosen(LIST, words)]  # noqa: E731
    assert numbers() == list(range(1, len(LIST) + 1))
    assert numbers("3", "5-7") == [3, 5, 6, 7]
    assert {LIST[i - 1].file for i in numbers("manifest.py")} == {"phi3_jax/data/manifest.py"}
    with pytest.raises(SystemExit, match="no mutant is called 'zzz'"):
        numbers("zzz")


@pytest.mark.parametrize(
    ("source", "verdict"), [("x < 1", "killed"), ("x < 1 or x == 1", "LIVES"), ("x > 1", "BROKEN")]
)
def test_a_planted_mistake_is_killed_lives_or_is_out_of_date(tmp_path: Path, source: str, verdict: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text(before := f"def f(x):\n    return {source}\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        f"from a import f\n\ndef test_f():\n    assert f(1) is {'or' in source}\n"
    )
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\n")
    assert mutants.plant(entry(), tmp_path, 60).split()[0] == verdict
    assert (tmp_path / "a.py").read_text() == before
