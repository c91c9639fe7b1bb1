"""Write a data set once, so that training only reads: `python -m phi3_jax.data.export --out DIR --data SPEC`.

What SPEC may be stands in the table of phi3_jax.data.sources. Of a path, one line says what was read and left out, and why.

Text is tokenised in batches, packed into windows with segment ids, and written as ArrayRecord shards plus a manifest
(phi3_jax.data.manifest) into a hidden folder beside DIR that takes DIR's name only when whole. The same input gives the
same fingerprint; an unchanged request on a whole data set is skipped. Input is unchanged where names, sizes and times of
the files inside PATH are, and where times or PATH differ but every sha256 agrees. Only tfds: and mixture: import
TensorFlow.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: Ctrl-C during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("data"))

import contextlib
import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from phi3_jax import keys
from phi3_jax.commands import Command, Flag
from phi3_jax.data import gallery, sources, tokenizers
from phi3_jax.data import manifest as manifests
from phi3_jax.data.recipe import Part, Recipe
from phi3_jax.data.windows import encode, record_dtype, record_version
from phi3_jax.errors import UserError
from phi3_jax.records import ownership
from phi3_jax.records.files import as_json, read_state, sweep, temporary, write_json

WRITER_OPTIONS = "group_size:1,zstd:1"
SHARD_BYTES = 512 << 20


def export(out: str | Path, data: str, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Write the data set `data` (see phi3_jax.data.sources) to the folder `out`; returns its manifest.

    Args:
      overwrite: replace another data set at `out`.
      options: of the source.

    Raises:
      UserError: anything wrong with the input, another data set at `out`, or no room for the output.
    """
    out = Path(out)
    recipe = sources.recipe(data, **options)
    manifest = _existing(out, recipe, overwrite)
    if manifest is None:
        with ownership.own(out, "choose another --out", wait=True):
            # Whom this process waited for may have made it.
            manifest = _existing(out, recipe, overwrite) or write_dataset(out, recipe)
    for line in [*(f"warning: {warning}" for warning in recipe.warnings()), *recipe.inputs.lines()]:
        print(line, file=sys.stderr)
    return manifest


# ------------------------------------------------------------------------------------------------ writing


