"""What a run writes besides its numbers: config.json, plan.json, the tokenizer, status.json."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from phi3_jax.configs import RunConfig, fingerprint, science
from phi3_jax.data import loader, tokenizers
from phi3_jax.errors import UserError
from phi3_jax.family import published_params
from phi3_jax.records.files import read_state, write_json
from phi3_jax.records.folder import KEPT, build, packages
from phi3_jax.records.goodput import account
from phi3_jax.training.loop import Result


def describe(run: RunConfig, folder: Path, ds: loader.Dataset, plan: Mapping[str, Any], forecast: str | None) -> None:
    """Writes config.json, with the hash of the study's forecast where it came first, plan.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_tokenizer(ds, folder)
    tree = dataclasses.asdict(run)
    tree["budget"] = run.budget
    shared = {"non_embedding": run.model.matrix_params, "published_parameters": published_params(run.model.member)}
    tree["model"] |= shared
    record = {
        "fingerprint": fingerprint(run), "name": run.name, "label": run.model.label, "config": tree,
        "identity": science(run),
        "packages": packages(), **build(), "device": jax.devices()[0].device_kind,
        "forecast": forecast, "tokenizer": ds.manifest["tokenizer"],
    }  # fmt: skip
    for name, content in (("config.json", record), ("plan.json", plan)):
        write_json(folder / name, content)


def keep_tokenizer(ds: loader.Dataset, folder: Path) -> None:
    """Copies the tokenizer of a data set into a run, once; data sets of older versions have none to copy.

    Raises:
      UserError: the data set's copy is not the tokenizer that made it, or the run cannot be written.
    """
    source, target = ds.folder / tokenizers.FOLDER, folder / KEPT
    if not source.is_dir() or target.exists():
        return
    found = tokenizers.load(source)
    if found.fingerprint != ds.manifest["tokenizer"]["fingerprint"]:
        raise UserError(f"{source} is not the tokenizer that {ds.folder} was made with; put its files back")
    try:
        tokenizers.keep(found.files, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; make room or choose another --workdir"
        ) from error


def write_status(folder: Path, result: Result) -> None:
    """status.json: how the run ended and what it took; times of several attempts add up."""
    path = folder / "status.json"
    old = read_state(path)
    if old.get("status") == "done":
        return
    goodput = account(folder) or {"wall_s": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = {
        "status": result.status,
        "step": result.step,
        "seconds": goodput["wall_s"],
        "compile_s": result.compile_s if result.compile_s is not None else old.get("compile_s"),
        "first_step_s": result.first_step_s if result.first_step_s is not None else old.get("first_step_s"),
        "peak_bytes": max(peak, old.get("peak_bytes") or 0),
        "goodput": goodput,
    }
    write_json(path, status)
