"""A chat server on this machine that says what a script says, by request: an answer, a status, silence."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = dict[str, Any] | str | int
NOUNS = [
    "river", "bridge", "stone", "market", "lantern", "engine", "garden", "letter", "number", "circle", "winter",
    "farmer", "pupil", "window", "copper",
]  # fmt: skip
FORMS = (
    "The {0} that we have {3} one {1} and then the other {2}.",
    "With {4} of them a {0} {3} what no {1} can.",
    "Whoever has a {0} to spare {3} the {1} of a neighbour, not the {2}.",
    "If {4} is the number, be sure that it {3} every {0}.",
    "Between {0} and {1} there have been {4} more, of which each {3} a {2}.",
    "So the old {0} {3} itself with the help of a {1}.",
    "Let a {2} be given; to find the {0} we ask which {1} {3} it.",
    "Nobody that lived here had seen how a {1} {3} the {0}.",
)
VERBS = [
    "carries", "divides", "follows", "measures", "repairs", "compares", "balances", "counts", "explains", "moves",
    "gathers", "shortens",
]  # fmt: skip


def prose(prompt: str, sentences: int = 14) -> str:
    """Text in English sentences, a function of the prompt alone."""
    draw = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    forms = [draw.sample(FORMS, len(FORMS)) for _ in range(-(-sentences // len(FORMS)))]
    said = [form.format(*draw.choices(NOUNS, k=3), draw.choice(VERBS), draw.randrange(99)) for f in forms for form in f]
    return " ".join(said[:sentences])


def obliging(prompt: str) -> str:
    """What a good model would write for the templates that come along."""
    draw = random.Random(prompt)
    if "assert statements" in prompt:
        n = draw.randrange(2, 10**6)
        return (
            f"Write a function add_{n}(x) that adds {n} to a number. {prose(prompt, 3)}\n\n```python\ndef add_{n}(x):\n"
            f'    """x plus {n}."""\n    return x + {n}\n```\n\n```python\nassert add_{n}(0) == {n}\nassert add_{n}(1) == '
            f"{n + 1}\nassert add_{n}(-{n}) == 0\n```"
        )
    if "Answer: NUMBER" in prompt:
        a, b = draw.randrange(2, 999), draw.randrange(2, 999)
        return (
            f"{prose(prompt, 4)} There are {a} and {b} more. How many are there?\n\nWe add: {a} + {b} = {a + b}.\n\n"
            f"Answer: {a + b}\n\n```python\nanswer = {a} + {b}\n```"
        )
    return f"Sure! Here is the text:\n\n{prose(prompt)}"


def reply(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of an answer."""
    usage = {"prompt_tokens": 7, "completion_tokens": len((text or "").split())}
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": usage}


class Scripted:
    """A server whose answer to each request is `script(prompt, how many requests there were before)`.

    A step is the body of an answer, a text (said as it is), a status; or (status, headers).

    Attributes:
      prompts: of all requests, in the order in which they came; bodies likewise; times of their coming.
    """

    def __init__(self, script: Callable[[str, int], Any] = lambda prompt, _: obliging(prompt)) -> None:
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, {}, json.dumps({"data": [{"id": "scripted-1"}]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    before = len(outer.prompts)
                    outer.prompts.append(prompt)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                step = script(prompt, before)
                status, headers = (
                    (step, {}) if isinstance(step, int) else step if isinstance(step, tuple) else (200, {})
                )
                found = reply(step) if isinstance(step, str) else step if isinstance(step, dict) else {}
                self._send(status, headers, json.dumps(found).encode())

            def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    pass  # whoever asked is gone

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
