"""Scores of documents under models of ours: the numbers are the models', and limits choose without scoring again."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from phi3_jax import verbs
from phi3_jax.commands import call
from phi3_jax.curation import pipeline, scores
from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.family import proxy
from phi3_jax.inference.engine import Engine
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params

pytest.importorskip("daft")
TEXTS = ["a short text", "b" * 700, "héllo", "", "one two three four five six seven"]


def engine(seed: int, scale: float) -> Engine:
    cfg = proxy("mini", "femto", context=256)
    draw = np.random.default_rng(seed)  # a proxy begins with equal logits
    params = jax.tree.map(
        lambda w: w + np.float32(scale) * draw.standard_normal(w.shape, np.float32), init_params(cfg, 0)
    )
    return Engine(Model(params, cfg, tokenizers.load("bytes"), np.float32), 4)


@pytest.fixture(scope="module")
def engines() -> dict[str, Engine]:
    return {"small": engine(0, 0.1), "large": engine(1, 0.3)}


def test_bits_per_byte_are_those_of_the_model(engines: dict[str, Engine]) -> None:
    one = engines["large"]
    found = scores.bits_per_byte(one, TEXTS)
    assert found[3] == 0 and (found[[0, 1, 2, 4]] > 1).all()
    np.testing.assert_allclose(scores.bits_per_byte(one, TEXTS[:1]), found[:1], rtol=1e-5)
    eos, ids = one.tokenizer.eos_id, one.tokenizer.encode(TEXTS[0])
    by_hand = -sum(one.score([([eos, *ids[:i]], [ids[i]])])[0].logprob for i in range(len(ids)))
    assert found[0] == pytest.approx(by_hand / math.log(2) / len(TEXTS[0]), rel=1e-4)
    pieces = scores.bits_per_byte(one, ["b" * 256, "b" * 188])  # rows of the context, each after an end
    assert found[1] == pytest.approx((2 * 256 * pieces[0] + 188 * pieces[1]) / 700, rel=1e-4)
    assert found[2] == pytest.approx(scores.bits_per_byte(one, ["héllo", "x"])[0]), "six bytes, five letters"


@pytest.fixture
def asked(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the models that were loaded."""
    loaded: list[str] = []

    def load(path: str) -> Engine:
        loaded.append(path)
        return engines[path]

    monkeypatch.setattr(scores, "_engine", load)
    monkeypatch.setattr(scores, "content", lambda path: f"weights of {path}")
    return loaded


def test_other_limits_choose_anew_without_scoring(asked: list[str], tmp_path: Path, engines: dict[str, Engine]) -> None:
    draw = random.Random(0)
    lines = [{"text": " ".join(draw.choices("abcdefgh", k=9)), "source": "letters"} for _ in range(12)]
    lines += [{"text": "".join(map(chr, draw.choices(range(200, 900), k=9))), "source": "odd"} for _ in range(12)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rule, models in (("perplexity", ("model",)), ("learnability", ("small", "large"))):
        paths = ("large",) if rule == "perplexity" else models
        given = [f"--config.rules.{rule}.{name}={path}" for name, path in zip(models, paths, strict=True)]
        file = tmp_path / f"{rule}.py"
        file.write_text(
            "from phi3_jax.curation.config import base, with_steps\n"
            f"def get_config(words=''):\n    return with_steps(base(), 'exact', {rule!r})\n"
        )
        given += ["--config", str(file)]
        words = lambda out, *more, given=given: [  # noqa: E731
            "--input", str(source), "--output", str(out), "--workers", "1", *given, *more
        ]  # fmt: skip
        first, second = tmp_path / f"{rule}-all", tmp_path / f"{rule}-half"
        assert call(verbs.CURATE, words(first)) == 0 and asked == [*paths]
        asked.clear()
        note = json.loads((first / "manifest.json").read_text())["notes"][rule]["scores"]
        assert note["letters"]["documents"] == note["odd"]["documents"] == 12
        bits = [scores.bits_per_byte(engines[path], [line["text"] for line in lines]) for path in paths]
        values = bits[0] - (bits[1] if len(bits) > 1 else 0)
        limit = float(np.median(values))
        assert np.ptp(values) > 0.1, "control: there is something to choose by"
        assert call(verbs.CURATE, words(second, f"--config.rules.{rule}.most={limit}", "--reuse", str(first))) == 0
        assert asked == [], "nothing was scored again"
        kept = {row["text"] for row in pipeline.documents_of(second)}
        assert kept == {line["text"] for line, value in zip(lines, values, strict=True) if value <= limit}
        assert "Bits per byte, percentiles by source" in (second / "report.html").read_text()
        gone = pipeline.store.read(second / f"rejected/{rule}/part-00000.parquet")
        assert {*gone["reason"].to_pylist()} == {"too_odd" if rule == "perplexity" else "beyond_the_small"}
        with pytest.raises(UserError, match=f"{rule}.most: 100.0 -> "):
            call(verbs.CURATE, words(first, f"--config.rules.{rule}.most={limit}"))


def test_a_score_needs_a_model() -> None:
    with pytest.raises(UserError, match="a score needs a model"):
        scores.content("")
