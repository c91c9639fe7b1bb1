"""The manifest: its fingerprint follows everything that decides what a model sees, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.data import export, loader, manifest
from phi3_jax.data.recipe import Part, Recipe
from phi3_jax.data.windows import Windows, record_dtype
from phi3_jax.errors import UserError


def part(content: str, **more: Any) -> dict[str, Any]:
    return {"name": f"part {content}", "content": content, "windows": 9, "shards": [{"file": "x", "size": 3}]} | more


MANIFEST: dict[str, Any] = {
    "format": 1, "name": "data", "kind": "facts", "vocab": 320, "window": 24, "dtype": "uint16", "domains": ["a", "b"],
    "loss": "token_mean", "tokenizer": {"kind": "json", "fingerprint": "abc"}, "generator": {"version": 1, "seed": 0},
    "inputs": [["f", 1, 2]],
    "sources": [part("s0", weight=1, fresh=False), part("s1", weight=2, fresh=True)],
    "evals": [part("e0", meter="knowledge"), part("e1", meter="text")],
}  # fmt: skip
SCIENCE = [
    ("vocab", 321), ("window", 25), ("domains", ["b", "a"]), ("loss", "domain_mean"), ("tokenizer", None),
    ("tokenizer/fingerprint", "abd"), ("generator/version", 2), ("generator/seed", 1),
    *[(f"sources/1/{key}", value) for key, value in (("name", "n"), ("weight", 3), ("fresh", False), ("content", "c"))],
    *[(f"evals/1/{key}", value) for key, value in (("name", "n"), ("meter", "reasoning"), ("content", "c"))],
]  # fmt: skip
ELSEWHERE = [
    ("name", "other"), ("kind", "x"), ("dtype", "uint32"), ("inputs", []), ("tokenizer/kind", "x"), ("format", 2),
    ("sources/0/shards", []), ("sources/0/windows", 8), ("evals/0/shards", []),
]  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(MANIFEST)
    *way, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    node = tree
    for word in way:
        node = node[word]
    assert node[last] != value
    node[last] = value
    return tree


def test_each_key_that_decides_what_a_model_sees_changes_the_fingerprint() -> None:
    found = {path: manifest.fingerprint(changed(path, value)) for path, value in SCIENCE}
    for group in ("sources", "evals"):
        found[f"order of {group}"] = manifest.fingerprint(MANIFEST | {group: MANIFEST[group][::-1]})
        found[f"fewer {group}"] = manifest.fingerprint(MANIFEST | {group: MANIFEST[group][:1]})
    assert len({manifest.fingerprint(MANIFEST), *found.values()}) == len(found) + 1, "no two of these are one data set"


@pytest.mark.parametrize(("path", "value"), ELSEWHERE)
def test_where_and_how_it_is_stored_does_not(path: str, value: Any) -> None:
    assert manifest.fingerprint(changed(path, value)) == manifest.fingerprint(MANIFEST)


def test_the_fingerprint_of_a_known_manifest() -> None:
    """Pinned: every data set and study that exists is known by it."""
    assert manifest.fingerprint(MANIFEST) == "403e226021f999de36606b2bad2ce45fa8ced9884aa3e0ffaed6e19df80d3ea5"


@pytest.mark.parametrize("vocab", [65_535, 65_536, 65_537])
def test_a_data_set_at_the_border_of_two_bytes_says_what_its_records_hold(tmp_path: Path, vocab: int) -> None:
    ids = np.full((3, 4), vocab - 1, np.int32)
    ones = np.ones_like(ids)
    recipe = Recipe(
        kind="test", vocab=vocab, window=4, domains=["a"], loss="token_mean", tokenizer=None, generator={"version": 1},
        sources=[Part("a", [Windows(ids, ids, ones, ones)])], evals=[],
    )  # fmt: skip
    written = export.write_dataset(tmp_path / "data", recipe)
    assert written["dtype"] == ("uint16" if vocab == 65_535 else "uint32")
    assert np.dtype(written["dtype"]).itemsize == record_dtype(4, vocab)["tokens"].base.itemsize
    batch = loader.train_batches(loader.open_dataset(tmp_path / "data"), 3)[0]
    assert (batch["tokens"] == vocab - 1).all() and (batch["targets"] == vocab - 1).all()
    path = tmp_path / "data" / manifest.NAME  # as exports before wrote it at 65,536: still read
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "uint16"}))
    assert (loader.train_batches(loader.open_dataset(tmp_path / "data"), 3)[0]["tokens"] == vocab - 1).all()


def test_a_manifest_without_any_of_its_fields_is_refused_by_their_names(tmp_path: Path) -> None:
    ids = np.ones((3, 4), np.int32)
    parts = [Part("a", [Windows(ids, ids, ids, ids)])]
    held = [Part("h", [Windows(ids, ids, ids, ids)], meter="text")]
    recipe = Recipe("test", 9, 4, ["a"], "token_mean", None, {"version": 1}, parts, held)
    whole = export.write_dataset(tmp_path / "data", recipe)
    path = tmp_path / "data" / manifest.NAME
    top = ("name", "kind", "vocab", "window", "dtype", "domains", "loss", "sources", "evals", "generator", "tokenizer")
    inner = ("windows", "tokens", "targets", "max_targets_per_window", "bytes", "content", "shards")
    broken = {key: {k: v for k, v in whole.items() if k != key} for key in top}
    for group, name in (("sources", "a"), ("evals", "h")):
        for key in inner:
            broken[f"{name}.{key}"] = whole | {group: [{k: v for k, v in whole[group][0].items() if k != key}]}
    for words, tree in broken.items():
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=f"lacks {words};"):
            manifest.read(tmp_path / "data")
    path.write_text(json.dumps(whole))
    assert manifest.read(tmp_path / "data") == whole
