"""One process alone: every question to "the others" is answered by itself. (Several: tests/launch/test_multiprocess.py.)"""

from __future__ import annotations

import pytest

from phi3_jax import distributed, launcher
from phi3_jax.errors import UserError


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


def test_alone_an_error_is_a_line_and_a_bug_a_traceback(capsys: pytest.CaptureFixture) -> None:
    assert distributed.fail(UserError("x=3 is too much; use 2")) == 2
    assert capsys.readouterr().err == "error: x=3 is too much; use 2\n"
    with pytest.raises(KeyError):
        distributed.fail(KeyError("x"))


def test_a_host_that_sees_another_folder_is_an_error(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.distributed, "from_first", lambda make: {"fingerprint": "that of process 0"})
    with pytest.raises(UserError, match="does not see .*; choose a --workdir on a file system that all hosts share"):
        launcher._export({}, tmp_path)
    (tmp_path / "manifest.json").write_text('{"fingerprint": "of a data set of its own"}')
    with pytest.raises(UserError, match="does not see"):
        launcher._export({}, tmp_path)
    (tmp_path / "manifest.json").write_text('{"fingerprint": "that of process 0"}')
    assert launcher._export({}, tmp_path) == {"fingerprint": "that of process 0"}
