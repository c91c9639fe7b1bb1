"""Several processes as one: they start together, agree on what they do, and end together.

Without `start` every function here answers for the one process there is, at no cost. Words go through the key-value
store and the barriers of jax's coordination service (0.4 ms on one machine), not through the devices, so that they
neither wait for a step nor disturb one. All processes must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src.distributed import global_state  # the client has no public name; orbax takes it from here too

from phi3_jax import entry
from phi3_jax.cluster import HEARTBEAT_SECONDS, Cluster, start_seconds
from phi3_jax.configs import config_diff, shown_changes
from phi3_jax.errors import STOPPED, Stopped, UserError

FOREVER_MS = 7 * 24 * 3600 * 1000  # a dead peer ends the wait, not the clock
GRACE_SECONDS = 2  # for a process to say by itself what it heard from another
_numbers = itertools.count()
_started = False
_failing = False


def start(job: Cluster) -> None:
    """Joins the other processes; to be called before anything touches a device."""
    global _started
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which the training loop needs
    jax.distributed.initialize(
        job.coordinator, job.processes if job.coordinator else None, job.process if job.coordinator else None,
        cluster_detection_method="deactivate" if job.coordinator else None,
        initialization_timeout=start_seconds(), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )  # fmt: skip
    _started = global_state.num_processes > 1
    if _started:
        threading.Thread(target=_listen, name="alarm", daemon=True).start()


def is_first() -> bool:
    """Whether this process writes what one process writes: process 0, or the only one."""
    return not _started or global_state.process_id == 0


def several() -> bool:
    """Whether there are other processes."""
    return _started


def _client() -> Any:
    """Of the coordination service; None before `start`."""
    return global_state.client


def barrier(name: str) -> None:
    """Returns when every process has come to the barrier `name`, which may be used again."""
    if _started:
        _client().wait_at_barrier(f"phi3_jax/{name}", FOREVER_MS)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` returns on process 0, a JSON value, on every process."""
    if not _started:
        return make()
    key = f"phi3_jax/value/{next(_numbers)}"
    if is_first():
        _client().key_value_set(key, json.dumps(make()))
    return json.loads(_client().blocking_key_value_get(key, FOREVER_MS))


def on_first(do: Callable[[], Any]) -> None:
    """Calls `do` on process 0; the others wait until it is done."""
    from_first(lambda: bool(do()) or True)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process: one answer for all."""
    if not _started:
        return flag
    key = f"phi3_jax/flag/{next(_numbers)}"
    if flag:
        _client().key_value_set(f"{key}/{global_state.process_id}", "")
    barrier("flag")
    return bool(_client().key_value_dir_get(f"{key}/"))


def agree(what: str, value: Any) -> None:
    """Raises the same UserError on every process where `value`, a JSON value, is not one and the same, with the diff."""
    if not _started:
        return
    mine = json.loads(json.dumps(value, default=list))
    changes = config_diff(from_first(lambda: mine), mine)
    key = f"phi3_jax/differs/{next(_numbers)}"
    if changes:
        _client().key_value_set(f"{key}/{global_state.process_id:06}", shown_changes(changes))
    barrier("agree")
    found = sorted(_client().key_value_dir_get(f"{key}/"))
    if found:
        parts = [f"process 0 -> process {int(name.rpartition('/')[2])}: {text}" for name, text in found[:3]]
        more = f"; and {len(found) - 3} more processes" if len(found) > 3 else ""
        raise UserError(f"the processes have different {what} ({'; '.join(parts)}{more}); give all the same command")


# ------------------------------------------------------------------------------------------------ the end


def leave(status: int) -> None:
    """Ends this process, together with the others where `status` is 0. Returns where it is the only one."""
    if not _started:
        return
    if status in (0, STOPPED):
        barrier("end")
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the orderly way waits for peers that may be waiting for this one


def fail(error: BaseException) -> int:
    """Prints an error and lets the other processes know; the exit status: 2 for a user's, `STOPPED` for a signal, else 1.

    Raises:
      BaseException: `error` itself, where there are no other processes.
    """
    global _failing
    if not _started:
        raise error
    reason = entry.explain(error)
    signalled = isinstance(error, (Stopped, KeyboardInterrupt))
    status = STOPPED if signalled else 1 if reason is None else 2
    if signalled:
        reason = "stopped by a signal; the same command goes on from here"
    if _PEER.search(str(error.__cause__ if isinstance(error, UserError) else error)):
        # A peer died under a collective. jax finds out which, and ends this process: `cluster.explain`.
        time.sleep(HEARTBEAT_SECONDS + 30)
    _failing = True
    line = "".join(traceback.format_exception(error)) if reason is None else f"error: {reason}"
    print(line.removeprefix("error: ") if signalled else line, file=sys.stderr, flush=True)
    text = f"process {global_state.process_id} stopped: {reason or f'{type(error).__name__}: {error}'}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        _client().key_value_set("phi3_jax/alarm", json.dumps([" ".join(text.split()), status]))
    if is_first():
        time.sleep(2 * GRACE_SECONDS)  # the store ends with this process
    return status


_PEER = re.compile("Gloo|NCCL|coordination|[Bb]arrier|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED")


def _listen() -> None:
    """Waits for another process to fail, and ends this one."""
    try:
        text, status = json.loads(_client().blocking_key_value_get("phi3_jax/alarm", FOREVER_MS))
    except jax.errors.JaxRuntimeError:
        return  # the end of the job
    time.sleep(GRACE_SECONDS)
    if not _failing:
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(status)
