"""Quality by example: it is judged on sources that it never saw, and what it says is a function of the labels."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from phi3_jax import verbs
from phi3_jax.commands import call
from phi3_jax.curation import classifier, pipeline
from phi3_jax.errors import UserError

pytest.importorskip("daft")
GOOD = "therefore because if then hence proof follows assume so implies".split()  # noqa: SIM905
BAD = "buy click now cheap free offer win best deal price".split()  # noqa: SIM905
SOURCES = (("logic", GOOD, 1), ("maths", GOOD, 1), ("shop", BAD, 0), ("mail", BAD, 0), ("odd", BAD, 1))


def rows(seed: int = 0) -> list[dict]:
    """Four sources that speak by their label, and one, `odd`, whose good texts are made of the others' bad words."""
    draw, found = random.Random(seed), []
    for source, words, label in SOURCES:
        own = [f"{source}{i}" for i in range(5)]
        for _ in range(12):
            text = " ".join(draw.choices(words, k=12) + draw.choices(own, k=12))
            found.append({"text": text, "label": label, "source": source})
    return found


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_it_is_judged_on_sources_that_it_never_saw(tmp_path: Path) -> None:
    labelled = classifier.read(str(write(tmp_path / "labels.jsonl", rows())), 4000)
    found = classifier.features(labelled.texts)
    table = {row["source"]: row for row in classifier.held_out(labelled, found)}
    four = classifier.read(str(write(tmp_path / "four.jsonl", [row for row in rows() if row["source"] != "odd"])), 4000)
    assert [row["right"] for row in classifier.held_out(four, classifier.features(four.texts))] == [1.0] * 4
    draw = np.random.default_rng(0).random(found.count) < 0.5
    p = classifier.fit(found, labelled.labels, draw)[1]
    odd = np.asarray(labelled.sources) == "odd"
    assert ((p >= 0.5) == labelled.labels)[odd & ~draw].mean() > 0.9, "control: a random split knows the source"
    assert table["odd"]["right"] < 0.1, "and left out it is not recognised"
    weights, again = classifier.fit(found, labelled.labels, np.ones(found.count, bool))
    np.testing.assert_allclose(classifier.predict(weights, found), again, atol=1e-5)


def test_documents_below_the_limit_go_and_the_page_has_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = write(tmp_path / "labels.jsonl", [row for row in rows() if row["source"] != "odd"])
    source = write(tmp_path / "in.jsonl", [row for row in rows(1) if row["source"] != "odd"])
    config = f"experiments/curation.py:quality={labels}"
    given = ["--config", config, "--input", str(source), "--workers", "1", "--config.order=exact,quality"]
    words = lambda out, *more: [*given, "--output", str(out), *more]  # noqa: E731
    assert call(verbs.CURATE, words(tmp_path / "a")) == 0
    kept = list(pipeline.documents_of(tmp_path / "a"))
    assert len(kept) == 24 and {row["source"] for row in kept} == {"logic", "maths"}
    page = (tmp_path / "a" / "report.html").read_text()
    assert "right when left out" in page and "Probability of the label 1" in page
    monkeypatch.setattr(classifier, "fit", lambda *_: pytest.fail("learned again"))
    assert (
        call(verbs.CURATE, words(tmp_path / "b", "--config.rules.quality.least=0", "--reuse", str(tmp_path / "a"))) == 0
    )
    assert len(list(pipeline.documents_of(tmp_path / "b"))) == 48


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([{"text": "a", "label": 2, "source": "s"}], "label=2: must be 0 or 1"),
        ([{"text": "a", "label": 1, "source": "s"}], "fewer than two sources of label 0"),
        ([{"label": 1, "source": "s"}], "text is missing"),
    ],
)
def test_labels_that_teach_nothing_are_one_line(tmp_path: Path, found: list[dict], line: str) -> None:
    with pytest.raises(UserError) as error:
        classifier.read(str(write(tmp_path / "l.jsonl", found)), 100)
    assert "\n" not in str(error.value) and line.split("=")[0].split(" is ")[0] in str(error.value)
