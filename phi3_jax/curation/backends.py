"""Who answers requests for synthetic text: a server, or a model of ours."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phi3_jax.curation.wanted import Request
from phi3_jax.errors import UserError
from phi3_jax.inference.endpoint import Answer, Endpoint

if TYPE_CHECKING:
    from phi3_jax.inference.engine import Engine

TOO_LONG = "too_long"  # how an answer ends whose prompt leaves no room in the context
BATCH = 8  # rows at a time of a model of ours
Prompts = Mapping[str, tuple[str, bool]]  # {key of a request: its prompt, and whether it is continued as it stands}
Answered = Iterator[tuple[Request, Answer]]


class Backend(Protocol):
    """A model that answers; `name` tells it from others."""

    name: str

    def ask(self, requests: Sequence[Request], prompts: Prompts, known: Collection[str]) -> Answered:
        """Answers to those requests of a part whose keys are not known, in any order.

        Raises:
          UserError: no further answer can be had; all that came before it have been given.
        """


class Server:
    """A model behind an OpenAI-compatible server, asked by several threads."""

    def __init__(self, url: str, model: str | None, how: Mapping[str, Any], at_once: int, timeout: float) -> None:
        """
        Args:
          model: name that the server knows; None: the only one that it has.
          how: temperature, top_p, max_tokens.
          at_once: requests under way.
          timeout: seconds for one answer.

        Raises:
          UserError: no address, or a server of several models of which none is named.
        """
        kept = "the answers so far are kept, type the same again to go on"
        self._endpoint = functools.partial(
            Endpoint, url, flag="--endpoint", who="model", kept=kept, timeout=timeout, retries=4
        )
        if model is None:
            names = self._endpoint("behind it").models()
            if len(names) != 1:
                raise UserError(f"{url} has the models {', '.join(names) or 'none'}; name one with --endpoint_model")
            (model,) = names
        self.name, self._how, self._at_once = model, dict(how), at_once

    def ask(self, requests: Sequence[Request], prompts: Prompts, known: Collection[str]) -> Answered:
        endpoint = self._endpoint(self.name)

        def answer(request: Request) -> Answer:
            messages = [{"role": "user", "content": prompts[request.key][0]}]
            return endpoint.chat(messages, **self._how, seed=request.draw)

        todo = iter([request for request in requests if request.key not in known])
        problem: UserError | None = None
        with ThreadPoolExecutor(self._at_once) as pool:
            waiting: dict[Future[Answer], Request] = {}
            while True:
                while problem is None and len(waiting) < self._at_once and (request := next(todo, None)) is not None:
                    waiting[pool.submit(answer, request)] = request
                if not waiting:
                    break
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    request = waiting.pop(done)
                    try:
                        found = done.result()
                    except UserError as error:
                        problem = problem or error
                        continue
                    yield request, found
        if problem is not None:
            raise problem


class Ours:
    """A model of ours, by its weights: a run, a Hugging Face folder, or a quantised run.

    Each request draws by a number of its own, and rows are batched in the order of their part, so that an answer does not
    depend on which others are there already.
    """

    def __init__(self, path: str, how: Mapping[str, Any], seed: int) -> None:
        """
        Raises:
          UserError: nothing usable at `path`, or a model without a tokenizer.
        """
        from phi3_jax.interop import loading

        self._path, self._how, self._seed = path, dict(how), seed
        config = loading.config_of(path)
        self.name = f"{config.name}@{_content(path)}"

    @functools.cached_property
    def _engine(self) -> Engine:
        from phi3_jax.inference.engine import Engine
        from phi3_jax.interop import loading

        model = loading.load(self._path)
        if model.tokenizer is None:
            raise UserError(f"{self._path} has no tokenizer; put its files into {loading.kept_folder(self._path)}")
        return Engine(model, BATCH)

    def ask(self, requests: Sequence[Request], prompts: Prompts, known: Collection[str]) -> Answered:
        from phi3_jax.inference.sampling import Sampling

        sampling = Sampling(temperature=self._how["temperature"], top_p=self._how["top_p"], seed=self._seed)
        room = self._how["max_tokens"]
        for at in range(0, len(requests), BATCH):
            group = requests[at : at + BATCH]
            if all(request.key in known for request in group):
                continue
            ids = {request.key: self._ids(*prompts[request.key]) for request in group}
            able = [request for request in group if len(ids[request.key]) + room <= self._engine.config.context]
            for request in group:
                if request not in able and request.key not in known:
                    yield request, Answer("", TOO_LONG)
            if not able:
                continue
            replies = self._engine.generate(
                [ids[r.key] for r in able], room, sampling, draws=[request.draw for request in able]
            )
            for request, reply in zip(able, replies, strict=True):
                if request.key not in known:
                    yield request, Answer(reply.text, reply.finish, reply.prompt_tokens, len(reply.ids))

    def _ids(self, prompt: str, bare: bool) -> list[int]:
        """A user's turn where the model's tokenizer has turns; else the prompt and a blank line."""
        from phi3_jax.data.chat import TURNS, chat_ids

        engine = self._engine
        assert engine.tokenizer is not None  # `_engine` has seen to it
        if bare:
            return engine.encode(prompt)
        if TURNS[1] in engine.tokenizer.special_tokens:
            return chat_ids(engine.tokenizer, [{"role": "user", "content": prompt}], engine.template.name)
        return engine.encode(f"{prompt}\n\n")


def _content(path: str) -> str:
    """Sixteen hex digits of a model's weights."""
    from phi3_jax.interop import loading
    from phi3_jax.interop.content import content

    if not loading.is_quantised(path):
        return content(loading.open_weights(path))
    digest = hashlib.sha256()
    for file in sorted(each for each in Path(path).rglob("*") if each.is_file() and not each.name.startswith(".")):
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
