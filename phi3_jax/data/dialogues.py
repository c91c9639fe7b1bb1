"""Rows of conversations, of prompts with completions and of preferences, as token ids and a mask of what bears loss.

A file holds rows of one kind, told by their keys:

| kind | keys | becomes |
| --- | --- | --- |
| conversation | messages | a conversation; loss on each answer of the assistant |
| | conversations (ShareGPT: from, value), or instruction, input, output (Alpaca) | the same |
| | text, rendered in the template of the model | the same, its control tokens read back into turns |
| completion | prompt, completion: both messages, or both text | loss on the completion alone |
| preference | prompt, chosen, rejected: all messages, or all text | two sequences with one prompt; loss on the answers |
| | chosen, rejected | the same; the prompt is what both begin with, in whole messages, or in token ids of text |

Rows may have pictures, for a phi-3-vision; `picture_rows` says how, and a text with pictures is a document, all of whose
text bears loss. Loss is on an answer, its `<|end|>`, and the `<|endoftext|>` that closes a conversation which ends with an
answer; never on headers, on what users or the system say, on pictures, or on padding. Masks alone decide: no id is compared
with that of padding. Plain text gets one `<|endoftext|>` at its end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from phi3_jax.data import chat, picture_rows, pictured
from phi3_jax.data.picture_rows import BadRow, Shelf
from phi3_jax.data.tokenizers import Tokenizer
from phi3_jax.errors import UserError

Message = Mapping[str, str]
KINDS: dict[tuple[str, ...], str] = {  # the keys of each kind, the longest first
    ("prompt", "chosen", "rejected"): "preference",
    ("chosen", "rejected"): "preference",
    ("prompt", "completion"): "completion",
    ("messages",): "conversation",
    ("conversations",): "conversation",
    ("instruction", "output"): "conversation",
    ("text",): "conversation",
    ("document",): "conversation",  # of `picture_rows`: text with pictures
}
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
EMPTY, EQUAL, LONG = "empty response", "responses equal in ids", "prompt not shorter than the window"


@dataclass(frozen=True)
class Example:
    """One sequence: `ids` (n,) int32, and `answer` (n,) bool, True for a token that is a target.

    Tokens of a picture are -k for the one that `pictures` names k-th.
    """

    ids: np.ndarray
    answer: np.ndarray
    pictures: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """What it takes of a window: each position reads a token and predicts the next."""
        return len(self.ids) - 1

    def cut(self, positions: int) -> Example:
        """Its beginning. An answer that is cut gets no end back; a picture that would be cut goes."""
        end = positions + 1
        while end and end < len(self.ids) and self.ids[end - 1] < 0:
            end -= 1
        return Example(self.ids[:end], self.answer[:end], self.pictures)

    @property
    def targets(self) -> int:
        """Tokens that bear loss; the first of a sequence has nothing before it that could predict it."""
        return int(self.answer[1:].sum())


Row = tuple[Example, ...]  # one of a conversation, two (chosen, rejected) of a preference
Examples = Callable[[], Iterator[tuple[str, Row]]]  # (place, row) of all rows, as often as asked


@dataclass
class Report:
    """What a reading met.

    Attributes:
      kind: of all rows, a value of `KINDS`.
      rows: read; dropped: left out, by reason; first: the first place of each reason.
      cut: sequences that were longer than their room.
      controls: rows whose text spells a control token, which stays text: a template was perhaps applied before.
      skipped: rows that are no such rows, by message, where asked to skip them.
    """

    kind: str = ""
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    controls: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """What a user should know, a line each."""
        out = []
        if self.dropped or self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in (self.dropped + self.skipped).most_common())
            out.append(f"{sum((self.dropped + self.skipped).values())} of {self.rows} rows were left out: {reasons}")
        if self.cut:
            out.append(f"{self.cut} sequences were cut to fit the window; they have no end token")
        if self.controls:
            out.append(
                f"{self.controls} of {self.rows} rows spell a control token such as <|end|> in their text, where it stays "
                "text; give messages, not rendered templates"
            )
        return out


def read(
    rows: Callable[[], Iterable[tuple[str, Any]]],
    tokenizer: Tokenizer,
    template: str,
    *,
    last_answer: bool = False,
    on_error: str = "stop",
    shelf: Shelf | None = None,
) -> tuple[Report, Examples]:
    """Checks all rows, and gives a function that makes their examples, as often as asked.

    Args:
      rows: gives (place, row) of each, place as file:line, anew at each call.
      tokenizer: the model's own, with the template's control tokens.
      template: a name in `chat.ROLES`.
      last_answer: loss on the last answer of a conversation only.
      on_error: "skip" leaves out and counts rows that are wrong.
      shelf: of the rows' pictures; None: they may have none. Rows of pictures that turn out `damaged` there are left out.

    Raises:
      UserError: rows of several kinds, no rows at all, or rows that are wrong: names the first and how many there are.
    """
    missing = [token for token in ("<|user|>", "<|assistant|>", "<|end|>") if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(
            f"this {tokenizer.kind} tokenizer has no {', '.join(missing)}; post-training needs the tokenizer of the family"
        )
    reading = _Reading(tokenizer, template, last_answer, shelf)
    report, wrong = reading.checked(rows(), on_error)
    return report, lambda: reading.examples((row for row in rows() if row[0] not in wrong), report)


@dataclass(frozen=True)
class _Reading:
    """How rows become examples; the attributes are arguments of `read`."""

    tokenizer: Tokenizer
    template: str
    last_answer: bool
    shelf: Shelf | None

    def parse(self, place: str, row: Any) -> tuple[tuple[str, ...], _Turns, tuple[str, ...]]:
        """(keys, turns, names of the pictures) of a row."""
        row, pictures = picture_rows.numbered(row)
        if pictures and (self.shelf is None or self.template != "vision"):
            raise BadRow(
                "it has pictures, which a text model does not read: start from a phi-3-vision"
                if self.template != "vision"
                else "it has pictures; say with images=FOLDER where they lie"
            )
        found = _keys(row)
        turns = _parse(row, found, self.template)
        if self.template == "vision":
            picture_rows.require_tags(turns.texts(), len(pictures))
        names = tuple(self.shelf.add(picture, place) for picture in pictures) if self.shelf else ()
        return found, turns, names

    def checked(self, rows: Iterable[tuple[str, Any]], on_error: str) -> tuple[Report, set[str]]:
        """What the rows are, and the places of those that are wrong."""
        report, keys, first, count = Report(), None, "", 0
        wrong: set[str] = set()
        for place, row in rows:
            report.rows += 1
            try:
                found, parsed, _ = self.parse(place, row)
                if keys is not None and found != keys:
                    raise BadRow(f"it has the keys {', '.join(found)} where the rows before have {', '.join(keys)}")
                keys = found
                spelt = {text for texts in parsed.texts() for text in texts}
                report.controls += any(control in text for text in spelt for control in self.tokenizer.special_tokens)
            except BadRow as error:
                count += 1
                wrong.add(place)
                first = first or f"{place}: {error}"
                report.skipped[re.sub(r"'.*?'|\d+", "..", str(error))[:60]] += 1
        if count and on_error != "skip":
            more = f" ({count} of {report.rows} rows are wrong)" if count > 1 else ""
            raise UserError(f"{first}{more}; mend the file, or leave such rows out with --config.data.on_error=skip")
        if keys is None:
            raise UserError(f"no rows of {_forms()}" if not count else f"{first}; no row is right")
        report.kind = KINDS[keys]
        return report, wrong

    def examples(self, rows: Iterable[tuple[str, Any]], report: Report) -> Iterator[tuple[str, Row]]:
        """(place, examples) of rows that are right; those without any are counted in the report."""
        for place, row in rows:
            _, turns, names = self.parse(place, row)
            if self.shelf and any(name in self.shelf.damaged for name in names):
                report.skipped["of damaged pictures"] += 1
                continue
            counts = self.shelf.counts(names) if self.shelf else []
            made = tuple(
                replace(example, pictures=names)
                for example in _examples(turns, self.tokenizer, self.template, self.last_answer, counts)
            )
            if any(example.targets == 0 for example in made):
                report.dropped[EMPTY] += 1
            elif len(made) == 2 and np.array_equal(made[0].ids, made[1].ids):
                report.dropped[EQUAL] += 1
            else:
                yield place, made


def _forms() -> str:
    return "; or ".join(", ".join(keys) for keys in KINDS)


def _keys(row: Any) -> tuple[str, ...]:
    if not isinstance(row, Mapping):
        raise BadRow("it is no JSON object in UTF-8")
    for keys in KINDS:
        if all(row.get(key) is not None for key in keys):
            return keys
    import difflib  # not at the top: `data --help` imports this file

    valid = {key for keys in KINDS for key in keys}
    near = [close[0] for key in row if (close := difflib.get_close_matches(str(key), valid, 1))]
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise BadRow(f"it has the keys {', '.join(map(repr, row)) or 'none'}{meant}; a row has {_forms()}")


# ------------------------------------------------------------------------------------------------ rows to turns


@dataclass(frozen=True)
class _Turns:
    """A prompt and the responses to it, all as messages or all as text; with no prompt, `responses` is all there is."""

    prompt: Sequence[Message] | str
    responses: tuple[Sequence[Message] | str, ...]

    def texts(self) -> list[list[str]]:
        """For each response the texts of the prompt and of it."""
        return [[text for part in (self.prompt, response) for text in _texts(part)] for response in self.responses]


def _texts(part: Sequence[Message] | str) -> list[str]:
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def _parse(row: Mapping[str, Any], keys: tuple[str, ...], template: str) -> _Turns:
    """Raises BadRow for what is no row of these keys."""
    if keys == ("messages",):
        return _Turns((), (_messages(row["messages"], "messages", template),))
    if keys == ("conversations",):
        talk = _list(row["conversations"], "conversations")
        return _Turns((), (_messages([_sharegpt(turn) for turn in talk], "conversations", template),))
    if keys == ("instruction", "output"):
        asked, extra = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
        talk = [
            _turn("user", f"{asked}\n\n{extra}" if extra else asked),
            _turn("assistant", _text(row["output"], "output")),
        ]
        return _Turns((), (talk,))
    if keys == ("text",):
        return _Turns((), (_messages(_rendered(_text(row["text"], "text")), "text", template),))
    if keys == ("document",):
        return _Turns("", (_text(row["document"], "document"),))
    parts = {key: row[key] for key in keys}
    if len({isinstance(part, str) for part in parts.values()}) > 1:
        forms = ", ".join(f"{key} is {'text' if isinstance(part, str) else 'messages'}" for key, part in parts.items())
        raise BadRow(f"{forms}; give all as text or all as messages")
    if isinstance(parts[keys[0]], str):
        return _Turns(parts.pop("prompt", ""), tuple(parts.values()))
    talks = {key: _messages(part, key, template, whole=key == "prompt") for key, part in parts.items()}
    if "prompt" in talks:
        return _Turns(talks.pop("prompt"), tuple(talks.values()))
    chosen, rejected = talks.values()
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, talks.values()))
    )
    while common and chosen[common - 1]["role"] == "assistant":  # equal answers are answers all the same
        common -= 1
    if not common:
        raise BadRow("chosen and rejected have no common prompt; both must begin with the same messages")
    return _Turns(chosen[:common], (chosen[common:], rejected[common:]))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type(value).__name__}, not text")
    return value


def _list(value: Any, key: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise BadRow(f"{key} is {'an empty list' if value == [] else type(value).__name__}, not a list of messages")
    return value


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _sharegpt(turn: Any) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise BadRow(f"a turn of conversations is {turn!r:.60}; it has from and value, both text")
    if turn.get("from") not in _SHAREGPT:
        raise BadRow(f"unknown role {turn.get('from')!r} in conversations; valid: {', '.join(_SHAREGPT)}")
    return _turn(_SHAREGPT[turn["from"]], turn["value"])


def _messages(value: Any, key: str, template: str, whole: bool = False) -> Sequence[Message]:
    """Messages with roles that the template has. `whole`: they may end with the user's turn."""
    talk = _list(value, key)
    for message in talk:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"a message of {key} is {message!r:.60}; it has role and content, both text")
        if message["role"] not in chat.ROLES[template]:
            raise BadRow(
                f"role {message['role']!r} in {key}; the template of phi-3-{template} has {', '.join(chat.ROLES[template])}"
            )
    if not whole and not any(message["role"] == "assistant" for message in talk):
        raise BadRow(f"{key} has no turn of the assistant, so nothing to learn from")
    return [_turn(message["role"], message["content"]) for message in talk]


