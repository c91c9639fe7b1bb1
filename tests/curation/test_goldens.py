"""Decisions of datatrove 0.10.1, rule by rule: keep or drop, and why; the texts that C4 leaves; personal data; pairs."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.curation import personal, shingles
from phi3_jax.curation.rule import decide
from phi3_jax.curation.table import DOCUMENT

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDENS = SHARED / "goldens" / "curation"
pytestmark = [pytest.mark.shared("goldens/curation"), pytest.mark.shared("corpus")]
MISSES = 6  # of 673 rows a filter
FILTERS = {
    "gopher_repetition": ("gopher_repetition", {}),
    "gopher_quality": ("gopher_quality", {}),
    "c4": ("c4", {}),
    "c4_no_terminal": ("c4", {"terminal": False}),
    "fineweb": ("fineweb", {}),
}
CHAIN = ("gopher_repetition", "gopher_quality", "c4_no_terminal", "fineweb")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDENS / name).read_text().splitlines()]


@functools.cache
def decisions() -> list[tuple[str, dict[str, Any]]]:
    """(text, what datatrove decided) of the border documents and the rows of the corpus."""
    texts = {row["id"]: row["text"] for row in rows("border.jsonl")}
    decided = rows("border_decisions.jsonl") + rows("corpus_decisions.jsonl")
    wanted = {row["id"]: row for row in decided}
    for stem in {name.split(":")[0] for name in wanted} - {"border"}:
        with gzip.open(SHARED / "corpus" / f"{stem}.jsonl.gz", "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream):
                if row := wanted.get(f"{stem}:{number}"):
                    text = json.loads(line)["text"]
                    whole = hashlib.sha256(text.encode()).hexdigest() == row["sha256"]
                    texts[row["id"]] = text if whole else text[:12_000]
                    assert hashlib.sha256(texts[row["id"]].encode()).hexdigest() == row["sha256"]
    return [(texts[row["id"]], row) for row in decided]


def decided(name: str, text: str) -> tuple[str, str]:
    """(reason or "keep", the text that is left)."""
    rule, more = DOCUMENT[FILTERS[name][0]], {"words": "spacy", **FILTERS[name][1]}
    parameters = {p: key.default for p, key in rule.keys.items()} | more
    how = {p: value for p, value in rule.how(parameters).items() if p != "exempt"}
    values, left = rule.measure(text, {}, **how)
    return decide(rule.checks, values, parameters) or "keep", left


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_decides_as_datatrove_does(name: str) -> None:
    pytest.importorskip("spacy")
    found = [(decided(name, text), text, row) for text, row in decisions()]
    wrong = [(row["id"], reason, row[name]) for (reason, _), _, row in found if reason != row[name]]
    print(f"{name}: {len(wrong)} of {len(found)} differ", wrong[:5])
    assert len(found) >= 673 and len(wrong) <= MISSES
    assert sum(row[name] != "keep" for _, _, row in found) > 30, "these rows cannot tell the filters apart"
    if name.startswith("c4"):
        kept = [
            (left, row.get(f"{name}_text") or digest(text)) for (_, left), text, row in found if row[name] == "keep"
        ]
        assert sum(digest(mine) != theirs for mine, theirs in kept) <= MISSES


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_chain_decides_as_datatrove_does() -> None:
    pytest.importorskip("spacy")
    wrong = 0
    for text, row in decisions():
        out = "keep"
        for name in CHAIN:
            reason, text = decided(name, text)
            if reason != "keep":
                out = f"{name}:{reason}"
                break
        wrong += out != row["chain"]
    assert wrong <= MISSES


def test_personal_data_are_found_as_datatrove_finds_them() -> None:
    texts = {row["id"]: row["text"] for row in rows("border.jsonl")}
    found = rows("border_pii.jsonl")
    for row in found:
        how = {"mail": "<E>", "address": "<I>", "phones": False, "ipv6": False}
        (mails, addresses, _), text = personal.replace(texts[row["id"]], {}, **how)
        every = personal.replace(texts[row["id"]], {}, all_addresses=True, **how)[0][1]
        assert (text, mails, addresses, every) == (
            row["text_default"], len(row["emails"]), row["ips_default"], row["ips_all"],
        )  # fmt: skip
    assert sum(len(row["emails"]) for row in found) and sum(row["ips_all"] for row in found)


def test_similarities_of_pairs_are_those_that_were_computed_elsewhere() -> None:
    """`jaccard` there folds numbers, which changes the kind `numbers` alone."""
    import numpy as np

    texts = {row["id"]: row["text"] for row in rows("pairs_docs.jsonl")}
    sets = {name: np.unique(shingles.Hashes(shingles.plain(text)).of(5)) for name, text in texts.items()}
    for row in rows("pairs.jsonl"):
        mine = shingles.jaccard(sets[row["a"]], sets[row["b"]])
        assert mine == pytest.approx(row["jaccard_plain" if row["kind"] == "numbers" else "jaccard"], abs=0.02)
