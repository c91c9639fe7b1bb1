"""One process alone: every question to "the others" is answered by itself. (Several: tests/launch/test_multiprocess.py.)"""

from __future__ import annotations

import pytest

from phi3_jax import distributed
from phi3_jax.errors import Stopped, UserError
from phi3_jax.study import launch


def test_alone_the_answers_are_ones_own() -> None:
    assert distributed.is_first() and not distributed.several()
    assert distributed.from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert distributed.any_process(True) and not distributed.any_process(False)
    distributed.agree("configs", {"a": 1})
    distributed.barrier("here")
    distributed.leave(0)
    done = []
    distributed.on_first(lambda: done.append(1))
    assert done == [1]


def test_alone_an_error_is_left_to_the_top_of_the_command() -> None:
    for error in (UserError("x=3 is too much; use 2"), KeyError("x"), Stopped()):
        with pytest.raises(type(error)):
            distributed.fail(error)


def test_a_host_that_sees_another_folder_is_an_error(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.distributed, "from_first", lambda make: {"fingerprint": "that of process 0"})
    with pytest.raises(UserError, match="does not see .*; choose a --workdir on a file system that all hosts share"):
        launch._export({}, tmp_path)
    (tmp_path / "manifest.json").write_text('{"fingerprint": "of a data set of its own"}')
    with pytest.raises(UserError, match="does not see"):
        launch._export({}, tmp_path)
    (tmp_path / "manifest.json").write_text('{"fingerprint": "that of process 0"}')
    assert launch._export({}, tmp_path) == {"fingerprint": "that of process 0"}
