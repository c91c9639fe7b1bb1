"""Needles: what is asked was stated, once and before; what bears a loss can be known; uneven tokenizers are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from phi3_jax.data import export, loader, meters, needles, tokenizers
from phi3_jax.data.corpora import text as corpus
from phi3_jax.errors import UserError

BYTES = tokenizers.load("bytes")
FORM = needles.Form(BYTES)
TEXT = np.frombuffer(("lorem ipsum dolor sit amet " * 20).encode(), np.uint8).astype(np.int32)


def test_a_planted_window_bears_loss_on_text_and_on_values_seen_before() -> None:
    again = 0
    for seed in range(200):
        ids, kinds = needles.planted(TEXT[:129], FORM, np.random.default_rng(seed))
        written = BYTES.decode(ids)
        assert len(ids) == len(kinds) == 129
        seen: dict[str, str] = {}
        expected = np.ones(129, int)
        for found in re.finditer(r"#([a-z]{2})=(\d{5});", written):
            expected[found.start() : found.end()] = 0
            key, value = found[1], found[2]
            if key in seen:
                assert seen[key] == value
                expected[found.start(2) : found.end(2)] = needles.VALUE
                again += 1
            seen[key] = value
        assert (kinds == expected).all()
        assert 2 <= len(seen) <= 4
        left = re.sub(r"#[a-z]{2}=\d{5};", "", written)
        assert BYTES.decode(TEXT).startswith(left)
    assert 3 * 200 <= again <= 6 * 200


@pytest.mark.parametrize("length", [64, 200, 500])
def test_a_question_is_answered_once_in_its_row_at_its_depth(length: int) -> None:
    for depth in (0.0, 0.25, 1.0):
        ids = needles.question(TEXT[:length], FORM, np.random.default_rng(length), depth)
        written = BYTES.decode(ids)
        assert len(written) == length and FORM.value == 5
        key, answer = written[-8:-6], written[-5:]
        assert written[-9] == "#" and written[-6] == "="
        stated = re.findall(rf"#{key}=(\d{{5}});", written[:-9])
        assert stated == [answer]
        others = [m.start() for m in re.finditer(r"#[a-z]{2}=\d{5};", written[:-9])]
        assert len(others) == 3
        at = written.index(f"#{key}={answer};")
        before = re.sub(r"#[a-z]{2}=\d{5};", "", written[:at])
        assert len(before) == round(depth * (length - 3 * 10 - 9))
    with pytest.raises(UserError, match="window of 20 tokens holds no 3 needles"):
        needles.question(TEXT[:20], FORM, np.random.default_rng(0), 0.5)


class Pairs(tokenizers.ByteTokenizer):
    """A tokenizer that writes equal digits beside each other as one token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(re.sub(rb"(\d)\1", b"\xff", t.encode("latin1"))) for t in texts]


class Triples(tokenizers.ByteTokenizer):
    """A tokenizer that writes three digits as one token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(re.sub(rb"\d{3}", b"\xfe", t.encode("latin1"))) for t in texts]


def test_tokenizers_that_split_digits_unevenly_are_refused() -> None:
    with pytest.raises(UserError, match="now more, now fewer tokens"):
        _ = needles.Form(Pairs()).value
    three = needles.Form(Triples())
    assert three.value == 3 and three.chance == pytest.approx(10 ** (-5 / 3))
    assert FORM.chance == pytest.approx(0.1)


def test_windows_of_a_data_set_lie_inside_documents_and_half_hold_needles(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{i} " + " ".join(map(str, rng.integers(0, 99, rng.integers(5, 400)))) for i in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    made = export.export(tmp_path / "out", f"needles:{tmp_path / 'a.jsonl'}", window=128, held_out=0.3)
    ds = loader.open_dataset(tmp_path / "out")
    assert made["loss"] == "domain_mean" and made["domains"] == ["text", "needles"]
    train = ds._source(made["sources"][0], False).take(np.arange(made["sources"][0]["windows"]))
    kept = {t for t in texts if not corpus.is_held_out(t, 0.3)}
    planted = 0
    for row in train:
        written = BYTES.decode([*row["tokens"][:1], *row["targets"]])
        planted += "#" in written
        left = re.sub(r"#[a-z]{2}=\d{5};", "", written)
        assert any(left in t for t in kept)
        assert (row["segments"] == 1).all() and ((row["domains"] == 2).any() == ("#" in written))
    assert 0.4 < planted / len(train) < 0.6
    held = ds._source(made["evals"][1], False).take(np.arange(made["evals"][1]["windows"]))
    assert set(np.unique(held["domains"])) == {0, 2}

    class Model:
        matrix_params = 1

    def shares(hit: np.ndarray) -> dict[str, float]:
        found = meters.measure(made["evals"][1], held, np.zeros(hit.shape), hit, ds, Model())
        assert {row["chance"] for row in found} == {0.1, 0.0} or found[0]["chance"] == pytest.approx(0.1)
        return {row["metric"]: row["value"] for row in found}

    right = np.ones(held["domains"].shape, bool)
    assert shares(right) == {"digits": 1, "exact": 1}
    one_wrong = right.copy()
    first = np.argwhere(held["domains"][0] == 2)[0, 0]
    one_wrong[0, first] = False
    values, digits = int((held["domains"] == 2).sum() / 5), int((held["domains"] == 2).sum())
    assert shares(one_wrong) == {"digits": pytest.approx(1 - 1 / digits), "exact": pytest.approx(1 - 1 / values)}
    with pytest.raises(UserError, match="longest document has .* too few for windows of 9,000"):
        export.export(tmp_path / "none", f"needles:{tmp_path / 'a.jsonl'}", window=9000)