def _rendered(text: str) -> list[Message]:
    """The messages of a rendered template."""
    found = re.findall(r"<\|(system|user|assistant)\|>\s*(.*?)\s*<\|end\|>", text, re.DOTALL)
    rest = re.sub(r"<\|(system|user|assistant)\|>\s*(.*?)\s*<\|end\|>", "", text, flags=re.DOTALL)
    if not found or re.sub(r"<\|endoftext\|>|<s>|</s>", "", rest).strip():
        raise BadRow("its text is no conversation rendered in the template of phi-3 (<|user|> .. <|end|>)")
    return [_turn(role, content) for role, content in found]


# ------------------------------------------------------------------------------------------------ turns to ids


def _examples(
    turns: _Turns, tokenizer: Tokenizer, template: str, last_answer: bool, pictures: Sequence[int] = ()
) -> Row:
    if isinstance(turns.prompt, str):
        return _plain(turns.prompt, turns.responses, tokenizer, pictures)
    made = []
    for response in turns.responses:
        talk = [*turns.prompt, *response]
        answers = [i for i, message in enumerate(talk) if message["role"] == "assistant" and i >= len(turns.prompt)]
        bears = answers[-1:] if last_answer else answers
        ids, answer = chat.masked_ids(tokenizer, talk, template, bears, pictures)
        empty = all(not talk[i]["content"].strip() for i in bears)
        made.append(Example(ids, answer & (not empty)))
    return tuple(made)


def _plain(prompt: str, responses: Sequence[Any], tokenizer: Tokenizer, pictures: Sequence[int] = ()) -> Row:
    """Text as it stands; of a text with pictures neither these nor the `<s>` before each piece of it bear loss."""
    end, silent = tokenizer.special_tokens[chat.END], pictured.begin_of(tokenizer) if pictures else -1

    def encode(text: str) -> list[int]:
        return pictured.text_ids(tokenizer, text, pictures) if pictures else tokenizer.encode(text)

    whole = [np.array([*encode(prompt + response), end], np.int32) for response in responses]
    if prompt:
        shared = [chat.common(encode(prompt), ids) for ids in whole]
    else:
        shared = [chat.common(*whole)] * len(whole) if len(whole) == 2 else [0]
    return tuple(
        Example(ids, (np.arange(len(ids)) >= start) & bool(response.strip()) & (ids >= 0) & (ids != silent))
        for ids, start, response in zip(whole, shared, responses, strict=True)
    )
