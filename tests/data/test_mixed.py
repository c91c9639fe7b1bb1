"""Mixtures with weights: the same held-out documents in each, and a source of weight 0 is evaluated alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax import UserError, experiment
from phi3_jax.data import sources
from phi3_jax.data.windows import Windows
from phi3_jax.study.arms import parts
from phi3_jax.study.data import data_arguments

MIXTURES = "experiments/mixtures.py"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """300 documents of digits, and 200 of letters."""
    for name, count, letters in (("digits", 300, "0123456789"), ("letters", 200, "abcdefghij")):
        rng = np.random.default_rng(count)
        rows = [{"text": "".join(rng.choice(list(letters), 60))} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "digits.jsonl", tmp_path / "letters.jsonl"


def made(spec: str, **more: Any) -> tuple[dict[str, tuple[float, Windows]], dict[str, Windows]]:
    """({source: (weight, windows)}, {eval: windows}); sources are consumed before evals, as an export does."""
    recipe = sources.recipe(spec, window=32, held_out=0.1, **more)
    parts = {part.name: (part.weight, _joined(part.windows)) for part in recipe.sources}
    return parts, {part.name: _joined(part.windows) for part in recipe.evals}


def _joined(windows: Any) -> Windows:
    found = list(windows)
    names = ("tokens", "targets", "segments", "domains")
    return Windows(*(np.concatenate([getattr(w, name) for w in found]) for name in names))


def test_mixtures_of_the_same_sources_have_the_same_held_out_documents(folders: tuple[Path, Path]) -> None:
    a, b = folders
    found = {weights: made(f"mix:{a}@{weights[0]}+{b}@{weights[1]}") for weights in ((1, 1), (3, 1), (1, 0), (0, 1))}
    for trained_on, evals in found.values():
        assert set(evals) == {"digits", "letters"}
        for name, windows in evals.items():
            assert np.array_equal(windows.tokens, found[1, 1][1][name].tokens) and len(windows) > 2
            assert np.array_equal(windows.domains, found[1, 1][1][name].domains), "a domain keeps its number"
        trained = {bytes(row) for _, windows in trained_on.values() for row in windows.tokens}
        assert not trained & {bytes(row) for windows in evals.values() for row in windows.tokens}
    assert {name: weight for name, (weight, _) in found[3, 1][0].items()} == {"digits": 0.75, "letters": 0.25}
    assert set(found[1, 0][0]) == {"digits"} and set(found[0, 1][0]) == {"letters"}


@pytest.mark.parametrize(
    "spec,message",
    [
        ("mix:{a}@0+{b}@0", "every weight is 0"),
        ("mix:{a}@x+{b}", "the weight x"),
        ("mix:{a}@-1+{b}", "the weight -1"),
        ("mix:", "names no source"),
        ("mix:{a}+nowhere", "'nowhere' does not exist"),
        ("mix:{a}+facts", "facts is no text"),
    ],
)
def test_wrong_mixtures_are_one_line(folders: tuple[Path, Path], spec: str, message: str) -> None:
    a, b = folders
    with pytest.raises(UserError, match=message) as error:
        made(spec.format(a=a, b=b))
    assert "\n" not in str(error.value)


def test_a_source_that_is_only_evaluated_needs_held_out_documents(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="held_out=0 leaves it nothing"):
        sources.recipe(f"mix:{folders[0]}+{folders[1]}@0", window=32, held_out=0.0)


def test_arms_of_mixtures_are_plain_studies_of_their_data(folders: tuple[Path, Path]) -> None:
    a, b = folders
    config = experiment.load_config(f"{MIXTURES}:data={a}+{b},weights=1:0/3:1,seeds=2,scale=femto,ratio=20,sizes=mini")
    found = parts(config, "femto")
    assert [(part.arm, part.config.seed) for part in found] == [("1-0", 0), ("3-1", 0), ("1-0", 1), ("3-1", 1)]
    assert found[0].data == found[2].data != found[1].data, "text is the same for every seed"
    arguments = data_arguments(found[1].config, "femto", 1000)
    assert arguments["data"] == f"mix:{a}@3+{b}@1" and "facts" not in arguments
    assert all(part.config.ratios == (20,) and not part.config.budgets for part in found)


@pytest.mark.parametrize(
    "words,message",
    [
        ("data=a+b,weights=1:1:1", "'1:1:1' has 3 weights for 2 sources"),
        ("data=a+b,weights=1:x", "'x'"),
        ("data=a+b,weights=1:1/1:1", "names '1:1' twice"),
        ("sizes=mni", "did you mean 'mini'"),
    ],
)
def test_wrong_weights_are_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment.load_config(f"{MIXTURES}:{words}")


def test_an_arm_is_of_data_or_of_counts() -> None:
    with pytest.raises(UserError, match="all that the arm is trained on"):
        experiment.Arm(data="pydocs", knowledge=1000)
    assert experiment.Arm(data="pydocs").given == {"data": "pydocs"}
