"""experiments/vision.py: training on pictures as a user types it, killed and resumed bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax.errors import UserError
from phi3_jax.experiment import load_config
from phi3_jax.interop.loading import load
from phi3_jax.models import parts
from phi3_jax.models.spec import named
from phi3_jax.records import streaming
from phi3_jax.records.rows import read_rows
from phi3_jax.study.data import data_arguments

ROOT = Path(__file__).parents[2]
FILE = f"{ROOT}/experiments/vision.py"
sys.path.append(str(ROOT / "tests" / "interop"))
from hf_folders import vision_folder  # noqa: E402

Image = pytest.importorskip("PIL.Image")


def config_of(words: str) -> Any:
    return load_config(f"{FILE}:{words}")


@pytest.mark.parametrize(
    "words,rate,trained,rank",
    [
        ("sft", 1e-5, (), None),
        ("pretrain", 1e-3, ("projector",), None),
        ("pretrain,train=all", 1e-5, (), None),
        ("sft,train=lm+tower@0.1", 1e-5, ("lm", "tower@0.1"), None),
        ("sft,train=lora", 2e-4, (), 32),
        ("sft,train=lora,lora=8", 2e-4, (), 8),
        ("dpo", 1e-6, (), None),
    ],
)
def test_words_are_keys(words: str, rate: float, trained: tuple[str, ...], rank: int | None) -> None:
    config = config_of(f"{words},model=hf:m,data=a.json,images=pics,crops=9")
    assert config.optim.peak_lr == pytest.approx(rate) and config.train.parts == trained and config.lora.rank == rank
    assert (config.data.images, config.data.crops, config.data.source) == ("pics", 9, "chats:a.json")
    assert config.data.rows == ("preferences" if words.startswith("dpo") else "conversations")


@pytest.mark.parametrize(
    "words,message",
    [
        ("sft,data=a.json", "sft needs model="),
        ("sft,model=hf:m", "sft needs data="),
        ("sft,model=hf:m,data=a.json,train=lmm", "'lmm' is no part of a model"),
        ("sft,model=hf:m,data=a.json,train=lm+lm", "names lm twice"),
        ("sft,model=hf:m,data=a.json,train=lm,lora=8", "lora=8 is of train=lora"),
        ("sft,model=hf:m,data=a.json,crops=65", "crops=65"),
        ("sfd,model=hf:m", "unknown target 'sfd'"),
    ],
)
def test_wrong_words_are_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_data_are_made_for_the_eyes_of_the_model(tmp_path: Path) -> None:
    vision_folder(tmp_path / "hf")
    config = config_of(f"sft,model=hf:{tmp_path / 'hf'},data=a.json,images=pics")
    given = data_arguments(config, "given", 1)
    assert (given["eyes"], given["crops"], given["images"], given["template"]) == ("48/2", 4, "pics", "vision")
    config.data.crops = 2
    assert data_arguments(config, "given", 1)["crops"] == 2


# ------------------------------------------------------------------------------------------------ runs


def shop(root: Path) -> None:
    """hf/, pics/ and llava.json: ten rows with 0, 1 or 2 pictures, one of them shown by several."""
    vision_folder(root / "hf")
    (root / "pics").mkdir()
    random = np.random.default_rng(0)
    for i in range(5):
        pixels = random.integers(0, 256, (20 + 10 * (i % 3), 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"pics/{i}.png")
    rows = []
    for i in range(10):
        shown = [f"{i % 5}.png", "0.png"][: i % 3]
        asked = "<image>" * len(shown) + "what is in this picture?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"a dog {i}"}]
        rows.append({"image": shown, "conversations": turns} if shown else {"conversations": turns})
    (root / "llava.json").write_text(json.dumps(rows))


def command(words: str) -> list[str]:
    more = ["--config.data.window=1536", "--config.train.batch_tokens=3072", "--config.data.held_out=0"]
    more += ["--config.train.log_every=1", "--config.train.checkpoint_every=1", "--config.train.keep_latest=20"]
    start = [sys.executable, str(ROOT / "launch/run.py"), "--config"]
    return [*start, f"{FILE}:sft,model=hf:hf,data=llava.json,images=pics,lr=1e-3,epochs=4,{words}", *more]


def train(root: Path, words: str) -> Path:
    done = subprocess.run(command(words), cwd=root, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    name = words.rpartition("name=")[2]
    (folder,) = [path.parent for path in (root / "runs" / name).glob("*/metrics.jsonl")]
    return folder


ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def leaves(folder: Path) -> dict[str, np.ndarray]:
    reader = streaming.Reader(folder / "checkpoints", "")
    return {name: reader.read(name, None) for name in reader.dtypes}


@pytest.mark.slow
def test_a_run_that_was_killed_with_pictures_in_its_stream_ends_bit_for_bit(tmp_path: Path) -> None:
    shop(tmp_path)
    whole = train(tmp_path, "train=lm+projector,name=whole")
    with subprocess.Popen(
        command("train=lm+projector,name=killed"), cwd=tmp_path, env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        limit = time.monotonic() + 600
        while not [*tmp_path.glob("runs/killed/*/checkpoints/*2*")]:
            assert running.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
        os.killpg(running.pid, signal.SIGKILL)
    killed = train(tmp_path, "train=lm+projector,name=killed")
    keys = ("step", "loss", "grad_norm", "tiles", "tiles_padded")
    rows = [[{k: row[k] for k in keys} for row in read_rows(run / "metrics.jsonl")] for run in (whole, killed)]
    assert rows[0] == rows[1] and rows[0][-1]["loss"] < rows[0][0]["loss"]
    assert all(0 < row["tiles"] <= row["tiles_padded"] for row in rows[0])
    one, other = leaves(whole), leaves(killed)
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    base, after = (named(load(path).params) for path in (f"hf:{tmp_path / 'hf'}", str(whole)))
    changed = {parts.part_of(name) for name in base if not np.array_equal(base[name], after[name])}
    assert changed == {"lm", "projector"}


@pytest.mark.slow
def test_preferences_about_pictures_are_learned(tmp_path: Path) -> None:
    shop(tmp_path)
    rows = [
        {
            "prompt": f"{'<image>' * (i % 3)}what is it?",
            "chosen": "a dog",
            "rejected": "a cat",
            "images": ["0.png", "1.png"][: i % 3],
        }
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{FILE}:dpo,model=hf:hf,data=pairs.jsonl,images=pics,lr=1e-3,epochs=6,name=dpo"]
    start = command("")
    done = subprocess.run(
        [*start[:3], *words, *start[4:]], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "runs/dpo").glob("*/metrics.jsonl")
    logged = read_rows(found)
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the policy is the reference
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"] and logged[0]["tiles"] > 0


@pytest.mark.slow
def test_adapters_of_a_run_stand_for_the_model_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop(tmp_path)
    monkeypatch.chdir(tmp_path)  # the run names its base as it was typed
    folder = train(tmp_path, "train=lora,lora=2,name=lora")
    model, base = load(str(folder)), load(f"hf:{tmp_path / 'hf'}")
    pictures = [str(tmp_path / "pics/1.png")]
    told, before = (one.logits("<|image_1|>what?", images=pictures) for one in (model, base))
    assert float(np.abs(told - before).max()) > 1e-3
    words = ["convert", "--from", str(folder), "--to", "runs/merged", "--merge"]
    done = subprocess.run(
        [sys.executable, "-m", "phi3_jax", *words], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    merged = load(str(tmp_path / "runs/merged")).logits("<|image_1|>what?", images=pictures)
    np.testing.assert_allclose(merged, told, rtol=0, atol=1e-4 * float(np.abs(told).max()))
