"""Pictures in `Engine` and in the commands: batches, few programs, the re-read, folders in and out, and bad input."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import phi3_jax
from phi3_jax import family
from phi3_jax.__main__ import main
from phi3_jax.data import chat, pictured
from phi3_jax.errors import UserError
from phi3_jax.inference.engine import Engine
from phi3_jax.inference.sampling import Sampling
from phi3_jax.interop import loading

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
from hf_folders import EYES, tensors_in, vision_folder

pytest.importorskip("PIL")
GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "vision2"


def photo(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, run/ of it, and pictures a.png, b.png."""
    from PIL import Image

    root = tmp_path_factory.mktemp("vision")
    vision_folder(root / "hf")
    main(["convert", "--from", f"hf:{root / 'hf'}", "--to", str(root / "run")])
    for name, size in (("a", (30, 20)), ("b", (60, 10))):
        Image.fromarray(photo(*size, ord(name))).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> loading.Model:
    return phi3_jax.load(folder / "run", dtype=jnp.float32)


def test_a_folder_comes_back_bitwise(folder: Path, tmp_path: Path) -> None:
    main(["convert", "--from", str(folder / "run"), "--to", f"hf:{tmp_path / 'back'}"])
    before, after = tensors_in(folder / "hf"), tensors_in(tmp_path / "back")
    assert set(before) == set(after) and len(before) > 60
    assert all(np.array_equal(before[k], after[k]) for k in before)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (folder / "hf" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_replies_are_the_argmax_of_the_full_forward_whatever_the_batch(model: loading.Model) -> None:
    engine = Engine(model, batch=4)
    prompts = ["no picture", "<|image_1|>what?", "a<|image_2|>b<|image_1|>"]
    shown = [[], [photo(20, 20, 0)], [photo(70, 20, 1), photo(20, 50, 2)]]
    together = engine.generate(prompts, 4, stop_ids=(), images=shown)
    album = pictured.Album(model.config)
    for prompt, pictures, reply in zip(prompts, shown, together, strict=True):
        assert engine.generate([prompt], 4, stop_ids=(), images=[pictures])[0].ids == reply.ids
        ids = pictured.text_ids(model.tokenizer, prompt, album.counts(album.open(pictures)))
        assert reply.prompt_tokens == len(ids)
        regime = "long" if len(ids) + 3 > model.config.longrope.original_context else "short"
        logits = model.logits([ids + reply.ids], images=[pictures], rope_regime=regime)[0, len(ids) - 1 : -1]
        assert jnp.argmax(logits, -1).tolist() == reply.ids


def test_programs_are_as_many_as_buckets(model: loading.Model) -> None:
    engine, tokens = Engine(model, batch=1), set()
    for seed, size in enumerate([(20, 20), (31, 30), (90, 20), (20, 90), (50, 40), (400, 100)]):
        (reply,) = engine.generate(["<|image_1|>"], 1, images=[[photo(*size, seed)]])
        tokens.add(reply.prompt_tokens)
    assert len(tokens) >= 3, "the pictures have different grids"
    # 5, 5, 4, 4, 5 and 5 tiles at most: the tower for 3, 4 and 5 of them, and a prompt after each.
    assert engine.compilations <= 6
    before = engine.compilations
    engine.generate(["<|image_1|>"], 1, images=[[photo(33, 31, 9)]])
    assert engine.compilations == before


def test_the_penalty_falls_on_no_picture(model: loading.Model) -> None:
    engine = Engine(model, batch=1)
    shown = [[photo(20, 20, 0)]]
    plain = engine.generate(["<|image_1|>"], 1, stop_ids=(), images=shown)
    hard = engine.generate(["<|image_1|>"], 1, Sampling(repetition_penalty=1e3), stop_ids=(), images=shown)
    begin = model.tokenizer.special_tokens["<s>"]  # the prompt's only token besides the picture's
    assert plain[0].ids != [begin], "this model says nothing that tells a penalty"
    assert hard[0].ids == plain[0].ids


@pytest.mark.shared("goldens/vision2")
def test_greedy_replies_are_the_originals_across_the_border() -> None:
    cases = json.loads((GOLDENS / "vision35.json").read_text())["cases"]
    model = phi3_jax.load(f"hf:{GOLDENS / 'vision35'}", dtype=jnp.float32)
    assert set(model.stop_ids) == {2, model.tokenizer.special_tokens["<|end|>"], model.tokenizer.eos_id}
    album, prompts, shown = pictured.Album(model.config), [], []
    for name in ("text", "one", "two"):
        case = cases[name]
        text = case["prompt"].removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
        shown.append(album.open([GOLDENS / "vision35" / path for path in case["images"]]))
        talk = [{"role": "user", "content": text}]
        prompts.append(chat.chat_ids(model.tokenizer, talk, "vision", pictures=album.counts(shown[-1])))
    engine = Engine(model, rope_regime="original")
    replies = engine.generate(prompts, 12, stop_ids=(), images=shown)
    for reply, name in ((replies[1], "one"), (replies[2], "two")):
        want = cases[name]["greedy_ids"]
        assert reply.ids[: len(want)] == want
    auto = Engine(model).generate(prompts[1:2], 12, stop_ids=(), images=shown[1:2])[0]
    assert auto.ids != cases["one"]["greedy_ids"]  # the long list from the first token on: a deviation, documented


def test_phi_3_vision_never_reads_again_and_phi_3_5_vision_once(model: loading.Model, monkeypatch) -> None:
    windows = [family.published(member).sliding_window for member in ("vision", "vision-3.5")]
    ids = [3 + i % 250 for i in range(model.config.longrope.original_context - 2)]
    calls, again = [], Engine._again
    monkeypatch.setattr(Engine, "_again", lambda self, *given: calls.append(1) or again(self, *given))
    for window, times in zip(windows, (0, 1), strict=True):
        one = dataclasses.replace(model, config=dataclasses.replace(model.config, sliding_window=window))
        calls.clear()
        (reply,) = Engine(one, batch=1, rope_regime="original").generate([ids], 5, stop_ids=())
        assert len(reply.ids) == 5 and len(calls) == times


# ------------------------------------------------------------------------------------------------ commands


def generate(folder: Path, *flags: str, prompt: str = "<|image_1|>what?") -> int | None:
    return main(["generate", "--model", str(folder / "run"), "--max_new_tokens", "3", "--prompt", prompt, *flags])


def test_a_question_about_two_pictures_is_a_turn_of_the_chat(folder: Path, model: loading.Model, capsys) -> None:
    question = "What changed between <|image_1|> and <|image_2|>?"
    files = [str(folder / "a.png"), str(folder / "b.png")]
    assert not generate(folder, "--image", files[0], "--image", files[1], "--logprobs", prompt=question)
    said = capsys.readouterr()
    assert "a user's turn in chat template vision" in said.err
    album = pictured.Album(model.config)
    talk = [{"role": "user", "content": question}]
    ids = chat.chat_ids(model.tokenizer, talk, "vision", pictures=album.counts(album.open(files)))
    (reply,) = Engine(model).generate([ids], 3, images=[files])
    for logprob in reply.logprobs:
        assert f"{logprob:9.4f}" in said.out


@pytest.mark.parametrize(
    ("flags", "prompt", "said"),
    [
        (["--image", "a.png"], "what?", "there is 1 picture, and no <|image_1|> in the prompt"),
        (["--image", "a.png"], "<|image_1|><|image_2|>", "<|image_2|> is in the prompt, and there is 1 picture"),
        (["--image", "none.png"], "<|image_1|>", "none.png cannot be opened: No such file"),
        (["--image", "page.png"], "<|image_1|>", "page.png cannot be opened: no picture"),
        (["--image", "thin.png"], "<|image_1|>", "thin.png has sides of 300 and 1 pixels; beyond 192 to 1"),
        (["--crops", "2"], "what?", "--crops without --image"),
    ],
)
def test_bad_input_is_one_line(flags, prompt, said, folder: Path, capsys, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.chdir(folder)
    Path("page.png").write_text("<html>")
    Image.fromarray(photo(300, 1, 0)).save("thin.png")
    assert generate(folder, *flags, prompt=prompt) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_text_model_takes_no_pictures(folder: Path) -> None:
    from test_engine import model as text_model

    with pytest.raises(UserError, match="reads no pictures"):
        Engine(text_model()).generate(["a"], 1, images=[[folder / "a.png"]])
    with pytest.raises(UserError, match="reads no pictures"):
        text_model().logits("a", images=[folder / "a.png"])
    with pytest.raises(UserError, match="original is phi-3-vision's"):
        Engine(text_model(), rope_regime="original")


def test_four_bits_leave_the_eyes_as_they_are_and_gguf_takes_none(folder: Path, model, tmp_path: Path, capsys) -> None:
    main(
        ["quantize", "--model", str(folder / "run"), "--format", "q8_0", "--out", str(tmp_path / "q"), "--tokens", "0"]
    )
    small = phi3_jax.load(tmp_path / "q")
    eyes = small.params["vision"]
    assert eyes["blocks"]["qkv"]["weight"].dtype == eyes["in"]["weight"].dtype == jnp.bfloat16
    want = model.params["vision"]["blocks"]["qkv"]["weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(eyes["blocks"]["qkv"]["weight"], want)
    files = [folder / "a.png"]
    near = small.logits("<|image_1|>what?", images=files)
    exact = model.logits("<|image_1|>what?", images=files)
    assert float(jnp.linalg.norm(near - exact)) < 0.1 * float(jnp.linalg.norm(exact))
    pytest.importorskip("gguf")
    target = tmp_path / "x.gguf"
    assert main(["export", "--model", str(folder / "run"), "--to", f"gguf:{target}", "--format", "f16"]) == 2
    assert "has eyes: llama.cpp's phi3 runs mini and medium only" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("embd_layer", "hd_transform_order"), "glb_sub", "hd_transform_order='glb_sub' is not supported"),
        (("img_processor", "model_name"), "google/siglip", "model_name='google/siglip' is not supported"),
        (("embd_layer", "use_hd_transform"), False, "use_hd_transform=False is not supported"),
        (("img_processor", "image_dim_out"), 32, f"image_dim_out=32 is not the tower's width of {EYES.embed}"),
        (("img_processor",), None, "img_processor is missing"),
        (("clip_config", "hidden_act"), "gelu", "hidden_act='gelu' is not supported"),
    ],
)
def test_folders_of_other_eyes_are_refused_by_name(where, value, said, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "hf" / "config.json").read_text())
    inside = config
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json") as error:
        loading.folder_config(tmp_path)
    assert said in str(error.value)
