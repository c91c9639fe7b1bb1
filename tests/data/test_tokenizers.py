"""Every tokenizer: exact round trips, control strings stay text, the fingerprint follows the content."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"
TEXTS = ["Hello, world", "tabs\tand\n\nlines  of   blanks ", "Grüße, 世界 🙂", "x", "def f(a):\n    return a**2\n"]
CONTROL = "<s>a</s> <|endoftext|><|end|> <|user|>"


def _huggingface(folder: Path) -> Path:
    import tokenizers as hf

    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    model.add_tokens([hf.AddedToken("</s>", special=False), hf.AddedToken("    ", special=False)])
    model.save(str(folder / "tokenizer.json"))
    return folder


def _tiktoken(folder: Path) -> Path:
    ranks = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)]
    (folder / "small.tiktoken").write_bytes(b"".join(lines))
    special = {"<|endoftext|>": len(ranks), "<|end|>": len(ranks) + 1}
    spec = {
        "pattern": r"\s?\S+|\s+",
        "n_vocab": len(ranks) + 2,
        "eos_token": "<|endoftext|>",
        "special_tokens": special,
    }
    (folder / "special_tokens.json").write_text(json.dumps(spec))
    return folder


def _sentencepiece(folder: Path) -> Path:
    import sentencepiece

    sentences = folder / "text"
    sentences.write_text("\n".join(["the cat sat on the mat", "a dog ran in the park", "numbers 1 2 3"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentences), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "sp.model"


def _bytes(folder: Path) -> str:
    return "bytes"


MAKERS = {"bytes": _bytes, "huggingface": _huggingface, "tiktoken": _tiktoken, "sentencepiece": _sentencepiece}


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    return request.param, MAKERS[request.param](tmp_path)


def test_round_trip_and_ids_in_range(made):
    kind, spec = made
    tokenizer = tokenizers.load(spec)
    assert tokenizer.kind == kind
    batch = tokenizer.encode_batch(TEXTS)
    assert batch == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS
    assert min(map(min, batch)) >= 0 and max(map(max, batch)) < tokenizer.vocab_size
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert tokenizer.encode("") == []


def test_control_strings_are_ordinary_text(made):
    _, spec = made
    tokenizer = tokenizers.load(spec)
    ids = tokenizer.encode(CONTROL)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == CONTROL
    assert len(ids) > 10  # positive control: they were spelled out, not dropped


def test_lone_surrogates_do_not_stop_an_export(made):
    tokenizer = tokenizers.load(made[1])
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_fingerprint_follows_the_content(tmp_path):
    folder = _tiktoken(tmp_path)
    first, again = tokenizers.load(folder), tokenizers.load(folder / "small.tiktoken")
    assert first.fingerprint == again.fingerprint != tokenizers.load("bytes").fingerprint
    spec = json.loads((folder / "special_tokens.json").read_text())
    (folder / "special_tokens.json").write_text(json.dumps(spec | {"eos_token": "<|end|>"}))
    changed = tokenizers.load(folder)
    assert changed.eos_id != first.eos_id and changed.fingerprint != first.fingerprint


def test_plain_added_pieces_keep_their_ids(tmp_path):
    tokenizer = tokenizers.load(_huggingface(tmp_path))
    assert len(tokenizer.encode("    ")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "no tokenizer at"),
        ("tokenizer.json", b'{"model": 3}', "not a readable tokenizer.json"),
        ("cut.tiktoken", b"AA== 0\n", "needs special_tokens.json"),
        ("x.model", b"\nrubbish", "not a readable sentencepiece model"),
        ("notes.md", b"hello there", "is neither"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folder_without_tokenizer_names_what_it_wants(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json, \.tiktoken or \.model"):
        tokenizers.load(tmp_path)


@pytest.mark.shared("tokenizers")
def test_published_phi3_tokenizers():
    mini, small = tokenizers.load(SHARED / "phi-3-mini"), tokenizers.load(SHARED / "phi-3-small")
    assert (mini.vocab_size, mini.eos_id) == (32_011, 32_000)
    assert (small.vocab_size, small.eos_id) == (100_352, 100_257)
    for tokenizer, control in ((mini, range(32_000, 32_011)), (small, range(100_256, 100_352))):
        for text in [*TEXTS, CONTROL]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert not set(ids) & set(control)
    assert not {0, 1, 2} & set(mini.encode(CONTROL))
    assert small.encode("Hello world") == [9906, 1917]  # cl100k_base
