"""The manifest of a data set folder: what is in it, checked before anything is read.

    {format, name, kind, vocab, window, dtype, records: version of their layout (absent for 1),
     domains: [name, ..], loss, tokenizer, generator, fingerprint,
     sources: [{name, weight, fresh, windows, tokens, targets, max_targets_per_window, bytes, content,
                shards: [{file, records, size, sha256}]}],
     evals: [the same, plus meter (a name in phi3_jax.data.meters.METERS) and extra (.npz of per-item arrays,
       or null)],
     pictures: {count, tile, patch, crops, sizes: .npz of width and height, shards: as above} where windows show any; each
       source and eval then has seen: {file: .npz of window, column, picture, sha256, tiles} (phi3_jax.data.gallery),
     inputs: what was read (phi3_jax.data.corpora.inputs), left_out: {reason: {count, files}} of a folder's other files}

A tokenizer that is read from files is kept in the folder `tokenizer`.

`tokens` counts positions that are not padding, `targets` positions with loss, `bytes` the UTF-8 bytes
behind the targets (null for synthetic data); `content` is the sha256 of the records, independent of
compression and sharding. A `fresh` source must never repeat. `fingerprint` covers the content and what it
means, not file names, and not when or where it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.records.files import read_json

FORMAT = 1
NAME = "manifest.json"
_TOP = (
    "name",
    "kind",
    "vocab",
    "window",
    "dtype",
    "domains",
    "loss",
    "sources",
    "evals",
    "generator",
    "tokenizer",
)
_SOURCE = ("name", "windows", "tokens", "targets", "max_targets_per_window", "bytes", "content", "shards")


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 of all that decides what a model sees: content, order and weights of sources, meaning of ids."""
    parts = {key: manifest[key] for key in ("vocab", "window", "domains", "loss", "generator")}
    parts["tokenizer"] = (manifest["tokenizer"] or {}).get("fingerprint")
    for group, keys in (
        ("sources", ("name", "weight", "fresh", "content")),
        ("evals", ("name", "meter", "content")),
    ):
        parts[group] = [[part[key] for key in keys] for part in manifest[group]]
    return digest(parts)


def read(folder: str | Path) -> dict[str, Any]:
    """The checked manifest of a data set folder.

    Raises:
      UserError: no folder or manifest, another format, missing fields, no windows, a manifest changed by
        hand.
    """
    path = Path(folder) / NAME
    again = "export it again with `python -m phi3_jax.data.export --out DIR --data SPEC`"
    if not path.is_file():
        raise UserError(f"no data set at {folder}: {NAME} is missing; {again}")
    try:
        manifest = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    found = manifest.get("format")
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}, this version reads format {FORMAT}; {again}")
    missing = [key for key in _TOP if key not in manifest]
    parts = [*manifest.get("sources", ()), *manifest.get("evals", ())]
    missing += [f"{part.get('name', '?')}.{key}" for part in parts for key in _SOURCE if key not in part]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; {again}")
    if not manifest["sources"]:
        raise UserError(f"{path} has no training source; {again}")
    for part in parts:
        if not part["windows"]:
            raise UserError(f"source {part['name']!r} of {folder} is empty; {again}")
    if fingerprint(manifest) != manifest.get("fingerprint"):
        raise UserError(f"{path} was changed after export: its fingerprint does not match its content; {again}")
    return manifest


def beside(run: str | Path, data: Mapping[str, Any]) -> Path:
    """The data set of a run: the one in its study, wherever that lies now, else the folder it was made in.

    Args:
      run: the run's folder.
      data: {folder, fingerprint} of the run's config.
    """
    made = Path(data["folder"])
    for place in (made.parts[-1:], made.parts[-2:]):  # STUDY/data, STUDY/data/ARM
        here = Path(run).absolute().parent.joinpath(*place)
        try:
            if read_json(here / NAME).get("fingerprint") == data.get("fingerprint"):
                return here
        except UserError:
            continue
    return made


def weighting(manifest: Mapping[str, Any]) -> str:
    """How the loss weighs unless a run says otherwise: "domain", or "target", alike for every target of a batch."""
    return "domain" if manifest.get("loss") == "domain_mean" else "target"


def find(part: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The eval called `part`, or UserError that lists the ones there are."""
    for entry in manifest["evals"]:
        if entry["name"] == part:
            return entry
    names = ", ".join(entry["name"] for entry in manifest["evals"]) or "none"
    raise UserError(f"no eval {part!r} in data set {manifest['name']!r}; it has {names}")
