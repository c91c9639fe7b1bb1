"""lm-eval's tasks with pictures: numbered tags, each picture where its `<image>` stands, on files of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.data.chat import chat_ids
from phi3_jax.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
from hf_folders import vision_folder

pytest.importorskip("PIL")
pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from PIL import Image

from phi3_jax.evaluation.harness import HarnessLM
from phi3_jax.inference.engine import Engine

SETTINGS = {"until": ["\n\n"], "max_gen_toks": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    vision_folder(root / "hf")
    return root / "hf"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(phi3_jax.load(f"hf:{folder}"), batch=4)


def pictures(count: int) -> list[Any]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (20, 24 + i, 3), dtype=np.uint8)) for i in range(count)]


def asked(text: str, shown: list[Any]) -> Instance:
    return Instance("generate_until", {}, (text, SETTINGS, {"visual": shown}), 0)


def test_pictures_stand_where_the_text_says(engine: Engine) -> None:
    lm, (a, b) = HarnessLM(engine, 4), pictures(2)
    assert lm.MULTIMODAL
    plain, both = "Is <image> like <image>?", "What is <image> beside <image>, and <image> again?"
    replies = lm.generate_until(
        [asked(plain, [a, b]), asked(both, [a, b, a]), Instance("generate_until", {}, ("Hi", SETTINGS), 0)]
    )
    direct = engine.generate(
        ["Is <|image_1|> like <|image_2|>?", "What is <|image_1|> beside <|image_2|>, and <|image_3|> again?"],
        6, images=[[a, b], [a, b, a]],
    )  # fmt: skip
    assert replies[:2] == [reply.text.split("\n\n")[0] for reply in direct]
    assert replies[2] == engine.generate(["Hi"], 6)[0].text.split("\n\n")[0]


def test_a_conversation_shows_them_too(engine: Engine) -> None:
    lm, shown = HarnessLM(engine, 4), pictures(1)
    marker = lm.apply_chat_template([{"role": "user", "content": "<image>\nWhat is it?"}])
    _, prompts, seen = lm._prompts([asked(marker, shown)], 6)
    talk = [{"role": "user", "content": "<|image_1|>\nWhat is it?"}]
    counts = lm._album.counts(seen[0])
    assert prompts[0] == chat_ids(engine.tokenizer, talk, engine.template.name, pictures=counts)
    with pytest.raises(UserError, match="a reply that is begun cannot follow pictures"):
        lm._prompts([asked(marker + " A", shown)], 6)
    with pytest.raises(UserError, match=r"there is 1 picture, and no <.image_1.> in the prompt"):
        lm._prompts([asked("What is it?", shown)], 6)


def test_answers_of_other_pictures_are_not_taken(engine: Engine, tmp_path: Path) -> None:
    from phi3_jax.evaluation.kept import Kept

    first, second = pictures(1)[0], pictures(1)[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number, picture in enumerate((first, second, first)):
        kept = Kept(tmp_path / "kept.jsonl", "model")
        HarnessLM(engine, 4, kept=kept).generate_until([asked("<image>?", [picture])])
        assert kept.taken == (number == 2)


def test_mmmu_is_asked_from_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        {"id": "validation_Accounting_1", "question": "Which is <image 1>?", "options": "['a cat', '<image 2>']",
         "answer": "A", "question_type": "multiple-choice", "image_1": "one.png", "image_2": "two.png"},
        {"id": "validation_Accounting_2", "question": "How many in <image 1>?", "options": "[]", "answer": "12",
         "question_type": "open", "image_1": "two.png", "image_2": None},
    ]  # fmt: skip
    data = tmp_path / "data/mmmu"
    (data / "hf").mkdir(parents=True)
    for picture, name in zip(pictures(2), ("one.png", "two.png"), strict=True):
        picture.save(data / name)
    (data / "hf/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["evaluate", "--model", f"hf:{folder}", "--suite", "lm-eval:mmmu_val_accounting", "--data_dir"]
    flags += [str(tmp_path / "data"), "--gen_kwargs", "max_gen_toks=4", "--out", str(tmp_path / "out")]
    assert main(flags) == 0, capsys.readouterr().err
    (row,) = [json.loads(line) for line in (tmp_path / "out/evals.jsonl").read_text().splitlines()]
    assert row["task"] == "mmmu_val_accounting" and row["n"] == 2 and row["metric"] == "acc"
    (data / "two.png").unlink()
    assert main(flags[:-1] + [str(tmp_path / "again")]) == 2
    assert "image_2 is 'two.png', which is not there" in capsys.readouterr().err
