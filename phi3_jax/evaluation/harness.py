"""Our models inside EleutherAI's lm-eval (0.4.13): log-likelihoods, rolling perplexities, generation, chat.

Texts are encoded without a begin-of-text token, as `Model.logits` does and as the released tokenizer files of June
2024 say; only an empty context becomes one (or the end token). What does not fit the context loses its beginning, as
in lm-eval's own Hugging Face model, and is counted in `HarnessLM.cut`.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from phi3_jax import checks
from phi3_jax.data import chat, pictured
from phi3_jax.data.images import Picture
from phi3_jax.errors import UserError
from phi3_jax.evaluation import beginnings
from phi3_jax.evaluation.kept import Kept
from phi3_jax.inference.trees import MOST
from phi3_jax.interop.templates import Template

if TYPE_CHECKING:
    from phi3_jax.inference.engine import Completion
    from phi3_jax.inference.sampling import Sampling

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise UserError("evaluation needs lm-eval; pip install -e '.[eval]'") from missing

IMAGE = "<image>"  # where a picture stands in lm-eval's texts
CHUNK = 16  # batches that go to the engine between two reports of progress
MAX_NEW = 256  # tokens of a reply where a task does not say: lm-eval's default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, by priority
_NAMES = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_DEFAULTS = {"num_beams": 1, "num_return_sequences": 1, "n": 1}  # what some stock tasks spell out

Ids = list[int]


class Engine(Protocol):
    """What is used of `phi3_jax.inference.engine.Engine`."""

    tokenizer: Any
    config: Any
    batch: int

    @property
    def template(self) -> Template: ...

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], shared: int = ...) -> list[Any]: ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        stop: Sequence[str],
        images: Sequence[Sequence[Any]] = ...,
    ) -> Sequence[Completion]: ...


class HarnessLM(TemplateLM):
    """A model of the family as lm-eval sees one.

    Attributes:
      cut: how many requests had to be cut, by what was done to them.
      progress: called as progress(done, total, what) after each part of the work.
    """

    def __init__(
        self,
        engine: Engine,
        batch: int = 8,
        progress: Callable[[int, int, str], None] | None = None,
        seed: int = 0,
        kept: Kept | None = None,
        fit: Callable[[int, int], int] | None = None,
    ) -> None:
        """
        Args:
          engine: with a tokenizer.
          batch: rows of one call, as the engine was told.
          progress: see above.
          seed: of sampled replies whose task names none.
          kept: answers of earlier starts, which are taken as they are; new ones are added part by part.
          fit: rows of one call, in the place of `batch`, from the length of the longest row and how many of its tokens have
            logits; asked anew for each kind of request of each task.

        Raises:
          UserError: the model has no tokenizer.
        """
        super().__init__()
        if engine.tokenizer is None:
            raise UserError(
                f"{engine.config.name} came without a tokenizer, and benchmarks are text; put its tokenizer.json beside "
                "the weights"
            )
        self.engine, self.codec, self.config = engine, engine.tokenizer, engine.config
        self.cut: collections.Counter[str] = collections.Counter()
        self.progress, self._seed, self._chunk = progress, seed, CHUNK * batch
        self.kept, self._fit_rows = kept or Kept(), fit
        # A marker stands for a conversation in the strings that lm-eval hands around. Its number is drawn anew for every
        # object, so that no data file can hold one.
        self._secret = secrets.token_hex(16)
        self._marker = re.compile(f"\ue000{self._secret}:(\\d+)\ue001")
        self._chats: list[tuple[list[dict[str, str]], bool]] = []
        self._album = pictured.Album(self.config) if getattr(self.config, "vision", None) else None
        if self._album:
            self.MULTIMODAL = True  # lm-eval asks for it before it gives pictures

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The begin-of-text token, or the end token where the vocabulary has none."""
        return begin_id(self.codec)

    @property
    def max_length(self) -> int:
        return self.config.context

    @property
    def tokenizer_name(self) -> str:
        return f"{self.codec.kind}-{self.codec.fingerprint[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        """Token ids; the marker of a conversation becomes its template's ids, text around it stays text."""
        found = self._marker.search(string)
        if found is None:
            return self.codec.encode(string) if string else []
        before, after = string[: found.start()], string[found.end() :]
        return self.tok_encode(before) + self._chat_ids(int(found[1]), after)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        if self._marker.search(context):  # its last blank is a template's, and no word's
            head = self.tok_encode(context)
            rest = self.tok_encode(context + continuation)[len(head) :]
        else:
            head, rest = super()._encode_pair(context, continuation)
        if continuation and not rest:  # the tokenizer joined it with the end of the context
            rest = self.codec.encode(continuation)
        return head, rest

    # ------------------------------------------------------------------------------------------------ chat

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for the record: the template itself makes ids (`phi3_jax.data.chat`)."""
        return f"phi-3-{self.engine.template.name}, as token ids" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A marker that `tok_encode` turns into the control tokens of the conversation.

        Without `add_generation_prompt` the last message, the assistant's, is left open for the model to go on.

        Raises:
          UserError: see `chat.chat_ids`.
        """
        messages = [{"role": m["role"], "content": m["content"]} for m in chat_history]
        if "system" not in chat.ROLES[self.engine.template.name]:
            messages = without_system(messages)
        self._chats.append((messages, add_generation_prompt))
        self._chat_ids(len(self._chats) - 1, "")  # says at once what the tokenizer lacks
        return f"\ue000{self._secret}:{len(self._chats) - 1}\ue001"

    def readable(self, text: str) -> str:
        """`text` with the conversation in place of its marker, for records; not what the model reads."""
        return self._marker.sub(lambda m: json.dumps(self._chats[int(m[1])][0], ensure_ascii=False), text)

    def _chat_ids(self, number: int, after: str) -> Ids:
        messages, header = self._chats[number]
        if header and not after:
            return chat.chat_ids(self.codec, messages, self.engine.template.name)
        # Text after the header is the assistant's: encoded together with the template's newline, then left open.
        if header:
            messages = [*messages, {"role": "assistant", "content": after}]
        elif messages and messages[-1]["role"] == "assistant":
            messages = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"] + after}]
        else:
            raise UserError(
                "a chat without a generation prompt must end with the assistant's message, to be gone on with"
            )
        return _opened(self.codec, chat.chat_ids(self.codec, messages, self.engine.template.name, False))

    # ------------------------------------------------------------------------------------------------ scores

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Ids, Ids]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each continuation."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, "options")
        for request, (value, greedy) in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], (value, greedy))
        return scores

    def _fit(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """Both cut from the left to context + 1 tokens, of which the last is only predicted."""
        whole = context + continuation
        if len(whole) > self.max_length + 1:
            self.cut["prompts were longer than the context and lost their beginning"] += 1
            whole = whole[-(self.max_length + 1) :]
        split = max(1, len(whole) - len(continuation))
        return whole[:split], whole[split:]

    def _score(self, pairs: Sequence[tuple[Ids, Ids]], what: str) -> list[tuple[float, bool]]:
        if pairs:
            self._sized(max(MOST, *(len(a) + len(b) for a, b in pairs)), max(len(b) for _, b in pairs))
        out: list[Any] = [(0.0, True)] * len(pairs)  # an empty continuation is certain
        asked = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        done = 0
        for tokens, members in beginnings.shared([pairs[i] for i in asked], self.config):
            # Longest first, so that the first batch is the largest; requests of one context side by side.
            order = sorted(
                (asked[k] for k in members), key=lambda i: (-len(pairs[i][0]), pairs[i][0], -len(pairs[i][1]))
            )
            once = {"shared": tokens} if tokens else {}
            for part in self._parts(order, what, done, len(asked)):
                names = {i: self.kept.name("score", *pairs[i]) for i in part}
                old = {i: self.kept.get(names[i]) for i in part}
                # A part is asked for whole or not at all: a score's last digits depend on what is read beside it.
                new = part if any(answer is None for answer in old.values()) else []
                scores = self.engine.score([pairs[i] for i in new], **once) if new else []
                found = {i: [float(score.logprob), bool(score.greedy)] for i, score in zip(new, scores, strict=True)}
                self.kept.add({names[i]: answer for i, answer in found.items() if old[i] is None})
                for i in part:
                    value, greedy = old[i] or found[i]
                    out[i] = (value, greedy)
            done += len(order)
        return out

    def _sized(self, length: int, count: int) -> None:
        """Takes as many rows at a time as fit, where nobody said how many."""
        if self._fit_rows is not None:
            self.engine.batch = self._fit_rows(length, count)
            self._chunk = CHUNK * self.engine.batch

    def _parts(self, order: Sequence[int], what: str, before: int = 0, total: int = 0) -> Iterator[Sequence[int]]:
        """Parts of the work, reported as done after so many `before` of a total (default: they are all)."""
        for start in range(0, len(order), self._chunk):
            part = order[start : start + self._chunk]
            yield part
            if self.progress is not None:
                self.progress(before + start + len(part), total or len(order), what)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of whole texts: each token once, windows of the whole context, none shared by texts."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._score(pairs, "windows"), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------------------------------------ replies

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Replies, cut before the first of the task's `until` strings.

        Raises:
          UserError: generation settings that are unknown or out of range.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        out = [""] * len(requests)
        for members in groups.values():
            settings = generation_settings(requests[members[0]].args[1])
            room, prompts, pictures = self._prompts([requests[i] for i in members], settings["max_new_tokens"])
            self._sized(max(map(len, prompts)) + room, 1)
            for k, text in enumerate(self._replies(prompts, pictures, room, settings)):
                out[members[k]] = text
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _replies(
        self, prompts: Sequence[Ids], pictures: Sequence[Sequence[Picture]], room: int, settings: Mapping[str, Any]
    ) -> list[str]:
        """Replies of `room` tokens at most, those that are kept and the others."""
        texts: list[str] = [""] * len(prompts)
        groups = [(0, list(range(len(prompts))))]
        if not any(pictures):
            groups = beginnings.shared([(ids, (0,)) for ids in prompts], self.config)
        done, number = 0, 0  # parts so far
        for tokens, members in groups:
            order = sorted(members, key=lambda k: (-len(prompts[k]), prompts[k]))
            once: dict[str, Any] = {"shared": tokens} if tokens else {}
            for part in self._parts(order, "replies", done, len(prompts)):
                sampling = self._sampling(settings, number)
                number += 1
                # A sampled reply depends on its row, so a part is taken whole or answered whole.
                drawn = sampling.temperature > 0
                names = [
                    self.kept.name(
                        "reply",
                        prompts[k],
                        room,
                        settings,
                        [sampling.seed, row] if drawn else None,
                        *map(_digest, pictures[k]),
                    )
                    for row, k in enumerate(part)
                ]
                old = [self.kept.get(name) for name in names]
                new = [row for row, text in enumerate(old) if text is None]
                new = list(range(len(part))) if new and drawn else new
                asked = [prompts[part[row]] for row in new]
                seen = [pictures[part[row]] for row in new]
                more = once | ({"images": seen} if any(seen) else {})
                found = self.engine.generate(asked, room, sampling, stop=settings["until"], **more) if asked else []
                for row, completion in zip(new, found, strict=True):
                    old[row] = cut_at(completion.text, settings["until"])
                self.kept.add({names[row]: old[row] for row in new})
                for k, text in zip(part, old, strict=True):
                    texts[k] = text
            done += len(order)
        return texts

    def _prompts(self, requests: Sequence[Instance], new: int) -> tuple[int, list[Ids], list[list[Picture]]]:
        """(tokens of a reply, prompts cut from the left to leave room for it, and the pictures in them).

        Raises:
          UserError: a prompt with pictures that leaves no room, as pictures cannot be cut; see `_pictured`.
        """
        if new > self.max_length // 2:
            new = max(1, self.max_length // 2)
            self.cut[f"replies were limited to {new} tokens, half the context"] += len(requests)
        most, prompts, pictures = self.max_length - new, [], []
        for request in requests:
            shown = [one for one in (request.args[2].get("visual") or ()) if one] if len(request.args) > 2 else []
            ids, some = self._pictured(request.args[0], shown) if shown else (self.tok_encode(request.args[0]), [])
            if shown and len(ids) > most:
                raise UserError(
                    f"a prompt with {len(some)} pictures has {len(ids):,} tokens, and {most:,} fit beside the reply; "
                    "set fewer max_gen_toks (--gen_kwargs)"
                )
            self.cut["prompts were longer than the context and lost their beginning"] += len(ids) > most
            prompts.append((ids or [self.prefix_token_id])[-most:])
            pictures.append(some)
        return new, prompts, pictures

    def _pictured(self, text: str, shown: Sequence[Any]) -> tuple[Ids, list[Picture]]:
        """Ids of a text or conversation with `<image>` where the pictures stand, in their order: -k for picture k.

        Raises:
          UserError: a model without eyes, another number of pictures than of `<image>`, a reply that is begun.
        """
        if self._album is None:
            raise UserError(f"{self.config.name} reads no pictures; take a phi-3-vision")
        pictures = self._album.open(shown)
        counts, numbers = self._album.counts(pictures), itertools.count(1)

        def tagged(content: str) -> str:
            return re.sub(IMAGE, lambda _: f"<|image_{next(numbers)}|>", content)

        found = self._marker.search(text)
        if found is None:
            return pictured.text_ids(self.codec, tagged(text), counts), pictures
        messages, header = self._chats[int(found[1])]
        if found[0] != text or not header:
            raise UserError("a reply that is begun cannot follow pictures; leave the task's gen_prefix out")
        talk = [message | {"content": tagged(message["content"])} for message in messages]
        return chat.chat_ids(self.codec, talk, self.engine.template.name, pictures=counts), pictures

    def _sampling(self, settings: Mapping[str, Any], number: int) -> Any:
        from phi3_jax.inference.engine import Sampling

        seed = self._seed if settings["seed"] is None else settings["seed"]
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return Sampling(**{k: settings[k] for k in names}, seed=seed + number)


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's `generation_kwargs` in one form: until (list), max_new_tokens, temperature (0: greedy), top_k, ...

    As in lm-eval: `do_sample: false` is greedy whatever the temperature, and a temperature above 0 alone samples.

    Raises:
      UserError: a setting that no decoder here has.
    """
    given = {k: v for k, v in given.items() if not (k in _DEFAULTS and v == _DEFAULTS[k])}
    if unknown := sorted(set(given) - set(_NAMES)):
        raise UserError(f"generation_kwargs has {', '.join(unknown)}; valid: {', '.join(_NAMES)}")
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    new = next((given[k] for k in _LENGTHS if given.get(k) is not None), MAX_NEW)
    new = checks.integer(new, "max_gen_toks", 1)
    temperature = given.get("temperature")
    if given.get("do_sample") is False or (given.get("do_sample") is None and not temperature):
        temperature = 0.0
    out = {"until": [u for u in until if u], "max_new_tokens": new, "seed": given.get("seed")}
    out["temperature"] = 1.0 if temperature is None else temperature
    for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        out[name] = default if given.get(name) is None else given[name]  # `Sampling` checks them
    return out


def cut_at(text: str, until: Sequence[str]) -> str:
    """`text` before the first of the strings `until`."""
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


def _digest(picture: Picture) -> str:
    """Of what is seen, by which an answer is known again."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.rgb().tobytes()).hexdigest()


def begin_id(tokenizer: Any) -> int:
    """Id of the begin-of-text token (`<s>`, or bytes' own), or of the end token where there is none."""
    own = getattr(tokenizer, "bos_id", None)
    return tokenizer.special_tokens.get("<s>", tokenizer.eos_id) if own is None else own


def without_system(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Messages whose system text stands before the first user's text, for phi-3-medium, which has no such role."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system" and m["content"])
    rest = [dict(m) for m in messages if m["role"] != "system"]
    first = next((m for m in rest if m["role"] == "user"), None)
    if system and first is None:
        rest.insert(0, {"role": "user", "content": system})
    elif system and first is not None:
        first["content"] = f"{system}\n\n{first['content']}"
    return rest


def _opened(tokenizer: Any, ids: Ids) -> Ids:
    """A closed conversation without the end of its last turn."""
    end = tokenizer.special_tokens["<|end|>"]
    return ids[: len(ids) - 1 - ids[::-1].index(end)]
