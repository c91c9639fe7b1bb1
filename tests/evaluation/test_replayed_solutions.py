"""A model that says the reference solutions token for token scores 100 %: real decoding, real stops, real sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

pytest.importorskip("lm_eval")
from suite_fakes import SHARED, confined, real, run, write

import phi3_jax
from phi3_jax.data import tokenizers
from phi3_jax.evaluation.harness import HarnessLM
from phi3_jax.evaluation.suites import phi3_report
from phi3_jax.inference.engine import Engine
from phi3_jax.interop.loading import Model
from phi3_jax.models.spec import init_params

PUBLISHED = SHARED.parent / "tokenizers"


class Replay(Engine):
    """An engine whose model says `said[prompt ids]`: all but the forward pass is `Engine`'s."""

    said: dict[tuple[int, ...], list[int]]

    def _run(self, prompts, replies, more, sampling, album, before) -> None:
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = [*self.said[tuple(prompt.ids)], self.tokenizer.eos_id]
            assert len(ids) <= more
            any(not reply.take(token, 0.0) for token in ids)


class Replayed(HarnessLM):
    """Replies `answer(row)` after its prompt, cut into tokens as text after that prompt is."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, answer) -> None:
        cfg = phi3_jax.proxy("mini", "pico", "clean", vocab=tokenizer.vocab_size, context=8192)
        model = Model(init_params(cfg, 0), cfg, tokenizer, jnp.float32)
        super().__init__(Replay(model))
        self.answer = answer

    def generate_until(self, requests, **options):
        self.engine.said = {}
        for request in requests:
            prompt = self.tok_encode(request.args[0])
            whole = self.tok_encode(request.args[0] + self.answer(request.doc))
            joined = whole[: len(prompt)] != prompt  # the prompt's last token goes on into the answer
            ids = self.codec.encode(self.answer(request.doc)) if joined else whole[len(prompt) :]
            self.engine.said[tuple(prompt)] = ids
        return super().generate_until(requests, **options)


def plain(row: dict) -> str:
    return row["target"] + ("\n[DONE]\n" if row["benchmark"] == "mbpp" else "\n\ndef next():\n    pass\n")


def fenced(row: dict) -> str:
    code = row["target"] if row["benchmark"] == "mbpp" else row["question"] + row["target"]
    return f"Here it is:\n\n```python\n{code}\n```\nIt works."


def score(tokenizer: tokenizers.Tokenizer, data: Path, name: str, answer=plain, chat: bool = False) -> dict:
    tasks = phi3_report.build([name], data_dir=data, allow_code_execution=True)
    results = run(Replayed(tokenizer, answer), tasks, **({"apply_chat_template": True} if chat else {}))
    return next(row for row in phi3_report.summarise(results, tasks) if row["task"] == name)


@confined
@real
@pytest.mark.shared("tokenizers")
@pytest.mark.parametrize("member", ("mini", "small"))
def test_all_164_reference_solutions_of_humaneval_pass(member: str) -> None:
    row = score(tokenizers.load(PUBLISHED / f"phi-3-{member}"), SHARED, "humaneval")
    assert (row["value"], row["n"]) == (1, 164)


@pytest.fixture
def blank_taking(tmp_path: Path) -> tokenizers.Tokenizer:
    """Bytes behind a decoder that takes one blank off the front, as Phi-3's does; runs of four blanks are a token."""
    import tokenizers as hf

    texts = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "▁▁▁▁"]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    model = hf.Tokenizer(
        hf.models.BPE({t: i for i, t in enumerate(texts)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")])
    steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    model.decoder = hf.decoders.Sequence([*steps, hf.decoders.Strip(" ", 1, 0)])
    roles = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]
    model.add_special_tokens([hf.AddedToken(name, rstrip=name != "<|endoftext|>", normalized=False) for name in roles])
    model.save(str(tmp_path / "tokenizer.json"))
    return tokenizers.load(tmp_path)


SOLUTIONS = {
    "f0": ("def f0(x):\n", "    return x + 0\n"),
    "f1": ("def f1(x):\n", "    if x:\n        return x + 1\n    return 1\n"),
    "f2": ("import math\n\ndef f2(x):\n", "    # a step\n\n    y = math.floor(x)\n    return y + 2\n"),
    "f3": ("def f3(x):\n", "\n    y = 3\n    return x + y\n"),
}
DOC = '    """What it gives."""\n'


def code(folder: Path, name: str) -> Path:
    """Our own rows of HumanEval's and MBPP's form."""
    folder.mkdir()
    write(folder, name)
    file = folder / name / "test.jsonl"
    first, rows = json.loads(file.read_text().split("\n")[0]), []
    for i, (entry, (head, body)) in enumerate(SOLUTIONS.items()):
        row = first | {"id": f"{name}/{i}", "target": body if name == "humaneval" else head + body}
        if name == "humaneval":
            row |= {
                "question": head + DOC,
                "entry_point": entry,
                "test": f"def check(f):\n    assert f(4) == 4 + {entry[1]}\n",
            }
        else:
            row |= {"question": f"Add {i}.", "test_list": [f"assert {entry}(4) == 4 + {i}"]}
        rows.append(json.dumps(row))
    file.write_text("\n".join(rows) + "\n")
    return folder


@confined
@pytest.mark.parametrize(
    ("name", "answer", "chat"),
    [("humaneval", plain, False), ("humaneval", fenced, True), ("mbpp", plain, False), ("mbpp", fenced, False),
     ("mbpp", fenced, True)],
)  # fmt: skip
def test_solutions_of_our_own_pass(blank_taking, tmp_path, name, answer, chat) -> None:
    row = score(blank_taking, code(tmp_path / "data", name), name, answer, chat)
    assert (row["value"], row["n"]) == (1, len(SOLUTIONS))


@confined
def test_a_solution_that_lost_a_blank_does_not_pass(blank_taking, tmp_path) -> None:
    """The positive control: of four solutions those of one level of blanks are put right, the others fail."""
    lost = lambda row: row["target"].removeprefix(" ")  # noqa: E731
    assert score(blank_taking, code(tmp_path / "data", "humaneval"), "humaneval", lost)["value"] < 1
