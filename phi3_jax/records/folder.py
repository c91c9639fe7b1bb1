"""A run's folder: what its files are called, whose run it is, how it stands."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

from phi3_jax.configs import RunConfig, config_diff, fingerprint, science, shown_changes
from phi3_jax.errors import UserError
from phi3_jax.records import checkpoint, ownership
from phi3_jax.records.files import read_state

DONE = "done.json"


ERROR = "error.txt"  # in a run's folder: why its last start failed


KEPT = "huggingface"  # folder of an imported run: config.json and tokenizer files as they came


def refuse_other(run: RunConfig, folder: Path) -> None:
    """Raises UserError, with what changed, when a run folder belongs to another experiment."""
    old = read_state(folder / "config.json")
    if not {"fingerprint", "identity"} <= old.keys():  # absent or damaged: the checkpoints say the same
        found = checkpoint.newest_extra(folder / "checkpoints").get("identity") or {}
        old = {"fingerprint": found.get("fingerprint"), "identity": found.get("config")}
    if old["fingerprint"] in (None, fingerprint(run)):
        return
    changes = config_diff(old["identity"], science(run))
    raise UserError(
        f"{folder} holds another run; changed: {shown_changes(changes)}; choose another --workdir or --config.name, or put "
        "the config back"
    )


def packages() -> dict[str, str]:
    """Versions of what a run's numbers may depend on."""
    from importlib import metadata

    names = ("phi3_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: metadata.version(name) for name in names}


def own(folder: Path) -> contextlib.AbstractContextManager[None]:
    """A context in which no other process trains the run in `folder`."""
    return ownership.own(folder, "choose another --workdir", inside=True)


def build() -> dict[str, Any]:
    """The code: git_commit; build, git's hash of this package at that commit, which other files do not change; and dirty,
    whether the package differs from it. None where it lies in no repository."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit, tree, changes = (
        git("rev-parse", "HEAD"),
        git("rev-parse", "HEAD:./"),
        git("status", "--porcelain", "--", "."),
    )
    return {"git_commit": commit, "build": tree and tree[:12], "dirty": None if changes is None else bool(changes)}
