"""A model behind an OpenAI-compatible server, for judges and for synthetic text: the standard library alone.

What may pass is tried again: no connection, 429 (after the time that the server asks for), 5xx, an answer of another form.
The key is that of the environment variable OPENAI_API_KEY, where it is set.
"""

from __future__ import annotations

import dataclasses
import email.utils
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from phi3_jax.errors import UserError

PATIENCE = 120.0  # seconds that a server may ask to wait; beyond, the command stops with what it has
SAID = 200  # characters of a server's own explanation that an error shows
MOST_BYTES = 1 << 26  # of one answer
_Found = TypeVar("_Found")


class NoAnswerError(ValueError):
    """What a server sent is no answer; asked again it may be one."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One reply.

    Attributes:
      finish: "stop", "length" (cut at the most tokens), or "refused" where the server says so.
      prompt_tokens, tokens: read and written, as the server counts them; 0 where it does not.
    """

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    tokens: int = 0


class Endpoint:
    """A model of a server: POST {url}/chat/completions. May be called by several threads.

    Called with a prompt it gives the text of the most likely answer, as a judge does. A prompt with the attributes `system`
    and `user` is sent as two messages.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        flag: str = "--judge",
        who: str = "judge",
        kept: str = "the replies and judgements so far are saved, run again to go on",
        timeout: float = 120.0,
        retries: int = 3,
        pause: float = 1.0,
    ) -> None:
        """
        Args:
          url: such as http://localhost:8000/v1.
          model: name that the server knows.
          flag, who, kept: of the errors: where the address was typed, what the model is there, and the way out.
          timeout: seconds for one answer.
          retries: further attempts after a failure that may pass.
          pause: seconds before the first of them; doubles each time.

        Raises:
          UserError: not an http(s) address.
        """
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(
                f"{flag} {url}: give the address of an OpenAI-compatible server, as http://localhost:8000/v1"
            )
        self._base, self.model = url.rstrip("/"), model
        self._who, self._kept = who, kept
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._open, self._opening = 0.0, threading.Lock()  # when the server wants to be asked again

    def __call__(self, prompt: str) -> str:
        """The server's answer at temperature 0.

        Raises:
          UserError: none came, in one line.
        """

        def read(answer: Any) -> str:
            text = answer["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise NoAnswerError("its answer holds no text")
            return text

        return self._post({"messages": messages_of(prompt), "temperature": 0, "max_tokens": 2048}, read)

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Answer:
        """An answer to a conversation; an empty one is an answer, too.

        Args:
          settings: what the request says besides, such as temperature, top_p, max_tokens, seed.

        Raises:
          UserError: none came, in one line.
        """
        return self._post({"messages": list(messages), **settings}, _answer)

    def models(self) -> list[str]:
        """The names of the models that the server has (GET {url}/models).

        Raises:
          UserError: it does not say.
        """
        found = self._request("/models", None, lambda answer: [str(each["id"]) for each in answer["data"]])
        return found

    def _post(self, body: Mapping[str, Any], read: Any) -> Any:
        return self._request("/chat/completions", {"model": self.model, **body}, read)

    def _request(self, path: str, body: Mapping[str, Any] | None, read: Any) -> Any:
        """What `read` finds in the answer to a request.

        Raises:
          UserError: no answer after all attempts, or one that no attempt would change.
        """
        url = self._base + path
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            self._wait()
            request = urllib.request.Request(url, content, headers, method="GET" if body is None else "POST")
            try:
                return read(json.loads(self._content(request)))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}{_said(error)}"
                if error.code != 429 and error.code < 500:  # asking again will not help
                    break
                wait = _retry_after(error.headers.get("Retry-After"))
                if wait > PATIENCE:
                    problem = f"HTTP {error.code}, to be asked again after {wait:,.0f} s, more than {PATIENCE:g}"
                    break
                with self._opening:
                    self._open = max(self._open, time.monotonic() + wait)
            except NoAnswerError as error:
                problem = str(error)
            except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                problem = "its answer is not that of an OpenAI-compatible server"
        raise UserError(f"the {self._who} {self.model} at {url}: {problem}; {self._kept}")

    def _wait(self) -> None:
        """Until the time before which the server wants no request, whichever thread was told so."""
        while (left := self._open - time.monotonic()) > 0:
            time.sleep(left)

    def _content(self, request: urllib.request.Request) -> bytes:
        """The bytes of an answer, all of them within the time for one; a server that drips is as slow as one that hangs."""
        end = time.monotonic() + self._timeout
        pieces, size = [], 0
        with urllib.request.urlopen(request, timeout=self._timeout) as answer:
            while piece := answer.read1(1 << 16):
                size += len(piece)
                if size > MOST_BYTES:
                    raise NoAnswerError(f"its answer is longer than {MOST_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
                pieces.append(piece)
            if answer.length:  # as `read` would say of a connection that was cut
                raise http.client.IncompleteRead(b"", answer.length)
        return b"".join(pieces)


def messages_of(prompt: str) -> list[dict[str, str]]:
    """The messages of a prompt, its system part apart where it has one."""
    messages = [{"role": "user", "content": str(getattr(prompt, "user", prompt))}]
    if system := str(getattr(prompt, "system", "")).strip():
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _answer(answer: Any) -> Answer:
    choice, usage = answer["choices"][0], answer.get("usage") or {}
    message, reason = choice["message"], choice.get("finish_reason")
    text, refusal = message.get("content"), message.get("refusal")
    if not isinstance(text, str) and text is not None:
        raise NoAnswerError("its answer holds no text")
    finish = "refused" if refusal or reason == "content_filter" else "length" if reason == "length" else "stop"
    read, written = (value if isinstance(value := usage.get(name), int) else 0
                     for name in ("prompt_tokens", "completion_tokens"))  # fmt: skip
    return Answer(text or "", finish, read, written)


def _retry_after(text: str | None) -> float:
    """Seconds of a Retry-After header, which holds a number or a date (RFC 9110, section 10.2.3); 0 without one."""
    if not text:
        return 0.0
    try:
        return max(0.0, float(text)) if float(text) < float("inf") else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _said(error: urllib.error.HTTPError) -> str:
    """What a server explains in the body of an error, in brackets."""
    try:
        found = json.loads(error.read(1 << 16))
        found = found.get("error", found)
        said = found.get("message") if isinstance(found, dict) else found
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return ""
    return f" ({' '.join(said.split())[:SAID]})" if isinstance(said, str) and said.strip() else ""
