"""The text of a reply: what its tokens add to the prompt's, whatever the decoder takes off the front."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from phi3_jax.data import tokenizers
from phi3_jax.data.continuation import REACH, Continuation, added, prompt_end

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"
CONTROLS = ("<|endoftext|>", "<|end|>", "<|assistant|>")


def phi3_like(folder: Path, kind: str = "strip") -> tokenizers.Tokenizer:
    """A tokenizer of bytes and a few words whose decoder takes off one blank: as Phi-3's does, or Metaspace."""
    import tokenizers as hf

    words = ["▁", "x", "▁x", "▁▁", "▁▁▁▁", "return", "▁return", "def", "+", "1", "a", "▁a"]
    texts = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    model = hf.Tokenizer(
        hf.models.BPE({t: i for i, t in enumerate(texts)}, [("▁", "x"), ("▁", "▁"), ("▁▁", "▁▁")], unk_token="<unk>",
                      byte_fallback=True)
    )  # fmt: skip
    if kind == "strip":
        model.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
        steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
        model.decoder = hf.decoders.Sequence([*steps, hf.decoders.Strip(" ", 1, 0)])
    else:
        model.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        model.decoder = hf.decoders.Sequence(
            [hf.decoders.ByteFallback(), hf.decoders.Metaspace(prepend_scheme="first", split=False)]
        )
    model.add_special_tokens([hf.AddedToken(t, special=True, normalized=False) for t in CONTROLS])
    model.save(str(folder / "tokenizer.json"))
    return tokenizers.load(folder)


def sentencepiece(folder: Path, **options) -> tokenizers.Tokenizer:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "text").write_text("\n".join(["the cat sat on  the mat", "    return x", "numbers 1 2 3"] * 20))
    trainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return tokenizers.load(folder / "sp.model")


def tiktoken(folder: Path) -> tokenizers.Tokenizer:
    from test_tokenizers import _tiktoken

    pytest.importorskip("tiktoken")
    return tokenizers.load(_tiktoken(folder))


MAKERS = {
    "bytes": lambda _: tokenizers.load("bytes"),
    "strip": phi3_like,
    "metaspace": lambda folder: phi3_like(folder, "metaspace"),
    "sentencepiece": lambda folder: sentencepiece(folder, remove_extra_whitespaces=False),
    "tiktoken": tiktoken,
}
RELEASED = ("phi-3-mini", "phi-3-small")
MAKERS |= {n: (lambda _, n=n: tokenizers.load(SHARED / n)) for n in RELEASED}


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.shared("tokenizers") if n in RELEASED else ()) for n in MAKERS]
)
def tokenizer(request, tmp_path) -> tokenizers.Tokenizer:
    return MAKERS[request.param](tmp_path)


def test_a_reply_cut_anywhere_is_what_it_adds(tokenizer) -> None:
    for text in ("def x:\n    return x + 1\n\n  a", "x    x", "    ", "a日本語 🙂é x\n 日本"):
        ids = tokenizer.encode(text)
        for cut in range(1, len(ids) + 1):
            got = tokenizer.continuation(ids[:cut], ids[cut:])
            heads = [tokenizer.decode(ids[:i]) for i in range(cut + 1)]
            head = next(h for h in reversed(heads) if not h.endswith("\ufffd"))  # a character cut in two is the reply's
            assert head + got == tokenizer.decode(ids), (text, cut)


def test_a_blank_at_the_front_is_the_replys(tmp_path) -> None:
    """What decoding a reply alone loses: the positive control of the test above."""
    for kind in ("strip", "metaspace"):
        made = phi3_like(tmp_path, kind)
        ids = made.encode("x    return")
        assert made.decode(ids[1:]) != "    return" == made.continuation(ids[:1], ids[1:])


def test_each_token_keeps_what_it_adds(tokenizer) -> None:
    """Blanks at the front too, which decoding a token alone loses (the control)."""
    lost = 0
    for text in ("def x:\n    return x + 1\n\n  a", "x    x", "the cat"):
        ids = tokenizer.encode(text)
        pieces = [added(tokenizer, ids[:i], ids[i]) for i in range(1, len(ids))]
        assert tokenizer.decode(ids[:1]) + "".join(pieces) == tokenizer.decode(ids), text
        lost += sum(piece != tokenizer.decode([i]) for piece, i in zip(pieces, ids[1:], strict=True))
    assert (lost > 0) == (tokenizer.kind in ("huggingface", "sentencepiece")), "control"
    ids = tokenizer.encode("x\u65e5")
    shown = [added(tokenizer, ids[:i], ids[i]) for i in range(1, len(ids))]
    assert shown[-1].endswith("\u65e5") and all(set(s) <= {"\ufffd", "x"} for s in shown[:-1])


def test_text_begins_anew_after_a_control_token(tmp_path) -> None:
    made = phi3_like(tmp_path)
    header, reply = [made.special_tokens["<|assistant|>"]], made.encode("x x")
    assert made.decode(reply) == "x x"  # `encode` put a blank before it
    for prompt in ([], header, [*made.encode("a a"), *header]):
        assert made.continuation(prompt, reply) == "x x"
        assert made.encode(made.continuation(prompt, reply)) == reply, "said again as a turn, it is the same ids"
    assert made.continuation([*header, *made.encode("\n")], reply) == " x x"


def test_pieces_are_whole_characters_and_never_change(tokenizer) -> None:
    """Also of ids that no text has: lone bytes, ids beyond the vocabulary."""
    rng = random.Random(0)
    for _ in range(300):
        low = range(3, 259) if tokenizer.kind in ("huggingface", "sentencepiece") else range(256)
        ids = [rng.choice([rng.choice(low), rng.randrange(tokenizer.vocab_size)]) for _ in range(rng.randint(1, 40))]
        ids = [i for i in ids if i not in tokenizer.control_ids]
        cut = rng.randrange(len(ids) + 1)
        text = Continuation(tokenizer, ids[:cut])
        pieces = [text.add(i) for i in ids[cut:]]
        assert not any(p.endswith("\ufffd") for p in pieces)
        whole, head = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
        if "\ufffd" not in whole and not head.endswith("\ufffd"):
            assert head + "".join(pieces) == whole
        assert "".join(pieces) + text.end() == tokenizer.continuation(ids[:cut], ids[cut:])


def test_a_broken_byte_spoils_no_character_before_it(tmp_path) -> None:
    made = phi3_like(tmp_path)
    ids = [1 + byte for byte in "日".encode() + b"\xe6"]
    assert made.decode(ids) == "\ufffd" * 4 and made.continuation([258], ids) == "日\ufffd"


@pytest.mark.parametrize("ids", ([10**6], [-1], [300, 2**31 - 1, 2**40], list(range(255, 1200))))
def test_ids_that_stand_for_nothing_are_shown_as_nothing(tokenizer, ids) -> None:
    ids = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    x = tokenizer.encode("x")
    assert tokenizer.decode(ids) == "" and tokenizer.continuation(ids, x) == "x" == tokenizer.continuation([], ids + x)


def test_a_long_prompt_costs_no_more_than_a_short_one(tokenizer) -> None:
    """Counted in tokens decoded, prompt and reply of any length."""
    counted, decode = [], tokenizer.decode
    tokenizer.decode = lambda ids: counted.append(len(ids)) or decode(ids)
    ids = tokenizer.encode("x a+1 " * 400)
    assert len(prompt_end(tokenizer, ids)) <= REACH
    del counted[:]
    tokenizer.continuation(ids, ids)
    assert sum(counted) < 16 * len(ids) + 8 * REACH * REACH
