"""The text of a reply: what its tokens add to the text before them.

A decoder is no map from tokens to strings that could be laid end to end: sentencepiece's and Phi-3's take one blank off
the front of what they decode, and the bytes of one character may lie in several tokens. So a reply is never decoded
alone: its text is text(end of the prompt + reply) without text(end of the prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # how decoders write bytes that are no character, and those of one that is not whole yet
REACH = 16  # tokens of a prompt's end that are looked at: text that any decoder takes off the front lies well inside


class Decoder(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    @property
    def control_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Continuation:
    """The text of a reply, piece by piece as its tokens come; the pieces joined are the reply's text.

    Each token costs the decoding of the few tokens since the last whole character, whatever the lengths of prompt and
    reply. A piece never ends inside a character, and never changes once it is given.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._ids = prompt_end(
            tokenizer, prompt
        )  # what is decoded together: tokens before the reply's open end, and that
        self._open = len(self._ids)  # where the open end begins
        self._lead = self._decode(self._ids)

    def add(self, token: int) -> str:
        """The text that became certain with one more token."""
        self._ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(BROKEN):
            return ""
        rest = self._ids[self._open :]
        if _stands_alone(self._decode(rest)):
            self._ids = rest
        self._open, self._lead = len(self._ids), self._decode(self._ids)
        return piece

    def end(self) -> str:
        """The text that was still open, where no token follows."""
        return self._piece() if len(self._ids) > self._open else ""

    def _piece(self) -> str:
        text, rest = self._decode(self._ids), self._ids[self._open :]
        if text.startswith(self._lead):
            return text[len(self._lead) :]
        whole = self._lead.rstrip(BROKEN)  # a character that the prompt left half became whole
        if whole != self._lead and text.startswith(whole):
            return text[len(whole) :]
        return self._decode(rest)  # byte fallback spells a whole run of bytes as broken when its last character is


def added(tokenizer: Decoder, before: Sequence[int], token: int) -> str:
    """What one token adds to the text of those before it; a sign for broken text where it ends inside a character."""
    text = Continuation(tokenizer, before)
    return text.add(token) + text.end()


def prompt_end(tokenizer: Decoder, prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, as many as a reply's text depends on.

    Nothing of it lies before a control token: text begins anew after one (`encode` puts a blank before it there, as at the
    start), so that what `chat_ids` makes of a reply's text is the reply.
    """
    tail = list(prompt[-REACH:])
    start = max((i for i, token in enumerate(tail, 1) if token in tokenizer.control_ids), default=0)
    tail = tail[start:]
    if tokenizer.decode(tail).endswith(BROKEN):
        for half in range(1, min(4, len(tail) + 1)):  # ends inside a character: begin with that
            if not tokenizer.decode(tail[:-half]).endswith(BROKEN):
                return tail[-half:]
    for count in range(1, len(tail)):
        if _stands_alone(tokenizer.decode(tail[-count:])):
            return tail[-count:]
    return tail


def _stands_alone(text: str) -> bool:
    """Whether what follows it is spelled as after all of the text before: not after blanks only, of which a decoder may
    take off one more, nor after the end of a character."""
    return bool(text.strip()) and not text.startswith(BROKEN)
