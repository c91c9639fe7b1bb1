"""A conversation as a model reads it: its chat template, or plain turns where its tokenizer has no control tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.data import chat

PLAIN = "plain"
PLAIN_STOP = "\n\nUser:"  # what a model that goes on without control tokens begins the next turn with


def template_name(engine: Any) -> str:
    """The name of the model's chat template, or "plain" where the tokenizer has no control tokens (proxies on bytes)."""
    has = engine.tokenizer.special_tokens
    return engine.template.name if {"<|user|>", "<|assistant|>", "<|end|>"} <= set(has) else PLAIN


def prompt_ids(engine: Any, talk: Sequence[Mapping[str, str]], template: str) -> list[int]:
    """Token ids of a conversation that the assistant goes on with."""
    if template != PLAIN:
        return chat.chat_ids(engine.tokenizer, talk, template)
    text = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in talk)
    return engine.tokenizer.encode(f"{text}\n\nAssistant:")


def stops(template: str) -> list[str]:
    """Strings that end a reply."""
    return [PLAIN_STOP] if template == PLAIN else []
