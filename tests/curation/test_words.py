"""Words of spaCy's, asked once a chunk: the same as of the whole text; sentences as its rule counts them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from phi3_jax.curation import words as wording
from phi3_jax.curation.words import English, english, lexicon
from phi3_jax.data import sources
from phi3_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EDGES = (
    "U.S.A. isn't can't e.g. Mr. x. X. cannot gonna Im etc. a.m. 10km, 3.5% (see) \"quoted,\" end.Start (well-known), .. "
    "... :-) C++ I'm."
)


def texts() -> list[str]:
    return [EDGES, *list(sources.texts(str(ROOT / "examples/pages")).documents)[::4]]


def test_chunks_have_the_words_of_the_whole_text() -> None:
    spacy = pytest.importorskip("spacy")
    whole, ours = spacy.blank("en"), English()
    for text in texts():
        words = [token.text for token in whole.tokenizer(text) if token.text.strip()]
        assert list(ours.words(text)) == words


def test_what_the_tokenizer_is_not_asked_it_would_have_said() -> None:
    pytest.importorskip("spacy")
    ours = English()
    chunks = {chunk for text in texts() for chunk in text.split()}
    draw = random.Random(0)
    stems = [*ours._special, "km", "St", "a", "USA", "x-y", "Fort-St", "well-known", "7", "2.5", "1,000", "12:30"]
    for _ in range(20_000):
        before, after = (
            "".join(draw.choices(marks, k=draw.choice((0, 0, 1, 2)))) for marks in ('("“‘[`<', ')"”]`>,;:!?.')
        )
        chunks.add(before + draw.choice(stems) + draw.choice(("", "", "'s", "’s", "'S")) + after)
    known = {chunk: words for chunk in chunks if (words := ours._plain(chunk)) is not None}
    assert len(known) > 0.25 * len(chunks) and "cannot" not in known and "Mr." not in known
    assert known["(well-known),"] == ["(", "well", "-", "known", ")", ","]
    asked = ours.asked(list(known))
    assert [chunk for chunk, words in zip(known, asked, strict=True) if known[chunk] != words] == []


def test_sentences_are_counted_as_spacy_does() -> None:
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    lines = [line.strip() for text in texts() for line in text.splitlines() if line.strip()]
    lines += ["One.  ! Two. ", 'He said "no." Then left.', "...", "a.\tb. c", "Wait... what?! Yes."]
    for line in lines[-300:]:
        theirs = len([s for s in nlp(line).sents if s.text.strip()])
        for enough in (1, 3, 99):
            assert english().sentences(line, enough) == min(theirs, enough), line


def test_words_between_white_space() -> None:
    found = lexicon("space").words("a  b,c\n. the be the")
    assert list(found) == ["a", "b,c", ".", "the", "be", "the"]
    assert found.letters() == 5 and found.marks().tolist() == [False, False, True, False, False, False]
    assert found.stop_words() == 2 and found.lengths.tolist() == [1, 3, 1, 3, 2, 3]


def test_a_full_lexicon_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a text are all there, those it shares with earlier ones too, and earlier texts keep theirs."""
    monkeypatch.setattr(wording, "_MOST", 5)
    ours = wording.Lexicon(lambda chunks: [[chunk] for chunk in chunks])
    first, second = "a b c d", "a b e f c"
    earlier = ours.words(first)
    assert list(ours.words(second)) == second.split() and list(earlier) == first.split()
    assert ours.names == ["a", "b", "e", "f", "c"]
    many = " ".join(map(str, range(3000)))
    assert list(ours.words(many)) == many.split() and ours.words(many).lengths[2999] == 4


def test_without_spacy_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(UserError, match=r"words=spacy needs spaCy: pip install -e '.\[curate\]'"):
        English()
