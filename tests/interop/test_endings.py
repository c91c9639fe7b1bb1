"""Exports of our own runs read text and stop elsewhere: tokenizer files, end ids, chat templates."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import phi3_jax
from phi3_jax.data import chat, stops, tokenizers
from phi3_jax.inference.engine import Engine
from phi3_jax.interop import convert, endings, huggingface
from phi3_jax.interop.templates import JINJA
from phi3_jax.records import streaming

CFG = phi3_jax.proxy("mini", "pico", "clean", vocab=320, context=64)
TEXTS = ["", "x", "def f(a):\n    return a ** 2\n", "Grüße, 世界 🙂\t\x00\x7f", " </s> <s>", "\u2028\r\n  "]


def test_the_byte_tokenizer_as_a_file_gives_the_same_ids_and_texts(tmp_path: Path) -> None:
    ours = tokenizers.load("bytes")
    endings.write(tmp_path, CFG, ours)
    theirs = tokenizers.load(tmp_path)
    assert (theirs.kind, theirs.eos_id, theirs.vocab_size) == ("huggingface", 257, 259)
    assert [theirs.encode(t) for t in TEXTS] == [ours.encode(t) for t in TEXTS]
    rng = random.Random(0)
    for ids in ([i] for i in range(256)):
        assert theirs.decode(ids) == ours.decode(ids)
    for _ in range(200):
        ids = list("aé日🙂".encode() * 3)[rng.randrange(9) : rng.randrange(9, 30)]
        assert theirs.decode(ids) == ours.decode(ids)
    listed = json.loads((tmp_path / "generation_config.json").read_text())
    assert listed == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    assert stops.stop_ids(None, tmp_path, CFG.vocab) == (257,)


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    endings.write(tmp_path, CFG, tokenizers.load("bytes"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 257, 258)
    for text in TEXTS[:4]:
        assert theirs(text)["input_ids"] == list(text.encode()) and theirs.decode(list(text.encode())) == text


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  there"}]
TALK += [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "x"}]


@pytest.mark.parametrize("member", chat.ROLES)
@pytest.mark.parametrize("header", (True, False))
def test_templates_say_what_chat_ids_says(member: str, header: bool) -> None:
    """With one character per id and no `rstrip`, ids and string are the same."""
    environment = pytest.importorskip("jinja2").Environment()

    class Characters:
        kind, stripping = "test", frozenset()
        special_tokens = MappingProxyType({name: -1 - i for i, name in enumerate((*chat.TURNS, chat.BEGIN))})
        encode = staticmethod(lambda text: list(map(ord, text)))

    names = {i: name for name, i in Characters.special_tokens.items()}
    names[Characters.special_tokens[chat.BEGIN]] = ""  # which the tokenizer adds, not the template
    talk = TALK if "system" in chat.ROLES[member] else TALK[1:]
    ids = chat.chat_ids(Characters, talk, member, header)
    template = environment.from_string(JINJA[member])
    said = template.render(messages=talk, add_generation_prompt=header)
    assert said == "".join(names[i] if i in names else chr(i) for i in ids)


def test_a_template_is_added_where_there_is_none(tmp_path: Path) -> None:
    class Own(tokenizers.ByteTokenizer):
        kind = "huggingface"
        special_tokens = MappingProxyType({name: 260 + i for i, name in enumerate(chat.TURNS)})

    endings.write(tmp_path, CFG, Own())
    path = tmp_path / "tokenizer_config.json"
    assert json.loads(path.read_text())["chat_template"] == JINJA["mini"]
    path.write_text(json.dumps({"chat_template": "own", "eos_token": "x"}))
    endings.write(tmp_path, dataclasses.replace(CFG, member="medium"), Own())
    assert json.loads(path.read_text()) == {"chat_template": "own", "eos_token": "x"}
    ends = endings.special_ids(Own(), 320)["eos_token_id"]
    assert ends == [257, 263, 264] and endings.special_ids(None, 320)["eos_token_id"] is None


def test_a_run_trained_on_bytes_is_exported_with_all_that_ends_its_replies(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, mup=None)
    run, data = tmp_path / "run", tmp_path / "data"
    specs = huggingface.leaves_of(cfg)
    forms = {f"params.{leaf}": (spec.shape, np.dtype("float32")) for leaf, spec in specs.items()}
    rng = np.random.default_rng(0)
    run.mkdir(), data.mkdir()
    with streaming.stream(run / "checkpoints", 0, forms, {}) as put:
        for leaf, spec in specs.items():
            stacked = spec.axes[0] == "layers"
            for layer in range(cfg.layers) if stacked else [None]:
                shape = spec.shape[1:] if stacked else spec.shape
                put(f"params.{leaf}", layer, rng.normal(0, 0.2, shape).astype(np.float32))
    (data / "manifest.json").write_text(json.dumps({"tokenizer": {"kind": "bytes"}}))
    record = {"config": {"model": dataclasses.asdict(cfg), "data": {"folder": str(data)}}}
    (run / "config.json").write_text(json.dumps(record))
    convert.export_run(run, tmp_path / "out")
    ours, theirs = phi3_jax.load(run), phi3_jax.load(f"hf:{tmp_path / 'out'}")
    assert ours.stop_ids == theirs.stop_ids == (257,) and theirs.tokenizer.kind == "huggingface"
    listed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (listed["bos_token_id"], listed["eos_token_id"], listed["pad_token_id"]) == (256, 257, 258)
    first, second = (Engine(m).generate(["abc"], 8)[0] for m in (ours, theirs))
    assert (first.ids, first.text) == (second.ids, second.text)
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 257
