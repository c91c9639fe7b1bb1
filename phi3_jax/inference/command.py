"""The command `launch/generate.py`."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.data.chat import TURNS, chat_ids
from phi3_jax.data.continuation import added
from phi3_jax.data.images import Picture
from phi3_jax.data.pictured import Album
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError
from phi3_jax.inference.engine import Completion, Engine
from phi3_jax.inference.sampling import Sampling
from phi3_jax.interop import loading

EXAMPLE = '--model runs/NAME --prompt "Once upon a time"'


def command(flags: Mapping[str, Any]) -> None:
    """Streams replies to prompts, or holds a dialogue."""
    prompts = [*flags["prompt"], *_lines(flags["file"])]
    if not prompts and not flags["chat"]:
        raise UserError(f"no --prompt; for example {EXAMPLE}")
    if flags["system"] and not flags["chat"]:
        raise UserError("--system needs --chat: only a dialogue has a system message")
    if any(not p for p in prompts):
        raise UserError("--prompt is empty; give at least one character")
    sampling = Sampling(**{field.name: flags[field.name] for field in dataclasses.fields(Sampling)})
    model = loading.load(flags["model"], adapter=flags["adapter"])
    if model.tokenizer is None:
        kept = loading.kept_folder(flags["model"])
        raise UserError(f"{flags['model']} has no tokenizer; put its files into {kept}")
    seen = _Seen(model, flags)
    engine = Engine(model, rope_regime=flags["rope_regime"])
    if flags["chat"]:
        return _chat(engine, model.tokenizer, flags, sampling, prompts, seen)
    _remark_on_control_tokens(prompts, model.tokenizer)
    if seen.pictures:
        encoded = [seen.ids(engine, model.tokenizer, [{"role": "user", "content": p}]) for p in prompts]
        print(f"notice: the prompt is a user's turn in chat template {engine.template.name}", file=sys.stderr)
    else:
        encoded = [model.tokenizer.encode(p) for p in prompts]
    shown = seen.images(len(prompts))
    room = min(model.config.context - len(ids) for ids in encoded)
    more = flags["max_new_tokens"] or (min(256, room) if room > 0 else 256)
    start = time.perf_counter()
    if len(prompts) == 1:
        replies = engine.generate(encoded, more, sampling, flags["stop"], on_text=_say, **shown)
        print()
    else:
        replies = engine.generate(encoded, more, sampling, flags["stop"], **shown)
        for prompt, reply in zip(prompts, replies, strict=True):
            print(f"--- {prompt}\n{reply.text}")
    if flags["logprobs"]:
        for prompt_ids, reply in zip(encoded, replies, strict=True):
            _print_logprobs(prompt_ids, reply, model.tokenizer)
    count, seconds = sum(len(r.ids) for r in replies), time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


class _Seen:
    """The pictures of --image, which every prompt is given.

    Raises:
      UserError: a text model, or files that are no pictures.
    """

    def __init__(self, model: loading.Model, flags: Mapping[str, Any]) -> None:
        if not flags["image"]:
            if lost := [f"--{name}" for name in ("crops", "exif") if flags[name]]:
                raise UserError(f"{' and '.join(lost)} without --image; name a picture, or leave it out")
            self.pictures: list[Picture] = []
            self._counts: list[int] = []
            self._crops = None
            return
        album = Album(model.config, flags["crops"], flags["exif"])
        self.pictures = album.open(flags["image"])
        self._counts, self._crops = album.counts(self.pictures), album.crops

    def ids(self, engine: Engine, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation with the pictures in it."""
        return chat_ids(tokenizer, messages, engine.template.name, pictures=self._counts)

    def images(self, prompts: int) -> dict[str, Any]:
        """Arguments of `Engine.generate`."""
        return {"images": [self.pictures] * prompts, "crops": self._crops} if self.pictures else {}


def _lines(path: str | None) -> list[str]:
    """Prompts of a file, one a line: a newline ends it (or CR LF), and no other character does."""
    if path is None:
        return []
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path} cannot be read as UTF-8 text: {error}") from error
    return [line for line in re.split("\r?\n", text) if line]


def _remark_on_control_tokens(prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Text makes no control tokens: whoever types them gets a line that says so."""
    names = {*tokenizer.special_tokens, *TURNS}
    if typed := sorted(name for name in names if any(name in prompt for prompt in prompts)):
        print(
            f"notice: {', '.join(typed)} in a prompt is plain text to the model, not a control token; --chat makes the "
            "turns of a dialogue",
            file=sys.stderr,
        )


def _say(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _print_logprobs(prompt: Sequence[int], reply: Completion, tokenizer: Tokenizer) -> None:
    for i, logprob in enumerate(reply.logprobs):
        print(f"{logprob:9.4f}  {added(tokenizer, [*prompt, *reply.ids[:i]], reply.ids[i])!r}")


def _chat(
    engine: Engine,
    tokenizer: Tokenizer,
    flags: Mapping[str, Any],
    sampling: Sampling,
    prompts: list[str],
    seen: _Seen,
) -> None:
    """A dialogue: the prompts given, then lines of stdin until it ends."""
    template = engine.template
    print(f"notice: chat template {template.name}, {template.why}", file=sys.stderr)
    messages = [{"role": "system", "content": flags["system"]}] if flags["system"] else []
    asked = iter(prompts)
    while True:
        prompt = next(asked, None)
        if prompt is None and prompts and not sys.stdin.isatty():
            return
        if prompt is None:
            print("> ", end="", flush=True)
            prompt = sys.stdin.readline()
            if not prompt:
                return print()
            prompt = prompt.rstrip("\n")
            if not prompt:
                continue
        else:
            print(f"> {prompt}")
        messages.append({"role": "user", "content": prompt})
        ids = seen.ids(engine, tokenizer, messages)
        more = flags["max_new_tokens"] or max(1, min(512, engine.config.context - len(ids)))
        (reply,) = engine.generate([ids], more, sampling, flags["stop"], on_text=_say, **seen.images(1))
        print()
        messages.append({"role": "assistant", "content": reply.text})
