"""Claims of free replies: where sentences end, what a reference holds, and how often the comparison of words errs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_jax.data.corpora.facts import Universe, name_words, prose
from phi3_jax.data.retrieval import Index
from phi3_jax.errors import UserError
from phi3_jax.evaluation import longform

SHARED = Path(__file__).resolve().parents[3] / "shared" / "benchmarks_safety" / "factscore" / "human.jsonl"


def test_where_claims_end() -> None:
    text = 'Dr. A. Smith was born in St. Louis in 1949. He wrote "Fog." It sold 3.5 copies!\n- He died\n\n---\n'
    assert longform.claims(text) == [
        "Dr. A. Smith was born in St. Louis in 1949.", 'He wrote "Fog."', "It sold 3.5 copies!", "- He died",
    ]  # fmt: skip
    assert longform.claims(" \n. ") == []


@pytest.mark.parametrize(
    ("claim", "right"),
    [
        ("Mar Stone was born on March 3.", True),
        ("Mar Stone was born on April 3.", False),  # a name that is not there
        ("Mar Stone was born on March 4.", False),  # a number
        ("She collects old flutes.", True),
        ("She collects old clocks from Peru.", False),
        ("She sold 1,200 flutes.", False),
        ("Mar Stone is Mar Stone.", None),
    ],
)
def test_what_a_reference_holds(claim: str, right: bool | None) -> None:
    reference = "Mar Stone was born on March 3. Friends give her old flutes, which she has collected since 1990."
    assert longform.supported(claim, reference, "Who is Mar Stone?") is right


def test_shares_are_of_claims_with_replies_as_clusters() -> None:
    items = [{"supported": [True, True, None]}, {"supported": [False, False]}, {"supported": [None]}]
    found = longform.measures(items)
    assert (found["supported"].value, found["supported"].n) == (0.5, 4)
    assert found["claims"].value == pytest.approx(4 / 3) and found["silent"].value == pytest.approx(1 / 3)
    assert found["supported"].high - found["supported"].low > 0.8  # two replies, not four claims
    assert "supported" not in longform.measures(items[2:])


def test_its_errors_on_persons_whose_facts_are_known() -> None:
    """Sentences of another document of the same facts, and of another person's under the same name."""
    universe, (first, last) = Universe(120, 120, seed=5), name_words()
    names = [f"{first[a]} {last[b]}" for a, b in universe.names]
    asked = [document.text for document in prose(universe, range(120), 1)]
    known = [
        " ".join(texts) for texts in zip(*([d.text for d in prose(universe, range(120), 2 + i)] for i in range(10)))
    ]  # fmt: skip
    own, other = [], []
    for i, name in enumerate(names):
        j = (i + 1) % 120
        own += [longform.supported(claim, known[i], name) for claim in longform.claims(asked[i])]
        stolen = asked[j].replace(names[j], name)
        other += [longform.supported(claim, known[i], name) for claim in longform.claims(stolen)]
    assert len(own) == len(other) == 720
    assert sum(map(bool, own)) > 0.88 * 720 and sum(map(bool, other)) < 0.05 * 720


def test_a_search_finds_what_claims_are_held_against() -> None:
    """Among documents about 120 persons: a person's own are found, and nobody's carry what is true of somebody else."""
    universe, (first, last) = Universe(120, 120, seed=5), name_words()
    names = [f"{first[a]} {last[b]}" for a, b in universe.names]
    asked = [document.text for document in prose(universe, range(120), 1)]
    texts = [document.text for i in range(10) for document in prose(universe, range(120), 2 + i)]
    index = Index.build([(str(i), text) for i, text in enumerate(texts)], ":memory:")
    own, other = [], []
    for i, name in enumerate(names):
        j = (i + 1) % 120
        found = longform.judged(asked[i], index, f"Who is {name}?")
        own += found["supported"]
        assert all(int(document) % 120 == i for some in found["documents"] for document in some)
        other += longform.judged(asked[j].replace(names[j], name), index, f"Who is {name}?")["supported"]
    assert len(own) == len(other) == 720
    print(f"supported: own {sum(map(bool, own)) / 720:.3f}, others' {sum(map(bool, other)) / 720:.3f}")
    assert sum(map(bool, own)) > 0.5 * 720 > 0.1 * 720 > sum(map(bool, other))


@pytest.mark.shared("benchmarks_safety")
def test_the_sentences_that_people_annotated_are_claims() -> None:
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    there = found = own = other = facts = 0
    rows = [row for row in rows if row["annotations"]]
    for row, next_row in zip(rows, rows[1:] + rows[:1], strict=True):
        claims = {"".join(claim.split()) for claim in longform.claims(row["completion"])}
        whole = "".join(row["completion"].split())
        for sentence in row["annotations"]:
            text = "".join(sentence["sentence"].split())
            there += text in whole
            found += text in claims
            for fact, _ in sentence["facts"] or ():
                facts += 1
                own += bool(longform.supported(fact, sentence["sentence"], row["prompt"]))
                other += bool(longform.supported(fact, next_row["completion"], row["prompt"]))
    assert found / there > 0.98 and own / facts > 0.85 and other / facts < 0.03


def test_rows_with_a_fault_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / longform.FILE
    file.parent.mkdir()
    for text, said in (
        ('{"id": 1, "prompt": "Who?"}', "line 1: reference=None must be a text, or a list"),
        ('{"id": 1, "prompt": 3, "reference": "x"}', "prompt=3"),
        ("\n", "is empty"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            longform.read(tmp_path)
    (tmp_path / longform.DOCUMENTS).mkdir()
    file.write_text('{"id": 1, "prompt": "Who?"}')
    assert longform.read(tmp_path) == [{"id": "1", "prompt": "Who?", "reference": None}]
