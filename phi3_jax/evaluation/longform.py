"""Long-form support: which claims of a free reply stand in a reference text, or in what a search finds for them.

A claim is a sentence. It is supported where the reference holds each of its numbers and names (words with a capital inside
a sentence) and most (seven tenths) of its other content words; words of the prompt count for nothing. That compares words:
it knows no paraphrase and no negation. Where a row has no reference, it is the passages that BM25 finds among the user's
documents for the prompt and the claim, of documents that hold the prompt's names. How often both err is measured, see
docs/safety.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import statistics
from phi3_jax.data.retrieval import Index
from phi3_jax.errors import UserError
from phi3_jax.foreign import Fields
from phi3_jax.records import files
from phi3_jax.statistics import Estimate

SHARE = 0.7  # of a claim's content words that are neither names nor numbers
_SHORT = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|no|vol|inc|ltd|co|corp|u\\.s|u\\.k|e\\.g|i\\.e|ph\\.d|[a-z]"
_NO_END = re.compile(rf"(?:^|[\s(.])(?:{_SHORT})\.$", re.IGNORECASE)
_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|\n+")
_WORD = re.compile(r"\d[\d,.]*\d|\d|[^\W\d_]+(?:['’][^\W\d_]+)?")
_STOP = re.compile(
    "a|about|after|all|also|an|and|any|are|as|at|be|been|before|being|both|but|by|can|could|did|do|does|"
    "during|each|for|from|had|has|have|he|her|hers|him|his|how|i|if|in|into|is|it|its|itself|just|may|me|"
    "more|most|my|no|nor|not|of|on|once|only|or|other|our|out|over|own|she|should|so|some|such|than|that|"
    "the|their|them|then|there|these|they|this|those|through|to|too|under|until|up|very|was|we|were|what|"
    "when|where|which|while|who|whom|why|will|with|would|you|your",
    re.IGNORECASE,
)

NAME = "longform"
FILE, DOCUMENTS = f"{NAME}/test.jsonl", f"{NAME}/documents"
PASSAGES = 3  # that a claim is held against
MANY = 20  # that are looked at for documents about what the prompt names
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    """The rows of DATA/longform/test.jsonl: id, prompt, reference (a text, or a list of them; None where a row has none and
    DATA/longform/documents is to be searched).

    Raises:
      UserError: a row without a column, or with a value of another kind; file, line and column are named.
    """
    path, found, searched = folder / FILE, [], (folder / DOCUMENTS).is_dir()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        fields = Fields(files.parse_json(line, where), where)
        row = {"id": str(fields.raw("id")), "prompt": fields.text("prompt"), "reference": None}
        found.append(row)
        texts = fields.raw("reference")
        if texts is None and searched:
            continue
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            what = f"must be a text, or a list of texts, that claims are held against; or make {folder / DOCUMENTS}"
            raise fields.refuse("reference", what)
        row["reference"] = "\n".join(texts)
    if not found:
        raise UserError(f"{path} is empty; write one JSON object a line")
    return found


def claims(text: str) -> list[str]:
    """The sentences of a reply, in order; a piece without a word is none."""
    found: list[str] = []
    begin = 0
    for match in _BREAK.finditer(text):
        piece = text[begin : match.start()]
        if "\n" not in match.group() and _NO_END.search(piece):
            continue
        found.append(text[begin : match.end()].strip())
        begin = match.end()
    found.append(text[begin:].strip())
    return [piece for piece in found if _WORD.search(piece)]


def supported(claim: str, reference: str, prompt: str = "") -> bool | None:
    """Whether the reference holds what a claim says beyond its prompt; None where it says nothing beyond it."""
    given, known = _stems(prompt), _stems(reference)
    found = list(_WORD.finditer(claim))
    hard: set[str] = set()
    soft: set[str] = set()
    for at, match in enumerate(found):
        word = match.group()
        if _STOP.fullmatch(word) or (stem := _stem(word)) in given:
            continue
        (hard if word[0].isdigit() or (at and word[0].isupper()) else soft).add(stem)
    if not hard and not soft:
        return None
    return hard <= known and len(soft & known) >= SHARE * len(soft)


def _is_name(text: str, at: int) -> bool:
    """Whether a word has a capital that no sentence begins with."""
    before = text[:at].rstrip(" \"'“(")
    return text[at].isupper() and bool(before) and before[-1] not in ".:!?\n"


def _stems(text: str) -> set[str]:
    return {_stem(word) for word in _WORD.findall(text)}


def _stem(word: str) -> str:
    """A word without case and its commonest endings; a number without its commas."""
    if word[0].isdigit():
        return word.replace(",", "").rstrip(".")
    word = re.sub(r"['’]s?$", "", word.lower())
    return re.sub(r"(?:ing|ed|es|s|e)$", "", word) if len(word) > 4 else word


def judged(reply: str, reference: str | Index, prompt: str) -> Row:
    """What an item says of a reply: its claims, and whether each is supported (None: it says nothing to check); where an
    index is searched, also the documents of the passages that each was held against, which know the prompt's names."""
    found = claims(reply)
    if isinstance(reference, str):
        return {"claims": found, "supported": [supported(claim, reference, prompt) for claim in found]}
    names = {_stem(match.group()) for match in _WORD.finditer(prompt) if _is_name(prompt, match.start())}
    about = {passage.source for passage in reference.search(prompt, MANY) if names <= _stems(passage.text)}
    passages = [
        [passage for passage in reference.search(f"{prompt} {claim}", PASSAGES) if passage.source in about]
        for claim in found
    ]
    texts = ["\n".join(passage.text for passage in some) for some in passages]
    return {
        "claims": found,
        "supported": [supported(claim, text, prompt) for claim, text in zip(found, texts, strict=True)],
        "documents": [[passage.source for passage in some] for some in passages],
    }


def measures(items: Sequence[Row]) -> dict[str, Estimate]:
    """By metric: `supported`, a share of the claims that can be checked (replies are the clusters); `claims`, how many of
    these a reply has; `silent`, the share of replies that have none.
    """
    marks = [[bool(mark) for mark in item["supported"] if mark is not None] for item in items]
    counts = np.array([len(some) for some in marks])
    found = {
        "claims": statistics.clustered_mean(counts, range(len(counts))),
        "silent": statistics.proportion(counts == 0),
    }
    if counts.sum():
        flat = np.concatenate([np.array(some, bool) for some in marks])
        found["supported"] = statistics.proportion(flat, np.repeat(np.arange(len(counts)), counts))
    return found
