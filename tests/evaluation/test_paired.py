"""Two evaluations of the same items: the numbers by hand, what is paired and what is not, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.evaluation import paired


def rows(marks: list[bool], key: str = "correct", **more: object) -> list[dict]:
    return [{"id": i, "prompt": f"p{i}", key: mark} | more for i, mark in enumerate(marks)]


def write(folder: Path, **tasks: list[dict]) -> Path:
    (folder / "items").mkdir(parents=True)
    for name, items in tasks.items():
        (folder / "items" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_numbers_by_hand() -> None:
    first, second = rows([True] * 12 + [False] * 28), rows([True] * 2 + [False] * 37 + [True])
    pair = paired.compared("t", "correct", first, second)
    assert (pair.lost, pair.won) == (10, 1) and pair.difference.value == pytest.approx(-9 / 40)
    assert pair.p == pytest.approx(stats.binomtest(1, 11).pvalue)
    assert pair.difference.high < 0
    assert paired.compared("t", "correct", first, first).p == 1.0


def test_the_order_of_items_is_nothing_and_another_prompt_is_another_item() -> None:
    first = rows([True, False, True, True])
    assert paired.compared("t", "correct", first, first[::-1]).difference.value == 0
    other = [*first[:2], first[2] | {"prompt": "else"}, first[3] | {"id": 99}]
    assert paired.compared("t", "correct", first, other).difference.n == 2
    with pytest.raises(UserError, match="no prompt in common"):
        paired.compared("t", "correct", first, [row | {"prompt": "else"} for row in first])


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = rows([True] * 20, "refused", safe=True) + [
        r | {"id": f"u{r['id']}"} for r in rows([True] * 9, "refused", safe=False)
    ]
    now = [row | {"refused": not row["safe"]} for row in prompts]
    none = [{"id": 1, "severity": 0.5, "correct": 0.43}]
    a = write(tmp_path / "a", **{"safety-xstest": prompts, "c-boolq": rows([True] * 8), "redteam": none, "only": none})
    b = write(tmp_path / "b", **{"safety-xstest": now, "c-boolq": rows([True] * 7 + [False]), "redteam": none})
    assert main(["compare", str(a), str(b)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    found = {line.rsplit("  refused", 1)[0].rsplit("  correct", 1)[0].strip(): line.split() for line in lines}
    assert list(found) == ["c-boolq", "safety-xstest safe", "safety-xstest unsafe"] and "Holm" in head
    assert found["safety-xstest safe"][-4:-2] == ["20", "0"] and found["safety-xstest unsafe"][-4:-2] == ["0", "0"]
    assert float(found["c-boolq"][-2]) == 1.0 and found["safety-xstest safe"][-1] == "0.0000"
    with (b / "items" / "c-boolq.jsonl").open("a") as file:
        file.write('{"id": 9, ')
    assert main(["compare", str(a), str(b)]) == 2 and "1 line(s) that are no JSON" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, said in (
        ((a, empty), "holds no items"),
        ((a, write(tmp_path / "c", other=none)), "share no task"),
        ((a, write(tmp_path / "d", redteam=none)), "nothing can be tested"),
    ):
        assert main(["compare", *map(str, words)]) == 2
        assert said in capsys.readouterr().err
