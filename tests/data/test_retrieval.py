"""Search finds what bm25s finds, takes any text as a query, is built whole or not at all, and its gains add up."""

from __future__ import annotations

import random
import sqlite3

import numpy as np
import pytest

from phi3_jax.data.retrieval import _TABLES, Index, Passage, cut
from phi3_jax.errors import UserError
from phi3_jax.evaluation.retrieval import Comparison, Question, augmented, compare, contains_answer

MEMORY = ":memory:"


def zipf_corpus(passages: int, seed: int = 0, vocab: int = 3000) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of 20 to 80 words, the words, and their flattened Zipf law (none in half of the passages)."""
    rng = np.random.default_rng(seed)
    words = np.array([f"w{i}" for i in range(vocab)])
    law = 1 / np.arange(30, vocab + 30)
    law /= law.sum()
    lengths = rng.integers(20, 81, passages)
    drawn = np.split(words[rng.choice(vocab, lengths.sum(), p=law)], np.cumsum(lengths)[:-1])
    return [" ".join(text) for text in drawn], words, law


def pairs(texts):
    return [(f"d{i}", text) for i, text in enumerate(texts)]


# ----------------------------------------------------------------------------------------------- building


def test_a_folder_of_several_kinds_is_indexed(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_text("The aardvark digs.")
    (folder / "deep" / "b.MD").write_text("# Badger\n\nThe badger sleeps.")
    (folder / "deep" / "er" / "c.rst").write_bytes("\ufeffThe caf\u00e9 opens.".encode())
    (folder / "d.jsonl").write_text(
        '{"text": "The dingo howls.\u2028Twice."}\n\n{"id": 2, "text": "The egret \\ud800 flies."}\n',
        encoding="utf-8",
    )
    (folder / "empty.txt").write_text("")
    (folder / "junk.txt").write_bytes(bytes(range(256)) * 20 + b" needle " + b"\xff\xfe\x00" * 50)
    (folder / "ignored.py").write_text("The ferret hides.")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "folder.txt").mkdir()
    index = Index.build(folder, tmp_path / "index")
    where = {word: [p.source for p in index.search(word)] for word in ("aardvark", "badger", "cafe", "dingo", "twice")}
    assert where == {
        "aardvark": ["a.txt"],
        "badger": ["deep/b.MD"],
        "cafe": ["deep/er/c.rst"],
        "dingo": ["d.jsonl:1"],
        "twice": ["d.jsonl:1"],
    }
    assert [p.source for p in index.search("egret")] == ["d.jsonl:3"]
    assert [p.source for p in index.search("needle")] == ["junk.txt"]
    assert not index.search("ferret") and not index.search("junk")  # neither other kinds nor names are text
    assert index.search("cafe")[0].text == "The caf\u00e9 opens."  # the byte order mark is no text
    names = [name for name, _, _ in index.files]
    assert names == ["a.txt", "d.jsonl", "deep/b.MD", "deep/er/c.rst", "empty.txt", "junk.txt"]
    assert [(size, sha[:8]) for _, size, sha in index.files if size < 19] == [(18, "fe200f06"), (0, "e3b0c442")]


def test_a_name_that_is_no_utf8_is_replaced(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    try:
        with open(bytes(folder) + b"/caf\xe9.txt", "w") as file:
            file.write("The aardvark digs.")
    except OSError:
        pytest.skip("this file system takes no such name")
    index = Index.build(folder, tmp_path / "index")
    assert [p.source for p in index.search("aardvark")] == ["caf\ufffd.txt"]


def test_an_index_reopens_the_same_and_read_only(tmp_path):
    texts, words, _ = zipf_corpus(200)
    built = Index.build(pairs(texts), tmp_path / "an index?#%.db")
    opened = Index.open(tmp_path / "an index?#%.db")
    query = " ".join(words[100:110])
    assert built.search(query, 20) == opened.search(query, 20) == Index.build(pairs(texts), MEMORY).search(query, 20)
    assert len(opened.search(query, 20)) == 20 and len(opened) == 200
    assert opened.files == built.files and len(opened.files) == 200
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        opened._db.execute("DELETE FROM files")


def test_the_fingerprint_follows_every_byte_and_name(tmp_path):
    def of(documents):
        return Index.build(documents, MEMORY).fingerprint

    base = of([("a", "one two"), ("b", "three")])
    assert base == of([("a", "one two"), ("b", "three")])
    assert len({base, of([("a", "one two"), ("b", "thref")]), of([("a", "one two"), ("c", "three")])}) == 3


def test_a_failure_in_the_middle_leaves_nothing_and_the_old_index(tmp_path):
    def broken():
        yield from pairs(zipf_corpus(3000)[0])
        raise RuntimeError("the disk is on fire")

    path = tmp_path / "index"
    with pytest.raises(RuntimeError, match="on fire"):
        Index.build(broken(), path)
    assert list(tmp_path.iterdir()) == []
    Index.build([("a", "The aardvark digs.")], path).close()
    assert list(tmp_path.iterdir()) == [path]  # positive control, and no leavings
    with pytest.raises(RuntimeError, match="on fire"):
        Index.build(broken(), path)
    assert list(tmp_path.iterdir()) == [path]
    assert len(Index.open(path).search("aardvark")) == 1
    assert len(Index.build([("b", "The badger sleeps.")], path).search("aardvark")) == 0  # replaced when whole


def test_other_files_are_never_replaced_or_opened(tmp_path):
    (tmp_path / "notes").write_text("do not lose me, please; " * 100)
    other = sqlite3.connect(tmp_path / "other")
    other.executescript(_TABLES + "PRAGMA application_id = 7;")  # all but the mark
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    Index.build(pairs(zipf_corpus(200)[0]), tmp_path / "whole").close()
    (tmp_path / "short").write_bytes((tmp_path / "whole").read_bytes()[:5000])
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for name in ("notes", "other", "empty", "folder", "short"):
        with pytest.raises(
            UserError, match=rf"{name}' is no search index \(.*\); remove it or name another file"
        ) as error:
            Index.open(tmp_path / name)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match="is no search index"):
            Index.build([("a", "The aardvark digs.")], tmp_path / name)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_bad_sources_and_paths_are_named(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for arguments, message in [
        ((tmp_path / "absent", MEMORY), "no folder .*absent' to index"),
        ((folder, MEMORY), r"holds 0 passages; give text, in files \*\.txt, \*\.md, \*\.rst, \*\.jsonl"),
        (([], MEMORY), "holds 0 passages"),
        (([("a", " \n ")], MEMORY), "holds 0 passages"),
        (([("a", "b")], MEMORY, 0), "passage_words=0 must be 1 or more"),
        (([("a", "b")], tmp_path / "absent" / "index"), "absent/index' is not built: .*No such file"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            Index.build(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no search index .*absent'; make it with Index.build"):
        Index.open(tmp_path / "absent")
    with pytest.raises(UserError, match="k=0 passages"):
        Index.build([("a", "b")], MEMORY).search("b", 0)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("The aardvark digs.")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read anything
    with pytest.raises(UserError, match=r"is not built: .*Permission denied: '.*secret\.txt'"):
        Index.build(tmp_path, MEMORY)


@pytest.mark.parametrize(
    "line", ['{"text": "cut sh', '["text"]', '{"body": "x"}', '{"text": null}', '{"text": ["x"]}', "7"]
)
def test_a_bad_line_of_json_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"^a\.jsonl:2 is no JSON object"):
        Index.build(tmp_path, tmp_path / "index")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("words", [1, 2, 7, 50, 10_000])
def test_passages_hold_every_word_once_and_no_more_than_allowed(words):
    rng = random.Random(0)
    text = "".join(rng.choice(["lorem", "ipsum.", "Dolor?", " ", "\n", "\n\n", "caf\u00e9"]) + " " for _ in range(3000))
    passages = list(cut(text, words))
    assert " ".join(passages).split() == text.split()
    lengths = [len(passage.split()) for passage in passages]
    assert max(lengths) <= words and min(lengths[:-1], default=words) > words // 2


def test_passages_end_with_sentences_and_paragraphs():
    sentence = "One two three four five six seven eight nine ten."
    passages = list(cut(" ".join([sentence] * 12), 45))
    assert passages == [" ".join([sentence] * 4)] * 3
    title = "\n\n".join(["one two three four five six seven eight nine ten"] * 4)
    assert [len(p.split()) for p in cut(title, 15)] == [10] * 4
    plain = title.replace("\n\n", " ")
    assert [len(p.split()) for p in cut(plain, 15)] == [15, 15, 10]  # nowhere to end: cut at the limit
    assert [len(p) for p in cut("x" * 1000, 2)] == [400, 400, 200]  # no passage without bound


# ----------------------------------------------------------------------------------------------- ranking


def oracle(texts, index, method):
    bm25s = pytest.importorskip("bm25s")
    retriever = bm25s.BM25(method=method, k1=1.2, b=0.75, dtype="float64")
    retriever.index([index.tokens(text) for text in texts], show_progress=False)
    return retriever


@pytest.mark.parametrize("method, first, tolerance", [("robertson", 0, 1e-6), ("lucene", 2000, 2e-3)])
def test_ranking_is_that_of_bm25s(method, first, tolerance):
    """robertson is FTS5's formula; lucene's idf, ln(1 + x), is nearly ln(x) where tokens are rare (from `first` on)."""
    texts, words, law = zipf_corpus(2000)
    index, rng = Index.build(pairs(texts), MEMORY, 1000), np.random.default_rng(1)
    reference = oracle(texts, index, method)
    sets = [set(text.split()) for text in texts]
    assert len(index) == len(texts)
    assert max(sum(word in has for has in sets) for word in words[:5]) < len(texts) / 2
    apart = 0.0
    for _ in range(100):
        query = words[first:][
            rng.choice(len(words) - first, 6, replace=False, p=law[first:] / law[first:].sum())
        ].tolist()
        found = index.search(" ".join(query), 10)
        scores = 2.2 * reference.get_scores(query)  # bm25s leaves the factor k1 + 1 out
        mine = scores[[int(passage.source[1:]) for passage in found]]
        best = np.sort(scores)[::-1][:10]
        assert len(set(found)) == 10 and best[-1] > 0
        np.testing.assert_allclose([passage.score for passage in found], mine, rtol=tolerance)
        np.testing.assert_allclose(mine, best, rtol=tolerance)  # the same ranking up to ties
        apart = max(apart, np.abs([passage.score for passage in found] / mine - 1).max())
    assert (apart > 1e-5) == (method == "lucene")  # the two formulas are told apart


def test_a_token_of_most_passages_counts_for_almost_nothing():
    texts = ["common rare"] + ["common"] * 9
    index = Index.build(pairs(texts), MEMORY)
    scores = [passage.score for passage in index.search("common", 10)]
    assert len(scores) == 10 and all(0 < score < 3e-6 for score in scores)
    assert index.search("common rare")[0].score == pytest.approx(index.search("rare")[0].score, rel=1e-3)
    assert index.search("rare")[0].score > 0.5
    assert oracle(texts, index, "lucene").get_scores(["common"]).min() > 0.01  # where Lucene's idf stays above 0


def test_one_passage_still_scores_above_zero():
    [passage] = Index.build([("a", "The aardvark digs.")], MEMORY).search("aardvark")
    assert passage.score > 0 and (passage.text, passage.source) == ("The aardvark digs.", "a")


def test_ties_come_in_the_order_of_building():
    texts = ["alpha beta", "gamma delta"] * 50 + ["x y"] * 200
    index = Index.build(pairs(texts), MEMORY)
    assert [p.source for p in index.search("gamma", 50)] == [f"d{i}" for i in range(1, 100, 2)]
    assert [p.source for p in index.search("gamma", 7)] == [f"d{i}" for i in range(1, 15, 2)]


def test_repeated_tokens_count_once_and_case_and_accents_not():
    index = Index.build(pairs(["Caf\u00e9 noir", "th\u00e9 vert", *["autre"] * 5]), MEMORY)
    one = index.search("cafe")
    assert one and one == index.search("CAFE cafe\u0301 Caf\u00e9 caf\u00e9")
    assert index.tokens("L'\u00c9t\u00e9, well-known C++ 3.5") == ["l", "ete", "well", "known", "c", "3", "5"]


HOSTILE = [
    '"', '""', '"unclosed', "a AND", "AND", "OR OR OR", "NOT aardvark", "NEAR(aardvark digs, 1)", "text:aardvark",
    "source : a", "^aardvark", "aard*", "(", ")(", "-aardvark", "+", "{text source}: x", "'; DROP TABLE passages; --",
    "\x00", "aard\x00vark", "\ud800 half", "?", "%s {x} \\", "\u4e2d\u6587", "\U0001f600", "a" * 100_000,
]  # fmt: skip


TEXTS = {"a": "the aardvark digs near text", "b": "or not and", "c": "x y"}


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_is_a_query(query):
    index = Index.build(TEXTS.items(), MEMORY)
    wanted = set(index.tokens(query))
    found = {passage.source for passage in index.search(query)}
    assert found == {name for name, text in TEXTS.items() if wanted & set(text.split())}
    assert len(index) == 3 and [p.source for p in index.search("aardvark")] == ["a"]  # and nothing was changed


@pytest.mark.parametrize("query", ["", "   ", "?!", '"\'"', "\n", "---", "\u2014\u2026"])
def test_a_query_without_tokens_finds_nothing(query):
    assert Index.build([("a", "The aardvark digs.")], MEMORY).search(query) == []


def test_text_of_any_script_finds_itself():
    rng = random.Random(0)
    texts = [
        "".join(chr(rng.randrange(1, 0x110000)) + " " * (rng.random() < 0.3) for _ in range(60)) for _ in range(60)
    ]
    index = Index.build(pairs(texts), MEMORY, 1000)
    for i, text in enumerate(texts):
        assert index.search(text)[0].source == f"d{i}"


def test_a_long_query_and_a_large_index():
    texts, words, _ = zipf_corpus(20_000)
    index = Index.build(pairs(texts), MEMORY)
    assert len(index) == 20_000
    assert len(index.search(" ".join(words[-400:]), 5)) == 5
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(texts), 1000):  # four rare words of a passage find it
        rare = sorted(set(texts[i].split()), key=lambda word: int(word[1:]))[-4:]
        assert f"d{i}" in [passage.source for passage in index.search(" ".join(rare), 3)]


# ------------------------------------------------------------------------------------------ what search is worth


@pytest.mark.parametrize(
    "reply, answers, right",
    [
        ("Paris", ["paris"], True),
        ("The answer is Paris.", ["Paris"], True),
        ("  \n paris!\nQuestion: next", ["The Paris"], True),
        ("London\nParis", ["Paris"], False),  # the first line alone
        ("Parisian", ["Paris"], False),
        ("in New  York city", ["new york"], True),
        ("new-york", ["New York"], False),  # SQuAD deletes punctuation
        ("the U.S.", ["US"], True),
        ("The Who", ["Who", "x"], True),
        ("snake_case", ["snake case"], True),
        ("Paris", [], False),
        ("Paris", ["", "the", "?!", " "], False),
        ("", [""], False),
        ("theatre", ["atre"], False),
        ("42", ["4"], False),
    ],
)
def test_answers_are_whole_words_of_the_first_line(reply, answers, right):
    assert contains_answer(reply, answers) is right


def test_prompts_differ_in_the_passages_alone():
    passages = [Passage("First {question}.", "a", 1.0), "Second {passages}."]
    assert augmented("Who {passages}?", passages) == (
        "First {question}.\n\nSecond {passages}.\n\nQuestion: Who {passages}?\nAnswer:"
    )
    assert augmented("Who?", []) == "Question: Who?\nAnswer:"
    assert augmented("Who?", ["P"], "Q {question} of {passages} {other}") == "Q Who? of P {other}"
    for template in ("{question}", "{passages}", ""):
        with pytest.raises(UserError, match="needs both {passages} and {question}"):
            augmented("Who?", [], template)


def world(n: int = 40) -> tuple[list[Question], list[tuple[str, str]]]:
    """Questions on capitals; search cannot find every fifth passage, and every seventh has no oracle passage."""
    facts = [(f"country{i}", f"city{i}") for i in range(n)]
    passages = [f"The capital of {country} is {city}." for country, city in facts]
    questions = [
        Question(f"What is the capital of {country}?", (city,), passages[i] if i % 7 else None)
        for i, (country, city) in enumerate(facts)
    ]
    return questions, [(f"p{i}", text) for i, text in enumerate(passages) if i % 5]


def student(prompts):
    """Knows the even facts, and believes whatever passage names the country that is asked for."""
    replies = []
    for prompt in prompts:
        passages, _, question = prompt.rpartition("Question: ")
        country = question.split("?")[0].split()[-1]
        told = [line.split()[-1] for line in passages.split("\n") if f"of {country} " in line]
        number = int(country.removeprefix("country"))
        replies.append(told[0] if told else f"city{number}" if number % 2 == 0 else "no idea")
    return replies


def test_search_mends_what_the_student_does_not_know():
    questions, documents = world()
    calls = []
    result = compare(
        lambda prompts: calls.append(list(prompts)) or student(prompts), questions, Index.build(documents, MEMORY)
    )
    number = np.arange(40)
    np.testing.assert_array_equal(result.closed, number % 2 == 0)
    np.testing.assert_array_equal(result.found, number % 5 > 0)
    np.testing.assert_array_equal(result.retrieved, (number % 2 == 0) | (number % 5 > 0))
    np.testing.assert_array_equal(result.has_oracle, number % 7 > 0)
    np.testing.assert_array_equal(result.oracle, result.has_oracle)
    assert [len(prompts) for prompts in calls] == [40, 40, int((number % 7 > 0).sum())]
    assert calls[0][1] == "Question: What is the capital of country1?\nAnswer:"
    assert calls[2][0] == augmented(questions[1].question, [questions[1].passage])
    assert all(prompt.count("capital") == 4 for prompt in calls[1])  # three passages and the question


def test_an_answer_anywhere_in_a_passage_is_found():
    index = Index.build([("a", "The capital of country1\n\nis\ncity1\nindeed.")], MEMORY)
    asked = [Question("What is the capital of country1?", (answer,)) for answer in ("is city1", "city1", "city2")]
    assert compare(student, asked, index).found.tolist() == [True, True, False]


def test_rows_and_the_paired_difference():
    questions, documents = world()
    result = compare(student, questions, Index.build(documents, MEMORY))
    rows = {row["task"]: row for row in result.rows()}
    assert list(rows) == ["closed", "retrieved", "oracle", "found", "retrieved-closed"]
    assert {task: row["value"] for task, row in rows.items()} == pytest.approx(
        {"closed": 0.5, "retrieved": 0.9, "oracle": 1.0, "found": 0.8, "retrieved-closed": 0.4}
    )
    assert rows["closed"]["n"] == 40 and rows["oracle"]["n"] == 34
    for row in rows.values():
        assert row["suite"] == "search" and row["chance"] == 0 and row["low"] <= row["value"] <= row["high"]
    gain = rows["retrieved-closed"]
    assert gain["metric"] == "difference" and {rows[t]["metric"] for t in list(rows)[:-1]} == {"accuracy"}
    unpaired = np.hypot(rows["closed"]["stderr"], rows["retrieved"]["stderr"])
    assert 0 < gain["stderr"] < unpaired and gain["low"] > 0


def test_cells_add_up():
    rng = np.random.default_rng(0)
    closed, retrieved, oracle, found = rng.random((4, 200)) < np.array([0.3, 0.6, 0.9, 0.7])[:, None]
    result = Comparison(closed, retrieved, oracle, found, np.ones(200, bool))
    cells = {(cell["questions"], cell["search"]): cell for cell in result.cells()}
    assert len(cells) == 4
    for way, hits in ("closed", closed), ("retrieved", retrieved):
        assert sum(cells[kind, way]["n"] for kind in ("known", "unknown")) == 200
        assert sum(cells[kind, way]["right"] for kind in ("known", "unknown")) == hits.sum()
    assert (cells["known", "closed"]["share"], cells["unknown", "closed"]["share"]) == (1, 0)
    lost, won = (closed & ~retrieved).sum(), (retrieved & ~closed).sum()
    assert 0 < lost < won
    assert cells["known", "retrieved"]["share"] == pytest.approx(1 - lost / closed.sum())
    assert cells["unknown", "retrieved"]["share"] == pytest.approx(won / (~closed).sum())


def test_the_table_shows_scores_and_cells():
    questions, documents = world()
    table = compare(student, questions, Index.build(documents, MEMORY)).table()
    assert table.splitlines() == [
        "| questions | search | n | right | 95 % |",
        "|---|---|--:|--:|---|",
        "| all | closed | 40 | 0.500 | 0.352–0.648 |",
        "| all | retrieved | 40 | 0.900 | 0.769–0.960 |",
        "| all | oracle | 34 | 1.000 | 0.898–1.000 |",
        "| known | closed | 20 | 1.000 | |",
        "| known | retrieved | 20 | 1.000 | |",
        "| unknown | closed | 20 | 0.000 | |",
        "| unknown | retrieved | 20 | 0.800 | |",
    ]


def test_no_oracle_passages_and_one_question():
    index = Index.build([("a", "The capital of country1 is city1.")], MEMORY)
    result = compare(student, [Question("What is the capital of country1?", ("city1",))], index, k=1)
    assert [row["task"] for row in result.rows()] == ["closed", "retrieved", "found", "retrieved-closed"]
    assert result.rows()[-1]["stderr"] is None and not result.oracle.any()
    assert [cell["share"] for cell in result.cells()] == [None, None, 0, 1]
    assert "| all | retrieved | 1 | 1.000 |" in result.table() and "| known | closed | 0 | – | |" in result.table()


def test_compare_takes_a_judge_and_checks_its_arguments():
    questions, documents = world(10)
    index = Index.build(documents, MEMORY)
    assert (
        compare(student, questions, index, correct=lambda reply, answers: "idea" in reply).closed.tolist()
        == [False, True] * 5
    )
    for replies in ([], ["x"] * 11):
        with pytest.raises(ValueError, match="zip"):
            compare(lambda prompts, replies=replies: replies, questions, index)
    with pytest.raises(UserError, match="0 questions"):
        compare(student, [], index)
