"""Write a data set once, so that training only reads: `python -m phi3_jax.data.export --out DIR --data SPEC`.

SPEC says what is in it:
  facts                       the controlled corpora: facts to know and fresh reasoning items, closed vocabulary
  pydocs                      documentation and docstrings of this Python installation
  PATH                        a .txt or .jsonl[.gz|.zst] file, or a folder of them
  tfds:NAME[/CONFIG][:SPLIT]  a TensorFlow data set with a text feature (downloads where TFDS does)
  mixture:PHASE               phi3_phase1 or phi3_phase2, the report's phases as declared in phi3_jax.data.tasks;
                              --source ROLE=PATH fills a role with text of one's own

Text is tokenised in batches, packed into windows with segment ids, and written as ArrayRecord shards plus a manifest
(phi3_jax.data.manifest) into a hidden folder beside DIR that takes DIR's name only when whole. The same input gives the
same fingerprint; an unchanged request on a whole data set is skipped. Only tfds: and mixture: import TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from phi3_jax.data import manifest as manifests
from phi3_jax.data import tokenizers
from phi3_jax.data.corpora import facts as facts_corpus
from phi3_jax.data.corpora import reading as reading_corpus
from phi3_jax.data.corpora import reasoning, text
from phi3_jax.data.windows import Windows, encode, pack_documents, record_dtype
from phi3_jax.errors import UserError

VERSION = 1  # of the output for given parameters; raise it when the same request gives other windows
WRITER_OPTIONS = "group_size:1,zstd:1"
SHARD_BYTES = 512 << 20
WINDOW = 1024
TOKENS = 4_000_000
EVAL_ITEMS, EVAL_SEED = 4096, 0  # reasoning items of the eval, the same whatever the data's seed
SPARE_WINDOWS = 1024  # reasoning windows beyond the budget, since runs round their last batch up
_CHARACTERS = 1 << 20  # of text tokenised at once

Document = tuple[str, "np.ndarray | None"]  # text, and its token ids where they are known already


@dataclass
class Part:
    """A source or an eval to be written; `windows` is consumed once, and sources before evals."""

    name: str
    windows: Iterable[Windows]
    weight: float = 1
    fresh: bool = False
    bytes: Callable[[], int] | None = None  # asked after the windows
    meter: str | None = None  # of an eval
    extra: dict[str, np.ndarray] | None = None


@dataclass
class Recipe:
    """All that is written: parts, what their numbers mean, and the parameters that made them."""

    kind: str
    vocab: int
    window: int
    domains: list[str]
    loss: str
    tokenizer: dict[str, Any]
    generator: dict[str, Any]
    sources: list[Part]
    evals: list[Part]
    inputs: list[Any] = field(default_factory=list)  # what was read, to skip by; not in the fingerprint
    warnings: Callable[[], list[str]] = list


def export(
    out: str | Path,
    data: str,
    *,
    tokenizer: str = "bytes",
    window: int = WINDOW,
    held_out: float = text.HELD_OUT,
    text_field: str = "text",
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
    **controlled: Any,
) -> dict[str, Any]:
    """Write the data set `data` (see the module) to the folder `out`; returns its manifest.

    Args:
      tokenizer: "bytes" or a file or folder for phi3_jax.data.tokenizers.load; not for `facts`.
      window: T, tokens a window; `facts` has its own.
      held_out: share of documents, chosen by hash, that become the eval "text" and are never trained on.
      sources: role -> path for a mixture.
      overwrite: replace another data set at `out`.
      controlled: parameters of `facts`, see `facts_recipe`; also `seed`, of a mixture's synthetic text and filter.

    Raises:
      UserError: anything wrong with the input, another data set at `out`, or no room for the output.
    """
    out = Path(out)
    if data == "facts":
        recipe = facts_recipe(**controlled)
    else:
        options = dict(tokenizer=tokenizers.load(tokenizer), window=window, held_out=held_out, text_field=text_field)
        recipe = text_recipe(data, sources=sources or {}, **options, **controlled)
    if (existing := _existing(out, recipe, overwrite)) is not None:
        return existing
    manifest = write_dataset(out, recipe)
    for warning in recipe.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    return manifest


# ----------------------------------------------------------------------------------------------- recipes


def facts_recipe(
    *,
    tokens: int = TOKENS,
    facts: int = 4500,
    universe: int = 9000,
    frequency: str = "uniform",
    pool: int = 256,
    value_bits: int = facts_corpus.MAX_VALUE_BITS,
    share: float | None = None,
    text_share: float = 0.0,
    text_source: str = "pydocs",
    reading: float = 0.0,
    seed: int = 0,
) -> Recipe:
    """The controlled corpora: compact facts (repeat in fresh orders), reasoning items (never repeat), and real text.

    Args:
      tokens: largest budget of a run that never repeats a reasoning item.
      facts, universe, frequency, pool, value_bits: of corpora.facts.Universe.
      share: of the tokens that are facts; default facts / (2 universe), so that each fact is seen equally often
        whatever the filter keeps (1/4 of the tokens at 4,500 of 9,000 facts, 1/2 at 9,000).
      text_share: of the tokens that are the bytes of `text_source`, whose ids are the shared pool's; reasoning items
        take what facts, text and reading leave.
      reading: share of the tokens that teach to answer from a sentence in context; they count as reasoning in the loss.
        With it come three more evals of knowledge, with search (see corpora.reading); at 0 nothing changes.
      seed: of the universe and of the training items.
    """
    people = facts_corpus.Universe(universe, facts, pool, value_bits, frequency, seed)
    share = facts / (2 * universe) if share is None else share
    if not 0 <= min(share, text_share, reading) <= share + text_share + reading <= 1 or tokens < 1:
        raise UserError(
            f"share={share}, text_share={text_share}, reading={reading} and tokens={tokens} need 0 <= share <= 1, the "
            "shares at most 1 together, and tokens >= 1"
        )
    window = reasoning.Layout().window
    total = -(-tokens // window)
    ratio, prose, read = (Fraction(x).limit_denominator(1000) for x in (share, text_share, reading))
    unit = math.lcm(ratio.denominator, prose.denominator, read.denominator)
    rest = 1 - ratio - prose - read
    sources, evals = [], []
    if ratio > 0:
        # One epoch, which the loader shuffles anew each time; rare facts, though, are not in every epoch.
        epochs = 1 if frequency == "uniform" else max(1, round(total * facts_corpus.PER_WINDOW * share / facts))
        windows = facts_corpus.compact_windows(people, people.order(seed, 0, epochs * facts))
        sources.append(Part("knowledge", [windows], weight=int(ratio * unit)))
    if rest > 0:
        count = int(total * rest) + SPARE_WINDOWS
        parts = _chunks(count, lambda start, n: reasoning.generate(seed, start, n, pool=pool))
        sources.append(Part("reasoning", parts, weight=int(rest * unit), fresh=True))
    known, extra = facts_corpus.eval_windows(people)
    evals.append(Part("knowledge", [known], meter="knowledge", extra=extra))
    items = reasoning.generate(EVAL_SEED, 0, EVAL_ITEMS, stream="eval", pool=pool)
    evals.append(Part("reasoning", [items], meter="reasoning", extra=reasoning.extra()))
    generator = dict(version=VERSION, data="facts", tokens=tokens, facts=facts, universe=universe)
    generator |= dict(frequency=frequency, pool=pool, value_bits=value_bits, share=share, seed=seed)
    domains, inputs = ["knowledge", "reasoning"], []
    if read:
        count = min(max(1, round(total * read)), pool**2 - universe)  # the loader begins again where they are too few
        pairs = reading_corpus.train_pairs(people, seed, count)
        parts = _chunks(count, lambda at, n: reading_corpus.windows_of(people, *pairs[:, at : at + n]))
        sources.append(Part("reading", parts, weight=int(read * unit)))
        for name, passage in reading_corpus.passages(people).items():
            asked, extra = reading_corpus.eval_windows(people, passage)
            evals.append(Part(name, [asked], meter="knowledge", extra=extra))
        generator |= dict(reading=reading)
    if prose:
        if pool < 256:
            raise UserError(f"text_share={text_share} needs pool=256 or more, the ids of bytes; pool is {pool}")
        as_bytes = tokenizers.load("bytes")
        as_bytes.eos_id = people.vocab - 1  # spare in the closed vocabulary, where a byte's own end is <R>
        enough = _first_texts(text_source, max(400_000, int(1.2 * total * prose) * window))
        stream = _TextStream("text", enough, as_bytes, window, len(domains) + 1, text.HELD_OUT)
        sources.append(Part("text", stream.train(), weight=int(prose * unit), bytes=lambda: stream.bytes))
        evals.append(Part("text", stream.held(), bytes=lambda: stream.held_bytes, meter="text"))
        generator |= dict(text_share=text_share, text_source=text_source)
        domains, inputs = [*domains, "text"], _inputs(text_source)
    closed = {"kind": "closed", "fingerprint": manifests.digest(["closed", pool]), "vocab_size": people.vocab}
    recipe = Recipe("facts", people.vocab, window, domains, "domain_mean", closed, generator, sources, evals)
    return dataclasses.replace(recipe, inputs=inputs)


def _first_texts(source: str, characters: int) -> Iterator[Document]:
    """Documents until they hold so many characters."""
    for document in text.documents(source):
        yield document.text, None
        characters -= len(document.text)
        if characters < 0:
            return


def _chunks(count: int, make: Callable[[int, int], Windows], size: int = 1 << 14) -> Iterator[Windows]:
    for start in range(0, count, size):
        yield make(start, min(size, count - start))


def text_recipe(
    data: str,
    *,
    tokenizer: tokenizers.Tokenizer,
    window: int = WINDOW,
    held_out: float = text.HELD_OUT,
    text_field: str = "text",
    sources: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Recipe:
    """Real text: one source, or the sources of a mixture, each with its own domain and held-out documents."""
    if window < 2 or not 0 <= held_out < 1:
        raise UserError(f"window={window} and held_out={held_out} need window >= 2 and 0 <= held_out < 1")
    generator = {"version": VERSION, "data": data, "window": window, "held_out": held_out}
    generator["tokenizer"] = tokenizer.fingerprint
    inputs: list[Any] = []
    warnings: Callable[[], list[str]] = list
    if data.startswith(("tfds:", "mixture:")):
        from phi3_jax.data import tasks  # the only way to TensorFlow

        generator |= {"seed": seed}
        roles, inputs = tasks.sources(data, tokenizer, dict(sources or {}), text_field=text_field, seed=seed)
        inputs = [entry for path in inputs for entry in _inputs(path)]
        named = [(role.name, role.rate, tasks.documents(role.task)) for role in roles]
    else:
        if sources:
            raise UserError(f"--source {'/'.join(sources)} belongs to a mixture, not to --data {data}")
        report = text.ReadReport()
        documents = text.documents(data, text_field=text_field, report=report)
        named = [("text", 1.0, ((document.text, None) for document in documents))]
        inputs = _inputs(data)
        if data != "pydocs":
            generator["data"] = Path(data).resolve().name
        warnings = lambda: [w] if (w := report.warning()) else []  # noqa: E731
    parts, evals = [], []
    for number, (name, rate, documents) in enumerate(named, 1):
        stream = _TextStream(name, documents, tokenizer, window, number, held_out)
        parts.append(Part(name, stream.train(), weight=rate, bytes=lambda s=stream: s.bytes))
        if held_out:
            held = Part(name, stream.held(), bytes=lambda s=stream: s.held_bytes, meter="text")
            evals.append(held)
    domains = [name for name, _, _ in named]
    return Recipe(
        kind="text" if len(parts) == 1 else "mixture",
        vocab=tokenizer.vocab_size,
        window=window,
        domains=domains,
        loss="token_mean",
        tokenizer=tokenizer.describe(),
        generator=generator,
        sources=parts,
        evals=evals,
        inputs=inputs,
        warnings=warnings,
    )


class _TextStream:
    """One pass over documents: training windows come out, held-out documents are kept for `held`."""

    def __init__(
        self,
        name: str,
        documents: Iterable[Document],
        tokenizer: tokenizers.Tokenizer,
        window: int,
        domain: int,
        held_out: float,
    ) -> None:
        self.name, self._documents, self._tokenizer = name, documents, tokenizer
        self._window, self._domain, self._held_out = window, domain, held_out
        self.bytes = self.held_bytes = 0
        self._held: list[np.ndarray] = []

    def train(self) -> Iterator[Windows]:
        yield from self._pack(self._training_ids())
        if not self.bytes:
            raise UserError(
                f"source {self.name!r}: no document is left for training at held-out share {self._held_out}; "
                "lower --held-out or give more documents"
            )

    def held(self) -> Iterator[Windows]:
        if not self._held:
            raise UserError(
                f"source {self.name!r}: no document fell into the held-out share {self._held_out}; raise "
                "--held-out, or set it to 0 for no evaluation"
            )
        yield from self._pack(self._held)

    def _pack(self, ids: Iterable[np.ndarray]) -> Iterator[Windows]:
        return pack_documents(ids, self._window, self._tokenizer.eos_id, domain=self._domain)

    def _training_ids(self) -> Iterator[np.ndarray]:
        for texts, ids in self._tokenised():
            for document, tokens in zip(texts, ids, strict=True):
                size, tokens = len(document.encode("utf-8", "replace")), np.asarray(tokens, np.int32)
                if text.is_held_out(document, self._held_out):
                    self._held.append(tokens)
                    self.held_bytes += size
                else:
                    self.bytes += size
                    yield tokens

    def _tokenised(self) -> Iterator[tuple[list[str], list[Any]]]:
        texts: list[str] = []
        size = 0
        for document, ids in self._documents:
            if ids is not None:
                yield [document], [ids]
                continue
            texts.append(document)
            size += len(document)
            if size >= _CHARACTERS:
                yield texts, self._tokenizer.encode_batch(texts)
                texts, size = [], 0
        if texts:
            yield texts, self._tokenizer.encode_batch(texts)


def _inputs(data: str) -> list[Any]:
    """What tells cheaply whether the input is that of an earlier export: names, sizes and times of the files."""
    if data == "pydocs":
        return ["pydocs", platform.python_version()]
    path = Path(data)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [f for f in files if f.is_file() and f.name.endswith(text.SUFFIXES)]
    return [[f.name, (stat := f.stat()).st_size, stat.st_mtime_ns] for f in files]


# ------------------------------------------------------------------------------------------------ writing


def write_dataset(out: str | Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a recipe to the folder `out` (replacing a data set there), whole or not at all; returns the manifest.

    Raises:
      UserError: ids outside the vocabulary, an empty source, or an output that cannot be written.
    """
    out, replaces = Path(out), Path(out).exists()
    partial = out.parent / f".{out.name}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        _remove_abandoned(out)
        partial.mkdir(parents=True)
        size = shard_bytes // record_dtype(recipe.window, recipe.vocab).itemsize
        manifest = {"format": manifests.FORMAT, "name": out.name, "kind": recipe.kind, "vocab": recipe.vocab}
        manifest |= {"window": recipe.window, "dtype": "uint16" if recipe.vocab <= 1 << 16 else "uint32"}
        manifest |= {"domains": recipe.domains, "loss": recipe.loss, "tokenizer": recipe.tokenizer}
        manifest |= {"generator": recipe.generator, "inputs": recipe.inputs}
        manifest["sources"] = [_write_part(partial, p, p.name, recipe, max(1, size)) for p in recipe.sources]
        manifest["evals"] = [_write_part(partial, p, f"eval-{p.name}", recipe, max(1, size)) for p in recipe.evals]
        manifest["fingerprint"] = manifests.fingerprint(manifest)
        (partial / manifests.NAME).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        if replaces or not _same_manifest(partial, out):  # else another process has put the same data there meanwhile
            _put_in_place(partial, out)
        return manifest
    except OSError as error:
        raise _cannot_write(out, error.strerror or str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_part(folder: Path, part: Part, stem: str, recipe: Recipe, shard_windows: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": part.name}
    entry |= {"weight": part.weight, "fresh": part.fresh} if part.meter is None else {"meter": part.meter}
    counts = {"windows": 0, "tokens": 0, "targets": 0, "max_targets_per_window": 0}
    content = hashlib.sha256()
    shards = _Shards(folder, stem, shard_windows)
    try:
        for windows in part.windows:
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
        raise UserError(f"source {part.name!r} is empty: nothing to export")
    entry |= counts | {"bytes": part.bytes() if part.bytes else None, "content": content.hexdigest()}
    entry["shards"] = shards.rename()
    if part.meter is not None:
        entry["extra"] = None
        if part.extra is not None:
            entry["extra"] = f"{stem}.npz"
            np.savez(folder / entry["extra"], **part.extra)
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
    old = partial.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists() and not out.exists():
            old.rename(out)
        if not _same_manifest(partial, out):
            raise
    shutil.rmtree(old, ignore_errors=True)


def _same_manifest(a: Path, b: Path) -> bool:
    try:
        return (a / manifests.NAME).read_bytes() == (b / manifests.NAME).read_bytes()
    except OSError:
        return False


def _remove_abandoned(out: Path) -> None:
    """Remove what killed exports of this machine left beside `out`."""
    host = socket.gethostname()
    for folder in out.parent.glob(f".{out.name}.{host}-*.partial"):
        pid = folder.name.removesuffix(".partial").rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _existing(out: Path, recipe: Recipe, overwrite: bool) -> dict[str, Any] | None:
    """The manifest at `out` where the request was met before; UserError where something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / manifests.NAME).is_file():
        raise UserError(f"{out} exists and is not a data set; choose another --out")
    try:
        manifest = manifests.read(out)
    except UserError:
        manifest = None
    wanted = json.loads(json.dumps([recipe.generator, recipe.inputs]))
    same = manifest is not None and [manifest["generator"], manifest["inputs"]] == wanted
    if same:
        from phi3_jax.data.loader import open_dataset  # brings grain, and so jax

        try:
            return open_dataset(out).manifest
        except UserError:
            if not overwrite:
                raise
    if overwrite:
        return None
    found = manifest["generator"] if manifest else {}
    differs = [f"{k}: {found.get(k)} -> {v}" for k, v in recipe.generator.items() if found.get(k) != v]
    reason = ", ".join(differs) or "its input files have changed"
    raise UserError(f"{out} holds another data set ({reason}); choose another folder, or remove this one")


# ------------------------------------------------------------------------------------------- command line


def _count(value: str) -> int:
    scale = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}.get(value[-1:], 1)
    return int(float(value[:-1]) * scale) if scale > 1 else int(value)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m phi3_jax.data.export",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--data", required=True, help="facts | pydocs | PATH | tfds:NAME | mixture:PHASE")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set at --out")
    for name, default, what in (
        ("--tokenizer", "bytes", "bytes, or a tokenizer file or folder"),
        ("--text-field", "text", "field of JSON lines that holds the text"),
    ):
        parser.add_argument(name, default=default, help=f"{what} (default {default})")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"tokens a window (default {WINDOW})")
    parser.add_argument("--held-out", type=float, default=text.HELD_OUT, help="share of documents kept for evaluation")
    parser.add_argument("--source", action="append", default=[], metavar="ROLE=PATH", help="a mixture's source")
    for name, kind, what in (
        ("--tokens", _count, "facts: largest budget without a repeated reasoning item, e.g. 4M"),
        ("--facts", int, "facts: facts in the corpus"),
        ("--universe", int, "facts: facts there are"),
        ("--frequency", str, "facts: " + " or ".join(facts_corpus.FREQUENCIES)),
        ("--pool", int, "facts: ids shared by names and values"),
        ("--value-bits", int, "facts: bits a value holds"),
        ("--share", float, "facts: share of the tokens that are facts"),
        ("--text-share", float, "facts: share of the tokens that are text"),
        ("--text-source", str, "facts: the text, as --data names it"),
        ("--reading", float, "facts: share of the tokens that teach to read from context"),
        ("--seed", int, "of synthetic data"),
    ):
        parser.add_argument(name, type=kind, default=argparse.SUPPRESS, help=what)
    options = vars(parser.parse_args(arguments))
    try:
        pairs = [pair.partition("=") for pair in options.pop("source")]
        if bad := [role + sign for role, sign, path in pairs if not path]:
            raise UserError(f"--source {bad[0]} is not of the form ROLE=PATH")
        if options["data"] != "facts" and (unused := {*options} & _FACTS_ONLY):
            raise UserError(f"--{'/--'.join(sorted(unused))} belong to --data facts, not to {options['data']}")
        manifest = export(options.pop("out"), options.pop("data"), sources={r: p for r, _, p in pairs}, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part in [*manifest["sources"], *manifest["evals"]]:
        print(f"{part['name']:12} {part['windows']:>10,} windows {part['targets']:>14,} targets")
    print(f"fingerprint {manifest['fingerprint']}")
    return 0


_FACTS_ONLY = {
    "tokens", "facts", "universe", "frequency", "pool", "value_bits", "share", "text_share", "text_source", "reading",
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
