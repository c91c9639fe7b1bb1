"""A reply while it is written, and when it is done: tokens, text, and where it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from phi3_jax.data.continuation import Continuation
from phi3_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """A reply.

    Attributes:
      ids: its tokens, without the stop id; text: what they add to the prompt's text (`data.continuation`), cut before a
        stop string.
      logprobs: of each token under the model, in nats.
      finish: "stop" (a stop id or string) or "length".
      prompt_tokens: of the prompt.
    """

    ids: list[int]
    text: str
    logprobs: list[float]
    finish: str
    prompt_tokens: int


class Reply:
    """One row's tokens and text, and where it stops."""

    def __init__(
        self,
        row: int,
        prompt: list[int],
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...],
        stop_ids: frozenset[int],
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.row, self.draw, self._prompt = row, row, len(prompt)
        self._decoded = None if tokenizer is None else Continuation(tokenizer, prompt)
        self._stop, self._stop_ids, self._on_text = stop, stop_ids, on_text
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._text, self._said, self._finish = "", 0, "length"

    def take(self, token: int, logprob: float) -> bool:
        """Adds a token; False when the reply has ended."""
        if token in self._stop_ids:
            self._finish = "stop"
            return False
        self._ids.append(token)
        self._logprobs.append(logprob)
        if self._decoded is None:
            return True
        if self._write(self._decoded.add(token)):
            return False
        self._say(held=max([_overlap(self._text, s) for s in self._stop], default=0))
        return True

    def _write(self, piece: str) -> bool:
        """Adds to the text; whether a stop string ended it, which is cut off."""
        self._text += piece
        found = [self._text.find(s, max(0, len(self._text) - len(piece) - len(s))) for s in self._stop] if piece else []
        if any(i >= 0 for i in found):
            self._text, self._finish, self._decoded = self._text[: min(i for i in found if i >= 0)], "stop", None
            return True
        return False

    def _say(self, held: int = 0) -> None:
        end = len(self._text) - held
        if self._on_text is not None and end > self._said:
            self._on_text(self.row, self._text[self._said : end])
            self._said = end

    def finished(self) -> Completion:
        """What was said, with the text that was held back."""
        if self._decoded is not None:
            self._write(self._decoded.end())
        self._say()
        return Completion(self._ids, self._text, self._logprobs, self._finish, self._prompt)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
