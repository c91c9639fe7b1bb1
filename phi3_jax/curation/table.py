"""Every rule by name: on one document, and on the corpus. A new one is a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from phi3_jax.curation import answers, basic, gopher, pages, personal
from phi3_jax.curation.rule import EXEMPT, Rule
from phi3_jax.keys import Key, local, number, share, whole, word

DOCUMENT: dict[str, Rule] = {
    "normalise": basic.NORMALISE,
    "language": basic.LANGUAGE,
    "gopher_repetition": gopher.REPETITION,
    "gopher_quality": gopher.QUALITY,
    "c4": pages.C4,
    "fineweb": pages.FINEWEB,
    "personal": personal.PERSONAL,
    "answers": answers.ANSWERS,
    "own": basic.USER,
}


@dataclasses.dataclass(frozen=True)
class CorpusRule:
    """A rule that looks at many documents.

    Attributes:
      work: "module:function", called with (work, step).
      reasons: why it drops a document.
      limits: parameters that decide over what is measured, and change no measurement.
    """

    doc: str
    work: str
    reasons: tuple[str, ...]
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    limits: tuple[str, ...] = ()


KEEP = Key(
    "which of several copies stays: sources from first to last; within one, the longest text",
    (), tuple, item=word("a source", None),
)  # fmt: skip
_BITS = number("least that stays", -100.0, -100.0, 100.0), number("most that stays", 100.0, -100.0, 100.0)
_READ = {"characters": whole("of a document that are read, from its beginning", 2000, 1)}
CORPUS: dict[str, CorpusRule] = {
    "exact": CorpusRule(
        "Texts that are equal but for white space and capitals",
        "phi3_jax.curation.near:exact",
        ("exact_duplicate",),
        {"keep": KEEP},
        ("keep",),
    ),
    "near": CorpusRule(
        "Texts whose word 5-grams agree, or that stand inside another one; candidates by MinHash and fingerprints, decided "
        "by exact similarity with a text that stays",
        "phi3_jax.curation.near:near",
        ("near_duplicate", "contained"),
        {
            "jaccard": share("least similarity at which a text is dropped", 0.8),
            "containment": share("least part of a text's word 3-grams in a longer one at which it is dropped", 0.98),
            "bands": whole("of the signature", 20, 1, 256),
            "rows": whole("hashes of a band", 7, 1, 64),
            "window": whole("words of a run that two texts share to be compared", 32, 4, 1024),
            "least_words": whole("texts with fewer words are left to `exact`", 20, 5),
            "keep": KEEP,
        },
        ("jaccard", "containment", "keep"),
    ),
    "against": CorpusRule(
        "Texts that are similar to, or stand inside, a text of another curated corpus; decided as `near` does",
        "phi3_jax.curation.against:against",
        ("near_duplicate", "contained"),
        {
            "corpus": local("a curated folder, whose texts stay as they are", ""),
            "jaccard": share("least similarity at which a text is dropped", 0.8),
            "containment": share("least part of a text's word 3-grams in a longer one at which it is dropped", 0.98),
            "bands": whole("of the signature", 20, 1, 256),
            "rows": whole("hashes of a band", 7, 1, 64),
            "window": whole("words of a run that two texts share to be compared", 32, 4, 1024),
            "least_words": whole("texts with fewer words are left alone", 5, 5),
        },
        ("jaccard", "containment"),
    ),
    "perplexity": CorpusRule(
        "Bits per byte under a model of ours, each document after the end of another; those too easy or too odd go",
        "phi3_jax.curation.scores:perplexity",
        ("too_easy", "too_odd"),
        {
            "model": local("a run, one of its checkpoints, or hf:FOLDER", ""),
            "least": _BITS[0],
            "most": _BITS[1],
            **_READ,
        },
        ("least", "most"),
    ),
    "learnability": CorpusRule(
        "Bits per byte under a small model minus those under a large one; texts that only the large one learns go",
        "phi3_jax.curation.scores:learnability",
        ("harder_for_the_large", "beyond_the_small"),
        {
            "small": local("a run of the size that the corpus is for", ""),
            "large": local("a run of a larger size, trained on the same text", ""),
            "least": _BITS[0],
            "most": _BITS[1],
            **_READ,
        },
        ("least", "most"),
    ),
    "lines": CorpusRule(
        "Lines that stand in several documents, but for white space and capitals, stay in one; documents that would lose "
        "too much go",
        "phi3_jax.curation.lines:lines",
        ("too_few_lines_left",),
        {
            "least_words": whole("lines with fewer words stay", 3, 1),
            "most_removed": share("most of its words that a document may lose and stay", 0.5),
            "keep": KEEP,
            "exempt": EXEMPT,
        },
        ("most_removed", "keep"),
    ),
    "decontaminate": CorpusRule(
        "Items of benchmarks: word 13-grams of question, answer and both; 8-grams of shorter ones",
        "phi3_jax.curation.decontaminate:decontaminate",
        ("contaminated",),
        {
            "benchmarks": local(
                "folder of NAME/test.jsonl, or a .jsonl file: rows with question and answer or target", ""
            ),
            "mode": word(
                "drop the document, cut what was found out of it, or tag it in the manifest",
                "drop",
                "drop",
                "cut",
                "tag",
            ),
            "common": whole("an n-gram in more documents than this is no evidence", 1000, 1),
            "seed": whole("of the items that are planted to check the search", 0),
        },
        ("mode", "common", "seed"),
    ),
    "knowledge": CorpusRule(
        "Facts beyond what a model of some size can hold: documents on a subject stay or go together, those with the "
        "fewest bits of facts per word first, until the distinct bits reach bits * parameters ** power",
        "phi3_jax.curation.knowledge:knowledge",
        ("beyond_budget",),
        {
            "parameters": whole("non-embedding parameters of the model that the corpus is for", 110_592, 1),
            "bits": number("bits of facts that a parameter is given", 1.0, 1e-9, 1e6),
            "power": number("of the parameters in the budget", 1.0, 1e-3, 4.0),
            "order": word("cheapest subjects first, or at random as a control", "cost", "cost", "random"),
            "seed": whole("of the order at random", 0),
        },
        ("parameters", "bits", "power", "order", "seed"),
    ),
}


def keys_of(rule: str) -> Mapping[str, Key]:
    """The parameters of a rule."""
    return DOCUMENT[rule].keys if rule in DOCUMENT else CORPUS[rule].keys


def reasons_of(rule: str) -> tuple[str, ...]:
    """Why a rule drops a document, by index."""
    return tuple(check.reason for check in DOCUMENT[rule].checks) if rule in DOCUMENT else CORPUS[rule].reasons
