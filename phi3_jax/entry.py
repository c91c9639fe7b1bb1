"""The top of every command: what a user, a shell or a machine can cause is one line and the usual exit status.

`phi3-jax`, `launch/*.py` and `python -m phi3_jax.*` all start here, before anything that takes time to import. Exit
statuses: 0; 2 for an error of the user's or the machine's; 130 for Ctrl-C; 141 where the reader of the output has gone, as
after SIGPIPE; `STOPPED` (75) for training that a signal stopped. A
mistake of this program keeps its traceback and status 1.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from phi3_jax.errors import STOPPED, Stopped, UserError

Body = Callable[[Sequence[str]], int | None]
VERBS = "phi3_jax.verbs:main"  # by name: what it imports takes time
STOPPABLE = ("run", "extend", "submit", "launch", "worker")  # verbs that go on where a signal stopped them
_LOOP = "Symlink loop from "  # of `Path.resolve` before Python 3.13
_WAYS = {
    errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota",
    errno.EACCES: "choose a place that you may read and write", errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written", errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENOENT: "see that it is there",
}  # fmt: skip


def run(arguments: Sequence[str], body: Body | str, *, stops: bool = False) -> int:
    """Runs a command and returns its exit status.

    Args:
      arguments: the words after the command's name.
      body: the function that gets the arguments, or its name as "module:function", which is imported inside. What it
        returns is the status; None is 0.
      stops: SIGTERM and Ctrl-C stop work that the same command goes on with: status `STOPPED`.
    """
    _mend_streams()
    try:
        with _stopping() if stops else contextlib.nullcontext():
            status = _function(body)(arguments) or 0
        sys.stdout.flush()
        return status
    except BaseException as error:
        return _status_of(error, stops)
    finally:
        _let_go_of_streams()


def _function(body: Body | str) -> Body:
    if not isinstance(body, str):
        return body
    module, _, name = body.partition(":")
    found: Body = getattr(importlib.import_module(module), name)
    return found


def start(verb: str, arguments: Sequence[str] | None = None) -> int:
    """`run` of a command by its name in `phi3_jax.verbs`, by default with the words of this process."""
    words = sys.argv[1:] if arguments is None else arguments
    return run([verb, *words], VERBS, stops=verb in STOPPABLE)


def _status_of(error: BaseException, stops: bool) -> int:
    """Prints an error as one line and returns the exit status; raises one that is a mistake of this program's."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if isinstance(error, Stopped) or (stops and isinstance(error, KeyboardInterrupt)):
        _say(str(error) or "stopped; the same command goes on from here")
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    reason = explain(error)
    if reason is None:
        raise error
    _say(f"error: {' '.join(reason.splitlines())}")
    return 2


def explain(error: BaseException) -> str | None:
    """What a user can make of an error, in one line; None for one that only the traceback explains."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or str(error) or type(error).__name__
        way = _WAYS.get(error.errno or 0, "")
        return f"{f'{names}: ' if names else ''}{reason}{f'; {way}' if way else ''}"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start : error.start + 1].hex()
        return f"text that is not UTF-8 (byte 0x{byte} at {error.start:,}); save or type it as UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start]!a} at {error.start:,} of a text is no Unicode character; leave it out"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return "memory ran out; close other programs, or ask for less at a time (a smaller batch or context)"
    if isinstance(error, RecursionError):
        return "an input is nested too deeply to be read"
    if isinstance(error, RuntimeError) and str(error).startswith(_LOOP):
        return f"{str(error).removeprefix(_LOOP)}: a symbolic link that leads to itself; choose another place"
    if isinstance(error, RuntimeError | KeyError) and any(w in str(error) for w in ("home directory", "getpwuid")):
        return "this user has no home directory and no entry in passwd; set HOME"
    return None


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM raises `Stopped`, until who can save on the way takes it over (`training.loop.fit`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------ streams


def _mend_streams() -> None:
    """Closed standard streams become empty ones, and text that a terminal cannot show is escaped rather than an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if (
            getattr(sys, name) is None
        ):  # the lowest free number is the closed stream's own: no file will be taken for it
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _let_go_of_streams() -> None:
    """Points a stream that cannot be written at nothing, so that Python's own last flush has nothing to complain of."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
