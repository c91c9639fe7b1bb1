"""The command `launch/generate.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from phi3_jax import commands, loading
from phi3_jax.data.chat import ROLES, chat_ids
from phi3_jax.errors import UserError
from phi3_jax.inference.engine import Completion, Engine
from phi3_jax.inference.sampling import Sampling

FLAGS = {
    "model": str, "prompt": list, "file": str, "chat": bool, "system": str, "max_new_tokens": int, "temperature": float,
    "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "seed": int, "stop": list, "logprobs": bool,
    "rope_regime": str,
}  # fmt: skip
EXAMPLE = '--model runs/NAME --prompt "Once upon a time"'


def command(arguments: Sequence[str]) -> None:
    """Streams replies to prompts, or holds a dialogue."""
    flags = commands.parse(arguments, FLAGS, ("model",), EXAMPLE)
    prompts = [*flags.get("prompt", []), *_lines(flags.get("file"))]
    if not prompts and not flags.get("chat"):
        raise UserError(f"no --prompt; for example {EXAMPLE}")
    if "system" in flags and not flags.get("chat"):
        raise UserError("--system needs --chat: only a dialogue has a system message")
    if any(not p for p in prompts):
        raise UserError("--prompt is empty; give at least one character")
    fields = {
        k: flags[k] for k in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed") if k in flags
    }
    sampling = Sampling(**fields)
    model = loading.load(flags["model"])
    if model.tokenizer is None:
        raise UserError(f"{flags['model']} has no tokenizer; put its files into {Path(flags['model']) / loading.KEPT}")
    engine = Engine(model, rope_regime=flags.get("rope_regime", "auto"))
    if flags.get("chat"):
        return _chat(engine, flags, sampling, prompts)
    encoded = [model.tokenizer.encode(p) for p in prompts]
    room = min(model.config.context - len(ids) for ids in encoded)
    more = flags.get("max_new_tokens", min(256, room) if room > 0 else 256)
    start = time.perf_counter()
    if len(prompts) == 1:
        replies = engine.generate(encoded, more, sampling, flags.get("stop", ()), on_text=_say)
        print()
    else:
        replies = engine.generate(encoded, more, sampling, flags.get("stop", ()))
        for prompt, reply in zip(prompts, replies, strict=True):
            print(f"--- {prompt}\n{reply.text}")
    if flags.get("logprobs"):
        for reply in replies:
            _print_logprobs(reply, engine)
    count, seconds = sum(len(r.ids) for r in replies), time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in Path(path).read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {path} cannot be read as UTF-8 text: {error}") from error


def _say(_: int, text: str) -> None:
    print(text, end="", flush=True)


def _print_logprobs(reply: Completion, engine: Engine) -> None:
    for token, logprob in zip(reply.ids, reply.logprobs, strict=True):
        print(f"{logprob:9.4f}  {engine.tokenizer.decode([token])!r}")


def _chat(engine: Engine, flags: dict, sampling: Sampling, prompts: list[str]) -> None:
    """A dialogue: the prompts given, then lines of stdin until it ends."""
    member = "moe" if engine.config.experts else engine.config.member
    if member not in ROLES:
        raise UserError(f"{engine.config.label} has no chat template; leave --chat out")
    messages = [{"role": "system", "content": flags["system"]}] if "system" in flags else []
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
        ids = chat_ids(engine.tokenizer, messages, member)
        more = flags.get("max_new_tokens", max(1, min(512, engine.config.context - len(ids))))
        (reply,) = engine.generate([ids], more, sampling, flags.get("stop", ()), on_text=_say)
        print()
        messages.append({"role": "assistant", "content": reply.text})
