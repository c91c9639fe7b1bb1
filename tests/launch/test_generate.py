"""The commands a user types: generate, quantize, export, on one small run, and what wrong input says."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import phi3_jax
from phi3_jax.__main__ import main
from phi3_jax.inference import command as inference_command
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import convert, hf_config, huggingface, safetensors
from phi3_jax.interop.templates import JINJA

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path) -> Path:
    """A tiny phi-3-mini with a tokenizer that has its control tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    cfg = dataclasses.replace(
        phi3_jax.published("mini"), name="tiny", vocab=320, embed=64, layers=2, heads=4, kv_heads=4, head_dim=16, mlp=96,
        context=96, sliding_window=None,
    )  # fmt: skip
    source = folder / "hf"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(hf_config.to_config(cfg, "float32")))
    rng = np.random.default_rng(0)
    shapes = huggingface.published_tensors(cfg)
    tensors = {k: (rng.standard_normal(s) * (0.2 if len(s) > 1 else 1)).astype(np.float32) for k, s in shapes.items()}
    entries = safetensors.plan({k: ("F32", v.shape) for k, v in tensors.items()}, source)
    with safetensors.Files({e.path for e in entries.values()}, write=True) as files:
        for name, entry in entries.items():
            files.write_at(entry.path, entry.offset, tensors[name])
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["hello there, how are you? explain rope in one sentence."] * 3, trainer)
    made.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA["mini"]}))
    convert.import_folder(source, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("tiny"))


def say(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    status = main(["generate", *(str(w) for w in words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_one_prompt_streams_what_the_engine_says(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    status, out, err = say(capsys, "--model", tiny, "--prompt", "hello there", "--max_new_tokens", 20)
    assert status == 0
    reply = Engine(phi3_jax.load(tiny)).generate(["hello there"], 20)[0]
    assert out == reply.text + "\n" and f"{len(reply.ids)} tokens in" in err


def test_several_prompts_options_and_logprobs(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("how are\nexplain\n")
    words = ["--model", tiny, "--prompt", "hello", "--file", tmp_path / "prompts.txt", "--max_new_tokens", 6]
    status, out, _ = say(capsys, *words, "--logprobs")
    lines = out.splitlines()
    assert status == 0 and [x for x in lines if x.startswith("--- ")] == ["--- hello", "--- how are", "--- explain"]
    assert sum(x[:4].strip(" -").isdigit() or x.startswith("  ") for x in lines) >= 12, "a line a token"
    sampled = [say(capsys, *words, "--temperature", 2, "--top_p", 0.9, "--seed", s)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("a\u2028b\x0bc", 1), ("a\x0cb\x1cc", 1), ("a\x85b", 1), ("a\rb", 1), ("\ufeffa\n\nb\n", 2), ("a\r\nb\r\n", 2),
    ],
)  # fmt: skip
def test_a_prompt_of_a_file_ends_at_a_newline_only(tmp_path: Path, content: str, prompts: int) -> None:
    (tmp_path / "p").write_bytes(content.encode())
    found = inference_command._lines(str(tmp_path / "p"))
    assert found == (["a", "b"] if prompts == 2 else [content])


def test_a_file_that_is_no_utf8_is_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "p").write_bytes(b"a\xff")
    status, _, err = say(capsys, "--model", tiny, "--file", tmp_path / "p")
    assert status == 2 and err.startswith("error: --file") and err.count("\n") == 1


def test_typed_control_tokens_are_remarked_on(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    _, _, err = say(capsys, "--model", tiny, "--prompt", "<|user|>hello<|end|>", "--max_new_tokens", 2)
    assert "notice: <|end|>, <|user|> in a prompt" in err and "--chat" in err
    assert "notice" not in say(capsys, "--model", tiny, "--prompt", "hello <user>", "--max_new_tokens", 2)[2]


def test_a_dialogue_remembers(tiny: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nhow are you?\n"))
    asked: list[list[int]] = []
    real = Engine.generate

    def spy(self, prompts, *more, **options):
        asked.append(list(prompts[0]))
        return real(self, prompts, *more, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    status, out, err = say(capsys, "--model", tiny, "--chat", "--system", "be kind", "--max_new_tokens", 5)
    assert f"chat template mini, as {tiny}" in err and "tokenizer_config.json says" in err
    assert status == 0 and out.count("> ") == 4, "asked until the input ends, an empty line being none"
    first, second = asked
    end = 3  # <|end|>
    assert second[: first.index(end)] == first[: first.index(end)] and len(second) > len(first) + 5
    assert first.count(end) == 2 and second.count(end) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no --prompt"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "hello " * 200], "exceed the context of 96 by"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens 0 must be an integer, 1 or more"),
        (["--prompt", "a", "--max_new_tokens", "97"], "exceed the context of 96 by 2; shorten"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1 must be a number, 0 to"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature hot must be a number"),
        (["--prompt", "a", "--top_p", "2"], "--top_p 2 must be a number"),
        (["--prompt", "a", "--system", "x"], "--system needs --chat"),
        (["--prompt", "a", "--rope_regime", "middle"], "--rope_regime middle is unknown; valid: auto"),
        (["--prompt", "a", "--file", "nowhere.txt"], "--file nowhere.txt"),
        (["--prmpt", "a"], "did you mean '--prompt'"),
    ],
)
def test_wrong_words_end_in_one_line(tiny: Path, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    status, out, err = say(capsys, "--model", tiny, *words)
    assert status == 2 and said in err and err.count("\n") == 1 and err.startswith("error: ") and out == ""


def test_a_model_without_tokenizer_says_what_to_add(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "huggingface" / "tokenizer.json").unlink()
    status, _, err = say(capsys, "--model", tmp_path / "bare", "--prompt", "a")
    assert status == 2 and "has no tokenizer; put its files into" in err


def test_the_readme_s_four_lines(tiny: Path, tmp_path: Path) -> None:
    """As typed, but for the model, from a shell."""
    pytest.importorskip("gguf")
    text = (ROOT / "README.md").read_text().partition("## Ask it")[2]
    lines = [line.partition("  #")[0] for line in text.partition("```sh\n")[2].partition("```")[0].splitlines()]
    assert [line.split("/")[1].split(".")[0] for line in lines] == ["generate", "evaluate", "quantize", "export"]
    for line in (lines[0], lines[2], lines[3]):
        line = line.replace("python launch", f"{sys.executable} {ROOT}/launch").replace("runs/phi3-mini ", f"{tiny} ")
        line = line.replace("runs/phi3-mini-q4", str(tmp_path / "q4")).replace("gguf:", f"gguf:{tmp_path}/")
        line += " --max_new_tokens 8" if "generate" in line else " --tokens 300" if "quantize" in line else ""
        done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "phi3-mini.Q4_0.gguf").stat().st_size > 60_000
    assert "| text perplexity |" not in done.stdout
    jax.clear_caches()
