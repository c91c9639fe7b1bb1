"""How well the knowledge filter sees the facts of the controlled universe, whose facts and bits are known.

    python analysis/knowledge_filter.py            # writes analysis/results/knowledge/filter.csv and prints it

Each row is a corpus of prose about persons, between as many arithmetic texts, curated by the rule `knowledge` alone. It
reads the texts and nothing else. What is compared with the truth afterwards: bits (of the persons that the corpus states),
facts, and which documents were found to state any. Minutes on one core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from phi3_jax.curation import pipeline
from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.engine import Engine
from phi3_jax.data.corpora.facts import ATTRIBUTES, Universe, prose
from phi3_jax.data.sources.mixture import reasoning_texts
from phi3_jax.records import files, tables

OUT = Path(__file__).parent / "results" / "knowledge" / "filter.csv"
# Persons, bits a value, visits a person, frequencies.
CORPORA = (
    (300, 8, 3, "uniform"), (1000, 8, 1, "uniform"), (3000, 8, 2, "uniform"), (3000, 4, 2, "uniform"),
    (3000, 2, 2, "uniform"), (4500, 8, 2, "uniform"), (4500, 8, 2, "power_law"),
    (9000, 8, 2, "uniform"), (13500, 8, 2, "uniform"),
)  # fmt: skip
FIELDS = ("persons", "value_bits", "visits", "frequencies", "true_facts", "facts", "true_bits", "bits", "ratio",
          "fact_documents_found", "reasoning_documents_kept", "nested")  # fmt: skip


def row(persons: int, value_bits: int, visits: int, frequencies: str, seed: int = 0) -> dict[str, object]:
    """Curates one corpus at three budgets and compares it with the truth."""
    world = Universe(persons=persons, facts=persons, value_bits=value_bits, frequencies=frequencies, seed=seed)
    order = world.order(seed, 0, visits * persons)
    stated = len(np.unique(order))
    bits = stated * ATTRIBUTES * value_bits
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        texts = [("facts", document.text) for document in prose(world, order, seed)]
        texts += [("reasoning", text) for text in reasoning_texts(seed, visits * persons // 4, 5)]
        lines = (json.dumps({"text": text, "source": source}) for source, text in texts)
        files.write_text(there / "in.jsonl", "\n".join(lines))
        made, kept = [], []
        for number, share in enumerate((4, 2)):
            config = with_steps(base(), "knowledge", knowledge={"parameters": max(1, bits // share)})
            other = there / "0" if number else None
            target = there / str(number)
            made.append(
                pipeline.curate(config.to_dict(), [str(there / "in.jsonl")], target, Engine("native", 1), other)
            )
            kept.append({document["id"] for document in pipeline.documents_of(target)})
    found, sources = made[0]["notes"]["knowledge"], made[0]["sources"]
    values = (
        persons, value_bits, visits, frequencies, stated * ATTRIBUTES, found["facts"], bits, round(found["bits"]),
        round(found["bits"] / bits, 3), round(found["documents_with_facts"] / len(order), 4),
        round(sources["reasoning"]["kept"] / sources["reasoning"]["read"], 4), kept[0] < kept[1],
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    rows = []
    for corpus in CORPORA:
        rows.append(row(*corpus))
        print(*rows[-1].values(), file=sys.stderr)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    tables.write(OUT, FIELDS, rows)


if __name__ == "__main__":
    main()
