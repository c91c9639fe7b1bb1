"""Which checkpoint is the best one."""

from __future__ import annotations

from pathlib import Path

from phi3_jax.training import best

EVALS = [{"name": "chat", "meter": "chat"}, {"name": "answers", "meter": "text"}]


def rows(values: dict[int, float], task: str = "answers", metric: str = "loss", suite: str = "text") -> list[dict]:
    return [
        {"step": step, "suite": suite, "task": task, "metric": metric, "value": value} for step, value in values.items()
    ]


def test_the_first_of_the_lowest_losses_after_step_0() -> None:
    which = best.wanted({"kind": "chats", "loss": "token_mean", "evals": EVALS})
    assert which is not None
    found = (
        rows({0: 0.5, 2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0}) + rows({6: 0.1}, task="text-pydocs") + rows({8: 0.1}, metric="x")
    )
    assert which.best(found) == (4, 1.0)
    assert which.best(rows({0: 0.5})) is None and which.best([]) is None


def test_the_highest_accuracy_of_pairs() -> None:
    which = best.wanted({"kind": "chats", "loss": "preference", "evals": [{"name": "chosen", "meter": "preference"}]})
    assert which is not None
    accuracy = rows({2: 0.5, 4: 0.75, 6: 0.75}, "chosen pairs", "accuracy", "preference")
    assert which.best(accuracy + rows({8: 0.0}, "chosen chosen", suite="preference")) == (4, 0.75)


def test_nothing_is_best_without_rows_held_out_or_in_pre_training() -> None:
    assert best.wanted({"kind": "chats", "loss": "token_mean", "evals": []}) is None
    assert best.wanted({"kind": "text", "loss": "token_mean", "evals": EVALS}) is None


def test_it_is_named_with_its_place(tmp_path: Path) -> None:
    assert best.line(tmp_path) is None
    best.write(tmp_path, best.Wanted("text", "answers", "loss", False), (4, 1.0))
    assert best.line(tmp_path) == f"best: loss 1.0000 at step 4: {tmp_path / 'checkpoints/4'}"