def write_dataset(out: str | Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a recipe to the folder `out` (replacing a data set there), whole or not at all; returns the manifest.

    Raises:
      UserError: ids outside the vocabulary, an empty source, or an output that cannot be written.
    """
    out = Path(out)
    partial = temporary(out)
    try:
        sweep(out)
        partial.mkdir(parents=True)
        record = record_dtype(recipe.window, recipe.vocab)
        size = shard_bytes // record.itemsize
        manifest = {"format": manifests.FORMAT, "name": out.name, "kind": recipe.kind, "vocab": recipe.vocab}
        manifest |= {"window": recipe.window, "dtype": record["tokens"].base.name}
        if (version := record_version(recipe.window)) > 1:
            manifest["records"] = version
        manifest |= {"domains": recipe.domains, "loss": recipe.loss, "tokenizer": recipe.tokenizer}
        manifest |= {"generator": recipe.generator}
        pictures = None
        if recipe.pictures:
            pictures = gallery.Writer(recipe.pictures, _Shards(partial, gallery.NAME, gallery.SHARD))
        manifest["sources"] = [_write_part(partial, p, p.name, recipe, max(1, size), pictures) for p in recipe.sources]
        evals = [_write_part(partial, p, f"eval-{p.name}", recipe, max(1, size), pictures) for p in recipe.evals]
        manifest["evals"] = [entry for entry in evals if entry]
        if pictures:
            manifest["pictures"] = pictures.finish(partial)
        manifest |= {"inputs": recipe.inputs.record(), "left_out": recipe.inputs.left_out()}
        tokenizers.keep(recipe.files, partial / tokenizers.FOLDER)
        manifest["fingerprint"] = manifests.fingerprint(manifest)
        write_json(partial / manifests.NAME, manifest)
        _put_in_place(partial, out)
        return manifest
    except OSError as error:
        raise _cannot_write(out, error.strerror or str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_part(
    folder: Path, part: Part, stem: str, recipe: Recipe, shard_windows: int, pictures: gallery.Writer | None = None
) -> dict[str, Any]:
    """A part's entry of the manifest; {} for an optional one that holds nothing."""
    entry: dict[str, Any] = {"name": part.name}
    entry |= {"weight": part.weight, "fresh": part.fresh} if part.meter is None else {"meter": part.meter}
    counts = {"windows": 0, "tokens": 0, "targets": 0, "max_targets_per_window": 0}
    content = hashlib.sha256()
    shards = _Shards(folder, stem, shard_windows)
    seen: list[tuple[int, int, int]] = []
    try:
        for windows in part.windows:
            if windows.seen and pictures:
                places, said = pictures.put(windows.seen, counts["windows"])
                seen += places
                content.update(said)
            per_window = (windows.domains > 0).sum(1)
            if windows.domains.max(initial=0) > len(recipe.domains):
                raise UserError(f"source {part.name!r} uses domain {windows.domains.max()} of {recipe.domains}")
            counts["windows"] += len(windows)
            counts["tokens"] += int((windows.segments > 0).sum())
            counts["targets"] += int(per_window.sum())
            counts["max_targets_per_window"] = max(counts["max_targets_per_window"], int(per_window.max(initial=0)))
            for record in encode(windows, recipe.vocab):
                content.update(record)
                shards.write(record)
    finally:
        shards.close()
    if not counts["windows"]:
        if part.optional:
            return {}
        raise UserError(f"source {part.name!r} is empty: nothing to export")
    entry |= counts | {"bytes": part.bytes() if part.bytes else None, "content": content.hexdigest()}
    entry["shards"] = shards.rename()
    if pictures:
        entry["seen"] = gallery.write_seen(folder, stem, seen, pictures.tiles(seen))
    if part.meter is not None:
        entry["extra"] = None
        if part.extra is not None:
            entry["extra"] = f"{stem}.npz"
            np.savez(folder / entry["extra"], **dict[str, Any](part.extra))
    return entry


class _Shards:
    """ArrayRecord files of at most `limit` records, named `-00000-of-00003` once their number is known."""

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self._folder, self._stem, self._limit = folder, stem, limit
        self._counts: list[int] = []
        self._writer: Any = None

    def write(self, record: bytes) -> None:
        if self._writer is None or self._counts[-1] == self._limit:
            self.close()
            self._counts.append(0)
            self._writer = self._try(array_record_module.ArrayRecordWriter, str(self._path()), WRITER_OPTIONS)
        self._try(self._writer.write, record)
        self._counts[-1] += 1

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self._try(writer.close)

    def rename(self) -> list[dict[str, Any]]:
        shards = []
        for number, records in enumerate(self._counts):
            file = f"{self._stem}-{number:05}-of-{len(self._counts):05}.arrayrecord"
            path = self._path(number).rename(self._folder / file)
            with path.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            shards.append({"file": file, "records": records, "size": path.stat().st_size, "sha256": sha256})
        return shards

    def _path(self, number: int | None = None) -> Path:
        return self._folder / f"{self._stem}-{len(self._counts) - 1 if number is None else number:05}"

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # array_record reports a full disk as a RuntimeError
            raise _cannot_write(self._folder, str(error).split(";")[0]) from error


def _cannot_write(path: Path, reason: str) -> UserError:
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    return UserError(f"cannot write {path}: {reason}; {free:,} bytes are free there, make room or use another --out")


def _put_in_place(partial: Path, out: Path) -> None:
    old = temporary(out)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _existing(out: Path, recipe: Recipe, overwrite: bool) -> dict[str, Any] | None:
    """The manifest at `out` where the request was met before; UserError where something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if "format" not in read_state(out / manifests.NAME) and _only_shards(out):
        return None  # its manifest is lost: the same data are written again
    if not (out / manifests.NAME).is_file():
        raise UserError(f"{out} exists and is not a data set; choose another --out")
    try:
        manifest = manifests.read(out)
    except UserError:
        manifest = None
    found = as_json(recipe.generator)
    old = manifest["generator"] if manifest else {}
    differs = {key for key in {*old, *found} if old.get(key) != found.get(key)}
    changed: list[str] = []
    if manifest and (not differs or (differs == {"data"} and recipe.inputs.accounts)):
        compared = recipe.inputs.compare(manifest["inputs"], renamed=bool(differs))
        if compared is None:
            compared = (["?"], []) if overwrite else _made_again(out, recipe, manifest)
        changed, inputs = compared
        if not changed:
            return _still_whole(out, recipe, manifest, inputs, overwrite)
    if overwrite:
        return None
    named = f": {', '.join(changed[:3])}{', ...' * (len(changed) > 3)}" if changed else ""
    reasons = [f"{key}: {old.get(key)} -> {found.get(key)}" for key in sorted(differs)]
    reasons += [f"its input files have changed{named}"] if changed or not differs else []
    reason = ", ".join(reasons)
    raise UserError(f"{out} holds another data set ({reason}); choose another folder, or remove this one")


def _only_shards(folder: Path) -> bool:
    """Whether a folder holds what an export writes and nothing of a user's."""
    names = (
        [path.name for path in folder.iterdir() if path.name not in (manifests.NAME, tokenizers.FOLDER)]
        if folder.is_dir()
        else []
    )
    shards = [name for name in names if re.fullmatch(r".+-\d{5}-of-\d{5}\.arrayrecord", name)]
    return bool(shards) and all(
        name in shards or re.fullmatch(r"eval-.+\.npz|.+-seen\.npz|pictures\.npz", name) for name in names
    )


def _made_again(out: Path, recipe: Recipe, manifest: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """As `Inputs.compare`, by a new export: for data sets that were written before inputs were hashed."""
    again = temporary(out)
    try:
        made = write_dataset(again, dataclasses.replace(recipe, generator=manifest["generator"]))
        return [] if made["fingerprint"] == manifest["fingerprint"] else ["their text"], made["inputs"]
    finally:
        shutil.rmtree(again, ignore_errors=True)


def _still_whole(
    out: Path, recipe: Recipe, manifest: dict[str, Any], inputs: list[Any], overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of a data set that meets the request, with today's times of its input; None to replace a damaged one."""
    from phi3_jax.data.loader import open_dataset  # brings grain, and so jax

    try:
        open_dataset(out)
    except UserError:
        if not overwrite:
            raise
        return None
    with contextlib.suppress(OSError):  # a data set that is read-only is one all the same
        tokenizers.keep(recipe.files, out / tokenizers.FOLDER)
        if inputs != manifest["inputs"]:
            write_json(out / manifests.NAME, manifest | {"inputs": inputs})
            manifest["inputs"] = inputs
    return manifest


# ------------------------------------------------------------------------------------------- command line


def with_options(command: Command) -> Command:
    """The command with --data, and the options of all sources; one that is not given has its source's default."""
    what = "; ".join(f"{source.name}: {source.what}" for source in sources.SOURCES.values())
    found = {**command.flags, "data": Flag(keys.local(what), "SPEC", needed=True)}
    for name, (key, owners) in sources.options().items():
        shown = dataclasses.replace(key.item or key, doc=f"{', '.join(owners)}: {key.doc}")
        found[name] = Flag(shown, repeated=key.item is not None, unset=key.item is None)
    return dataclasses.replace(command, flags=found)


def command(given: Mapping[str, Any]) -> None:
    """The command: `export`, and a line for each source."""
    options = {name: value for name, value in given.items() if value not in (None, ())}
    manifest = export(options.pop("out"), options.pop("data"), **options)
    for part in [*manifest["sources"], *manifest["evals"]]:
        print(f"{part['name']:12} {part['windows']:>10,} windows {part['targets']:>14,} targets")
    print(f"fingerprint {manifest['fingerprint']}")
